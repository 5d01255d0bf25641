package kmsplugin

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
)

func TestSealingIsSoftwareAndOpeningOneOperation(t *testing.T) {
	f := newFixture(t)
	id := f.wrapper()
	begun := f.token.Operations()
	var blob *pb.BlobInfo
	for range 10 {
		var err error
		if blob, err = f.encrypt(id, "a root key", "aad"); err != nil {
			t.Fatal(err)
		}
	}
	if spent := f.token.Operations() - begun; spent != 0 {
		t.Errorf("sealing cost %d operations of the HSM", spent)
	}
	if got, err := f.decrypt(id, blob, "aad"); err != nil || got != "a root key" {
		t.Errorf("Decrypt: %q, %v", got, err)
	}
	if spent := f.token.Operations() - begun; spent != 1 {
		t.Errorf("opening cost %d operations of the HSM, want 1", spent)
	}
	for _, aad := range []string{"", "another"} {
		_, err := f.decrypt(id, blob, aad)
		wantCode(t, err, codes.InvalidArgument, "made for something else")
	}
	if spent := f.token.Operations() - begun; spent != 1 {
		t.Error("what cannot open cost an operation")
	}
}

func TestWhatASealIsShownAs(t *testing.T) {
	f := newFixture(t)
	made, err := f.configure(f.settings())
	if err != nil {
		t.Fatal(err)
	}
	shown := made.GetWrapperConfig().GetMetadata()
	if shown["key_id"] != "prod/v1" || shown["devices"] != "rack" || len(shown["key_record_sha256"]) != 64 {
		t.Errorf("it is shown as %v", shown)
	}
	if strings.Contains(fmt.Sprint(shown), "password") {
		t.Errorf("more is shown than a person needs: %v", shown)
	}
}

func TestEnvelopesOfOtherUsesDoNotOpen(t *testing.T) {
	f := newFixture(t)
	id := f.wrapper()
	begun := f.token.Operations()
	for _, use := range []envelope.Use{envelope.UseWrap, envelope.UseTransit} {
		_, err := f.decrypt(id, f.sealedFor(use), "aad")
		wantCode(t, err, codes.InvalidArgument, `use is "`+string(use)+`", not "seal"`)
	}
	if f.token.Operations() != begun {
		t.Error("the HSM was asked")
	}
}

