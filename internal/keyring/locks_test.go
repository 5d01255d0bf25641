package keyring

import (
	"context"
	"errors"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// slowFinder is a device on which another process may come between a look-up and what follows it: PKCS#11 tokens take a
// second key of the same id without a word.
type slowFinder struct {
	hsm.Device

	mu   sync.Mutex
	made int
}

func (d *slowFinder) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	d.mu.Lock()
	d.made++
	d.mu.Unlock()
	return d.Device.GenerateKey(ctx, spec)
}

func TestProcessesThatShareALockMakeOneHSMKey(t *testing.T) {
	f := newFixture(t)
	slow := &slowFinder{Device: f.one}
	f.devices.set("one", slow)
	records, err := file.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	process := func() *Keyring {
		lock := func(ctx context.Context, name string) (func(), error) { return records.Lock(ctx, "keys/"+name) }
		return New(Config{Records: records, Devices: f.devices, Lock: lock, SealAuthKeys: true})
	}
	if _, err := process().Begin(t.Context(), "prod", generateRequest()); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if _, err := process().Finish(t.Context(), "prod"); err != nil {
				t.Errorf("finishing: %v", err)
			}
		})
	}
	all.Wait()
	if slow.made != 1 {
		t.Errorf("%d HSM keys were made or tried, want 1", slow.made)
	}
}

func TestALockThatIsNotGivenKeepsAKeyAsItIs(t *testing.T) {
	f := newFixture(t)
	refused := errors.New("somebody else has it")
	f.Keyring = New(Config{Records: f.store, Devices: f.devices, Lock: func(context.Context, string) (func(), error) { return nil, refused }})
	for range 2 { // the second shows that the turn within the process was given back
		if _, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "one", Label: "ec", By: "alice"}); !errors.Is(err, refused) {
			t.Errorf("adopting without the lock answers %v", err)
		}
	}
	if _, err := f.Get(t.Context(), "prod"); !errors.Is(err, ErrKeyNotFound) {
		t.Errorf("the key: %v, want ErrKeyNotFound", err)
	}
}
