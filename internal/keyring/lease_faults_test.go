package keyring

import (
	"context"
	"encoding/base64"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// withoutSecond returns a leased envelope whose KEK no longer opens with the second of its two recipients.
func withoutSecond(t *testing.T, raw []byte) []byte {
	t.Helper()
	b64 := base64.RawURLEncoding
	const begin = `{"protected":"`
	protected, rest, _ := strings.Cut(string(raw[len(begin):]), `"`)
	header, err := b64.DecodeString(protected)
	if err != nil {
		t.Fatal(err)
	}
	before, kek, _ := strings.Cut(string(header), `"kek":"`)
	kek, after, _ := strings.Cut(kek, `"`)
	sealed, err := b64.DecodeString(kek)
	if err != nil {
		t.Fatal(err)
	}
	const member = `"encrypted_key":"`
	at := strings.LastIndex(string(sealed), member) + len(member)
	copy(sealed[at:], "AAAAAAAA")
	header = []byte(before + `"kek":"` + b64.EncodeToString(sealed) + `"` + after)
	return []byte(begin + b64.EncodeToString(header) + `"` + rest)
}

// Who may ask for openings decides what KEK is opened, and a copy of ours that opens on one HSM alone is still ours.
func TestWhatIsSealedCarriesTheKEKOfTheRecordWhicheverCopyWasOpened(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.addTwo()
		f.openLease()
		crippled := withoutSecond(t, f.encrypt("x").Envelope)
		f.EndLeases()
		if _, err := f.decrypt(crippled); err == nil {
			t.Fatal("an envelope that was changed opened")
		}
		first := f.encrypt("sealed at once").Envelope
		synctest.Wait()
		leased := f.encrypt("sealed later")
		if !leased.Leased {
			t.Error("a copy that was changed keeps the lease from being opened")
		}
		pass(testLease - time.Minute) // its last fifth
		f.encrypt("renews")
		synctest.Wait()
		last := f.encrypt("sealed after a renewal").Envelope
		f.EndLeases()
		f.devices.set("one", nil)
		f.decrypts(first, "sealed at once")
		f.decrypts(leased.Envelope, "sealed later")
		f.decrypts(last, "sealed after a renewal")
	})
}

// panics is a device of which a provider's mistake comes out once.
type panics struct {
	Devices
	once sync.Once
}

func (p *panics) Device(ctx context.Context, name string) (hsm.Device, error) {
	p.once.Do(func() { pass(time.Second); panic("a mistake") })
	return p.Devices.Device(ctx, name)
}

func TestAPanicWhileAKEKIsOpenedLeavesNobodyWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		f.EndLeases()
		f.Keyring.devices = &panics{Devices: f.devices}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		open := func() error {
			_, err := f.Unwrap(ctx, "prod", envelope.UseTransit, raw, nil)
			return err
		}
		var all sync.WaitGroup
		all.Go(func() {
			defer func() {
				if recover() == nil {
					t.Error("the panic was swallowed")
				}
			}()
			_ = open()
		})
		synctest.Wait()
		all.Go(func() {
			if err := open(); err == nil || ctx.Err() != nil {
				t.Errorf("who waited: %v", err)
			}
		})
		all.Wait()
		if err := open(); err != nil {
			t.Errorf("who comes later: %v", err)
		}
	})
}

func TestARecordThatIsReadAnewMeanwhileDoesNotCostTheLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		f.EndLeases()
		f.one.Delay(time.Second)
		f.spends(1, "two openings, and between them somebody wrote the record of a key", func() {
			var all sync.WaitGroup
			all.Go(func() { f.decrypts(raw, "x") })
			synctest.Wait()
			f.Invalidate("")
			all.Wait()
			f.decrypts(raw, "x")
		})
	})
}

// Whoever looked the record up before the lease was taken away may open the KEK only afterwards.
func TestALeaseThatWasTakenAwayJustBeforeItIsOpenedIsNotHeld(t *testing.T) {
	for name, takeAway := range map[string]func(f *fixture){
		"by its setting": func(f *fixture) { f.configure(Settings{Lease: ptr(time.Duration(0))}) },
		"with the wrapping key": func(f *fixture) {
			f.configure(Settings{DeletionAllowed: ptr(true)})
			if err := f.Delete(f.t.Context(), "prod", DeleteRequest{}); err != nil {
				f.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newLeased(t)
			rec, err := f.lookup(t.Context(), "prod")
			if err != nil {
				t.Fatal(err)
			}
			auth, err := f.authKey(t.Context(), rec, 1)
			if err != nil {
				t.Fatal(err)
			}
			f.openLease()
			takeAway(f)
			if held := f.Leases(); len(held) != 0 {
				t.Errorf("still open: %+v", held)
			}
			opened, leave, err := f.openKEK(t.Context(), rec, rec.version(1), rec.version(1).kek, auth)
			if err != nil {
				t.Fatal(err)
			}
			if !opened.aes.Use(noCipher) {
				t.Error("it is wiped before it was used")
			}
			leave()
			if held := f.Leases(); len(held) != 0 || opened.aes.Use(noCipher) {
				t.Errorf("held %+v, or not wiped", held)
			}
		})
	}
}

