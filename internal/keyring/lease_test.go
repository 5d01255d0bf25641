package keyring

import (
	"bytes"
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

const testLease = 10 * time.Minute

// newLeased is a fixture whose key "prod" serves encrypt/ and has a lease.
func newLeased(t testing.TB) *fixture {
	t.Helper()
	f := newFixture(t)
	f.server()
	f.adopt()
	f.backup()
	f.configure(Settings{AcceptSingleHSM: ptr(true), Lease: ptr(testLease)})
	return f
}

// server makes the fixture's keyring one of a process that was just started, on the bubble's clock.
func (f *fixture) server() {
	f.t.Helper()
	f.process()
	if key, err := f.Get(f.t.Context(), "prod"); err == nil && key.LatestVersion > 0 {
		if err := f.Warm(f.t.Context(), "prod"); err != nil {
			f.t.Fatalf("warming: %v", err)
		}
	}
}

func (f *fixture) openLease() {
	f.t.Helper()
	if err := f.OpenLease(f.t.Context(), "prod"); err != nil {
		f.t.Fatalf("opening a lease: %v", err)
	}
}

func (f *fixture) encrypt(payload string) Sealed {
	f.t.Helper()
	sealed, err := f.Wrap(f.t.Context(), "prod", envelope.UseTransit, []byte(payload), nil)
	if err != nil {
		f.t.Fatalf("encrypting: %v", err)
	}
	return sealed
}

func (f *fixture) decrypt(raw []byte) (string, error) {
	f.t.Helper()
	opened, err := f.Unwrap(f.t.Context(), "prod", envelope.UseTransit, raw, nil)
	return string(opened.Payload), err
}

// decrypts fails the test unless the envelope opens to that.
func (f *fixture) decrypts(raw []byte, want string) {
	f.t.Helper()
	if got, err := f.decrypt(raw); err != nil || got != want {
		f.t.Errorf("decrypted %q, %v; want %q", got, err, want)
	}
}

// spends fails the test unless do costs so many operations in both HSMs.
func (f *fixture) spends(want int, what string, do func()) {
	f.t.Helper()
	spent := f.operations()
	do()
	if got := spent(); got[0]+got[1] != want {
		f.t.Errorf("%s: %d HSM operations, want %d", what, got[0]+got[1], want)
	}
}

func TestALeaseCostsOneOperationHoweverOftenItIsUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.server()
		var first Sealed
		f.spends(1, "the first envelope, and opening the lease in the background", func() {
			if first = f.encrypt("strict"); first.Leased {
				t.Error("the first envelope waited for the HSM")
			}
			synctest.Wait()
		})
		var raws [][]byte
		f.spends(0, "100 envelopes and their openings", func() {
			for i := range 100 {
				sealed := f.encrypt(fmt.Sprint(i))
				if !sealed.Leased || sealed.Recipients != 1 {
					t.Fatalf("sealed %+v", sealed)
				}
				f.decrypts(sealed.Envelope, fmt.Sprint(i))
				raws = append(raws, sealed.Envelope)
			}
		})
		f.spends(1, "the envelope that was sealed before the lease was open", func() { f.decrypts(first.Envelope, "strict") })
		f.server()
		f.spends(1, "all of them in another process", func() {
			for i, raw := range raws {
				f.decrypts(raw, fmt.Sprint(i))
			}
		})
		leases := f.Leases()
		key, err := f.Get(t.Context(), "prod")
		if err != nil {
			t.Fatal(err)
		}
		if len(leases) != 1 || leases[0].Key != "prod" || leases[0].Version != 1 || leases[0].KID != key.Versions[0].KEK ||
			!leases[0].Until.Equal(time.Now().Add(testLease)) {
			t.Errorf("the leases are %+v", leases)
		}
		if key.Lease != testLease || key.Versions[0].KEK == "" {
			t.Errorf("the key is %+v", key)
		}
	})
}

