package keyring

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// lose gives the fixture an empty store: the mount is gone, the HSMs and whoever holds the key record are not.
func (f *fixture) lose() {
	f.store = newStore(f.t)
	f.restart()
}

func (f *fixture) restore(backup KeyRecord) *Key {
	f.t.Helper()
	key, err := f.Restore(f.t.Context(), "prod", RestoreRequest{
		Record: backup.Record, SHA256: backup.SHA256, AcceptRecipients: true, By: "dora",
	})
	if err != nil {
		f.t.Fatalf("restoring: %v", err)
	}
	return key
}

func TestALostMountIsRestoredFromTheKeyRecordAndOneHSM(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	first := f.wrap("first")
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "rsa"}}); err != nil {
		t.Fatal(err)
	}
	second := f.wrap("second")
	backup := f.backup()

	f.lose()
	count := f.operations()
	key := f.restore(backup)
	if got := count(); got != [2]int{1, 1} {
		t.Errorf("restoring cost %v operations, want one for each version", got)
	}
	if f.unwrapped(first) != "first" || f.unwrapped(second) != "second" {
		t.Error("an envelope changed")
	}
	if key.RecordSHA256 != backup.SHA256 {
		t.Errorf("the restored record's SHA-256 is %s, it was %s", key.RecordSHA256, backup.SHA256)
	}
	if key.RecordRead == nil || key.RecordRead.By != "dora" {
		t.Errorf("whoever restores has read the record: %+v", key.RecordRead)
	}
	if !key.Versions[0].ServedEncrypt {
		t.Error("nobody knows whether a restored version served encrypt/: its HSM keys must be kept")
	}
	if again := f.restore(backup); again.RecordSHA256 != backup.SHA256 {
		t.Error("a repeated restore changed the key")
	}
}

func TestARestoredVersionWhoseHSMIsAwayWaitsForIt(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	first := f.wrap("first")
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "rsa"}}); err != nil {
		t.Fatal(err)
	}
	second := f.wrap("second")
	backup := f.backup()

	f.lose()
	f.two.SetError(hsm.ErrUnavailable)
	key := f.restore(backup)
	if key.Versions[0].Locked || !key.Versions[1].Locked {
		t.Errorf("versions %+v", key.Versions)
	}
	if f.unwrapped(first) != "first" {
		t.Error("an envelope changed")
	}
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseWrap, nil, nil); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("sealing without an authentication key: %v, want ErrUnavailable", err)
	}
	f.two.SetError(nil)
	count := f.operations()
	if f.unwrapped(second) != "second" {
		t.Error("an envelope changed")
	}
	if got := count(); got != [2]int{0, 2} {
		t.Errorf("the first use cost %v operations, want two", got)
	}
	f.restart()
	if f.unwrapped(second) != "second" {
		t.Error("an envelope changed")
	}
	if got := count(); got != [2]int{0, 3} {
		t.Errorf("the second use made it %v operations, want one more", got)
	}
	if key, err := f.Get(t.Context(), "prod"); err != nil || key.Versions[1].Locked {
		t.Errorf("still locked: %v", err)
	}
}

func TestARestoreWithoutAnyHSMIsRefused(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	backup := f.backup()
	f.lose()
	f.one.SetError(hsm.ErrUnavailable)
	_, err := f.Restore(t.Context(), "prod", RestoreRequest{Record: backup.Record, SHA256: backup.SHA256})
	if !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	if names, _ := f.List(t.Context()); len(names) != 0 {
		t.Errorf("left %v", names)
	}
}

func TestARestoreMapsDevicesThatHaveNewNames(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	raw := f.wrap("secret")
	backup := f.backup()
	f.lose()
	f.devices.set("one", nil)
	f.devices.set("stick", f.one)
	request := RestoreRequest{Record: backup.Record, SHA256: strings.ToUpper(backup.SHA256), Devices: map[string]string{"one": "stick"}}
	for range 2 {
		key, err := f.Restore(t.Context(), "prod", request)
		if err != nil || key.Versions[0].Recipients[0].Device != "stick" {
			t.Fatalf("restored %+v, %v", key, err)
		}
	}
	if f.unwrapped(raw) != "secret" {
		t.Error("an envelope changed")
	}
}

