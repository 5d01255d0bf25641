package keyring

import (
	"bytes"
	"crypto/ecdh"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Each error of the package, as a user meets it: it names the key and says what to do.
func TestEveryErrorSaysWhatToDo(t *testing.T) {
	met := map[error]bool{}
	for _, test := range []struct {
		name string
		want error
		says string
		make func(f *fixture) error
	}{
		{"a bad name", ErrInvalid, "use 1 to 64 letters", func(f *fixture) error {
			_, err := f.Get(t.Context(), "prod/x")
			return err
		}},
		{"an unknown algorithm", ErrInvalid, "take one of rsa-2048, ", func(f *fixture) error {
			_, err := f.Begin(t.Context(), "new", GenerateRequest{Device: "one", Algorithm: "rsa"})
			return err
		}},
		{"an unknown device", ErrNoDevice, "configure it first", func(f *fixture) error {
			_, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "three", Label: "ec"})
			return err
		}},
		{"an unknown label", hsm.ErrNotFound, "list the keys of the device", func(f *fixture) error {
			_, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "one", Label: "nobody"})
			return err
		}},
		{"a label of two keys", hsm.ErrAmbiguous, "name one by its id as well", func(f *fixture) error {
			f.one.AddEC(t, "ec", "77", ecdh.P256())
			_, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "one", Label: "ec"})
			return err
		}},
		{"an unknown key", ErrKeyNotFound, "make or adopt it first", func(f *fixture) error {
			_, err := f.Get(t.Context(), "new")
			return err
		}},
		{"a taken name", ErrKeyExists, "rotate it", func(f *fixture) error {
			_, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "two", Label: "ec"})
			return err
		}},
		{"an old version", ErrVersionTooOld, "lower that, then rewrap", func(f *fixture) error {
			raw := f.wrap("x")
			if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "ec"}}); err != nil {
				t.Fatal(err)
			}
			f.configure(Settings{MinDecryptionVersion: ptr(2)})
			_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
			return err
		}},
		{"a version from elsewhere", ErrVersionUnknown, "restore the key record that has it", func(f *fixture) error {
			backup := f.backup()
			if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "ec"}}); err != nil {
				t.Fatal(err)
			}
			raw := f.wrap("x")
			f.lose()
			f.restore(backup)
			_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
			return err
		}},
		{"a record that nobody read", ErrNotReady, "read keys/prod/backup and keep it", func(f *fixture) error {
			return f.Ready(t.Context(), "prod", PurposeEncrypt)
		}},
		{"a single HSM", ErrNotReady, "set backup_confirmed=true", func(f *fixture) error {
			f.backup()
			return f.Ready(t.Context(), "prod", PurposeCluster)
		}},
		{"a key that is being made", ErrGenerating, "wait until it is ready, or abandon it", func(f *fixture) error {
			if _, err := f.Begin(t.Context(), "new", generateRequest()); err != nil {
				t.Fatal(err)
			}
			_, err := f.Wrap(t.Context(), "new", envelope.UseWrap, nil, nil)
			return err
		}},
		{"a key that is being deleted", ErrDeleting, "delete it once more", func(f *fixture) error {
			f.lose()
			f.generate()
			f.configure(Settings{DeletionAllowed: ptr(true)})
			f.one.SetError(hsm.ErrUnavailable)
			if err := f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true}); !errors.Is(err, hsm.ErrUnavailable) {
				t.Fatal(err)
			}
			_, err := f.Wrap(t.Context(), "prod", envelope.UseWrap, nil, nil)
			return err
		}},
		{"a weak key", ErrWeakKey, "accept_weak_key=true", func(f *fixture) error {
			f.one.SetTraits("02", hsm.Traits{Extractable: true})
			_, err := f.Adopt(t.Context(), "new", AdoptRequest{Device: "one", Label: "rsa"})
			return err
		}},
		{"a key of another kind", ErrUnusableKey, "choose another key", func(f *fixture) error {
			f.one.SetHashes()
			_, err := f.Adopt(t.Context(), "new", AdoptRequest{Device: "one", Label: "rsa"})
			return err
		}},
		{"the same HSM key twice", ErrSameKey, "name another one", func(f *fixture) error {
			_, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "one", Label: "ec"})
			return err
		}},
		{"an HSM key that was adopted", ErrNotOurs, "pkcs11-tool --delete-object --type privkey --id 01", func(f *fixture) error {
			f.configure(Settings{DeletionAllowed: ptr(true)})
			return f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true})
		}},
		{"an HSM key that served encrypt/", ErrInUse, "delete the wrapping key without its HSM keys", func(f *fixture) error {
			f.configure(Settings{DeletionAllowed: ptr(true), AcceptSingleHSM: ptr(true)})
			f.backup()
			if _, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, nil, nil); err != nil {
				t.Fatal(err)
			}
			return f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true})
		}},
		{"a deletion that nobody allowed", ErrDeletionNotAllowed, "set deletion_allowed=true first", func(f *fixture) error {
			return f.Delete(t.Context(), "prod", DeleteRequest{})
		}},
		{"a request id that was used", ErrRequestReused, "with another request id", func(f *fixture) error {
			request := generateRequest()
			request.RequestID = "r"
			if _, err := f.Begin(t.Context(), "new", request); err != nil {
				t.Fatal(err)
			}
			request.Algorithm = hsm.RSA2048
			_, err := f.Begin(t.Context(), "new", request)
			return err
		}},
		{"a damaged record", ErrRecordMalformed, "restore", func(f *fixture) error {
			if _, err := f.store.Put(t.Context(), "keys/new", []byte("{"), store.NoRevision); err != nil {
				t.Fatal(err)
			}
			_, err := f.Get(t.Context(), "new")
			return err
		}},
		{"a key record that is not the confirmed one", ErrRecordMismatch, "do not restore it if they differ", func(f *fixture) error {
			backup := f.backup()
			_, err := f.Restore(t.Context(), "new", RestoreRequest{Record: backup.Record, SHA256: strings.Repeat("0", 64)})
			return err
		}},
		{"too many versions", ErrTooLarge, "make another wrapping key", func(f *fixture) error {
			_, err := f.update(t.Context(), "prod", func(r *record) error {
				r.CreatedBy = strings.Repeat("x", store.MaxValueSize-4<<10)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			request := generateRequest()
			_, err = f.Rotate(t.Context(), "prod", RotateRequest{Generate: &request})
			if f.one.Generations() != 0 {
				t.Error("an HSM key was made for which there is no room")
			}
			return err
		}},
		{"a foreign envelope", envelope.ErrMalformed, "send the whole envelope", func(f *fixture) error {
			_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, []byte("vault:v1:abc"), nil)
			return err
		}},
		{"another context", envelope.ErrContext, "with the context that it was made with", func(f *fixture) error {
			_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, f.wrap("x"), nil)
			return err
		}},
		{"another HSM", hsm.ErrNotFound, "attach the right HSM", func(f *fixture) error {
			raw := f.wrap("x")
			keys, _ := f.one.FindKeys(t.Context(), hsm.KeyQuery{Label: "ec"})
			if err := f.one.DeleteKey(t.Context(), keys[0].Ref()); err != nil {
				t.Fatal(err)
			}
			_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
			return err
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			f.adopt()
			err := test.make(f)
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if !strings.Contains(err.Error(), test.says) {
				t.Errorf("%q does not say %q", err, test.says)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q has more than one line", err)
			}
		})
		met[test.want] = true
	}
	for _, own := range []error{
		ErrInvalid, ErrKeyNotFound, ErrKeyExists, ErrVersionTooOld, ErrVersionUnknown, ErrNotReady, ErrGenerating, ErrDeleting,
		ErrWeakKey, ErrUnusableKey, ErrSameKey, ErrInUse, ErrNoDevice, ErrDeletionNotAllowed, ErrRequestReused, ErrRecordMalformed,
		ErrRecordMismatch, ErrTooLarge,
	} {
		if !met[own] {
			t.Errorf("%q is not in the table", own)
		}
	}
}

