package keyring

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

var errCrashed = errors.New("crashed")

// crash makes the at-th call to store or device fail: before it did anything, or after it did it all. Where dead is
// wanted every later call fails as well, as it does for a process that is no more.
type crash struct {
	mu     sync.Mutex
	at     int // 0 for never
	after  bool
	deadly bool

	calls int
	dead  bool
}

func (c *crash) do(f func() error) error {
	c.mu.Lock()
	c.calls++
	hit := c.calls == c.at
	dead := c.dead
	c.dead = dead || (hit && c.deadly)
	c.mu.Unlock()
	if dead || (hit && !c.after) {
		return errCrashed
	}
	err := f()
	if hit {
		return errCrashed
	}
	return err
}

type crashStore struct {
	store.Store
	crash *crash
}

func (s *crashStore) Get(ctx context.Context, name string) (entry store.Entry, err error) {
	err = s.crash.do(func() error { entry, err = s.Store.Get(ctx, name); return err })
	return entry, err
}

func (s *crashStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (r store.Revision, err error) {
	err = s.crash.do(func() error { r, err = s.Store.Put(ctx, name, value, expected); return err })
	return r, err
}

func (s *crashStore) List(ctx context.Context, prefix string) (names []string, err error) {
	err = s.crash.do(func() error { names, err = s.Store.List(ctx, prefix); return err })
	return names, err
}

func (s *crashStore) Delete(ctx context.Context, name string, expected store.Revision) error {
	return s.crash.do(func() error { return s.Store.Delete(ctx, name, expected) })
}

// crashDevice is a device with elliptic-curve keys only.
type crashDevice struct {
	hsm.Device
	crash *crash
}

func (d *crashDevice) FindKeys(ctx context.Context, query hsm.KeyQuery) (keys []hsm.Key, err error) {
	err = d.crash.do(func() error { keys, err = d.Device.FindKeys(ctx, query); return err })
	for i := range keys {
		keys[i] = &crashKey{Agreer: keys[i].(hsm.Agreer), crash: d.crash}
	}
	return keys, err
}

func (d *crashDevice) GenerateKey(ctx context.Context, spec hsm.KeySpec) (key hsm.Key, err error) {
	err = d.crash.do(func() error { key, err = d.Device.GenerateKey(ctx, spec); return err })
	if err != nil {
		return nil, err
	}
	return &crashKey{Agreer: key.(hsm.Agreer), crash: d.crash}, nil
}

func (d *crashDevice) DeleteKey(ctx context.Context, ref hsm.KeyRef) error {
	return d.crash.do(func() error { return d.Device.DeleteKey(ctx, ref) })
}

type crashKey struct {
	hsm.Agreer
	crash *crash
}

func (k *crashKey) Agree(ctx context.Context, peer *ecdh.PublicKey) (z []byte, err error) {
	err = k.crash.do(func() error { z, err = k.Agreer.Agree(ctx, peer); return err })
	return z, err
}

// bench is a keyring whose store and device may crash.
type bench struct {
	t     *testing.T
	store store.Store
	token *hsmtest.Memory
	crash *crash
	*Keyring
}

// start makes the keyring of a new process, which may crash in its turn.
func (b *bench) start(c *crash) {
	b.crash = c
	all := &devices{}
	all.set("one", &crashDevice{Device: b.token, crash: c})
	b.Keyring = New(Config{Records: &crashStore{Store: b.store, crash: c}, Devices: all})
}

// atEveryCrash prepares, runs the action with a crash at its first call to the outside, then its second and so on until
// it ends without one, and after each lets a new process check what was left. All four kinds of crash take part.
func atEveryCrash(t *testing.T, prepare func(b *bench), action func(b *bench) error, check func(b *bench)) {
	t.Helper()
	for _, kind := range []*crash{{}, {after: true}, {deadly: true}, {after: true, deadly: true}} {
		for at := 1; ; at++ {
			if at > 200 {
				t.Fatal("the action does not come to an end")
			}
			b := &bench{t: t, store: newStore(t), token: hsmtest.NewMemory()}
			b.start(&crash{})
			prepare(b)
			b.start(&crash{at: at, after: kind.after, deadly: kind.deadly})
			err := action(b)
			crashed := b.crash.calls >= at
			b.start(&crash{})
			name := fmt.Sprintf("crash at call %d, after it did its work: %v, for good: %v", at, kind.after, kind.deadly)
			if !t.Run(name, func(t *testing.T) { b.t = t; check(b) }) {
				return
			}
			if !crashed {
				if err != nil {
					t.Fatalf("without a crash: %v", err)
				}
				break
			}
		}
	}
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// works wraps and unwraps with the key.
func (b *bench) works() {
	b.t.Helper()
	sealed, err := b.Wrap(b.t.Context(), "prod", envelope.UseWrap, []byte("secret"), nil)
	b.must(err)
	opened, err := b.Unwrap(b.t.Context(), "prod", envelope.UseWrap, sealed.Envelope, nil)
	b.must(err)
	if string(opened.Payload) != "secret" {
		b.t.Errorf("opened %q", opened.Payload)
	}
}

func (b *bench) hsmKeyCount(want int) {
	b.t.Helper()
	if got := hsmKeys(b.t, b.token); len(got) != want {
		b.t.Errorf("%d keys on the HSM, want %d", len(got), want)
	}
}

var generateP256 = GenerateRequest{Device: "one", Algorithm: hsm.ECDHP256, By: "alice"}

func TestACrashWhileAKeyIsMadeEndsWithExactlyOneHSMKey(t *testing.T) {
	making := func(b *bench) error {
		if _, err := b.Begin(b.t.Context(), "prod", generateP256); err != nil {
			return err
		}
		_, err := b.Finish(b.t.Context(), "prod")
		return err
	}
	t.Run("begun again and finished", func(t *testing.T) {
		atEveryCrash(t, func(*bench) {}, making, func(b *bench) {
			key, err := b.Get(b.t.Context(), "prod")
			if errors.Is(err, ErrKeyNotFound) || (err == nil && key.State == StateGenerating) {
				b.must(making(b))
			} else {
				b.must(err)
			}
			key, err = b.Finish(b.t.Context(), "prod")
			b.must(err)
			if key.State != StateReady || key.LatestVersion != 1 {
				b.t.Errorf("ended as %+v", key)
			}
			b.hsmKeyCount(1)
			b.works()
		})
	})
	t.Run("abandoned", func(t *testing.T) {
		atEveryCrash(t, func(*bench) {}, making, func(b *bench) {
			b.must(b.Abandon(b.t.Context(), "prod"))
			switch _, err := b.Get(b.t.Context(), "prod"); {
			case errors.Is(err, ErrKeyNotFound):
				b.hsmKeyCount(0)
			default: // it was ready already
				b.must(err)
				b.hsmKeyCount(1)
				b.works()
			}
		})
	})
}

func TestACrashWhileAKeyIsAbandonedLeavesNothing(t *testing.T) {
	prepare := func(b *bench) {
		_, err := b.Begin(b.t.Context(), "prod", generateP256)
		b.must(err)
		// The HSM key is made, the record is not: the store goes away for the last write.
		b.Keyring.records.(*crashStore).Store = &lastWrite{Store: b.store}
		if _, err := b.Finish(b.t.Context(), "prod"); !errors.Is(err, store.ErrUnavailable) {
			b.t.Fatalf("finishing without a store: %v", err)
		}
		b.hsmKeyCount(1)
	}
	abandon := func(b *bench) error { return b.Abandon(b.t.Context(), "prod") }
	atEveryCrash(t, prepare, abandon, func(b *bench) {
		if _, err := b.Finish(b.t.Context(), "prod"); err == nil { // it had not been written down yet
			b.hsmKeyCount(1)
			b.works()
			return
		}
		b.must(abandon(b))
		b.hsmKeyCount(0)
		if _, err := b.Get(b.t.Context(), "prod"); !errors.Is(err, ErrKeyNotFound) {
			b.t.Errorf("the record is left: %v", err)
		}
	})
}

// lastWrite is a store that takes one more write.
type lastWrite struct {
	store.Store
	full bool
}

func (s *lastWrite) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if s.full {
		return store.NoRevision, store.ErrUnavailable
	}
	s.full = true
	return s.Store.Put(ctx, name, value, expected)
}

func TestACrashWhileAKeyIsRotatedLosesNothing(t *testing.T) {
	var old []byte
	prepare := func(b *bench) {
		_, err := b.Begin(b.t.Context(), "prod", generateP256)
		b.must(err)
		_, err = b.Finish(b.t.Context(), "prod")
		b.must(err)
		sealed, err := b.Wrap(b.t.Context(), "prod", envelope.UseWrap, []byte("old"), nil)
		b.must(err)
		old = sealed.Envelope
	}
	request := generateP256
	request.RequestID = "rotation"
	rotate := func(b *bench) error {
		if _, err := b.Rotate(b.t.Context(), "prod", RotateRequest{Generate: &request}); err != nil {
			return err
		}
		_, err := b.Finish(b.t.Context(), "prod")
		return err
	}
	atEveryCrash(t, prepare, rotate, func(b *bench) {
		opened, err := b.Unwrap(b.t.Context(), "prod", envelope.UseWrap, old, nil)
		b.must(err)
		if string(opened.Payload) != "old" {
			b.t.Errorf("opened %q", opened.Payload)
		}
		b.works()
		for range 3 { // as the API client sends it
			b.must(rotate(b))
		}
		key, err := b.Get(b.t.Context(), "prod")
		b.must(err)
		if key.LatestVersion != 2 || key.State != StateReady {
			b.t.Errorf("ended as %+v", key)
		}
		b.hsmKeyCount(2)
		b.works()
	})
}

func TestACrashWhileAKeyIsDeletedIsFinishedByTheNextDelete(t *testing.T) {
	prepare := func(b *bench) {
		_, err := b.Begin(b.t.Context(), "prod", generateP256)
		b.must(err)
		_, err = b.Finish(b.t.Context(), "prod")
		b.must(err)
		second := generateP256
		_, err = b.Rotate(b.t.Context(), "prod", RotateRequest{Generate: &second})
		b.must(err)
		_, err = b.Finish(b.t.Context(), "prod")
		b.must(err)
		_, err = b.Configure(b.t.Context(), "prod", Settings{DeletionAllowed: ptr(true)})
		b.must(err)
	}
	remove := func(b *bench) error { return b.Delete(b.t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true}) }
	atEveryCrash(t, prepare, remove, func(b *bench) {
		if key, err := b.Get(b.t.Context(), "prod"); err == nil && key.State == StateDeleting {
			_, err := b.Wrap(b.t.Context(), "prod", envelope.UseWrap, nil, nil)
			if !errors.Is(err, ErrDeleting) {
				b.t.Errorf("sealing with a half-deleted key: %v", err)
			}
		}
		if err := remove(b); err != nil && !errors.Is(err, ErrKeyNotFound) {
			b.t.Fatal(err)
		}
		b.hsmKeyCount(0)
		if names, err := b.List(b.t.Context()); err != nil || len(names) != 0 {
			b.t.Errorf("left: %v, %v", names, err)
		}
	})
}

