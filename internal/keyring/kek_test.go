package keyring

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func TestARecipientMoreGetsAKEKOfItsOwnAndOldEnvelopesOpen(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	old := f.encrypt("old")
	before, err := f.Get(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	after := f.addTwo()
	if after.Versions[0].KEK == before.Versions[0].KEK || after.Versions[0].KEK == "" {
		t.Errorf("the KEK was %s and is %s", before.Versions[0].KEK, after.Versions[0].KEK)
	}
	f.openLease()
	both := f.encrypt("both")
	if !both.Leased || both.Recipients != 2 {
		t.Errorf("sealed %+v", both)
	}
	f.EndLeases()
	f.decrypts(old.Envelope, "old")
	f.EndLeases()
	f.devices.set("one", nil)
	f.decrypts(both.Envelope, "both")
	if _, err := f.decrypt(old.Envelope); err == nil {
		t.Error("an envelope of before was opened by the HSM that came later")
	}
}

func TestEachVersionHasAKEKAndOldOnesOpen(t *testing.T) {
	for _, generated := range []bool{false, true} {
		t.Run(fmt.Sprintf("generated %v", generated), func(t *testing.T) {
			f := newLeased(t)
			f.openLease()
			first := f.encrypt("first")
			if generated {
				if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: ptr(generateRequest())}); err != nil {
					t.Fatal(err)
				}
				f.finish()
			} else {
				f.rotate("two", "rsa")
			}
			key, err := f.Get(t.Context(), "prod")
			if err != nil {
				t.Fatal(err)
			}
			if key.Versions[1].KEK == "" || key.Versions[1].KEK == key.Versions[0].KEK {
				t.Errorf("the KEKs are %q and %q", key.Versions[0].KEK, key.Versions[1].KEK)
			}
			if sealed := f.encrypt("x"); sealed.Version != 1 || !sealed.Leased {
				t.Errorf("while the new record is not read it seals %+v", sealed)
			}
			f.backup()
			f.openLease()
			second := f.encrypt("second")
			if second.Version != 2 || !second.Leased {
				t.Errorf("sealed %+v", second)
			}
			f.server()
			f.spends(2, "both versions, twice", func() {
				for range 2 {
					f.decrypts(first.Envelope, "first")
					f.decrypts(second.Envelope, "second")
				}
			})
			if leases := f.Leases(); len(leases) != 2 {
				t.Errorf("the leases are %+v", leases)
			}
		})
	}
}

// Which version serves may change after the lease was set, by what people confirm.
func TestALeaseThatAnOldVersionCannotUseIsWarnedOf(t *testing.T) {
	f := newFixture(t)
	f.server()
	f.adopt()
	f.addTwo()
	f.rotate("one", "rsa")
	f.configure(Settings{Lease: ptr(testLease)})
	f.backup() // version 1 is on two HSMs, version 2 is not
	warned := func() bool {
		return f.warned("version 1, which serves encrypt/", "no key encryption key", "set the lease once more")
	}
	if f.openLease(); f.encrypt("x").Leased || !warned() {
		t.Error("it is sealed strictly, and nothing says so")
	}
	f.configure(Settings{Lease: ptr(testLease)})
	if f.openLease(); !f.encrypt("x").Leased || warned() {
		t.Error("what the warning says does not help")
	}
}

func TestServersRestoredFromTheKeyRecordShareAKEK(t *testing.T) {
	a := newLeased(t)
	b := a.twin(true)
	t.Cleanup(func() { _ = b.Close() })
	b.configure(Settings{AcceptSingleHSM: ptr(true), Lease: ptr(testLease)})
	of := func(f *fixture) string {
		key, err := f.Get(t.Context(), "prod")
		if err != nil {
			t.Fatal(err)
		}
		return key.Versions[0].KEK + key.RecordSHA256
	}
	if of(a) != of(b) {
		t.Fatalf("%s and %s", of(a), of(b))
	}
	a.openLease()
	b.openLease()
	b.spends(0, "what the one sealed, in the other", func() { b.decrypts(a.encrypt("x").Envelope, "x") })
}

func TestARestoreTakesOnTheKEKOfTheRecord(t *testing.T) {
	a := newFixture(t)
	a.adopt()
	b := a.twin(false)
	without := a.backup()
	a.configure(Settings{AcceptSingleHSM: ptr(true), Lease: ptr(testLease)})
	b.configure(Settings{AcceptSingleHSM: ptr(true), Lease: ptr(testLease)})
	kek := func(f *fixture) string {
		key, err := f.Get(t.Context(), "prod")
		if err != nil {
			t.Fatal(err)
		}
		return key.Versions[0].KEK
	}
	own := kek(b)
	if kek(a) == own {
		t.Fatal("two that gave a lease on their own have one KEK")
	}
	b.openLease()
	sealed := b.encrypt("own").Envelope
	b.spends(0, "a record with another KEK", func() { b.restore(a.backup()) })
	if kek(b) != kek(a) {
		t.Error("the record's KEK was not taken on")
	}
	b.decrypts(sealed, "own")
	b.spends(0, "a record without a KEK", func() { b.restore(without) })
	if kek(b) != kek(a) {
		t.Error("a record without a KEK took it away")
	}
	for _, f := range []*fixture{a, b} {
		_ = f.Close()
	}
}