// What is logged, and what an error or a description prints as, holds neither payload nor authentication key.
func TestNothingSecretIsLogged(t *testing.T) {
	f := newFixture(t)
	var log bytes.Buffer
	f.Keyring = New(Config{
		Records: f.store, Devices: f.devices, Now: f.clock.Now,
		Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	f.adopt()
	f.addTwo()
	f.backup()
	request := generateRequest()
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: &request}); err != nil {
		t.Fatal(err)
	}
	f.finish()
	raw := f.wrap("the unseal key")
	f.configure(Settings{AcceptSingleHSM: ptr(true), DeletionAllowed: ptr(true)})
	f.one.SetError(hsm.ErrUnavailable)
	_, failure := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
	rec, _, err := f.load(t.Context(), "prod")
	if err != nil || failure == nil {
		t.Fatal(err, failure)
	}
	f.one.SetError(nil)
	if err := f.Delete(t.Context(), "prod", DeleteRequest{}); err != nil {
		t.Fatal(err)
	}
	printed := log.String() + failure.Error()
	for _, event := range []string{"adopted", "recipient added", "key record read", "HSM key made", "configured", "deleted"} {
		if !strings.Contains(printed, event) {
			t.Errorf("%q is not logged", event)
		}
	}
	secrets := []string{"the unseal key", base64.StdEncoding.EncodeToString([]byte("the unseal key"))}
	for _, v := range rec.Versions {
		secrets = append(secrets, string(v.AuthKey), hex.EncodeToString(v.AuthKey), base64.StdEncoding.EncodeToString(v.AuthKey))
	}
	for _, secret := range secrets {
		if strings.Contains(printed, secret) {
			t.Errorf("a secret is logged:\n%s", printed)
		}
	}
}

func TestTimesAreWholeSecondsInUTC(t *testing.T) {
	f := newFixture(t)
	f.clock.now = time.Date(2026, 3, 1, 3, 0, 0, 123456789, time.FixedZone("CET", 3600))
	if got := f.adopt().Created.Format(time.RFC3339Nano); got != "2026-03-01T02:00:00Z" {
		t.Errorf("created %s", got)
	}
}