func TestAnOpenLeaseOpensNoVersionThatIsTooOld(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	raw := f.encrypt("x").Envelope
	f.rotate("two", "rsa")
	f.backup()
	f.configure(Settings{MinDecryptionVersion: ptr(2)})
	f.lookedUp()
	if len(f.Leases()) == 0 {
		t.Fatal("no lease is open")
	}
	if _, ok, err := f.OpenLeased("prod", raw, envelope.Context{Use: envelope.UseTransit}); ok || err != nil {
		t.Errorf("OpenLeased: %v, %v", ok, err)
	}
	if _, err := f.decrypt(raw); !errors.Is(err, ErrVersionTooOld) {
		t.Errorf("opening: %v", err)
	}
}

// A record that another process wrote says what holds from when it is read, also before [Keyring.Invalidate] is heard.
func TestALeaseThatAnotherProcessMadeShorterEndsWhenTheRecordIsRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		other := New(Config{Records: f.store, Devices: f.devices, SealAuthKeys: true})
		if _, err := other.Configure(t.Context(), "prod", Settings{Lease: ptr(MinLease)}); err != nil {
			t.Fatal(err)
		}
		f.cache.drop("prod")
		f.spends(0, "within it", func() { f.decrypts(raw, "x") })
		pass(MinLease)
		f.spends(1, "after it", func() { f.decrypts(raw, "x") })
	})
}

// Only who has the authentication key can make one, which is no reason to hold it under a wrong name.
func TestAKEKThatIsNotTheOneItNamesIsNotHeld(t *testing.T) {
	f := newLeased(t)
	rec, err := f.lookup(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	auth, err := f.authKey(t.Context(), rec, 1)
	if err != nil {
		t.Fatal(err)
	}
	v := rec.version(1)
	raw, err := envelope.Seal(v.kek.Envelope().Context(), v.sealTo(), auth, envelope.NewKEK())
	if err != nil {
		t.Fatal(err)
	}
	other, err := envelope.ParseKEK(raw)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.openKEK(t.Context(), rec, v, other, auth); !errors.Is(err, envelope.ErrNotAuthentic) || len(f.Leases()) != 0 {
		t.Errorf("opened: %v; held %+v", err, f.Leases())
	}
}

// An HSM key that is being made must find room for its version, and a key record for what a restore adds.
func TestALeaseLeavesRoomForAnotherVersion(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	if _, err := f.update(t.Context(), "prod", func(rec *record) error {
		raw, err := rec.encode()
		rec.CreatedBy = strings.Repeat("x", store.MaxValueSize-room-len(raw))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Configure(t.Context(), "prod", Settings{Lease: ptr(testLease)}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a lease that takes its room: %v", err)
	}
	if key, err := f.Get(t.Context(), "prod"); err != nil || key.Lease != 0 || key.Versions[0].KEK != "" {
		t.Errorf("the lease is %v, the KEK %q, %v", key.Lease, key.Versions[0].KEK, err)
	}
	if _, err := f.Configure(t.Context(), "prod", Settings{DeletionAllowed: ptr(true)}); err != nil {
		t.Errorf("what takes no room: %v", err)
	}
}

func TestARecordOfANewerReleaseIsNotCalledDamagedAlone(t *testing.T) {
	f := newLeased(t)
	rec, err := f.lookup(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := rec.encode()
	if err != nil {
		t.Fatal(err)
	}
	raw = append([]byte(`{"later":1,`), raw[1:]...)
	if _, err := decodeRecord("prod", raw); !errors.Is(err, ErrRecordMalformed) || !strings.Contains(err.Error(), "newer release") {
		t.Errorf("read: %v", err)
	}
}

// Several wrapping keys may share an HSM key, so recipients do not tell their KEKs apart.
func TestARecordTakesNoKEKOfAnotherKeyOrVersion(t *testing.T) {
	f := newLeased(t)
	rec, err := f.lookup(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	for name, made := range map[string]envelope.Context{
		"of another key":     {Key: "other", Version: 1},
		"of another version": {Key: "prod", Version: 2},
	} {
		kek, err := envelope.SealKEK(made.Key, made.Version, rec.version(1).sealTo(), envelope.NewAuthKey(), envelope.NewKEK())
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.update(t.Context(), "prod", func(rec *record) error {
			rec.version(1).KEKEnvelope = kek.Raw()
			return nil
		})
		if !errors.Is(err, ErrRecordMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestADamagedCopyOfAKEKFailsNobodyWhoHasItWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		whole := f.encrypt("x").Envelope
		broken := withoutSecond(t, whole) // of one recipient it is the only one's
		f.EndLeases()
		f.one.Delay(time.Second)
		var all sync.WaitGroup
		all.Go(func() {
			if _, err := f.decrypt(broken); !errors.Is(err, envelope.ErrDecrypt) {
				t.Errorf("the damaged one: %v", err)
			}
		})
		synctest.Wait()
		for range 3 {
			all.Go(func() { f.decrypts(whole, "x") })
		}
		all.Wait()
	})
}

func TestWhoGoesAwayAloneIsNotHeldUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		f.EndLeases()
		f.one.Delay(time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, leave)
		begun := time.Now()
		_, err := f.Unwrap(ctx, "prod", envelope.UseTransit, raw, nil)
		if !errors.Is(err, context.Canceled) || time.Since(begun) != time.Second {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
	})
}
