package keyring

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// twin is another machine with the same HSMs and a store of its own, which has the key as it is in f.
func (f *fixture) twin(sealed bool) *fixture {
	f.t.Helper()
	other := *f
	other.store = newStore(f.t)
	other.Keyring = New(Config{Records: other.store, Devices: f.devices, Now: f.clock.Now, SealAuthKeys: sealed})
	other.restore(f.backup())
	return &other
}

func TestARestoreBringsAChangedKeyToAMachineThatHasIt(t *testing.T) {
	for _, mode := range []struct {
		name   string
		sealed bool
	}{{"where the records hold authentication keys", false}, {"where they are sealed", true}} {
		for _, test := range []struct {
			name   string
			change func(f *fixture) *Key
			opens  int // private-key operations of the restore in a keyring that has used the key
		}{
			{"a recipient more", func(f *fixture) *Key { return f.addTwo() }, 1},
			{"a version more", func(f *fixture) *Key { return f.rotate("two", "ec") }, 1},
			{"two recipients and a version more", func(f *fixture) *Key {
				f.addTwo()
				return f.rotate("two", "rsa")
			}, 2},
		} {
			t.Run(mode.name+", "+test.name, func(t *testing.T) {
				a := newFixture(t)
				a.adopt()
				b := a.twin(mode.sealed)
				old := b.wrap("old")
				b.configure(Settings{AcceptSingleHSM: ptr(true), BackupConfirmed: ptr(true), DeletionAllowed: ptr(true)})
				want := test.change(a)
				changed := a.wrap("new")

				spent := b.operations()
				key := b.restore(a.backup())
				if got := spent(); got[0]+got[1] != test.opens {
					t.Errorf("it cost %v operations, want %d", got, test.opens)
				}
				if key.RecordSHA256 != want.RecordSHA256 || key.LatestVersion != want.LatestVersion {
					t.Errorf("it has version %d and the record %s, want %d and %s", key.LatestVersion, key.RecordSHA256, want.LatestVersion,
						want.RecordSHA256)
				}
				if b.unwrapped(old) != "old" || b.unwrapped(changed) != "new" || a.unwrapped(b.wrap("back")) != "back" {
					t.Error("an envelope changed")
				}
				if key.AcceptSingleHSM == nil || key.AcceptSingleHSM.By != "alice" || !key.DeletionAllowed {
					t.Errorf("settings went: %+v", key)
				}
				if confirmed := key.Versions[0].BackupConfirmed; confirmed == nil || confirmed.By != "alice" {
					t.Errorf("the confirmed backup of version 1 is %+v", confirmed)
				}
				if (key.BackupConfirmed != nil) != (key.LatestVersion == 1) {
					t.Errorf("a backup is confirmed for the newest of %d versions: %+v", key.LatestVersion, key.BackupConfirmed)
				}
				if key.RecordRead == nil {
					t.Error("whoever restores has read the record")
				}
				spent = b.operations()
				if again := b.restore(a.backup()); !reflect.DeepEqual(again, key) || spent() != [2]int{} {
					t.Error("a repeat changed the key")
				}
			})
		}
	}
}

