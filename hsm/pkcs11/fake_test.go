package pkcs11

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// patience bounds whatever a test waits for.
const patience = 20 * time.Second

const (
	fakePIN    = "648219"
	fakeSerial = "DENK0100001"
)

// fake stands for the module, the token in it and all hosts that load it. A host is a goroutine of the test that speaks
// the wire over real pipes, so that the client under test is the whole client.
type fake struct {
	t       *testing.T
	private *rsa.PrivateKey

	mu sync.Mutex // guards what follows
	// hosts counts those born, calls the requests of each operation over all hosts.
	hosts   int
	calls   map[wire.Op]int
	running sync.WaitGroup
	// pin is the token's PIN, flags its CKF_ flags, objects its data objects by label.
	pin     string
	flags   uint
	present bool
	objects map[string]string
	// script, where set, is asked first about every request. It returns false where the ordinary answer is wanted.
	script func(h *fakeHost, f wire.Frame) bool
}

// fakeHost is one host.
type fakeHost struct {
	*fake
	number   int // 1 is the first
	requests *os.File
	answers  *os.File
	process  *process
	kill     sync.Once
	killed   chan struct{}
	writing  sync.Mutex
	loggedIn bool
	slot     uint
}

// sharedKey is made once: generating one takes a moment.
var sharedKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

// newFake returns a working token and a manager that may use it.
func newFake(t *testing.T) (*fake, *Manager, string) {
	t.Helper()
	f := &fake{
		t: t, private: sharedKey(), calls: make(map[wire.Op]int), pin: fakePIN, present: true, objects: make(map[string]string),
		flags: ckfLoginRequired | ckfUserPINInitialized | ckfTokenInitialized,
	}
	module := filepath.Join(t.TempDir(), "module.so")
	if err := os.WriteFile(module, []byte("stands for a module"), 0o600); err != nil {
		t.Fatal(err)
	}
	m := New(Options{Modules: []string{module}, StateDir: stateDir(t)})
	m.spawn = f.spawn
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("closing the manager: %v", err)
		}
		f.running.Wait()
	})
	return f, m, module
}

func stateDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// open opens the token.
func (f *fake) open(t *testing.T, m *Manager, module string, change ...func(*Config)) *Device {
	t.Helper()
	config := Config{Module: module, Serial: fakeSerial, PIN: []byte(fakePIN), Owner: "mount"}
	for _, c := range change {
		c(&config)
	}
	d, err := m.Open(t.Context(), config)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// do changes the token while tests use it.
func (f *fake) do(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// follow installs a script.
func (f *fake) follow(script func(h *fakeHost, r wire.Frame) bool) {
	f.do(func() { f.script = script })
}

func (f *fake) count(op wire.Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op]
}

func (f *fake) born() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hosts
}

// spawn stands for birth.start.
func (f *fake) spawn() (*process, error) {
	in, requests, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	answers, out, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	h := &fakeHost{fake: f, requests: in, answers: out, killed: make(chan struct{}), slot: 7}
	h.process = &process{requests: requests, answers: answers, ended: make(chan struct{}), status: "signal: killed"}
	h.process.kill = h.die
	f.mu.Lock()
	f.hosts++
	h.number = f.hosts
	f.mu.Unlock()
	f.running.Go(h.serve)
	return h.process, nil
}

// die ends the host as a signal does.
func (h *fakeHost) die() {
	h.kill.Do(func() {
		close(h.killed)
		_ = h.requests.Close()
		_ = h.answers.Close()
		close(h.process.ended)
	})
}

func (h *fakeHost) serve() {
	defer h.die()
	for {
		f, err := wire.ReadFrame(h.requests)
		if err != nil {
			return
		}
		h.mu.Lock()
		h.calls[f.Op]++
		script := h.script
		h.mu.Unlock()
		h.running.Go(func() {
			if script == nil || !script(h, f) {
				h.ordinary(f)
			}
		})
	}
}

// hang blocks a script until release is closed or the host dies; false for the latter.
func (h *fakeHost) hang(release <-chan struct{}) bool {
	select {
	case <-release:
		return true
	case <-h.killed:
		return false
	}
}

func (h *fakeHost) answer(f wire.Frame, meta any, data []byte) {
	reply := wire.Frame{ID: f.ID, Op: f.Op, Data: data}
	if meta != nil {
		reply.Meta = wire.Encode(meta)
	}
	h.send(reply)
}

// fail answers with a return value; true, for scripts.
func (h *fakeHost) fail(f wire.Frame, code uint) bool {
	h.send(wire.Frame{ID: f.ID, Op: f.Op, Failed: true, Meta: wire.Encode(&wire.Error{Function: "C_Fake", Code: code})})
	return true
}

func (h *fakeHost) send(f wire.Frame) {
	h.writing.Lock()
	defer h.writing.Unlock()
	_ = wire.WriteFrame(h.answers, f) // a client that is gone reads nothing
}

