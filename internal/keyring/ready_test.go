package keyring

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// rotate gives "prod" its next version, of an HSM key that exists.
func (f *fixture) rotate(device, label string) *Key {
	f.t.Helper()
	key, err := f.Rotate(f.t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: device, Label: label, By: "bob"}})
	if err != nil {
		f.t.Fatalf("rotating: %v", err)
	}
	return key
}

// encrypts checks which version encrypt/ seals with, 0 for none.
func (f *fixture) encrypts(want int) {
	f.t.Helper()
	ctx := f.t.Context()
	key, err := f.Get(ctx, "prod")
	if err != nil {
		f.t.Fatal(err)
	}
	if key.EncryptVersion != want {
		f.t.Errorf("the key says that version %d serves encrypt/, want %d", key.EncryptVersion, want)
	}
	ready := f.Ready(ctx, "prod", PurposeEncrypt)
	sealed, err := f.Wrap(ctx, "prod", envelope.UseTransit, []byte("x"), nil)
	if want == 0 {
		if !errors.Is(ready, ErrNotReady) || !errors.Is(err, ErrNotReady) {
			f.t.Errorf("ready: %v; sealing: %v; want ErrNotReady twice", ready, err)
		}
		return
	}
	if ready != nil || err != nil || sealed.Version != want {
		f.t.Errorf("ready: %v; sealed with version %d: %v; want version %d", ready, sealed.Version, err, want)
	}
}

// warned tells whether a warning of "prod" holds all of these.
func (f *fixture) warned(parts ...string) bool {
	f.t.Helper()
	key, err := f.Get(f.t.Context(), "prod")
	if err != nil {
		f.t.Fatal(err)
	}
	return slices.ContainsFunc(key.Warnings, func(warning string) bool {
		return !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(warning, part) })
	})
}

// A Vault whose seal "transit" uses the key seals a test value when it starts: it must start at any moment.
func TestEncryptGoesOnWithTheNewestVersionThatIsReady(t *testing.T) {
	for _, test := range []struct {
		name  string
		steps func(f *fixture)
		want  int
	}{
		{"rotated after the record was read and a backup confirmed", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
		}, 1},
		{"rotated, and the record read again before the new backup is confirmed", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
			f.backup()
		}, 1},
		{"rotated, and the new backup confirmed before the record is read again", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
			f.configure(Settings{BackupConfirmed: ptr(true)})
		}, 1},
		{"rotated, and all confirmed anew", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
		}, 2},
		{"rotated with a single HSM accepted for the key", func(f *fixture) {
			f.configure(Settings{AcceptSingleHSM: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
		}, 1},
		{"rotated twice", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
			f.rotate("two", "rsa")
		}, 1},
		{"rotated twice, the record read in between", func(f *fixture) {
			f.configure(Settings{AcceptSingleHSM: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
			f.backup()
			f.rotate("two", "rsa")
		}, 2},
		{"rotated before the first record was read, which the second one covers", func(f *fixture) {
			f.addTwo()
			f.rotate("one", "rsa")
			f.backup()
		}, 1},
		{"the same, and rotated once more", func(f *fixture) {
			f.addTwo()
			f.rotate("one", "rsa")
			f.backup()
			f.rotate("two", "rsa")
		}, 1},
		{"a recipient added to the version that serves", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.addTwo()
		}, 1},
		{"a recipient added, and rotated", func(f *fixture) {
			f.configure(Settings{AcceptSingleHSM: ptr(true)})
			f.backup()
			f.addTwo()
			f.rotate("two", "rsa")
		}, 1},
		{"a second HSM that the record read does not know", func(f *fixture) {
			f.backup()
			f.addTwo()
		}, 0},
		{"a second HSM that the record read does not know, a version later", func(f *fixture) {
			f.backup()
			f.addTwo()
			f.rotate("two", "rsa")
		}, 0},
		{"the confirmation taken back, of an older version too", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.rotate("two", "ec")
			f.configure(Settings{BackupConfirmed: ptr(false)})
		}, 0},
		{"the acceptance taken back, with an older version on two HSMs", func(f *fixture) {
			f.addTwo()
			f.configure(Settings{AcceptSingleHSM: ptr(true)})
			f.rotate("one", "rsa")
			f.backup()
			f.configure(Settings{AcceptSingleHSM: ptr(false)})
		}, 1},
		{"restored while only the older version was ready", func(f *fixture) {
			f.addTwo()
			f.rotate("one", "rsa")
			backup := f.backup()
			f.lose()
			f.restore(backup)
		}, 1},
		{"nothing acknowledged before the rotation", func(f *fixture) { f.rotate("two", "ec") }, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			f.adopt()
			test.steps(f)
			f.encrypts(test.want)
			f.restart()
			f.encrypts(test.want)
		})
	}
}