func TestACiphertextThatSomebodyElseMadeDoesNotOpen(t *testing.T) {
	f := newFixture(t)
	id := f.wrapper()
	key, err := f.keys.Get(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	recipient := key.Versions[0].Recipients[0] // public keys are public
	forged, err := envelope.Seal(envelope.Context{Use: envelope.UseSeal, Key: "prod", Version: 1},
		[]envelope.Recipient{{KID: recipient.KID, Algorithm: recipient.Algorithm, Public: recipient.Public}}, envelope.NewAuthKey(),
		[]byte("another root key"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.decrypt(id, &pb.BlobInfo{Ciphertext: forged}, "")
	wantCode(t, err, codes.InvalidArgument, "not authentic")
}

func TestInitProvesThatWhatIsSealedCanBeOpened(t *testing.T) {
	f := newFixture(t)
	id := f.wrapper()
	begun := f.token.Operations()
	if _, err := f.Init(t.Context(), &pb.InitRequest{WrapperId: id}); err != nil {
		t.Fatal(err)
	}
	if f.token.Operations() == begun {
		t.Error("it asked no HSM")
	}
	f.token.SetError(hsm.ErrUnavailable)
	_, err := f.Init(t.Context(), &pb.InitRequest{WrapperId: id})
	wantCode(t, err, codes.Unavailable, "proving that what is sealed can be opened")
}

func TestARecordMayBeTakenWhileTheHSMIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		settings := f.settings()
		f.token.SetError(hsm.ErrUnavailable)
		made, err := f.configure(settings)
		if err != nil {
			t.Fatalf("OpenBao would end: %v", err)
		}
		id := made.GetWrapperId()
		if key, err := f.KeyId(t.Context(), &pb.KeyIdRequest{WrapperId: id}); err != nil || key.GetKeyId() != "prod/v1" {
			t.Errorf("KeyId: %v, %v", key, err)
		}
		_, err = f.encrypt(id, "x", "")
		wantCode(t, err, codes.Unavailable, "opening the authentication key")
		<-time.After(10 * time.Minute)
		if said := strings.Count(f.log.String(), "the HSM cannot open the seal now"); said != 1 {
			t.Errorf("the same trouble was said %d times in ten minutes", said)
		}
		f.token.SetError(nil)
		<-time.After(longestPause)
		synctest.Wait()
		if !strings.Contains(f.log.String(), "seal ready") {
			t.Error("the background did not go on")
		}
		begun := f.token.Operations()
		if _, err := f.encrypt(id, "x", ""); err != nil {
			t.Error(err)
		}
		if f.token.Operations() != begun {
			t.Error("sealing asked the HSM although the background had opened the authentication key")
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestACallHasAnEndAlthoughOpenBaoSetsNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		id := f.wrapper()
		blob, err := f.encrypt(id, "x", "")
		if err != nil {
			t.Fatal(err)
		}
		f.token.Delay(24 * time.Hour)
		begun := time.Now()
		_, err = f.decrypt(id, blob, "")
		wantCode(t, err, codes.Unavailable, "")
		if took := time.Since(begun); took != callLimit {
			t.Errorf("it took %s", took)
		}

		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = f.Decrypt(short, &pb.DecryptRequest{WrapperId: id, Ciphertext: blob})
		wantCode(t, err, codes.DeadlineExceeded, "")
		gone, leave := context.WithCancel(t.Context())
		leave()
		_, err = f.Decrypt(gone, &pb.DecryptRequest{WrapperId: id, Ciphertext: blob})
		wantCode(t, err, codes.Canceled, "")

		// Finalize does not wait for what hangs.
		failed := make(chan error)
		go func() {
			_, err := f.decrypt(id, blob, "")
			failed <- err
		}()
		synctest.Wait()
		begun = time.Now()
		if _, err := f.Finalize(t.Context(), &pb.FinalizeRequest{WrapperId: id}); err != nil {
			t.Errorf("Finalize: %v", err)
		}
		wantCode(t, <-failed, codes.Unavailable, "finalized")
		if took := time.Since(begun); took > time.Second {
			t.Errorf("Finalize took %s", took)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestTheSameTroubleIsSaidAgainWhenItComesAgain(t *testing.T) {
	f := newFixture(t)
	id := f.wrapper()
	blob, err := f.encrypt(id, "x", "")
	if err != nil {
		t.Fatal(err)
	}
	for outage := range 2 {
		f.token.SetError(hsm.ErrUnavailable)
		_, err := f.decrypt(id, blob, "")
		wantCode(t, err, codes.Unavailable, "")
		if said := strings.Count(f.log.String(), "a call failed"); said != outage+1 {
			t.Errorf("in outage %d it was said %d times in all", outage+1, said)
		}
		f.token.SetError(nil)
		if _, err := f.decrypt(id, blob, ""); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCallsWithoutAWrapper(t *testing.T) {
	f := newFixture(t)
	ended := f.wrapper()
	if _, err := f.Finalize(t.Context(), &pb.FinalizeRequest{WrapperId: ended}); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"", "1", ended} {
		for name, call := range map[string]func(context.Context) error{
			"Type": func(ctx context.Context) error {
				_, err := f.Type(ctx, &pb.TypeRequest{WrapperId: id})
				return err
			},
			"KeyId": func(ctx context.Context) error {
				_, err := f.KeyId(ctx, &pb.KeyIdRequest{WrapperId: id})
				return err
			},
			"Encrypt": func(ctx context.Context) error {
				_, err := f.Encrypt(ctx, &pb.EncryptRequest{WrapperId: id})
				return err
			},
			"Decrypt": func(ctx context.Context) error {
				_, err := f.Decrypt(ctx, &pb.DecryptRequest{WrapperId: id})
				return err
			},
			"Init": func(ctx context.Context) error {
				_, err := f.Init(ctx, &pb.InitRequest{WrapperId: id})
				return err
			},
			"Finalize": func(ctx context.Context) error {
				_, err := f.Finalize(ctx, &pb.FinalizeRequest{WrapperId: id})
				return err
			},
		} {
			wantCode(t, call(t.Context()), codes.NotFound, "no wrapper of that id")
			if t.Failed() {
				t.Fatalf("%s with the id %q", name, id)
			}
		}
	}
	_, err := f.configure(nil)
	wantCode(t, err, codes.InvalidArgument, `"key" is missing`)
	_, err = f.SetConfig(t.Context(), &pb.SetConfigRequest{})
	wantCode(t, err, codes.InvalidArgument, `"key" is missing`)
}

func TestWrappersThatOpenBaoForgotAreEnded(t *testing.T) {
	f := newFixture(t)
	settings, used := f.settings(), f.wrapper()
	forgotten := f.wrapper()
	for range 3 * maxSeals {
		made, err := f.configure(settings)
		if err != nil {
			t.Fatal(err)
		}
		if w, err := f.find(made.GetWrapperId()); err == nil {
			w.running.Wait()
		}
		if _, err := f.Type(t.Context(), &pb.TypeRequest{WrapperId: used}); err != nil {
			t.Fatalf("a wrapper in use was ended: %v", err)
		}
	}
	_, err := f.encrypt(forgotten, "x", "")
	wantCode(t, err, codes.NotFound, "")
	if kept, held := len(f.seals), f.held(); kept != maxSeals || held != maxSeals {
		t.Errorf("%d wrappers are kept and %d devices, want %d", kept, held, maxSeals)
	}
	if _, err := f.Finalize(t.Context(), &pb.FinalizeRequest{WrapperId: used}); err != nil || f.held() != maxSeals-1 {
		t.Errorf("%d devices are kept after Finalize, %v", f.held(), err)
	}
	if err := f.Close(); err != nil || f.held() != 0 {
		t.Errorf("%d devices are kept at the end, %v", f.held(), err)
	}
}

func TestAServerThatEndsMakesNoWrapper(t *testing.T) {
	f := newFixture(t)
	id := f.wrapper()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := f.configure(f.settings())
	wantCode(t, err, codes.Unavailable, "being finalized")
	_, err = f.encrypt(id, "x", "")
	wantCode(t, err, codes.NotFound, "")
}

func TestTheRecordIsTakenOnlyAsItWasConfirmed(t *testing.T) {
	f := newFixture(t)
	pipe := f.dir + "/pipe"
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	loose := f.put("loose", "{}")
	if err := os.Chmod(loose, 0o622); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		setting, value string
		says           string
	}{
		"another hash":                    {"key_record_sha256", sum, "its SHA-256 is"},
		"no JSON":                         {"key_record_file", f.put("text", "hello"), "malformed key record"},
		"a pipe that nobody writes":       {"key_record_file", pipe, "is not a regular file"},
		"a folder":                        {"key_record_file", f.dir, "is not a regular file"},
		"a file that others may write":    {"key_record_file", loose, "chmod go-w"},
		"a file that is far too large":    {"key_record_file", f.put("large", strings.Repeat(" ", maxRecord+1)), "is larger than"},
		"another name than the record's":  {"key", "other", `it is the record of key "prod"`},
		"a name that no key has":          {"key", "../x", "name"},
		"a device that is not in it":      {"device", "stick", `it has "rack"`},
		"certificates that are none":      {"ca_cert_file", f.put("ca", "hello"), "holds no certificate"},
		"certificates that are not there": {"ca_cert_file", "/nowhere", "no such file"},
		"a node that is no URL":           {"urls", "nethsm", "is not a URL"},
		"a file beyond the secrets":       {"password_file", "/etc/passwd", "does not lie under"},
		"no nitroseal.hcl":                {"config", "/nowhere.hcl", "describes a device"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := f.configure(f.settings(test.setting, test.value))
			wantCode(t, err, codes.InvalidArgument, test.says)
		})
	}
	t.Run("one HSM, and nobody's word that this will do", func(t *testing.T) {
		_, err := f.configure(f.settings("accept_single_hsm", ""))
		wantCode(t, err, codes.FailedPrecondition, `write accept_single_hsm = "true" into the seal stanza`)
		f.wrapper("accept_single_hsm", "", "backup_confirmed", "true")
	})
}

func TestAfterARotationTheNewRecordOpensOldAndNew(t *testing.T) {
	f := newFixture(t)
	before := f.wrapper()
	old, err := f.encrypt(before, "old", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.keys.Rotate(t.Context(), "prod", keyring.RotateRequest{
		Adopt: &keyring.AdoptRequest{Device: "rack", Label: "seal-2", By: "test"},
	}); err != nil {
		t.Fatal(err)
	}
	after := f.wrapper()
	if key, err := f.KeyId(t.Context(), &pb.KeyIdRequest{WrapperId: after}); err != nil || key.GetKeyId() != "prod/v2" {
		t.Errorf("KeyId: %v, %v", key, err)
	}
	blob, err := f.encrypt(after, "new", "")
	if err != nil || blob.GetKeyInfo().GetKeyId() != "prod/v2" {
		t.Fatalf("Encrypt: %v, %v", blob.GetKeyInfo(), err)
	}
	for want, sealed := range map[string]*pb.BlobInfo{"old": old, "new": blob} {
		if got, err := f.decrypt(after, sealed, ""); err != nil || got != want {
			t.Errorf("Decrypt of the %s one: %q, %v", want, got, err)
		}
	}
	_, err = f.decrypt(before, blob, "")
	wantCode(t, err, codes.FailedPrecondition, "name the newest key record")
}

func TestAVersionThatNobodySaidMayBeAloneDoesNotSeal(t *testing.T) {
	f := newFixture(t)
	f.other.AddEC(t, "seal", "01", ecdh.P256())
	if _, err := f.keys.AddRecipient(t.Context(), "prod", keyring.AdoptRequest{Device: "vault", Label: "seal", By: "test"}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.keys.Rotate(t.Context(), "prod", keyring.RotateRequest{
		Adopt: &keyring.AdoptRequest{Device: "rack", Label: "seal-2", By: "test"},
	}); err != nil {
		t.Fatal(err)
	}
	for accepted, want := range map[string]string{"": "prod/v1+1", "true": "prod/v2"} {
		id := f.wrapper("accept_single_hsm", accepted, "device", "rack")
		key, err := f.KeyId(t.Context(), &pb.KeyIdRequest{WrapperId: id})
		if err != nil || key.GetKeyId() != want {
			t.Errorf("KeyId: %v, %v; want %q", key, err, want)
		}
		begun := f.token.Operations()
		blob, err := f.encrypt(id, "x", "")
		if err != nil || blob.GetKeyInfo().GetKeyId() != want || f.token.Operations() != begun {
			t.Errorf("sealed with %v after %d operations, %v; want %q without any", blob.GetKeyInfo(), f.token.Operations()-begun, err, want)
		}
		if got, err := f.decrypt(id, blob, ""); err != nil || got != "x" {
			t.Errorf("Decrypt: %q, %v", got, err)
		}
	}
}

func TestAnotherRecipientIsAnotherKeyID(t *testing.T) {
	f := newFixture(t)
	alone := f.wrapper()
	if _, err := f.keys.AddRecipient(t.Context(), "prod", keyring.AdoptRequest{Device: "rack", Label: "seal-2", By: "test"}); err != nil {
		t.Fatal(err)
	}
	both := f.wrapper()
	for id, want := range map[string]string{alone: "prod/v1", both: "prod/v1+1"} {
		key, err := f.KeyId(t.Context(), &pb.KeyIdRequest{WrapperId: id})
		if err != nil {
			t.Fatal(err)
		}
		blob, err := f.encrypt(id, "x", "")
		if err != nil {
			t.Fatal(err)
		}
		if said, named := key.GetKeyId(), blob.GetKeyInfo().GetKeyId(); said != want || named != want {
			t.Errorf("KeyId says %q, the ciphertext %q, want %q: OpenBao seals anew when it changes", said, named, want)
		}
	}
}

func TestDevicesOfAFile(t *testing.T) {
	f := newFixture(t)
	file := func(device string) string {
		return f.put("nitroseal.hcl", "state_dir = \"state\"\n"+device)
	}
	rack := "type = \"nethsm\"\n urls = [\"https://nethsm.example\"]\n username = \"operator\"\n"
	with := func(path string) map[string]string {
		return f.settings("config", path, "type", "", "urls", "", "username", "", "password_file", "")
	}
	t.Setenv("RACK_PASSWORD", "a password")

	if _, err := f.configure(with(file("device \"rack\" {\n" + rack + "password_file = \"password\"\n}"))); err != nil {
		t.Errorf("a device with a file: %v", err)
	}
	fromEnvironment := with(file("device \"rack\" {\n" + rack + "password_env = \"RACK_PASSWORD\"\n}"))
	if _, err := f.configure(fromEnvironment); err != nil {
		t.Errorf("a device with a variable: %v", err)
	}
	_, err := f.SetConfig(t.Context(), &pb.SetConfigRequest{Options: &pb.Options{ConfigMap: fromEnvironment, DisallowEnvVars: true}})
	wantCode(t, err, codes.InvalidArgument, "RACK_PASSWORD is not set")
	_, err = f.configure(with(file("device \"stick\" {\n" + rack + "password_file = \"password\"\n}")))
	wantCode(t, err, codes.InvalidArgument, `describes none of the devices that the key record names: "rack"`)
	_, err = f.configure(with(file("nonsense = 1")))
	wantCode(t, err, codes.InvalidArgument, "nonsense")
	_, err = f.configure(with("/nowhere.hcl"))
	wantCode(t, err, codes.InvalidArgument, "/nowhere.hcl")
}

func TestErrorsHaveTheCodesThatOpenBaoKnows(t *testing.T) {
	away, broken := fmt.Errorf("one: %w", hsm.ErrUnavailable), fmt.Errorf("two: %w", envelope.ErrDecrypt)
	for name, test := range map[string]struct {
		err  error
		want codes.Code
	}{
		"no wrapper":                         {errNoWrapper, codes.NotFound},
		"a stanza":                           {errStanza, codes.InvalidArgument},
		"an HSM that is away":                {away, codes.Unavailable},
		"one away, the other cannot open it": {errors.Join(broken, away), codes.Unavailable},
		"none can open it":                   {broken, codes.InvalidArgument},
		"a key that is not on the HSM":       {hsm.ErrNotFound, codes.FailedPrecondition},
		"another key in its place":           {hsm.ErrKeyChanged, codes.FailedPrecondition},
		"a wrong PIN":                        {&hsm.PINError{TriesLeft: 2, Wrong: true}, codes.FailedPrecondition},
		"a locked token":                     {&hsm.PINError{}, codes.FailedPrecondition},
		"a PIN here, and an HSM away there":  {errors.Join(&hsm.PINError{TriesLeft: 2}, away), codes.Unavailable},
		"what nobody thought of":             {errors.New("?"), codes.Internal},
	} {
		t.Run(name, func(t *testing.T) {
			if got := code(test.err); got != test.want {
				t.Errorf("%v has the code %s, want %s", test.err, got, test.want)
			}
		})
	}
}
