package hsmtest

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Memory is an [hsm.Device] in memory for unit tests, with every capability but [hsm.Unlocker]. It behaves as a token
// does: labels need not be unique, a taken id is hsm.ErrExists, a block that does not decrypt is hsm.ErrCiphertext.
// Its faults are switched at run time by SetError, Delay, SetCapacity and SetHashes.
type Memory struct {
	token  *token
	closed atomic.Bool
}

var (
	_ hsm.Device      = (*Memory)(nil)
	_ hsm.ObjectStore = (*Memory)(nil)
	_ hsm.Randomer    = (*Memory)(nil)
	_ hsm.PINChanger  = (*Memory)(nil)

	_ hsm.ForeignObjects = (*Memory)(nil)
)

// token is what all handles to one Memory share.
type token struct {
	mu       sync.Mutex
	serial   string
	keys     []*memoryKey
	objects  []object
	hashes   []crypto.Hash
	pin      string
	err      error
	delay    time.Duration
	capacity int // keys and objects together; negative for no limit

	operations  atomic.Int64
	generations atomic.Int64
}

type object struct {
	ref   hsm.ObjectRef
	value []byte
}

// serials numbers the tokens of a process, so that no two have the same serial.
var serials atomic.Int64

// NewMemory returns an empty token with a serial of its own and room without end.
func NewMemory() *Memory {
	return &Memory{token: &token{
		serial:   fmt.Sprintf("MEM%07d", serials.Add(1)),
		hashes:   []crypto.Hash{crypto.SHA256, crypto.SHA1},
		pin:      "648219",
		capacity: -1,
	}}
}

// Attach returns one more handle to the same token, as another process would have. Closing one leaves the other.
func (m *Memory) Attach() *Memory { return &Memory{token: m.token} }

// AddRSA puts an RSA key on the token. The key comes from a pool of the process, because making one is slow; the keys
// of one running test are all different. Label and id may be taken already: that is how ambiguity is made.
func (m *Memory) AddRSA(t testing.TB, label, id string, bits int) hsm.Key {
	t.Helper()
	return m.add(t, label, id, borrowRSA(t, bits))
}

// AddEC puts an elliptic-curve key on the token.
func (m *Memory) AddEC(t testing.TB, label, id string, curve ecdh.Curve) hsm.Key {
	t.Helper()
	private, err := curve.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatalf("making a key on %v: %v", curve, err)
	}
	return m.add(t, label, id, private)
}