func TestOpeningTellsWhetherALeaseDidIt(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	sealed := f.encrypt("x")
	key, err := f.Get(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	want := Opened{Context: envelope.Context{Use: envelope.UseTransit, Key: "prod", Version: 1}, Version: 1, LatestVersion: 1, KID: key.Versions[0].KEK, Recipients: 1, Leased: true}
	check := func(what string, opened Opened, err error, device string) {
		t.Helper()
		want.Device, want.Payload = device, opened.Payload
		if err != nil || fmt.Sprint(opened) != fmt.Sprint(want) || string(opened.Payload) != "x" {
			t.Errorf("%s: %+v, %v", what, opened, err)
		}
	}
	opened, err := f.Unwrap(t.Context(), "prod", envelope.UseTransit, sealed.Envelope, nil)
	check("with the lease", opened, err, "")
	opened, ok, err := f.OpenLeased("prod", sealed.Envelope, envelope.Context{Use: envelope.UseTransit})
	if !ok {
		t.Error("OpenLeased did not open it")
	}
	check("by OpenLeased", opened, err, "")
	f.EndLeases()
	if _, ok, err := f.OpenLeased("prod", sealed.Envelope, envelope.Context{Use: envelope.UseTransit}); ok || err != nil {
		t.Errorf("OpenLeased without a lease: %v, %v", ok, err)
	}
	opened, err = f.Unwrap(t.Context(), "prod", envelope.UseTransit, sealed.Envelope, nil)
	check("with the HSM", opened, err, "one")
}

func TestOpenLeasedNeverAsksAnHSMOrAStore(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	sealed := f.encrypt("x").Envelope
	transit := envelope.Context{Use: envelope.UseTransit}
	strict := func() []byte {
		raw, err := f.Wrap(t.Context(), "prod", envelope.UseWrap, []byte("x"), nil)
		if err != nil {
			t.Fatal(err)
		}
		return raw.Envelope
	}()
	f.devices.set("one", nil)
	damaged := damage(sealed)
	for _, test := range []struct {
		name  string
		raw   []byte
		want  envelope.Context
		ready func()
		ok    bool
		err   error
	}{
		{"no envelope", []byte("x"), transit, nil, true, envelope.ErrMalformed},
		{"another entrance", sealed, envelope.Context{Use: envelope.UseWrap}, nil, true, envelope.ErrContext},
		{"another caller's context", sealed, envelope.Context{Use: envelope.UseTransit, Caller: []byte("x")}, nil, true, envelope.ErrContext},
		{"a strict envelope", strict, envelope.Context{Use: envelope.UseWrap}, nil, false, nil},
		{"a damaged one", damaged, transit, nil, true, envelope.ErrDecrypt},
		{"a record that is not cached", sealed, transit, func() { f.cache.drop("prod") }, false, nil},
	} {
		if test.ready != nil {
			test.ready()
		}
		if _, ok, err := f.OpenLeased("prod", test.raw, test.want); ok != test.ok || !errors.Is(err, test.err) {
			t.Errorf("%s: %v, %v", test.name, ok, err)
		}
	}
	f.process()
	f.lookedUp()
	if _, ok, err := f.OpenLeased("prod", sealed, transit); ok || err != nil {
		t.Errorf("an authentication key that is not open: %v, %v", ok, err)
	}
}

// process is server without warming.
func (f *fixture) process() {
	f.Keyring = New(Config{Records: f.store, Devices: f.devices, CacheRecords: true, SealAuthKeys: true})
	keys := f.Keyring
	f.t.Cleanup(func() { _ = keys.Close() })
}

// lookedUp has the record cached.
func (f *fixture) lookedUp() {
	f.t.Helper()
	if _, err := f.Get(f.t.Context(), "prod"); err != nil {
		f.t.Fatal(err)
	}
}

func TestSixtyFourWhoWaitForAKEKCostOneOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		for name, lease := range map[string]time.Duration{"with a lease": testLease, "where the lease was taken away meanwhile": 0} {
			f.server()
			f.configure(Settings{Lease: &lease})
			f.one.Delay(time.Second)
			f.spends(1, name, func() {
				var all sync.WaitGroup
				for range 64 {
					all.Go(func() { f.decrypts(raw, "x") })
				}
				all.Wait()
			})
			f.one.Delay(0)
			if held := len(f.Leases()); held != map[bool]int{true: 1, false: 0}[lease > 0] {
				t.Errorf("%s: %d leases are held", name, held)
			}
		}
	})
}

