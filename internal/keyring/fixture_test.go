package keyring

import (
	"context"
	"crypto/ecdh"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// devices is a map of open devices.
type devices struct {
	mu  sync.Mutex
	all map[string]hsm.Device
}

func (d *devices) Device(_ context.Context, name string) (hsm.Device, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	device, ok := d.all[name]
	if !ok {
		return nil, fmt.Errorf("looking it up: %w", ErrNoDevice)
	}
	return device, nil
}

func (d *devices) set(name string, device hsm.Device) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.all == nil {
		d.all = map[string]hsm.Device{}
	}
	if device == nil {
		delete(d.all, name)
		return
	}
	d.all[name] = device
}

// fixture is a keyring over a file store with two devices, each with an elliptic-curve key and an RSA key.
type fixture struct {
	*Keyring
	t       testing.TB
	store   store.Store
	devices *devices
	one     *hsmtest.Memory // "one": keys "ec" (id 01) and "rsa" (id 02)
	two     *hsmtest.Memory // "two": keys "ec" (id 11) and "rsa" (id 12)
	clock   *clock
}

type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{
		t:       t,
		store:   newStore(t),
		devices: &devices{},
		one:     hsmtest.NewMemory(),
		two:     hsmtest.NewMemory(),
		clock:   &clock{now: time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)},
	}
	f.one.AddEC(t, "ec", "01", ecdh.P256())
	f.one.AddRSA(t, "rsa", "02", 2048)
	f.two.AddEC(t, "ec", "11", ecdh.P384())
	f.two.AddRSA(t, "rsa", "12", 2048)
	f.devices.set("one", f.one)
	f.devices.set("two", f.two)
	f.restart()
	return f
}

func newStore(t testing.TB) store.Store {
	t.Helper()
	s, err := file.Open(t.TempDir())
	if err != nil {
		t.Fatalf("opening a store: %v", err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// restart makes a new keyring over what the old one left.
func (f *fixture) restart() {
	f.Keyring = New(Config{Records: f.store, Devices: f.devices, Now: f.clock.Now})
}

// adopt makes key "prod" of the elliptic-curve key on device one.
func (f *fixture) adopt() *Key {
	f.t.Helper()
	key, err := f.Adopt(f.t.Context(), "prod", AdoptRequest{Device: "one", Label: "ec", By: "alice"})
	if err != nil {
		f.t.Fatalf("adopting: %v", err)
	}
	return key
}

// generate makes key "prod" of an elliptic-curve key that device one makes.
func (f *fixture) generate() *Key {
	f.t.Helper()
	f.begin(generateRequest())
	return f.finish()
}

// addTwo adds the elliptic-curve key on device two to "prod".
func (f *fixture) addTwo() *Key {
	f.t.Helper()
	key, err := f.AddRecipient(f.t.Context(), "prod", AdoptRequest{Device: "two", Label: "ec", By: "bob"})
	if err != nil {
		f.t.Fatalf("adding a recipient: %v", err)
	}
	return key
}

func (f *fixture) wrap(payload string) []byte {
	f.t.Helper()
	sealed, err := f.Wrap(f.t.Context(), "prod", envelope.UseWrap, []byte(payload), []byte("ctx"))
	if err != nil {
		f.t.Fatalf("wrapping: %v", err)
	}
	return sealed.Envelope
}

// unwrapped returns what an envelope of wrap holds.
func (f *fixture) unwrapped(raw []byte) string {
	f.t.Helper()
	opened, err := f.Unwrap(f.t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
	if err != nil {
		f.t.Fatalf("unwrapping: %v", err)
	}
	return string(opened.Payload)
}

func (f *fixture) backup() KeyRecord {
	f.t.Helper()
	backup, err := f.Backup(f.t.Context(), "prod", "carol")
	if err != nil {
		f.t.Fatalf("reading the key record: %v", err)
	}
	return backup
}

// operations are the private-key operations of both devices since it was called last.
func (f *fixture) operations() func() [2]int {
	before := [2]int{f.one.Operations(), f.two.Operations()}
	return func() [2]int {
		return [2]int{f.one.Operations() - before[0], f.two.Operations() - before[1]}
	}
}

// hsmKeys are the ids of the keys on a device.
func hsmKeys(t testing.TB, device hsm.Device) []string {
	t.Helper()
	keys, err := device.FindKeys(context.Background(), hsm.KeyQuery{})
	if err != nil {
		t.Fatalf("listing the keys of a device: %v", err)
	}
	ids := make([]string, len(keys))
	for i, key := range keys {
		ids[i] = key.Ref().ID
	}
	slices.Sort(ids)
	return ids
}

func ptr[T any](value T) *T { return &value }