// A KEK says what is sealed to from then on, and one that opens with the first of two HSMs alone is still ours: whoever may restore
// a record, and no more, must not take the second away.
func TestARecordOverAKeyBringsNoKEKUnasked(t *testing.T) {
	f := newLeased(t)
	f.addTwo()
	own := f.backup()
	crippled := bytes.Clone(own.Record)
	kek := bytes.Index(crippled, []byte(`"kek_envelope"`))
	const part = `"encrypted_key":"`
	at := kek + bytes.LastIndex(crippled[kek:], []byte(part)) + len(part)
	copy(crippled[at:], "AAAAAAAA")
	content, err := ReadKeyRecord(crippled)
	if err != nil {
		t.Fatal(err)
	}
	before := f.stored()
	request := RestoreRequest{Record: crippled, SHA256: content.SHA256, By: "mallory"}
	if _, err := f.Restore(t.Context(), "prod", request); !errors.Is(err, ErrKeyExists) || !strings.Contains(err.Error(), "accept_recipients=true") ||
		!strings.Contains(err.Error(), "key encryption key") {
		t.Errorf("got %v, want ErrKeyExists that says how to accept it", err)
	}
	if !bytes.Equal(f.stored(), before) {
		t.Error("a refused record changed the key")
	}
	if _, err := f.Restore(t.Context(), "prod", RestoreRequest{Record: own.Record, SHA256: own.SHA256, By: "dora"}); err != nil {
		t.Errorf("its own record, which brings nothing: %v", err)
	}
}

func TestARestoreThatBringsRecipientsBringsAKEKForThem(t *testing.T) {
	for name, leased := range map[string]bool{"from a machine with a lease": true, "from one without": false} {
		t.Run(name, func(t *testing.T) {
			a := newFixture(t)
			a.adopt()
			b := a.twin(true)
			t.Cleanup(func() { _ = b.Close() })
			b.configure(Settings{AcceptSingleHSM: ptr(true), Lease: ptr(testLease)})
			if leased {
				a.configure(Settings{Lease: ptr(testLease)})
			}
			a.addTwo()
			b.restore(a.backup())
			b.openLease()
			sealed := b.encrypt("x")
			if !sealed.Leased {
				t.Fatalf("sealed %+v", sealed)
			}
			b.EndLeases()
			b.devices.set("one", nil)
			b.decrypts(sealed.Envelope, "x")
		})
	}
}

// Who can write the record, or has a forged one confirmed, gets nothing: the HSM opens a KEK, and the authentication key tells
// whether it is one of ours.
func TestAKEKThatSomebodyMadeUpSealsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		known := envelope.NewKEK()
		rec, _, err := f.load(t.Context(), "prod")
		if err != nil {
			t.Fatal(err)
		}
		forged, err := envelope.SealKEK("prod", 1, rec.newest().sealTo(), envelope.NewAuthKey(), known)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.update(t.Context(), "prod", func(rec *record) error {
			rec.newest().KEKEnvelope = forged.Raw()
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := f.OpenLease(t.Context(), "prod"); !errors.Is(err, envelope.ErrNotAuthentic) {
			t.Errorf("opening it: %v", err)
		}
		for range 3 {
			if f.encrypt("x").Leased {
				t.Fatal("it sealed to a key that somebody else knows")
			}
			synctest.Wait()
		}
	})
}

func TestARewrapOfALeasedEnvelope(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	raw := f.encrypt("x").Envelope
	want := envelope.Context{Use: envelope.UseTransit}
	rewrap := func(what string, changed, leased bool) []byte {
		t.Helper()
		got, err := f.Rewrap(t.Context(), "prod", raw, want)
		if err != nil || got.Changed != changed || got.Leased != leased {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
		f.decrypts(got.Envelope, "x")
		return got.Envelope
	}
	rewrap("with nothing to change", false, true)
	f.addTwo()
	f.backup()
	f.openLease()
	raw = rewrap("with a recipient more", true, true)
	f.configure(Settings{Lease: ptr(time.Duration(0))})
	raw = rewrap("with the lease taken away", true, false)
	f.configure(Settings{Lease: ptr(testLease)})
	rewrap("back with a lease, for what is strict", false, false)
}