// ordinary is what a token does that works.
func (h *fakeHost) ordinary(f wire.Frame) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.present && f.Op != wire.OpHello && f.Op != wire.OpSlots {
		h.fail(f, ckrDeviceRemoved)
		return
	}
	switch f.Op {
	case wire.OpHello:
		h.answer(f, wire.HelloReply{Version: wire.Version, MemoryLocked: true}, nil)
	case wire.OpSlots:
		token := wire.Token{Label: "unseal (UserPIN)   ", Serial: fakeSerial, Flags: h.flags}
		h.answer(f, wire.Slots{Slots: []wire.Slot{{ID: 1}, {ID: h.slot, Present: h.present, Token: token}}}, nil)
	case wire.OpMechanisms:
		h.answer(f, wire.Mechanisms{Mechanisms: []wire.Mechanism{
			{Type: ckmRSAPKCSOAEP, Flags: ckfDecrypt}, {Type: ckmRSAPKCS, Flags: ckfDecrypt},
		}}, nil)
	case wire.OpLogin:
		if string(f.Data) != h.pin {
			h.flags |= ckfUserPINCountLow
			h.fail(f, ckrPINIncorrect)
			return
		}
		h.flags &^= ckfUserPINCountLow
		h.loggedIn = true
		h.answer(f, nil, nil)
	case wire.OpFindKeys:
		var r wire.FindKeysRequest
		_ = wire.Decode(f.Meta, &r)
		var found wire.Keys
		if k := h.key(); (r.ID == "" || r.ID == k.ID) && (r.Label == "" || r.Label == k.Label) {
			found.Keys = append(found.Keys, k)
		}
		h.answer(f, found, nil)
	case wire.OpDecryptOAEP:
		h.decrypt(f)
	case wire.OpObjects:
		var labels []string
		for label := range h.objects {
			labels = append(labels, label)
		}
		slices.Sort(labels)
		h.answer(f, wire.Objects{Labels: labels}, nil)
	case wire.OpCreateObject, wire.OpReadObject, wire.OpDestroyObject:
		h.object(f)
	case wire.OpRandom:
		var r wire.RandomRequest
		_ = wire.Decode(f.Meta, &r)
		h.answer(f, nil, make([]byte, r.Count))
	case wire.OpSetPIN:
		var r wire.SetPINRequest
		_ = wire.Decode(f.Meta, &r)
		if string(f.Data[:r.OldLen]) != h.pin {
			h.fail(f, ckrPINIncorrect)
			return
		}
		h.pin = string(f.Data[r.OldLen:])
		h.answer(f, nil, nil)
	case wire.OpGenerateKey:
		h.answer(f, h.key(), nil)
	default:
		h.fail(f, ckrFunctionNotSupported)
	}
}

// handle depends on the host: one of a dead host is of no use to another.
func (h *fakeHost) handle() uint { return uint(1000 + h.number) }

func (h *fakeHost) key() wire.Key {
	return wire.Key{
		Handle: h.handle(), Label: "unseal", ID: "01", Modulus: h.private.N.Bytes(), Exponent: []byte{1, 0, 1},
		Sensitive: true, Uses: []string{"decrypt"},
	}
}

func (h *fakeHost) decrypt(f wire.Frame) {
	var r wire.DecryptRequest
	_ = wire.Decode(f.Meta, &r)
	switch {
	case !h.loggedIn:
		h.fail(f, ckrUserNotLoggedIn)
	case r.Handle != h.handle():
		h.fail(f, ckrKeyHandleInvalid)
	default:
		hash := map[uint]crypto.Hash{ckmSHA1: crypto.SHA1, ckmSHA256: crypto.SHA256}[r.Hash]
		plaintext, err := rsa.DecryptOAEP(hash.New(), nil, h.private, f.Data, nil)
		if err != nil {
			h.fail(f, ckrGeneralError) // as SoftHSM and cards do
			return
		}
		h.answer(f, nil, plaintext)
	}
}

func (h *fakeHost) object(f wire.Frame) {
	var r wire.ObjectRequest
	_ = wire.Decode(f.Meta, &r)
	value, there := h.objects[r.Label]
	switch {
	case f.Op == wire.OpCreateObject:
		h.objects[r.Label] = string(f.Data)
		h.answer(f, nil, nil)
	case !there:
		h.fail(f, wire.CodeNotFound)
	case f.Op == wire.OpReadObject:
		h.answer(f, nil, []byte(value))
	default:
		delete(h.objects, r.Label)
		h.answer(f, nil, nil)
	}
}

// key finds the one key.
func key(t *testing.T, d *Device) *rsaKey {
	t.Helper()
	found, err := hsm.FindKey(patient(t), d, hsm.KeyQuery{Label: "unseal"})
	if err != nil {
		t.Fatalf("FindKey: %v", err)
	}
	k, ok := found.(*rsaKey)
	if !ok {
		t.Fatalf("the key is a %T", found)
	}
	return k
}

// ciphertext encrypts a message to the fake's key.
func (f *fake) ciphertext(message string) []byte {
	f.t.Helper()
	c, err := rsa.EncryptOAEP(crypto.SHA256.New(), rand.Reader, &f.private.PublicKey, []byte(message), nil)
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// decrypts fails the test where the key does not decrypt.
func (f *fake) decrypts(ctx context.Context, k *rsaKey) error {
	got, err := k.DecryptOAEP(ctx, crypto.SHA256, f.ciphertext("message"))
	if err == nil && string(got) != "message" {
		err = fmt.Errorf("it decrypts to %q", got)
	}
	return err
}

func patient(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// lapse lets as much time pass for the watchdog of a device's host as it says: what is inside has been there that much longer.
func lapse(t *testing.T, d *Device, by time.Duration) {
	t.Helper()
	h, err := d.module.host(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	for _, c := range h.inside {
		c.progress = c.progress.Add(-by)
	}
	h.mu.Unlock()
	h.bark()
}

// eventually polls until the condition holds.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	ctx := patient(t)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%s: it did not happen within %v", what, patience)
		}
	}
}