func TestALeasedEnvelopeOpensWhateverTheLeaseSaysNow(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	raw := f.encrypt("x").Envelope
	f.configure(Settings{Lease: ptr(time.Duration(0))})
	if leases := f.Leases(); len(leases) != 0 {
		t.Fatalf("without a lease there are %v", leases)
	}
	f.spends(2, "two openings in strict mode", func() {
		f.decrypts(raw, "x")
		f.decrypts(raw, "x")
	})
	if leases := f.Leases(); len(leases) != 0 {
		t.Errorf("opening held %v", leases)
	}
	if f.encrypt("y").Leased {
		t.Error("in strict mode it sealed to the KEK")
	}
	f.configure(Settings{Lease: ptr(testLease)})
	key, err := f.Get(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	f.spends(1, "the lease given again, to the same KEK", func() {
		f.decrypts(raw, "x")
		f.decrypts(raw, "x")
	})
	if leases := f.Leases(); len(leases) != 1 || leases[0].KID != key.Versions[0].KEK {
		t.Errorf("held %+v, the key is %+v", leases, key)
	}
}

func TestOnlyTransitUpTo16KiBIsLeased(t *testing.T) {
	f := newLeased(t)
	f.openLease()
	for _, test := range []struct {
		use    envelope.Use
		size   int
		leased bool
	}{
		{envelope.UseTransit, 0, true},
		{envelope.UseTransit, envelope.MaxLeasedPayload, true},
		{envelope.UseTransit, envelope.MaxLeasedPayload + 1, false},
		{envelope.UseWrap, 10, false},
		{envelope.UseSeal, 10, false},
	} {
		payload := bytes.Repeat([]byte("x"), test.size)
		sealed, err := f.Wrap(t.Context(), "prod", test.use, payload, []byte("context"))
		if err != nil || sealed.Leased != test.leased {
			t.Errorf("%s, %d bytes: leased %v, %v", test.use, test.size, sealed.Leased, err)
		}
		opened, err := f.Unwrap(t.Context(), "prod", test.use, sealed.Envelope, []byte("context"))
		if err != nil || !bytes.Equal(opened.Payload, payload) || opened.Leased != test.leased {
			t.Errorf("%s, %d bytes: opened %d, %v", test.use, test.size, len(opened.Payload), err)
		}
	}
}

func TestWithTheHSMAwaySealingGoesOnAndOpeningUntilTheLeaseEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		leased := f.encrypt("leased").Envelope
		f.one.SetError(fmt.Errorf("unplugged: %w", hsm.ErrUnavailable))
		pass(testLease - time.Second)
		if !f.encrypt("y").Leased {
			t.Error("sealing did not use the lease")
		}
		f.decrypts(leased, "leased")
		synctest.Wait() // the lease was to be opened anew, which failed
		pass(time.Second)
		begun := time.Now()
		strict := f.encrypt("strict")
		if strict.Leased || time.Since(begun) != 0 {
			t.Errorf("after the lease: leased %v, took %v", strict.Leased, time.Since(begun))
		}
		if _, err := f.decrypt(leased); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("opening after the lease: %v", err)
		}
		f.one.SetError(nil)
		f.decrypts(leased, "leased")
		f.decrypts(strict.Envelope, "strict")
	})
}

func TestOpeningInTheBackgroundRestsAfterFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.one.SetError(fmt.Errorf("unplugged: %w", hsm.ErrUnavailable))
		asked := f.countDevice("one")
		for range 600 { // a Vault that seals each second for ten minutes
			if f.encrypt("x").Leased {
				t.Fatal("leased without an HSM")
			}
			pass(time.Second)
			synctest.Wait()
		}
		if got := asked(); got < 10 || got > 20 {
			t.Errorf("an HSM that was away for ten minutes was asked %d times", got)
		}
		f.one.SetError(nil)
		pass(longestRest)
		f.encrypt("x")
		synctest.Wait()
		if !f.encrypt("x").Leased {
			t.Error("the HSM is back, and there is no lease")
		}
	})
}