// A forger who can hand in a record knows all public keys: only the SHA-256 that the operator kept tells them apart.
func TestAKeyRecordThatIsNotTheConfirmedOneIsRefused(t *testing.T) {
	f := newFixture(t)
	key := f.adopt()
	backup := f.backup()
	rcpt := key.Versions[0].Recipients[0]

	own := envelope.NewAuthKey() // the forger's: they could make envelopes with it
	forgedEnvelope, err := envelope.Seal(authContext("prod", 1),
		[]envelope.Recipient{{KID: rcpt.KID, Algorithm: rcpt.Algorithm, Public: rcpt.Public}}, own, own[:])
	if err != nil {
		t.Fatal(err)
	}
	change := func(change func(*keyRecord)) KeyRecord {
		var r keyRecord
		if err := json.Unmarshal(backup.Record, &r); err != nil {
			t.Fatal(err)
		}
		change(&r)
		return r.canonical()
	}
	forged := change(func(r *keyRecord) { r.Versions[0].AuthEnvelope = forgedEnvelope })
	indented := &bytes.Buffer{}
	if err := json.Indent(indented, backup.Record, "", "  "); err != nil {
		t.Fatal(err)
	}
	duplicate := strings.Replace(string(backup.Record), `"name":"prod"`, `"name":"evil","name":"prod"`, 1)

	for _, test := range []struct {
		name   string
		key    string
		record []byte
		sha256 string
		want   error
	}{
		{"forged, with the SHA-256 of the true one", "prod", forged.Record, backup.SHA256, ErrRecordMismatch},
		{"the true one, with another SHA-256", "prod", backup.Record, forged.SHA256, ErrRecordMismatch},
		{"no SHA-256", "prod", backup.Record, "", ErrRecordMismatch},
		{"under another name", "other", backup.Record, backup.SHA256, ErrInvalid},
		{"not JSON", "prod", []byte("hello"), backup.SHA256, ErrRecordMalformed},
		{"empty", "prod", nil, backup.SHA256, ErrRecordMalformed},
		{"other JSON", "prod", []byte(`{}`), backup.SHA256, ErrRecordMalformed},
		{"two records", "prod", slices.Concat(backup.Record, backup.Record), backup.SHA256, ErrRecordMalformed},
		{
			"an unknown member", "prod", bytes.Replace(backup.Record, []byte(`{"type"`), []byte(`{"x":1,"type"`), 1), backup.SHA256,
			ErrRecordMalformed,
		},
		{
			"a later format", "prod", bytes.Replace(backup.Record, []byte(`"format":1`), []byte(`"format":2`), 1), backup.SHA256,
			ErrRecordMalformed,
		},
		{"too large", "prod", bytes.Repeat([]byte{' '}, 1<<20), backup.SHA256, ErrRecordMalformed},
		{"another public key under the kid, even if confirmed", "prod", nil, "", ErrRecordMalformed},
		{"a forged envelope of another version, even if confirmed", "prod", nil, "", ErrRecordMalformed},
		{"an envelope for somebody else, even if confirmed", "prod", nil, "", ErrRecordMalformed},
	} {
		t.Run(test.name, func(t *testing.T) {
			f.lose()
			confirmed := KeyRecord{Record: test.record, SHA256: test.sha256}
			switch {
			case strings.HasPrefix(test.name, "another public key"):
				confirmed = change(func(r *keyRecord) {
					other, _ := f.two.FindKeys(t.Context(), hsm.KeyQuery{Label: "ec"})
					r.Versions[0].Recipients[0].PublicKey, _ = newJWK(other[0].Public())
				})
			case strings.HasPrefix(test.name, "a forged envelope of another"):
				confirmed = change(func(r *keyRecord) {
					sealed, err := envelope.Seal(authContext("prod", 2),
						[]envelope.Recipient{{KID: rcpt.KID, Algorithm: rcpt.Algorithm, Public: rcpt.Public}}, own, own[:])
					if err != nil {
						t.Fatal(err)
					}
					r.Versions[0].AuthEnvelope = sealed
				})
			case strings.HasPrefix(test.name, "an envelope for somebody else"):
				confirmed = change(func(r *keyRecord) {
					other, _ := f.two.FindKeys(t.Context(), hsm.KeyQuery{Label: "ec"})
					sealed, err := envelope.Seal(authContext("prod", 1), []envelope.Recipient{{
						KID: other[0].Ref().Fingerprint, Algorithm: envelope.ECDHESA256KW, Public: other[0].Public(),
					}}, own, own[:])
					if err != nil {
						t.Fatal(err)
					}
					r.Versions[0].AuthEnvelope = sealed
				})
			}
			_, err := f.Restore(t.Context(), test.key, RestoreRequest{Record: confirmed.Record, SHA256: confirmed.SHA256})
			if !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if names, _ := f.List(t.Context()); len(names) != 0 {
				t.Errorf("left %v", names)
			}
		})
	}
	for name, record := range map[string][]byte{
		"indented by a tool": indented.Bytes(), "with a newline": append(bytes.Clone(backup.Record), '\n'),
		"with a member twice, of which the last is what was confirmed": []byte(duplicate),
	} {
		t.Run(name, func(t *testing.T) {
			f.lose()
			if _, err := f.Restore(t.Context(), "prod", RestoreRequest{Record: record, SHA256: backup.SHA256}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestARestoreOfAnOlderRecordIsRefused(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	backup := f.backup()
	f.addTwo()
	if _, err := f.Restore(t.Context(), "prod", RestoreRequest{Record: backup.Record, SHA256: backup.SHA256}); !errors.Is(err, ErrKeyExists) {
		t.Errorf("got %v, want ErrKeyExists", err)
	}
}

func TestTheKeyRecordStaysTheSameInDailyUse(t *testing.T) {
	f := newFixture(t)
	before := f.adopt().RecordSHA256
	f.configure(Settings{AcceptSingleHSM: ptr(true), BackupConfirmed: ptr(true), DeletionAllowed: ptr(true)})
	f.backup()
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	key, err := f.Get(t.Context(), "prod")
	if err != nil || key.RecordSHA256 != before {
		t.Errorf("the SHA-256 changed from %s to %s: %v", before, key.RecordSHA256, err)
	}
	if key.RecordRead == nil || !key.Versions[0].ServedEncrypt {
		t.Errorf("not recorded: %+v", key)
	}
	if f.addTwo().RecordSHA256 == before {
		t.Error("a recipient was added and the SHA-256 is the same")
	}
}

func TestAKeyRecordThatNobodyGotIsNotSaidToBeRead(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	read := func() bool {
		t.Helper()
		key, err := f.Get(t.Context(), "prod")
		if err != nil {
			t.Fatal(err)
		}
		return key.RecordRead != nil
	}
	full := errors.New("no room")
	if err := f.BackupTo(t.Context(), "prod", "carol", func(KeyRecord) error { return full }); !errors.Is(err, full) || read() {
		t.Errorf("it could not be written: %v, recorded as read: %v", err, read())
	}
	changed := func(KeyRecord) error {
		_, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "two", Label: "rsa", By: "bob"})
		return err
	}
	if err := f.BackupTo(t.Context(), "prod", "carol", changed); !errors.Is(err, store.ErrConflict) || read() {
		t.Errorf("it changed while it was written: %v, recorded as read: %v", err, read())
	}
	var kept KeyRecord
	if err := f.BackupTo(t.Context(), "prod", "carol", func(got KeyRecord) error { kept = got; return nil }); err != nil || !read() {
		t.Errorf("it was written: %v, recorded as read: %v", err, read())
	}
	if want := f.backup(); kept.SHA256 != want.SHA256 {
		t.Errorf("another record was written than the one that is kept")
	}
}
