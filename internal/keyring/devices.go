package keyring

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// device opens a device and names it in the error.
func (k *Keyring) device(ctx context.Context, name string) (hsm.Device, error) {
	device, err := k.devices.Device(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", name, err)
	}
	return device, nil
}

// namedDevice opens a device that a request names: one that is not configured is the request's mistake.
func (k *Keyring) namedDevice(ctx context.Context, name string) (hsm.Device, error) {
	device, err := k.device(ctx, name)
	if errors.Is(err, ErrNoDevice) {
		return nil, fmt.Errorf("%w: %w; configure it first, or name another one", ErrInvalid, err)
	}
	return device, err
}

// hsmKey returns the HSM key of a recipient. What the HSM has under the recorded name must be what was recorded:
// hsm.ErrKeyChanged. A key whose name was changed is found by what it is.
func (k *Keyring) hsmKey(ctx context.Context, rcpt *recipient) (hsm.Key, error) {
	device, err := k.device(ctx, rcpt.Device)
	if err != nil {
		return nil, err
	}
	if key := k.found.get(rcpt.Device, device, rcpt.KID); key != nil {
		return key, nil
	}
	key, err := findRecorded(ctx, device, rcpt)
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", rcpt.Device, err)
	}
	k.found.put(rcpt.Device, device, rcpt.KID, key)
	return key, nil
}

func findRecorded(ctx context.Context, device hsm.Device, rcpt *recipient) (hsm.Key, error) {
	query := hsm.KeyQuery{ID: rcpt.ID}
	if rcpt.ID == "" {
		query = hsm.KeyQuery{Label: rcpt.Label}
	}
	keys, err := device.FindKeys(ctx, query)
	if err != nil {
		return nil, err
	}
	same := slices.DeleteFunc(slices.Clone(keys), func(key hsm.Key) bool { return !isRecorded(key, rcpt) })
	switch {
	case len(same) == 1:
		return same[0], nil
	case len(same) > 1:
		return nil, fmt.Errorf("looking up the key with %v: %w: %d entries of the same key have it; delete all but one", query,
			hsm.ErrAmbiguous, len(same))
	case len(keys) > 0:
		return nil, fmt.Errorf("looking up the key with %v: %w: expected fingerprint %s; attach the right HSM, or put the "+
			"recorded key back from its backup", query, hsm.ErrKeyChanged, rcpt.KID)
	}
	key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Fingerprint: rcpt.KID})
	if errors.Is(err, hsm.ErrNotFound) {
		return nil, fmt.Errorf("looking up the key with %v: %w: attach the right HSM, or put the key back from its backup", query, err)
	}
	if err != nil {
		return nil, err
	}
	if !isRecorded(key, rcpt) {
		return nil, fmt.Errorf("looking up the key with fingerprint %s: %w", rcpt.KID, hsm.ErrKeyChanged)
	}
	return key, nil
}

// isRecorded compares the public key that the HSM shows with the recorded one, not just the names.
func isRecorded(key hsm.Key, rcpt *recipient) bool {
	kid, err := hsm.Fingerprint(key.Public())
	return err == nil && kid == rcpt.KID
}

// foundKeys remembers the HSM keys that were found, for as long as the device is the same instance. The zero value is
// ready.
type foundKeys struct {
	mu      sync.Mutex
	devices map[string]deviceKeys
}

type deviceKeys struct {
	device hsm.Device
	keys   map[string]hsm.Key // by kid
}

func (f *foundKeys) get(name string, device hsm.Device, kid string) hsm.Key {
	f.mu.Lock()
	defer f.mu.Unlock()
	known, ok := f.devices[name]
	if !ok || !sameInstance(known.device, device) {
		return nil
	}
	return known.keys[kid]
}

func (f *foundKeys) put(name string, device hsm.Device, kid string, key hsm.Key) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.devices == nil {
		f.devices = map[string]deviceKeys{}
	}
	known, ok := f.devices[name]
	if !ok || !sameInstance(known.device, device) {
		known = deviceKeys{device: device, keys: map[string]hsm.Key{}}
		f.devices[name] = known
	}
	known.keys[kid] = key
}

// drop forgets a key after an operation with it failed: looking it up again is cheap.
func (f *foundKeys) drop(name, kid string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.devices[name].keys, kid)
}

func sameInstance(a, b hsm.Device) bool {
	return reflect.TypeOf(a).Comparable() && a == b
}

// unhealthyFor is how long a device that failed is asked after the others.
const unhealthyFor = 30 * time.Second

// deviceHealth remembers which devices failed lately, so that an absent one costs its time-out once and not at every
// opening, and how many openings each is busy with, so that several share a storm. The zero value is ready.
type deviceHealth struct {
	mu     sync.Mutex
	failed map[string]time.Time
	busy   map[string]int
	said   map[string]complaint
}

// complaint is when it was said last that a device did not open something, and how often it was not said since.
type complaint struct {
	at     time.Time
	unsaid int
}

// complainEvery is how often it is said of a device at most.
const complainEvery = 10 * time.Second

// complain tells whether to say that a device did not open something, and how often that was not said before.
func (h *deviceHealth) complain(device string, now time.Time) (say bool, unsaid int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.said == nil {
		h.said = map[string]complaint{}
	}
	last, before := h.said[device]
	if since := now.Sub(last.at); before && since >= 0 && since < complainEvery {
		last.unsaid++
		h.said[device] = last
		return false, 0
	}
	h.said[device] = complaint{at: now}
	return true, last.unsaid
}

// begin notes that a device opens something until the caller calls done.
func (h *deviceHealth) begin(device string) (done func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy == nil {
		h.busy = map[string]int{}
	}
	h.busy[device]++
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.busy[device]--; h.busy[device] == 0 {
			delete(h.busy, device)
		}
	}
}

func (h *deviceHealth) note(device string, ok bool, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if ok {
		delete(h.failed, device)
		delete(h.said, device)
		return
	}
	if h.failed == nil {
		h.failed = map[string]time.Time{}
	}
	h.failed[device] = now
}

// order returns the recipients in the order in which they are tried: healthy devices first, then the least busy, else as
// recorded.
func (h *deviceHealth) order(recipients []*recipient, now time.Time) []*recipient {
	h.mu.Lock()
	defer h.mu.Unlock()
	unhealthy := func(r *recipient) int {
		if at, failed := h.failed[r.Device]; failed && now.Sub(at) < unhealthyFor {
			return 1
		}
		return 0
	}
	ordered := slices.Clone(recipients)
	slices.SortStableFunc(ordered, func(a, b *recipient) int {
		return cmp.Or(unhealthy(a)-unhealthy(b), h.busy[a.Device]-h.busy[b.Device])
	})
	return ordered
}
