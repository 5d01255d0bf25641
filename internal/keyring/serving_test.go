package keyring

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func TestADeferredRestoreAsksNoHSM(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	leased := f.encrypt("leased").Envelope
	backup := f.backup()
	f.lose()
	f.process()
	f.one.SetError(fmt.Errorf("away: %w", hsm.ErrUnavailable))
	request := RestoreRequest{Record: backup.Record, SHA256: backup.SHA256, By: "plugin"}
	if _, err := f.Restore(t.Context(), "prod", request); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("without Deferred: %v", err)
	}
	request.Deferred = true
	f.spends(0, "restoring", func() {
		key, err := f.Restore(t.Context(), "prod", request)
		if err != nil {
			t.Fatal(err)
		}
		if key.Versions[0].KEK == "" {
			t.Error("the KEK did not come along")
		}
	})
	if _, err := f.Configure(t.Context(), "prod", Settings{AcceptSingleHSM: ptr(true)}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseSeal, []byte("x"), nil); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("sealing before the HSM was there once: %v", err)
	}
	f.one.SetError(nil)
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseSeal, []byte("x"), nil); err != nil {
		t.Errorf("sealing with the HSM back: %v", err)
	}
	f.one.SetError(fmt.Errorf("away: %w", hsm.ErrUnavailable))
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseSeal, []byte("x"), nil); err != nil {
		t.Errorf("sealing with the HSM away again: %v", err)
	}
	f.one.SetError(nil)
	f.decrypts(leased, "leased")
	wrong := request
	wrong.SHA256 = strings.Repeat("0", 64)
	f.lose()
	f.process()
	if _, err := f.Restore(t.Context(), "prod", wrong); !errors.Is(err, ErrRecordMismatch) {
		t.Errorf("another SHA-256: %v", err)
	}
}

func TestASealOfOpenBaoWantsAKeyThatIsReady(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseSeal, []byte("x"), nil); !errors.Is(err, ErrNotReady) {
		t.Errorf("a key whose record nobody has: %v", err)
	}
	f.backup()
	f.configure(Settings{AcceptSingleHSM: ptr(true)})
	sealed, err := f.Wrap(t.Context(), "prod", envelope.UseSeal, []byte("x"), []byte("aad"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := f.Get(t.Context(), "prod")
	if err != nil || !key.Versions[0].ServedEncrypt {
		t.Errorf("it is not noted that others depend on the version: %+v, %v", key, err)
	}
	opened, err := f.Unwrap(t.Context(), "prod", envelope.UseSeal, sealed.Envelope, []byte("aad"))
	if err != nil || string(opened.Payload) != "x" {
		t.Errorf("opened %q, %v", opened.Payload, err)
	}
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseTransit, sealed.Envelope, []byte("aad")); !errors.Is(err, envelope.ErrContext) {
		t.Errorf("it opened at decrypt/: %v", err)
	}
}

func TestWarmingOpensTheAuthenticationKeysOfAllVersions(t *testing.T) {
	f := newFixture(t).sealed()
	f.adopt()
	first := f.wrap("first")
	f.rotate("one", "rsa")
	f.rotate("two", "ec")
	f.sealed()
	f.spends(3, "warming three versions", func() {
		if err := f.Warm(t.Context(), "prod"); err != nil {
			t.Fatal(err)
		}
	})
	f.spends(1, "opening an old envelope then", func() { f.unwrapped(first) })
	f.sealed()
	f.devices.set("one", nil)
	if err := f.Warm(t.Context(), "prod"); err != nil {
		t.Errorf("the HSM of old versions alone is away: %v", err)
	}
	f.sealed()
	f.devices.set("one", f.one)
	f.devices.set("two", nil)
	if err := f.Warm(t.Context(), "prod"); err == nil {
		t.Error("the HSM of the newest version is away, and that is no error")
	}
}

func TestTwoHSMsShareAStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.adopt()
		f.addTwo()
		raw := f.wrap("x")
		f.one.Delay(time.Second)
		f.two.Delay(time.Second)
		spent := f.operations()
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if got := f.unwrapped(raw); got != "x" {
					t.Errorf("unwrapped %q", got)
				}
			})
			synctest.Wait()
		}
		all.Wait()
		if got := spent(); got != [2]int{10, 10} {
			t.Errorf("the operations were %v", got)
		}
	})
}

func TestAnHSMThatIsAwayIsSaidOnceInAWhile(t *testing.T) {
	var log strings.Builder
	f := newFixture(t)
	f.adopt()
	raw := f.wrap("x")
	f.Keyring = New(Config{Records: f.store, Devices: f.devices, Now: f.clock.Now, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	open := func() { _, _ = f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx")) }
	said := func() int { return strings.Count(log.String(), "a recipient did not open an envelope") }
	f.one.SetError(fmt.Errorf("away: %w", hsm.ErrUnavailable))
	for range 30 {
		open()
		f.clock.advance(time.Second)
	}
	if got := said(); got != 3 || !strings.Contains(log.String(), "unsaid=9") {
		t.Errorf("in 30 s it was said %d times:\n%s", got, log.String())
	}
	f.one.SetError(nil)
	open()
	f.one.SetError(fmt.Errorf("away: %w", hsm.ErrUnavailable))
	if open(); said() != 4 {
		t.Error("it was back, and that it went away again was not said")
	}
	f.one.SetError(nil)
	damaged := damage(raw)
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, damaged, []byte("ctx")); !errors.Is(err, envelope.ErrDecrypt) || said() != 4 {
		t.Errorf("an envelope that does not decrypt: %v\n%s", err, log.String())
	}
}
