package keyring

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// What another mount or program may need is not ours to destroy.
func TestOnlyHSMKeysThatWereMadeForTheWrappingKeyAreDestroyed(t *testing.T) {
	for _, test := range []struct {
		name    string
		prepare func(f *fixture)
		want    error
	}{
		{"one that was generated", func(f *fixture) { f.generate() }, nil},
		{"one that was generated, and another one for a rotation", func(f *fixture) {
			f.generate()
			request := generateRequest()
			if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: &request}); err != nil {
				t.Fatal(err)
			}
			f.finish()
		}, nil},
		{"one that was adopted", func(f *fixture) { f.adopt() }, ErrNotOurs},
		{"one that was generated, and one that was adopted by a rotation", func(f *fixture) {
			f.generate()
			f.rotate("two", "ec")
		}, ErrNotOurs},
		{"one that was generated, and one that was adopted as its second recipient", func(f *fixture) {
			f.generate()
			f.addTwo()
		}, ErrNotOurs},
		{"one that was generated, and restored from the key record", func(f *fixture) {
			f.generate()
			backup := f.backup()
			f.lose()
			f.restore(backup)
		}, ErrInUse}, // nobody knows what it served
		{"one that was generated, served encrypt/, was deleted without its HSM key and is adopted anew", func(f *fixture) {
			id := f.generate().Versions[0].Recipients[0].ID
			f.configure(Settings{DeletionAllowed: ptr(true), AcceptSingleHSM: ptr(true)})
			f.backup()
			if _, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("x"), nil); err != nil {
				t.Fatal(err)
			}
			if err := f.Delete(t.Context(), "prod", DeleteRequest{}); err != nil {
				t.Fatal(err)
			}
			if _, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "one", ID: id}); err != nil {
				t.Fatal(err)
			}
		}, ErrNotOurs},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			test.prepare(f)
			f.configure(Settings{DeletionAllowed: ptr(true)})
			before := slices.Concat(hsmKeys(t, f.one), hsmKeys(t, f.two))
			if err := f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true}); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			after := slices.Concat(hsmKeys(t, f.one), hsmKeys(t, f.two))
			switch {
			case test.want != nil && !slices.Equal(after, before):
				t.Errorf("of the HSM keys %v there are %v left", before, after)
			case test.want == nil && !slices.Equal(after, []string{"01", "02", "11", "12"}):
				t.Errorf("left are %v, want the ones that were there before", after)
			case test.want != nil:
				if key, err := f.Get(t.Context(), "prod"); err != nil || key.State != StateReady {
					t.Errorf("a refused deletion left %+v, %v", key, err)
				}
			}
		})
	}
}

func TestAKeySaysWhichOfItsHSMKeysWereMadeForIt(t *testing.T) {
	f := newFixture(t)
	f.generate()
	key := f.addTwo()
	f.restart()
	for _, read := range []func() (*Key, error){
		func() (*Key, error) { return key, nil },
		func() (*Key, error) { return f.Get(t.Context(), "prod") },
	} {
		got, err := read()
		if err != nil {
			t.Fatal(err)
		}
		if recipients := got.Versions[0].Recipients; !recipients[0].Generated || recipients[1].Generated {
			t.Errorf("generated: %v and %v, want the first only", recipients[0].Generated, recipients[1].Generated)
		}
	}
}

func TestARequestIDOfAnAdoptionAnswersNoRequestToMakeAnHSMKey(t *testing.T) {
	f := newFixture(t)
	adopt := AdoptRequest{Device: "one", Label: "ec", RequestID: "r"}
	if _, err := f.Adopt(t.Context(), "prod", adopt); err != nil {
		t.Fatal(err)
	}
	request := generateRequest()
	request.RequestID = "r"
	if key, err := f.Begin(t.Context(), "prod", request); !errors.Is(err, ErrRequestReused) {
		t.Errorf("making: %+v, %v, want ErrRequestReused", key, err)
	}
	if key, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: &request}); !errors.Is(err, ErrRequestReused) {
		t.Errorf("rotating: %+v, %v, want ErrRequestReused", key, err)
	}
	if _, err := f.Adopt(t.Context(), "prod", adopt); err != nil {
		t.Errorf("the adoption, sent again: %v", err)
	}
}