// Clusters are kept as material, which the newest version seals: an older one that is ready is no help to them.
func TestAClusterWantsTheNewestVersionReady(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.configure(Settings{AcceptSingleHSM: ptr(true)})
	f.backup()
	f.rotate("two", "ec")
	if err := f.Ready(t.Context(), "prod", PurposeCluster); !errors.Is(err, ErrNotReady) {
		t.Errorf("after a rotation: %v, want ErrNotReady", err)
	}
	sealed, err := f.Wrap(t.Context(), "prod", envelope.UseWrap, []byte("x"), nil)
	if err != nil || sealed.Version != 2 {
		t.Errorf("wrap/ sealed with version %d: %v, want 2", sealed.Version, err)
	}
	f.backup()
	if err := f.Ready(t.Context(), "prod", PurposeCluster); err != nil {
		t.Errorf("after the record was read: %v", err)
	}
	f.addAnother()
	if err := f.Ready(t.Context(), "prod", PurposeCluster); err != nil {
		t.Errorf("after another recipient: %v", err)
	}
}

// addAnother adds the RSA key on device one to "prod".
func (f *fixture) addAnother() {
	f.t.Helper()
	if _, err := f.AddRecipient(f.t.Context(), "prod", AdoptRequest{Device: "one", Label: "rsa"}); err != nil {
		f.t.Fatalf("adding a recipient: %v", err)
	}
}

func TestAVersionThatIsNotReadyIsNotSealedWithOnDemand(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.configure(Settings{AcceptSingleHSM: ptr(true)})
	f.backup()
	f.rotate("two", "ec")
	for version, want := range map[int]error{1: nil, 2: ErrNotReady} {
		_, err := f.Seal(t.Context(), "prod", envelope.Context{Use: envelope.UseTransit, Version: version}, []byte("x"))
		if !errors.Is(err, want) {
			t.Errorf("version %d: %v, want %v", version, err, want)
		}
	}
}

// What a recipient too new for the record that was read can open, the old HSM opens with that record.
func TestTheRecordReadBeforeARecipientBringsBackWhatWasSealedAfter(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.configure(Settings{AcceptSingleHSM: ptr(true)})
	backup := f.backup()
	f.addTwo()
	sealed, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("secret"), nil)
	if err != nil || sealed.Recipients != 2 {
		t.Fatalf("sealed to %d recipients: %v", sealed.Recipients, err)
	}
	f.lose()
	f.restore(backup)
	opened, err := f.Unwrap(t.Context(), "prod", envelope.UseTransit, sealed.Envelope, nil)
	if err != nil || string(opened.Payload) != "secret" {
		t.Errorf("opened %q: %v", opened.Payload, err)
	}
}

func TestTheMinimumDoesNotPassTheVersionThatServesEncrypt(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.configure(Settings{BackupConfirmed: ptr(true)})
	f.backup()
	f.rotate("two", "ec")
	if key := f.configure(Settings{MinDecryptionVersion: ptr(2)}); key.EncryptVersion != 0 {
		t.Errorf("a version below the minimum serves: %+v", key)
	}
	f.configure(Settings{MinDecryptionVersion: ptr(1)})
	f.encrypts(1) // from now on some Vault depends on it
	_, err := f.Configure(t.Context(), "prod", Settings{MinDecryptionVersion: ptr(2)})
	if !errors.Is(err, ErrNotReady) || !strings.Contains(err.Error(), "set backup_confirmed=true") {
		t.Errorf("got %v, want ErrNotReady with what to do", err)
	}
	f.encrypts(1)
	f.backup()
	f.configure(Settings{MinDecryptionVersion: ptr(2), BackupConfirmed: ptr(true)})
	f.encrypts(2)
}

func TestARewrapForTransitGoesToTheVersionThatServes(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.configure(Settings{AcceptSingleHSM: ptr(true)})
	f.backup()
	sealed, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	f.rotate("two", "ec")
	for _, test := range []struct {
		name    string
		before  func()
		version int
		spent   [2]int
	}{
		{"the new version's record not read", func() {}, 1, [2]int{}},
		{"the record read", func() { f.backup() }, 2, [2]int{1, 0}},
	} {
		test.before()
		count := f.operations()
		got, err := f.Rewrap(t.Context(), "prod", sealed.Envelope, envelope.Context{Use: envelope.UseTransit})
		if err != nil || got.Version != test.version || got.Changed != (test.version != 1) {
			t.Errorf("%s: rewrapped to %+v: %v, want version %d", test.name, got.Sealed, err, test.version)
		}
		if spent := count(); spent != test.spent {
			t.Errorf("%s: %v operations, want %v", test.name, spent, test.spent)
		}
	}
}