func TestARestoreOverAKeyTakesNothingAway(t *testing.T) {
	forged := func(f *fixture, versions int) []byte { // what anybody can make who knows the public keys
		own := envelope.NewAuthKey()
		key, _ := f.Get(f.t.Context(), "prod")
		var to []envelope.Recipient
		for _, r := range key.Versions[versions-1].Recipients {
			to = append(to, envelope.Recipient{KID: r.KID, Algorithm: r.Algorithm, Public: r.Public})
		}
		raw, err := envelope.Seal(authContext("prod", versions), to, own, own[:])
		if err != nil {
			f.t.Fatal(err)
		}
		return raw
	}
	edited := func(f *fixture, edit func(*keyRecord)) KeyRecord {
		var r keyRecord
		if err := json.Unmarshal(f.backup().Record, &r); err != nil {
			f.t.Fatal(err)
		}
		edit(&r)
		return r.canonical()
	}
	for _, test := range []struct {
		name  string
		other func(a, b *fixture) KeyRecord // a has version 1 on device one; b is its twin
		want  error
		says  string
	}{
		{"an older record, without a version", func(a, b *fixture) KeyRecord {
			older := a.backup()
			b.rotate("two", "ec")
			return older
		}, ErrKeyExists, "it lacks version 2"},
		{"an older record, without a recipient", func(a, b *fixture) KeyRecord {
			older := a.backup()
			b.addTwo()
			return older
		}, ErrKeyExists, `it lacks the recipient of version 1 on device "two"`},
		{"each went on for itself", func(a, b *fixture) KeyRecord {
			a.rotate("two", "ec")
			b.rotate("two", "rsa")
			return a.backup()
		}, ErrKeyExists, `it lacks the recipient of version 2 on device "two"`},
		{"another key of that name", func(a, b *fixture) KeyRecord {
			other := *a
			other.store = newStore(t)
			other.restart()
			other.clock.advance(1e9)
			other.adopt()
			other.addTwo()
			return other.backup()
		}, ErrKeyExists, "it is of a key that was made at"},
		{"another authentication key", func(a, b *fixture) KeyRecord {
			a.addTwo()
			raw := forged(a, 1)
			return edited(a, func(r *keyRecord) { r.Versions[0].AuthEnvelope = raw })
		}, ErrKeyExists, "version 1 has another authentication key"},
		{"a known HSM key with another algorithm", func(a, b *fixture) KeyRecord {
			a.addTwo()
			return edited(a, func(r *keyRecord) { r.Versions[0].Recipients[0].Algorithm = "RSA-OAEP" })
		}, ErrRecordMalformed, "does not fit"},
		{"not the confirmed one", func(a, b *fixture) KeyRecord {
			a.addTwo()
			return KeyRecord{Record: a.backup().Record, SHA256: strings.Repeat("0", 64)}
		}, ErrRecordMismatch, "do not restore it"},
		{"no HSM of what changed answers", func(a, b *fixture) KeyRecord {
			a.addTwo()
			a.one.SetError(hsm.ErrUnavailable)
			a.two.SetError(hsm.ErrUnavailable)
			return a.backup()
		}, hsm.ErrUnavailable, "attach"},
		{"no HSM of the new version answers", func(a, b *fixture) KeyRecord {
			a.rotate("two", "ec")
			a.two.SetError(hsm.ErrUnavailable)
			return a.backup()
		}, hsm.ErrUnavailable, "attach"},
		{"an HSM key is being made here", func(a, b *fixture) KeyRecord {
			a.addTwo()
			_, err := b.Rotate(t.Context(), "prod", RotateRequest{Generate: ptr(generateRequest())})
			if err != nil {
				t.Fatal(err)
			}
			return a.backup()
		}, ErrGenerating, "prod"},
	} {
		for _, sealed := range []bool{false, true} {
			t.Run(test.name, func(t *testing.T) {
				a := newFixture(t)
				a.adopt()
				b := a.twin(sealed)
				record := test.other(a, b)
				before := b.stored()
				_, err := b.Restore(t.Context(), "prod", RestoreRequest{
					Record: record.Record, SHA256: record.SHA256, AcceptRecipients: true, By: "dora",
				})
				if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("got %v, want %v that says %q", err, test.want, test.says)
				}
				if !bytes.Equal(b.stored(), before) {
					t.Error("a refused record changed the key")
				}
			})
		}
	}
}

func TestWhatDevicesAreCalledHereStaysWhenAKeyGrows(t *testing.T) {
	a := newFixture(t)
	a.adopt()
	backup := a.backup()
	a.devices.set("stick", a.one)
	b := *a
	b.store = newStore(t)
	b.restart()
	request := RestoreRequest{Record: backup.Record, SHA256: backup.SHA256, Devices: map[string]string{"one": "stick"}, By: "dora"}
	if _, err := b.Restore(t.Context(), "prod", request); err != nil {
		t.Fatal(err)
	}
	a.addTwo()
	backup = a.backup()
	a.devices.set("here", a.two)
	request = RestoreRequest{
		Record: backup.Record, SHA256: backup.SHA256, Devices: map[string]string{"two": "here"}, AcceptRecipients: true, By: "dora",
	}
	for range 2 {
		key, err := b.Restore(t.Context(), "prod", request)
		if err != nil {
			t.Fatal(err)
		}
		if got := key.Versions[0].Recipients; got[0].Device != "stick" || got[1].Device != "here" {
			t.Errorf("the devices are %q and %q", got[0].Device, got[1].Device)
		}
	}
}