// countDevice counts how often a device is looked up.
func (f *fixture) countDevice(name string) func() int {
	counting := &countingDevices{Devices: f.devices, name: name}
	f.Keyring.devices = counting
	return func() int {
		counting.mu.Lock()
		defer counting.mu.Unlock()
		return counting.count
	}
}

type countingDevices struct {
	Devices
	name  string
	mu    sync.Mutex
	count int
}

func (d *countingDevices) Device(ctx context.Context, name string) (hsm.Device, error) {
	if name == d.name {
		d.mu.Lock()
		d.count++
		d.mu.Unlock()
	}
	return d.Devices.Device(ctx, name)
}

func TestALeaseIsOpenedAnewWhenItIsUsedShortlyBeforeItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		f.spends(0, "used in the first four fifths", func() {
			pass(testLease*4/5 - time.Second)
			f.decrypts(raw, "x")
			synctest.Wait()
		})
		f.spends(1, "used in the last fifth, by many", func() {
			pass(2 * time.Second)
			for range 10 {
				f.decrypts(raw, "x")
				f.encrypt("y")
			}
			synctest.Wait()
		})
		f.spends(0, "used after what would have been its end", func() {
			pass(testLease / 2)
			f.decrypts(raw, "x")
		})
		pass(testLease)
		synctest.Wait()
		if leases := f.Leases(); len(leases) != 0 {
			t.Errorf("unused, it is still there: %+v", leases)
		}
	})
}

func TestALeaseThatNobodyUsesIsWipedAtItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		l := f.theLease()
		pass(testLease - time.Second)
		synctest.Wait()
		if !l.aes.Use(noCipher) {
			t.Error("it was wiped before its end")
		}
		pass(time.Second)
		synctest.Wait()
		if l.aes.Use(noCipher) {
			t.Error("it was not wiped")
		}
	})
}

// theLease is the only lease that is held.
func (f *fixture) theLease() *lease {
	f.t.Helper()
	f.leases.mu.RLock()
	defer f.leases.mu.RUnlock()
	if len(f.leases.held) != 1 {
		f.t.Fatalf("%d leases are held", len(f.leases.held))
	}
	for _, l := range f.leases.held {
		return l
	}
	return nil
}

// The clock that timers go by stands still while the machine is suspended: in the bubble the wall clock jumps instead.
func TestASuspendedMachineDoesNotProlongALease(t *testing.T) {
	for _, used := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			f := newLeased(t)
			var jump atomic.Int64
			now := func() time.Time { return time.Now().Add(time.Duration(jump.Load())) }
			f.Keyring = New(Config{Records: f.store, Devices: f.devices, CacheRecords: true, Now: now})
			t.Cleanup(func() { _ = f.Close() })
			f.openLease()
			raw := f.encrypt("x").Envelope
			l := f.theLease()
			jump.Store(int64(testLease))
			if used {
				f.spends(1, "the first use after it", func() { f.decrypts(raw, "x") })
			} else {
				pass(sweepEvery)
				synctest.Wait()
			}
			if l.aes.Use(noCipher) {
				t.Errorf("used %v: the lease outlived its time", used)
			}
			f.EndLeases()
			f.openLease()
			jump.Store(int64(-48 * time.Hour)) // somebody sets the clock back
			l = f.theLease()
			pass(testLease)
			synctest.Wait()
			if l.aes.Use(noCipher) {
				t.Error("a clock that was set back prolonged the lease")
			}
		})
	}
}

func TestEndingLeasesWipesThemAllAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		l := f.theLease()
		f.EndLeases()
		if l.aes.Use(noCipher) || len(f.Leases()) != 0 {
			t.Error("a lease is still there")
		}
		f.one.Delay(10 * time.Second)
		f.spends(1, "ending all while one is being opened", func() {
			var all sync.WaitGroup
			for range 8 {
				all.Go(func() { f.decrypts(raw, "x") })
			}
			pass(5 * time.Second)
			f.EndLeases()
			all.Wait()
		})
		if leases := f.Leases(); len(leases) != 0 {
			t.Errorf("what was being opened is held: %+v", leases)
		}
	})
}