func TestACrashOfAnyOtherChangeLosesNothing(t *testing.T) {
	var old []byte
	prepare := func(b *bench) {
		b.token.AddEC(b.t, "first", "01", ecdh.P256())
		b.token.AddEC(b.t, "second", "02", ecdh.P384())
		b.token.AddEC(b.t, "third", "03", ecdh.P384())
		_, err := b.Adopt(b.t.Context(), "prod", AdoptRequest{Device: "one", Label: "first"})
		b.must(err)
		sealed, err := b.Wrap(b.t.Context(), "prod", envelope.UseWrap, []byte("old"), nil)
		b.must(err)
		old = sealed.Envelope
	}
	for name, change := range map[string]func(b *bench) error{
		"adding a recipient": func(b *bench) error {
			_, err := b.AddRecipient(b.t.Context(), "prod", AdoptRequest{Device: "one", Label: "second", RequestID: "r1"})
			return err
		},
		"rotating to a key that exists": func(b *bench) error {
			_, err := b.Rotate(b.t.Context(), "prod", RotateRequest{
				Adopt: &AdoptRequest{Device: "one", Label: "third", RequestID: "r2"},
			})
			return err
		},
		"configuring": func(b *bench) error {
			_, err := b.Configure(b.t.Context(), "prod", Settings{AcceptSingleHSM: ptr(true)})
			return err
		},
		"reading the key record": func(b *bench) error {
			_, err := b.Backup(b.t.Context(), "prod", "carol")
			return err
		},
		"adopting again": func(b *bench) error {
			_, err := b.Adopt(b.t.Context(), "prod", AdoptRequest{Device: "one", Label: "first"})
			return err
		},
		"rewrapping": func(b *bench) error {
			_, err := b.Rewrap(b.t.Context(), "prod", old, envelope.Context{Use: envelope.UseWrap})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			atEveryCrash(t, prepare, change, func(b *bench) {
				opened, err := b.Unwrap(b.t.Context(), "prod", envelope.UseWrap, old, nil)
				b.must(err)
				if string(opened.Payload) != "old" {
					b.t.Errorf("opened %q", opened.Payload)
				}
				b.must(change(b))
				b.works()
				b.hsmKeyCount(3)
			})
		})
	}
}