func TestAKeyThatGrewWhileItsRecordWasTakenIsLeftAlone(t *testing.T) {
	a := newFixture(t)
	a.adopt()
	b := a.twin(false)
	a.addTwo()
	backup := a.backup()
	racing := New(Config{
		Records: &interrupted{Store: b.store, before: func() {
			if _, err := b.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "two", Label: "rsa"}); err != nil {
				t.Error(err)
			}
		}}, Devices: b.devices, Now: b.clock.Now,
	})
	_, err := racing.Restore(t.Context(), "prod", RestoreRequest{Record: backup.Record, SHA256: backup.SHA256, AcceptRecipients: true})
	if !errors.Is(err, store.ErrConflict) && !errors.Is(err, ErrKeyExists) {
		t.Errorf("got %v", err)
	}
	if key, err := b.Get(t.Context(), "prod"); err != nil || len(key.Versions[0].Recipients) != 2 || key.Versions[0].Recipients[1].Label != "rsa" {
		t.Errorf("the other's change is lost: %+v, %v", key, err)
	}
}

// interrupted is a store where somebody else comes just before the first write.
type interrupted struct {
	store.Store
	before func()
}

func (s *interrupted) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if before := s.before; before != nil {
		s.before = nil
		before()
	}
	return s.Store.Put(ctx, name, value, expected)
}

// TestARecordOverAKeyBringsNoRecipientUnasked: an envelope for several does not authenticate to whom it is, so anybody adds
// one to the authentication envelope of a version; and a version more may be anybody's as a whole.
func TestARecordOverAKeyBringsNoRecipientUnasked(t *testing.T) {
	a := newFixture(t)
	a.adopt()
	a.addTwo()
	b := a.twin(true)
	var forged keyRecord
	if err := json.Unmarshal(a.backup().Record, &forged); err != nil {
		t.Fatal(err)
	}
	stranger := newFixture(t).adopt().Versions[0].Recipients[0]
	public, err := newJWK(stranger.Public)
	if err != nil {
		t.Fatal(err)
	}
	theirs := forged.Versions[0].Recipients[0]
	theirs.Device, theirs.KID, theirs.PublicKey = "three", stranger.KID, public
	before, stanzas, _ := strings.Cut(string(forged.Versions[0].AuthEnvelope), `"recipients":[`)
	for _, stanza := range strings.Split(stanzas[:strings.Index(stanzas, `],"iv"`)], `,{"header":`) {
		if known := forged.Versions[0].Recipients[0].KID; strings.Contains(stanza, known) {
			added := `{"header":` + strings.TrimPrefix(strings.Replace(stanza, known, stranger.KID, 1), `{"header":`) + ","
			forged.Versions[0].AuthEnvelope = []byte(before + `"recipients":[` + added + stanzas)
		}
	}
	forged.Versions[0].Recipients = append(forged.Versions[0].Recipients, theirs)
	newer := a.rotate("two", "rsa")
	for name, test := range map[string]struct {
		record KeyRecord
		says   string
	}{
		"a recipient more": {forged.canonical(), `"three", ` + stranger.KID},
		"a version more":   {a.backup(), `"two", ` + newer.Versions[1].Recipients[0].KID},
	} {
		t.Run(name, func(t *testing.T) {
			before, spent := b.stored(), b.operations()
			_, err := b.Restore(t.Context(), "prod", RestoreRequest{Record: test.record.Record, SHA256: test.record.SHA256, By: "mallory"})
			if !errors.Is(err, ErrKeyExists) || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), "accept_recipients=true") {
				t.Errorf("got %v", err)
			}
			if !bytes.Equal(b.stored(), before) || spent() != [2]int{} {
				t.Error("a refused record changed the key, or an HSM was asked")
			}
		})
	}
}