func TestAfterCloseTheKeyringWorksWithoutLeases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		f.EndLeases()
		f.one.Delay(time.Hour)
		f.encrypt("begins to open a lease")
		begun := time.Now()
		if err := f.Close(); err != nil || time.Since(begun) != 0 {
			t.Errorf("closing took %v: %v", time.Since(begun), err)
		}
		f.one.Delay(0)
		f.spends(1, "opening", func() { f.decrypts(raw, "x") })
		if f.encrypt("y").Leased || len(f.Leases()) != 0 {
			t.Error("there is a lease")
		}
	})
}

func TestWhoGoesAwayDoesNotFailTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		f.openLease()
		raw := f.encrypt("x").Envelope
		f.server()
		f.one.Delay(10 * time.Second)
		open := func(ctx context.Context) error {
			_, err := f.Unwrap(ctx, "prod", envelope.UseTransit, raw, nil)
			return err
		}
		f.spends(1, "the first of three goes away", func() {
			gone, leave := context.WithCancel(t.Context())
			var all sync.WaitGroup
			all.Go(func() { _ = open(gone) })
			synctest.Wait()
			for range 2 {
				all.Go(func() {
					if err := open(t.Context()); err != nil {
						t.Errorf("who waited with it: %v", err)
					}
				})
			}
			pass(time.Second)
			leave()
			all.Wait()
		})
		f.EndLeases()
		begun := time.Now()
		alone, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := open(alone); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) != time.Second {
			t.Errorf("one alone, whose time was over: %v after %v", err, time.Since(begun))
		}
		f.spends(1, "the first has less time than the operation takes, which is then not counted", func() {
			short, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			var all sync.WaitGroup
			all.Go(func() { _ = open(short) })
			synctest.Wait()
			all.Go(func() {
				if err := open(t.Context()); err != nil {
					t.Errorf("who had more time: %v", err)
				}
			})
			all.Wait()
		})
		f.EndLeases()
		f.spends(0, "all go away before it ends", func() {
			ctx, leave := context.WithCancel(t.Context())
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() {
					if err := open(ctx); !errors.Is(err, context.Canceled) {
						t.Errorf("who left: %v", err)
					}
				})
			}
			synctest.Wait()
			begun := time.Now()
			leave()
			all.Wait()
			if took := time.Since(begun); took != 0 {
				t.Errorf("leaving took %v", took)
			}
		})
	})
}

func TestALeaseHasBounds(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	for _, wrong := range []time.Duration{-time.Second, 1, time.Second, MinLease - time.Second, MinLease + 1, MaxLease + time.Second} {
		if _, err := f.Configure(t.Context(), "prod", Settings{Lease: &wrong}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v: %v", wrong, err)
		}
	}
	for _, good := range []time.Duration{MinLease, MaxLease, 0} {
		if key := f.configure(Settings{Lease: &good}); key.Lease != good {
			t.Errorf("%v became %v", good, key.Lease)
		}
	}
}

func TestGivingALeaseCostsNoOperationWhereTheAuthenticationKeyIsOpen(t *testing.T) {
	f := newFixture(t).sealed()
	f.adopt()
	f.spends(0, "in the process that made the key", func() { f.configure(Settings{Lease: ptr(testLease)}) })
	f.configure(Settings{Lease: ptr(time.Duration(0))})
	f.sealed()
	f.spends(0, "a KEK that is there", func() { f.configure(Settings{Lease: ptr(testLease)}) })
	g := newFixture(t).sealed()
	g.adopt()
	g.sealed()
	g.spends(1, "in another process, the authentication key", func() { g.configure(Settings{Lease: ptr(testLease)}) })
}

func TestAShorterLeaseEndsWhatIsHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newLeased(t)
		command := New(Config{Records: f.store, Devices: f.devices, SealAuthKeys: true}) // another process
		set := func(lease time.Duration) {
			t.Helper()
			if _, err := command.Configure(t.Context(), "prod", Settings{Lease: &lease, By: "alice"}); err != nil {
				t.Fatal(err)
			}
			f.Invalidate("prod")
			synctest.Wait()
		}
		f.openLease()
		l := f.theLease()
		set(time.Minute)
		if !l.aes.Use(noCipher) {
			t.Error("a shorter lease ended at once")
		}
		pass(time.Minute)
		synctest.Wait()
		if l.aes.Use(noCipher) {
			t.Error("it outlived the shorter lease")
		}
		f.openLease()
		l = f.theLease()
		set(0)
		if l.aes.Use(noCipher) {
			t.Error("without a lease it was still held")
		}
		set(testLease)
		f.one.Delay(time.Second)
		f.encrypt("begins to open a lease")
		set(0)
		pass(time.Second)
		synctest.Wait()
		if leases := f.Leases(); len(leases) != 0 {
			t.Errorf("what was being opened when the lease was taken away is held: %+v", leases)
		}
		f.one.Delay(0)
		set(testLease)
		f.openLease()
		l = f.theLease()
		if _, err := command.Configure(t.Context(), "prod", Settings{DeletionAllowed: ptr(true)}); err != nil {
			t.Fatal(err)
		}
		if err := command.Delete(t.Context(), "prod", DeleteRequest{}); err != nil {
			t.Fatal(err)
		}
		f.Invalidate("")
		synctest.Wait()
		if l.aes.Use(noCipher) {
			t.Error("the key was deleted and its lease is held")
		}
	})
}

// damage returns an envelope with a character of its ciphertext changed.
func damage(raw []byte) []byte {
	damaged := bytes.Clone(raw)
	at := bytes.Index(raw, []byte(`"ciphertext":"`)) + len(`"ciphertext":"`)
	if damaged[at] == 'A' {
		damaged[at] = 'B'
	} else {
		damaged[at] = 'A'
	}
	return damaged
}

// pass lets time pass on the bubble's clock.
func pass(d time.Duration) { <-time.After(d) }

// noCipher uses a key for nothing, to see whether it is there.
func noCipher(cipher.Block) {}

func TestLeasesWorkWhileEverythingChanges(t *testing.T) {
	f := newLeased(t)
	f.addTwo()
	f.openLease()
	raws := [][]byte{f.encrypt("x").Envelope, f.wrap("x")}
	done := make(chan struct{})
	var users, changes sync.WaitGroup
	for i := range 8 {
		users.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				sealed, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("x"), nil)
				if err != nil {
					t.Errorf("encrypting: %v", err)
					return
				}
				for _, raw := range [][]byte{raws[0], sealed.Envelope} {
					opened, err := f.Unwrap(t.Context(), "prod", envelope.UseTransit, raw, nil)
					if err != nil || string(opened.Payload) != "x" {
						t.Errorf("decrypting: %q, %v", opened.Payload, err)
						return
					}
					clear(opened.Payload)
				}
				if i == 0 {
					_ = f.Leases()
				}
			}
		})
	}
	change := func(do func(n int)) {
		changes.Go(func() {
			for n := range 30 {
				do(n)
			}
		})
	}
	change(func(int) { f.EndLeases() })
	change(func(int) { f.Invalidate("") })
	change(func(n int) {
		lease := testLease
		if n%3 == 0 {
			lease = 0
		}
		if _, err := f.Configure(t.Context(), "prod", Settings{Lease: &lease}); err != nil {
			t.Errorf("configuring: %v", err)
		}
	})
	change(func(int) {
		if err := f.OpenLease(t.Context(), "prod"); err != nil {
			t.Errorf("opening the lease: %v", err)
		}
	})
	changes.Wait()
	close(done)
	users.Wait()
	if err := f.Close(); err != nil || len(f.Leases()) != 0 {
		t.Errorf("closing: %v, %d leases", err, len(f.Leases()))
	}
}