func TestWarningsSayWhatAVersionWaitsFor(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	if f.warned("encrypt/") {
		t.Error("a key that never served encrypt/ warns of it")
	}
	f.configure(Settings{BackupConfirmed: ptr(true)})
	f.backup()
	f.rotate("two", "ec")
	if !f.warned("version 2 is not used by encrypt/ yet", "version 1", "read keys/prod/backup", "backup_confirmed=true") {
		t.Error("nothing says what version 2 waits for")
	}
	f.backup()
	if !f.warned("version 2 is not used by encrypt/ yet", "backup_confirmed=true") || f.warned("read keys/prod/backup") {
		t.Error("nothing says that version 2 waits for the confirmation only")
	}
	f.configure(Settings{BackupConfirmed: ptr(true)})
	if f.warned("encrypt/") {
		t.Error("something is said about encrypt/ although the newest version serves it")
	}
	f.addAnother()
	if !f.warned("the key record changed since it was read", "read keys/prod/backup") || f.warned("was never read") {
		t.Error("nothing says that the record lacks a recipient")
	}
	key, err := f.Get(t.Context(), "prod")
	if err != nil || key.RecordRead != nil {
		t.Errorf("the record that was read is taken for today's: %+v, %v", key.RecordRead, err)
	}
	for _, v := range key.Versions {
		if v.RecordRead == nil || v.RecordRead.By != "carol" || v.BackupConfirmed == nil || v.BackupConfirmed.By != "alice" {
			t.Errorf("version %d forgot what was acknowledged about it: %+v", v.Number, v)
		}
	}
}

// A record of a release that knew acknowledgements of the newest version only means just that.
func TestAcknowledgementsOfAnEarlierRecordCoverItsNewestVersion(t *testing.T) {
	f := newFixture(t)
	if _, err := f.store.Put(t.Context(), recordPrefix+"prod", golden(t, "record.json"), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	f.encrypts(2)
	f.devices.set("two", f.two)
	if err := f.AbandonWithoutHSM(t.Context(), "prod"); err != nil { // the version that was being made
		t.Fatal(err)
	}
	f.rotate("two", "ec")
	f.encrypts(2)
	f.configure(Settings{BackupConfirmed: ptr(true)})
	f.backup()
	f.encrypts(3)
}

// The same recipients in any order are on the same number of HSMs.
func TestAnHSMIsCountedOnceByItsSerialOrElseByItsName(t *testing.T) {
	for sentence, test := range map[string]struct {
		places []string // device/serial
		want   int
	}{
		"one":                                     {[]string{"A/s1"}, 1},
		"two keys on one":                         {[]string{"A/s1", "A/s1"}, 1},
		"two HSMs":                                {[]string{"A/s1", "B/s2"}, 2},
		"two names of one":                        {[]string{"A/s1", "B/s1"}, 1},
		"two names of one, and a second one":      {[]string{"A/s1", "B/s1", "B/s2"}, 2},
		"one name for two":                        {[]string{"A/s1", "A/s2"}, 2},
		"a name without a serial":                 {[]string{"A/", "A/"}, 1},
		"two names without a serial":              {[]string{"A/", "B/"}, 2},
		"a name that told its serial once":        {[]string{"A/", "A/s1"}, 1},
		"one that told its serial by another one": {[]string{"A/", "A/s1", "B/s1"}, 1},
		"one with a serial and one without":       {[]string{"A/s1", "B/"}, 2},
	} {
		t.Run(sentence, func(t *testing.T) {
			var public []Recipient
			var recorded []recipient
			for _, place := range test.places {
				device, serial, _ := strings.Cut(place, "/")
				public = append(public, Recipient{Device: device, Serial: serial})
				recorded = append(recorded, recipient{recipientCore: recipientCore{Device: device, Serial: serial}})
			}
			for range test.places {
				public, recorded = append(public[1:], public[0]), append(recorded[1:], recorded[0])
				slices.Reverse(public[1:])
				if got, also := CountHSMs(public), countHSMs(recorded); got != test.want || also != test.want {
					t.Errorf("%v are on %d HSMs, recorded on %d, want %d", public, got, also, test.want)
				}
			}
		})
	}
}