// As commands do: the request has an id, so that who comes when the key is made is known, and processes take turns by a lock.
func TestManyAtOnceMakeOneHSMKey(t *testing.T) {
	b := &bench{t: t, store: newStore(t), token: hsmtest.NewMemory()}
	b.start(&crash{})
	other := &bench{t: t, store: b.store, token: b.token} // a second process
	other.start(&crash{})
	for _, process := range []*bench{b, other} {
		process.lock = b.store.(*file.Store).Lock
	}
	request := generateP256
	request.RequestID = "sent by all"
	var wait sync.WaitGroup
	for i := range 8 {
		keyring := []*Keyring{b.Keyring, other.Keyring}[i%2]
		wait.Go(func() {
			if _, err := keyring.Begin(t.Context(), "prod", request); err != nil {
				t.Errorf("beginning: %v", err)
				return
			}
			if _, err := keyring.Finish(t.Context(), "prod"); err != nil {
				t.Errorf("finishing: %v", err)
			}
		})
	}
	wait.Wait()
	b.hsmKeyCount(1)
	b.works()
	key, err := b.Get(t.Context(), "prod")
	if err != nil || key.LatestVersion != 1 {
		t.Errorf("ended as %+v, %v", key, err)
	}
}

func TestConcurrentChangesAreAllKept(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	other := New(Config{Records: f.store, Devices: f.devices, Now: f.clock.Now})
	var wait sync.WaitGroup
	for _, change := range []func() error{
		func() error {
			_, err := f.Configure(t.Context(), "prod", Settings{DeletionAllowed: ptr(true)})
			return err
		},
		func() error {
			_, err := other.Configure(t.Context(), "prod", Settings{AcceptSingleHSM: ptr(true)})
			return err
		},
		func() error {
			_, err := other.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "two", Label: "ec"})
			return err
		},
		func() error {
			_, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "two", Label: "rsa"})
			return err
		},
	} {
		wait.Go(func() {
			if err := change(); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	key, err := f.Get(t.Context(), "prod")
	if err != nil || !key.DeletionAllowed || key.AcceptSingleHSM == nil || len(key.Versions[0].Recipients) != 3 {
		t.Errorf("ended as %+v, %v", key, err)
	}
	for _, device := range []string{"one", "two"} { // each recipient can open the authentication envelope
		if !slices.ContainsFunc(key.Versions[0].Recipients, func(r Recipient) bool { return r.Device == device }) {
			t.Errorf("no recipient on %q", device)
		}
	}
}
