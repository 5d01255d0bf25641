package keyring

import (
	"bytes"
	"encoding/json"
	"errors"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// sealed makes the fixture's keyring one that keeps no authentication key in its records.
func (f *fixture) sealed() *fixture {
	f.Keyring = New(Config{Records: f.store, Devices: f.devices, Now: f.clock.Now, SealAuthKeys: true})
	return f
}

// stored is the record of "prod" as the store holds it.
func (f *fixture) stored() []byte {
	f.t.Helper()
	entry, err := f.store.Get(f.t.Context(), recordPrefix+"prod")
	if err != nil {
		f.t.Fatalf("reading the record: %v", err)
	}
	return entry.Value
}

// holdsAuthKey tells whether the stored record has an authentication key in the clear.
func (f *fixture) holdsAuthKey() bool {
	f.t.Helper()
	var rec struct {
		Versions []map[string]json.RawMessage `json:"versions"`
	}
	if err := json.Unmarshal(f.stored(), &rec); err != nil {
		f.t.Fatal(err)
	}
	for _, v := range rec.Versions {
		if _, there := v["auth_key"]; there {
			return true
		}
	}
	return false
}

func TestSealedAuthKeysNeverReachTheStore(t *testing.T) {
	f := newFixture(t).sealed()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"adopting", func() error { f.adopt(); return nil }},
		{"wrapping", func() error { f.wrap("x"); return nil }},
		{"adding a recipient", func() error { f.addTwo(); return nil }},
		{"reading the key record", func() error { f.backup(); return nil }},
		{"rotating", func() error {
			_, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "one", Label: "rsa", By: "alice"}})
			return err
		}},
		{"generating", func() error {
			_, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: ptr(generateRequest())})
			if err == nil {
				_, err = f.Finish(t.Context(), "prod")
			}
			return err
		}},
		{"configuring", func() error {
			_, err := f.Configure(t.Context(), "prod", Settings{AcceptSingleHSM: ptr(true), By: "alice"})
			return err
		}},
		{"restoring", func() error {
			backup := f.backup()
			f.store = newStore(t)
			f.sealed()
			_, err := f.Restore(t.Context(), "prod", RestoreRequest{Record: backup.Record, SHA256: backup.SHA256, By: "dave"})
			return err
		}},
		{"wrapping after the restore", func() error { f.wrap("x"); return nil }},
	} {
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if f.holdsAuthKey() {
			t.Errorf("after %s the record has an authentication key in the clear:\n%s", step.name, f.stored())
		}
	}
}

func TestASealedAuthKeyCostsOneOperationInAProcess(t *testing.T) {
	f := newFixture(t).sealed()
	f.adopt()
	raw := f.wrap("secret")
	f.sealed() // as a new process
	for _, step := range []struct {
		name string
		do   func()
		cost int
	}{
		{"the first wrap opens it", func() { f.wrap("x") }, 1},
		{"the next one has it", func() { f.wrap("x") }, 0},
		{"an unwrap opens the envelope only", func() {
			if got := f.unwrapped(raw); got != "secret" {
				t.Errorf("unwrapped %q", got)
			}
		}, 1},
		{"in a new process both are opened", func() { f.sealed().unwrapped(raw) }, 2},
		{"in one that was warmed by several at once, the authentication key once", func() {
			f.sealed()
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() {
					if err := f.Warm(t.Context(), "prod"); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
		}, 1},
		{"and then the envelope only", func() { f.unwrapped(raw) }, 1},
	} {
		spent := f.operations()
		step.do()
		if got := spent()[0]; got != step.cost {
			t.Errorf("%s: %d private-key operations, want %d", step.name, got, step.cost)
		}
	}
	key, err := f.Get(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	if key.Versions[0].Locked {
		t.Error("the version is called locked, as after a restore that could not open it")
	}
}

func TestARecipientIsAddedToASealedAuthKeyByAnotherProcess(t *testing.T) {
	f := newFixture(t).sealed()
	f.adopt()
	before := f.wrap("before")
	f.sealed().addTwo()
	after := f.wrap("after")
	f.devices.set("one", nil)
	f.sealed()
	if got := f.unwrapped(after); got != "after" {
		t.Errorf("the second HSM alone opened %q", got)
	}
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, before, []byte("ctx")); err == nil {
		t.Error("an envelope from before the second recipient was opened by it")
	}
}

func TestARecordWithAnAuthKeyInTheClearIsRefusedWhereTheyAreSealed(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	if !f.holdsAuthKey() {
		t.Fatal("the record of an ordinary keyring has no authentication key")
	}
	raw := f.wrap("x")
	f.sealed()
	if _, err := f.Get(t.Context(), "prod"); !errors.Is(err, ErrRecordMalformed) {
		t.Errorf("reading it answers %v, want ErrRecordMalformed: whoever put the key there could make envelopes", err)
	}
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx")); !errors.Is(err, ErrRecordMalformed) {
		t.Errorf("opening with it answers %v, want ErrRecordMalformed", err)
	}
}

func TestTheKeyRecordIsTheSameWhereAuthKeysAreSealed(t *testing.T) {
	f := newFixture(t).sealed()
	f.adopt()
	sealed := f.backup()
	f.store = newStore(t)
	f.restart()
	if _, err := f.Restore(t.Context(), "prod", RestoreRequest{Record: sealed.Record, SHA256: sealed.SHA256, By: "dave"}); err != nil {
		t.Fatalf("restoring into a mount what a command kept: %v", err)
	}
	if back := f.backup(); back.SHA256 != sealed.SHA256 || !bytes.Equal(back.Record, sealed.Record) {
		t.Error("the key record changed on its way from a command to a mount")
	}
}