func (m *Memory) add(t testing.TB, label, id string, private crypto.PrivateKey) hsm.Key {
	t.Helper()
	key, err := m.newKey(label, id, private)
	if err != nil {
		t.Fatalf("adding a key: %v", err)
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	m.token.keys = append(m.token.keys, key)
	return m.bind(key)
}

// AddObject puts a data object on the token even where the name is taken, as a program that does not know our rules
// would.
func (m *Memory) AddObject(ref hsm.ObjectRef, value []byte) {
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	m.token.objects = append(m.token.objects, object{ref, bytes.Clone(value)})
}

// SetTraits changes what every key with that id says about itself.
func (m *Memory) SetTraits(id string, traits hsm.Traits) {
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	for _, key := range m.token.keys {
		if key.ref.ID == id {
			key.traits = traits
		}
	}
}

// SetHashes changes what RSA keys answer to OAEPHashes and accept in DecryptOAEP. The default is SHA-256 and SHA-1.
func (m *Memory) SetHashes(hashes ...crypto.Hash) {
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	m.token.hashes = slices.Clone(hashes)
}

// SetCapacity limits the number of keys and objects together; what exceeds it is hsm.ErrFull. A negative n lifts it.
func (m *Memory) SetCapacity(n int) {
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	m.token.capacity = n
}

// SetError makes every call but Close fail with err on every handle, until it is set to nil. Unbar works where err is
// an [hsm.PINError] that bars, and clears it.
func (m *Memory) SetError(err error) {
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	m.token.err = err
}

// Delay makes every private-key operation and every generation take d. Its end comes early where ctx ends.
func (m *Memory) Delay(d time.Duration) {
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	m.token.delay = d
}

// Operations returns how many private-key operations all handles have begun, failed ones included.
func (m *Memory) Operations() int { return int(m.token.operations.Load()) }

// Generations returns how many keys GenerateKey has made.
func (m *Memory) Generations() int { return int(m.token.generations.Load()) }

// PIN returns the PIN that ChangePIN set last.
func (m *Memory) PIN() string {
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	return m.token.pin
}

// enter fails where the call must not reach the token.
func (m *Memory) enter(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if m.closed.Load() {
		return fmt.Errorf("using a device that was closed: %w", hsm.ErrUnavailable)
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	return m.token.err
}

// work enters and takes the time of a slow operation.
func (m *Memory) work(ctx context.Context) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.token.mu.Lock()
	delay := m.token.delay
	m.token.mu.Unlock()
	if delay == 0 {
		return nil
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return m.enter(ctx) // the fault may have been switched on meanwhile
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Info implements [hsm.Device].
func (m *Memory) Info(ctx context.Context) (hsm.Info, error) {
	if err := m.enter(ctx); err != nil {
		return hsm.Info{}, err
	}
	return hsm.Info{
		Vendor:     "nitroseal",
		Model:      "memory",
		Serial:     m.token.serial,
		Firmware:   "1.0",
		Label:      "memory",
		State:      hsm.StateOperational,
		Mechanisms: []string{"CKM_RSA_PKCS_OAEP", "CKM_ECDH1_DERIVE"},
	}, nil
}

// FindKeys implements [hsm.Device].
func (m *Memory) FindKeys(ctx context.Context, query hsm.KeyQuery) ([]hsm.Key, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	var found []*memoryKey
	for _, key := range m.token.keys {
		if matches(query, key.ref) {
			found = append(found, key)
		}
	}
	slices.SortStableFunc(found, func(a, b *memoryKey) int { return cmp.Compare(a.ref.ID, b.ref.ID) })
	keys := make([]hsm.Key, len(found))
	for i, key := range found {
		keys[i] = m.bind(key)
	}
	return keys, nil
}

func matches(query hsm.KeyQuery, ref hsm.KeyRef) bool {
	return (query.Label == "" || query.Label == ref.Label) &&
		(query.ID == "" || query.ID == ref.ID) &&
		(query.Fingerprint == "" || query.Fingerprint == ref.Fingerprint)
}

// GenerateKey implements [hsm.Device].
func (m *Memory) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	if err := m.work(ctx); err != nil {
		return nil, err
	}
	private, err := generate(spec.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("generating a key: %w", err)
	}
	id := spec.ID
	if id == "" {
		random := make([]byte, 8)
		_, _ = rand.Read(random) // never fails: crypto/rand
		id = hex.EncodeToString(random)
	}
	key, err := m.newKey(spec.Label, id, private)
	if err != nil {
		return nil, fmt.Errorf("generating a key: %w", err)
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	if slices.ContainsFunc(m.token.keys, func(k *memoryKey) bool { return k.ref.ID == id }) {
		return nil, fmt.Errorf("generating a key with id %q: %w", id, hsm.ErrExists)
	}
	if m.token.full() {
		return nil, fmt.Errorf("generating a key: %w", hsm.ErrFull)
	}
	m.token.keys = append(m.token.keys, key)
	m.token.generations.Add(1)
	return m.bind(key), nil
}

// DeleteKey implements [hsm.Device].
func (m *Memory) DeleteKey(ctx context.Context, ref hsm.KeyRef) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	isIt := func(k *memoryKey) bool { return k.ref.ID == ref.ID && k.ref.Fingerprint == ref.Fingerprint }
	if !slices.ContainsFunc(m.token.keys, isIt) {
		return fmt.Errorf("deleting the key with id %q and fingerprint %q: %w", ref.ID, ref.Fingerprint, hsm.ErrNotFound)
	}
	m.token.keys = slices.DeleteFunc(m.token.keys, isIt)
	return nil
}

// Close implements [hsm.Device].
func (m *Memory) Close() error {
	m.closed.Store(true)
	return nil
}

// Random implements [hsm.Randomer].
func (m *Memory) Random(ctx context.Context, n int) ([]byte, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	if n < 1 || n > 1024 {
		return nil, fmt.Errorf("asking for %d random bytes: 1 to 1024 can be had: %w", n, hsm.ErrUnsupported)
	}
	random := make([]byte, n)
	_, _ = rand.Read(random) // never fails: crypto/rand
	return random, nil
}

// ChangePIN implements [hsm.PINChanger].
func (m *Memory) ChangePIN(ctx context.Context, pin []byte) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	m.token.pin = string(pin)
	return nil
}

// AdoptPIN implements [hsm.PINChanger].
func (m *Memory) AdoptPIN(ctx context.Context, pin []byte, _ bool) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	if string(pin) != m.PIN() {
		return &hsm.PINError{TriesLeft: 2, Detail: "the token refused the PIN"}
	}
	return nil
}