// An attempt whose caller had gone goes on in the HSM, and may come through after its intent was undone.
func TestAnHSMKeyThatMayBeLeftOverIsNamedInTheLog(t *testing.T) {
	f := newFixture(t)
	var log bytes.Buffer
	f.logger = slog.New(slog.NewTextHandler(&log, nil))
	id := f.begin(generateRequest()).Pending.ID
	other := New(Config{Records: f.store, Devices: f.devices})
	device := &hookDevice{Device: f.one}
	device.generate = func(generate func() (hsm.Key, error)) (hsm.Key, error) {
		if err := other.Abandon(t.Context(), "prod"); err != nil {
			t.Error(err)
		}
		if _, err := generate(); err != nil { // the attempt before comes through
			t.Error(err)
		}
		return generate()
	}
	f.devices.set("one", device)
	if _, err := f.Finish(t.Context(), "prod"); err == nil {
		t.Fatal("finished what was abandoned")
	}
	if !slices.Contains(hsmKeys(t, f.one), id) {
		t.Fatal("nothing is left over: the race did not come about")
	}
	for _, part := range []string{"left over", "device=one", "id=" + id} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("the log does not say %q:\n%s", part, log.String())
		}
	}
}

// One HSM that says that an envelope does not decrypt may be at fault itself.
func TestAnEnvelopeThatOneHSMDoesNotDecryptIsOpenedByTheNext(t *testing.T) {
	for name, fault := range map[string]error{"the HSM says so": hsm.ErrCiphertext, "its answer opens nothing": envelope.ErrDecrypt} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.adopt()
			f.addTwo()
			raw := f.wrap("secret")
			f.one.SetError(fault)
			count := f.operations()
			if got := f.unwrapped(raw); got != "secret" {
				t.Errorf("opened %q", got)
			}
			if got := count(); got != [2]int{0, 1} {
				t.Errorf("operations: %v, want one of the second HSM", got)
			}
			f.one.SetError(nil)
			count = f.operations()
			f.unwrapped(raw)
			if got := count(); got != [2]int{1, 0} {
				t.Errorf("operations: %v, want the first HSM to be asked first as before", got)
			}
		})
	}
}

func TestAnEnvelopeThatNoHSMDecryptsCostsOneOperationEachAndOneSentence(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.addTwo()
	raw := f.wrap("secret")
	damaged := bytes.Replace(raw, []byte(`"tag":"`), []byte(`"tag":"AAAA`), 1)
	i := bytes.Index(damaged, []byte(`"tag":"`)) + len(`"tag":"AAAA`)
	damaged = slices.Delete(damaged, i, i+4)
	count := f.operations()
	_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, damaged, []byte("ctx"))
	if !errors.Is(err, envelope.ErrDecrypt) || strings.Count(err.Error(), "recipient on device") != 1 ||
		!strings.Contains(err.Error(), `device "one"`) {
		t.Errorf("got %v, want ErrDecrypt of the first device alone", err)
	}
	if got := count(); got != [2]int{1, 1} {
		t.Errorf("operations: %v, want one of each HSM", got)
	}
}

func TestWhetherAKeyLivesIsAskedOfTheStoreAndNotOfTheCache(t *testing.T) {
	f := newFixture(t)
	f.generate()
	cached := New(Config{Records: f.store, Devices: f.devices, CacheRecords: true})
	lives := func(want error) {
		t.Helper()
		if _, err := cached.Get(t.Context(), "prod"); err != nil {
			t.Fatal(err)
		}
		if err := cached.Lives(t.Context(), "prod"); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	lives(nil)
	f.configure(Settings{DeletionAllowed: ptr(true)})
	f.one.SetError(hsm.ErrUnavailable)
	if err := f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true}); !errors.Is(err, hsm.ErrUnavailable) {
		t.Fatal(err)
	}
	lives(ErrDeleting)
	f.one.SetError(nil)
	if err := f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true}); err != nil {
		t.Fatal(err)
	}
	lives(ErrKeyNotFound)
}
