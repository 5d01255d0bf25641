package keyring

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// hookDevice calls the hooks that are set at the moments that a race needs.
type hookDevice struct {
	hsm.Device
	find     func(keys []hsm.Key) []hsm.Key
	generate func(generate func() (hsm.Key, error)) (hsm.Key, error)
	finds    int
	makes    int
}

func (d *hookDevice) FindKeys(ctx context.Context, query hsm.KeyQuery) ([]hsm.Key, error) {
	d.finds++
	keys, err := d.Device.FindKeys(ctx, query)
	if d.find != nil {
		keys = d.find(keys)
	}
	return keys, err
}

func (d *hookDevice) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	d.makes++
	generate := func() (hsm.Key, error) { return d.Device.GenerateKey(ctx, spec) }
	if d.generate != nil {
		return d.generate(generate)
	}
	return generate()
}

// hookStore calls a hook around each write, and one after each read.
type hookStore struct {
	store.Store
	put func(put func() (store.Revision, error)) (store.Revision, error)
	got func()
}

func (s *hookStore) Get(ctx context.Context, name string) (store.Entry, error) {
	entry, err := s.Store.Get(ctx, name)
	if s.got != nil {
		s.got()
	}
	return entry, err
}

func (s *hookStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	put := func() (store.Revision, error) { return s.Store.Put(ctx, name, value, expected) }
	if s.put != nil {
		return s.put(put)
	}
	return put()
}

func TestFinishLooksForTheHSMKeyBeforeItMakesOne(t *testing.T) {
	f := newFixture(t)
	id := f.begin(generateRequest()).Pending.ID
	if _, err := f.one.GenerateKey(t.Context(), hsm.KeySpec{Algorithm: hsm.ECDHP384, Label: "made before the crash", ID: id}); err != nil {
		t.Fatal(err)
	}
	device := &hookDevice{Device: f.one}
	f.devices.set("one", device)
	f.finish()
	if device.makes != 0 {
		t.Error("the HSM was asked for another key")
	}
}

func TestFinishTakesAnHSMKeyThatAppearsWhileItLooks(t *testing.T) {
	f := newFixture(t)
	id := f.begin(generateRequest()).Pending.ID
	device := &hookDevice{Device: f.one}
	device.find = func(keys []hsm.Key) []hsm.Key {
		if device.finds > 1 {
			return keys
		}
		// A generation that its caller had given up comes through only now.
		if _, err := f.one.GenerateKey(t.Context(), hsm.KeySpec{Algorithm: hsm.ECDHP384, Label: "late", ID: id}); err != nil {
			t.Error(err)
		}
		return keys
	}
	f.devices.set("one", device)
	if key := f.finish(); key.Versions[0].Recipients[0].Label != "late" {
		t.Errorf("finished as %+v", key)
	}
}

func TestAnHSMKeyWhoseIntentWasUndoneMeanwhileIsDeleted(t *testing.T) {
	for name, undo := range map[string]func(t *testing.T, other *Keyring){
		"abandoned": func(t *testing.T, other *Keyring) {
			t.Helper()
			if err := other.Abandon(t.Context(), "prod"); err != nil {
				t.Error(err)
			}
		},
		"half abandoned": func(t *testing.T, other *Keyring) {
			t.Helper()
			other.devices.(*devices).set("one", nil)
			if err := other.Abandon(t.Context(), "prod"); !errors.Is(err, ErrNoDevice) {
				t.Error(err)
			}
		},
		"abandoned and begun anew": func(t *testing.T, other *Keyring) {
			t.Helper()
			if err := other.Abandon(t.Context(), "prod"); err != nil {
				t.Error(err)
			}
			if _, err := other.Begin(t.Context(), "prod", generateRequest()); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.begin(generateRequest())
			all := &devices{}
			all.set("one", f.one)
			other := New(Config{Records: f.store, Devices: all}) // another process
			f.devices.set("one", &hookDevice{Device: f.one, generate: func(generate func() (hsm.Key, error)) (hsm.Key, error) {
				undo(t, other)
				return generate()
			}})
			if _, err := f.Finish(t.Context(), "prod"); err == nil {
				t.Error("an abandoned intent was finished")
			}
			if got := hsmKeys(t, f.one); len(got) != 2 {
				t.Errorf("HSM keys left: %v", got)
			}
		})
	}
}