// Unbar implements [hsm.PINChanger].
func (m *Memory) Unbar(ctx context.Context) error {
	err := m.enter(ctx)
	var pin *hsm.PINError
	if !errors.As(err, &pin) || !pin.Barred {
		return err
	}
	m.SetError(nil)
	return nil
}

// Objects implements [hsm.ObjectStore].
func (m *Memory) Objects(ctx context.Context, application string) ([]hsm.ObjectRef, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	var refs []hsm.ObjectRef
	for _, o := range m.token.objects {
		if o.ref.Application == application {
			refs = append(refs, o.ref)
		}
	}
	slices.SortFunc(refs, func(a, b hsm.ObjectRef) int { return cmp.Compare(a.Label, b.Label) })
	return refs, nil
}

// ReadObject implements [hsm.ObjectStore].
func (m *Memory) ReadObject(ctx context.Context, ref hsm.ObjectRef) ([]byte, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	i, err := m.token.find(ref)
	if err != nil {
		return nil, fmt.Errorf("reading object %q: %w", ref.Label, err)
	}
	return bytes.Clone(m.token.objects[i].value), nil
}

// WriteObject implements [hsm.ObjectStore].
func (m *Memory) WriteObject(ctx context.Context, ref hsm.ObjectRef, value []byte) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	if slices.ContainsFunc(m.token.objects, func(o object) bool { return o.ref == ref }) {
		return fmt.Errorf("writing object %q: %w", ref.Label, hsm.ErrExists)
	}
	if m.token.full() {
		return fmt.Errorf("writing object %q: %w", ref.Label, hsm.ErrFull)
	}
	m.token.objects = append(m.token.objects, object{ref, bytes.Clone(value)})
	return nil
}

// DeleteObject implements [hsm.ObjectStore].
func (m *Memory) DeleteObject(ctx context.Context, ref hsm.ObjectRef) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	i, err := m.token.find(ref)
	if err != nil {
		return fmt.Errorf("deleting object %q: %w", ref.Label, err)
	}
	m.token.objects = slices.Delete(m.token.objects, i, i+1)
	return nil
}

// find returns the index of the one object of that name. The caller holds mu.
func (k *token) find(ref hsm.ObjectRef) (int, error) {
	found := -1
	for i, o := range k.objects {
		if o.ref != ref {
			continue
		}
		if found >= 0 {
			return 0, hsm.ErrAmbiguous
		}
		found = i
	}
	if found < 0 {
		return 0, hsm.ErrNotFound
	}
	return found, nil
}

// full tells whether there is no room. The caller holds mu.
func (k *token) full() bool { return k.capacity >= 0 && len(k.keys)+len(k.objects) >= k.capacity }

// generate makes a private key. RSA keys come from the pool where one is free.
func generate(algorithm hsm.Algorithm) (crypto.PrivateKey, error) {
	switch algorithm {
	case hsm.RSA2048:
		return takeRSA(2048)
	case hsm.RSA3072:
		return takeRSA(3072)
	case hsm.RSA4096:
		return takeRSA(4096)
	case hsm.ECDHP256:
		return ecdh.P256().GenerateKey(rand.Reader)
	case hsm.ECDHP384:
		return ecdh.P384().GenerateKey(rand.Reader)
	default:
		return nil, fmt.Errorf("algorithm %q: %w", algorithm, hsm.ErrUnsupported)
	}
}

// pool holds RSA keys that no running test uses, by modulus size in bits.
var pool struct {
	mu   sync.Mutex
	free map[int][]*rsa.PrivateKey
}

// takeRSA returns a key that nobody else has.
func takeRSA(bits int) (*rsa.PrivateKey, error) {
	pool.mu.Lock()
	if free := pool.free[bits]; len(free) > 0 {
		key := free[len(free)-1]
		pool.free[bits] = free[:len(free)-1]
		pool.mu.Unlock()
		return key, nil
	}
	pool.mu.Unlock()
	return rsa.GenerateKey(rand.Reader, bits)
}

// borrowRSA takes a key and gives it back when the test ends.
func borrowRSA(t testing.TB, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := takeRSA(bits)
	if err != nil {
		t.Fatalf("making an RSA key of %d bits: %v", bits, err)
	}
	t.Cleanup(func() {
		pool.mu.Lock()
		defer pool.mu.Unlock()
		if pool.free == nil {
			pool.free = map[int][]*rsa.PrivateKey{}
		}
		pool.free[bits] = append(pool.free[bits], key)
	})
	return key
}