func TestAWriteThatWasMadeAlthoughTheStoreFailedIsASuccess(t *testing.T) {
	f := newFixture(t)
	flaky := &hookStore{Store: f.store, put: func(put func() (store.Revision, error)) (store.Revision, error) {
		if _, err := put(); err != nil {
			return store.NoRevision, err
		}
		return store.NoRevision, fmt.Errorf("the answer was lost: %w", store.ErrUnavailable)
	}}
	f.Keyring = New(Config{Records: flaky, Devices: f.devices, Now: f.clock.Now})
	f.adopt()
	f.addTwo()
	if key := f.configure(Settings{AcceptSingleHSM: ptr(true)}); key.AcceptSingleHSM == nil {
		t.Error("not configured")
	}
	flaky.put = func(func() (store.Revision, error)) (store.Revision, error) {
		return store.NoRevision, store.ErrUnavailable
	}
	if _, err := f.Configure(t.Context(), "prod", Settings{AcceptSingleHSM: ptr(false)}); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("a write that was not made: %v", err)
	}
}

func TestTheCacheNeverKeepsWhatWasReadBeforeAWrite(t *testing.T) {
	f := newFixture(t)
	hooked := &hookStore{Store: f.store}
	f.Keyring = New(Config{Records: hooked, Devices: f.devices, CacheRecords: true})
	f.adopt()
	hooked.put = func(put func() (store.Revision, error)) (store.Revision, error) {
		f.wrap("meanwhile") // reads and caches the old record
		return put()
	}
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "ec"}}); err != nil {
		t.Fatal(err)
	}
	if key, err := f.Get(t.Context(), "prod"); err != nil || key.LatestVersion != 2 {
		t.Errorf("the cache holds %+v, %v", key, err)
	}

	hooked.put = nil
	f.Invalidate("prod")
	hooked.got = func() { // the record was read, and before it is cached somebody writes it
		hooked.got = nil
		f.configure(Settings{MinDecryptionVersion: ptr(2)})
	}
	f.wrap("meanwhile")
	if key, err := f.Get(t.Context(), "prod"); err != nil || key.MinDecryptionVersion != 2 {
		t.Errorf("the cache holds %+v, %v", key, err)
	}
}

func TestALookUpIsMadeOnceForEachDeviceInstance(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	raw := f.wrap("secret")
	device := &hookDevice{Device: f.one}
	f.devices.set("one", device)
	for range 3 {
		f.unwrapped(raw)
	}
	if device.finds != 1 {
		t.Errorf("%d look-ups for three openings", device.finds)
	}
	f.one.SetError(hsm.ErrUnavailable)
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx")); !errors.Is(err, hsm.ErrUnavailable) {
		t.Fatal(err)
	}
	f.one.SetError(nil)
	f.unwrapped(raw)
	if device.finds != 2 {
		t.Errorf("%d look-ups: after a failure there is one more", device.finds)
	}
}

func TestManyCanUseAKeyWhileItChanges(t *testing.T) {
	f := newFixture(t)
	f.Keyring = New(Config{Records: f.store, Devices: f.devices, CacheRecords: true})
	f.adopt()
	var users sync.WaitGroup
	done := make(chan struct{})
	for range 4 {
		users.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if got := f.unwrapped(f.wrap("secret")); got != "secret" {
					t.Errorf("unwrapped %q", got)
				}
				if _, err := f.Get(t.Context(), "prod"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 5 {
		request := generateRequest()
		request.RequestID = fmt.Sprint(i)
		if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: &request}); err != nil {
			t.Error(err)
		}
		if _, err := f.Finish(t.Context(), "prod"); err != nil {
			t.Error(err)
		}
		f.Invalidate("")
		if _, err := f.Configure(t.Context(), "prod", Settings{AcceptSingleHSM: ptr(i%2 == 0)}); err != nil {
			t.Error(err)
		}
	}
	close(done)
	users.Wait()
}
