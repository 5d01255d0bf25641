package keyring

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// machine runs the keyring beside a model of it: sets of kids and a list of envelopes.
type machine struct {
	t       *testing.T
	ctx     context.Context
	devices *devices
	tokens  map[string]*hsmtest.Memory
	down    map[string]bool
	keyring *Keyring
	fresh   int // numbers HSM keys

	keys      map[string]*modelKey
	envelopes []modelEnvelope
}

type modelKey struct {
	versions []map[string]string // kid to device
	minimum  int
	backup   KeyRecord
	known    bool // the backup is of the newest state

	// Acknowledgements, the first three by version: recipients in the newest record that was read, a confirmed backup of
	// the HSM keys, and whether encrypt/ was served.
	read      []map[string]string
	confirmed []bool
	served    []bool
	accepted  bool // a single HSM
	lease     bool
}

// rotated adds a version.
func (k *modelKey) rotated(kid, device string) {
	k.versions = append(k.versions, map[string]string{kid: device})
	k.read, k.confirmed, k.served = append(k.read, nil), append(k.confirmed, false), append(k.served, false)
	k.known = false
}

// encrypts returns the version that serves encrypt/ with that minimum, 0 for none.
func (k *modelKey) encrypts(minimum int) int {
	for i := len(k.versions) - 1; i >= minimum-1; i-- {
		devices := map[string]bool{}
		for _, device := range k.read[i] {
			devices[device] = true
		}
		if len(devices) > 1 || len(devices) == 1 && (k.confirmed[i] || k.accepted) {
			return i + 1
		}
	}
	return 0
}

// hasRead notes that the record as it is now was read.
func (k *modelKey) hasRead() {
	for i, version := range k.versions {
		k.read[i] = maps.Clone(version)
	}
}

type modelEnvelope struct {
	raw     []byte
	use     envelope.Use
	leased  bool
	key     string
	version int
	kids    []string
	caller  string
	payload string
}

// newHSMKey makes an HSM key and returns how to adopt it and its kid.
func (m *machine) newHSMKey(rt *rapid.T) (AdoptRequest, string) {
	device := rapid.SampledFrom([]string{"one", "two", "three"}).Draw(rt, "device")
	m.fresh++
	label := fmt.Sprintf("key%d", m.fresh)
	key := m.tokens[device].AddEC(m.t, label, fmt.Sprintf("%04x", m.fresh), ecdh.P256())
	return AdoptRequest{Device: device, Label: label, By: "model"}, key.Ref().Fingerprint
}

func (m *machine) pick(rt *rapid.T) (string, *modelKey) {
	if len(m.keys) == 0 {
		rt.Skip("no key yet")
	}
	name := rapid.SampledFrom(slices.Sorted(maps.Keys(m.keys))).Draw(rt, "key")
	return name, m.keys[name]
}

// settle checks that an action that needs that device did what the model says: it works unless the device is down.
func (m *machine) settle(rt *rapid.T, device string, err error) bool {
	if m.down[device] {
		if !errors.Is(err, hsm.ErrUnavailable) {
			rt.Fatalf("device %s is down: %v", device, err)
		}
		return false
	}
	if err != nil {
		rt.Fatal(err)
	}
	return true
}

func (m *machine) Adopt(rt *rapid.T) {
	name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "name")
	request, kid := m.newHSMKey(rt)
	_, err := m.keyring.Adopt(m.ctx, name, request)
	if m.keys[name] != nil {
		if !errors.Is(err, ErrKeyExists) {
			rt.Fatalf("adopting a name that is taken: %v", err)
		}
		return
	}
	if m.settle(rt, request.Device, err) {
		m.keys[name] = &modelKey{minimum: 1}
		m.keys[name].rotated(kid, request.Device)
	}
}

func (m *machine) Generate(rt *rapid.T) {
	name := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "name")
	device := rapid.SampledFrom([]string{"one", "two", "three"}).Draw(rt, "device")
	if m.down[device] {
		rt.Skip("the device is down")
	}
	request := GenerateRequest{Device: device, Algorithm: hsm.ECDHP256, By: "model"}
	var err error
	if m.keys[name] == nil {
		_, err = m.keyring.Begin(m.ctx, name, request)
		m.keys[name] = &modelKey{minimum: 1}
	} else {
		_, err = m.keyring.Rotate(m.ctx, name, RotateRequest{Generate: &request})
	}
	if err != nil {
		rt.Fatal(err)
	}
	if rapid.Bool().Draw(rt, "abandon") {
		if err := m.keyring.Abandon(m.ctx, name); err != nil {
			rt.Fatal(err)
		}
		if len(m.keys[name].versions) == 0 {
			delete(m.keys, name)
		}
		return
	}
	key, err := m.keyring.Finish(m.ctx, name)
	if err != nil {
		rt.Fatal(err)
	}
	rcpt := key.Versions[key.LatestVersion-1].Recipients[0]
	m.keys[name].rotated(rcpt.KID, device)
}

func (m *machine) RotateToAnExistingKey(rt *rapid.T) {
	name, key := m.pick(rt)
	request, kid := m.newHSMKey(rt)
	_, err := m.keyring.Rotate(m.ctx, name, RotateRequest{Adopt: &request})
	if m.settle(rt, request.Device, err) {
		key.rotated(kid, request.Device)
	}
}

func (m *machine) AddRecipient(rt *rapid.T) {
	name, key := m.pick(rt)
	newest := key.versions[len(key.versions)-1]
	request, kid := m.newHSMKey(rt)
	_, err := m.keyring.AddRecipient(m.ctx, name, request)
	if len(newest) == envelope.MaxRecipients && !m.down[request.Device] {
		if !errors.Is(err, ErrTooLarge) {
			rt.Fatalf("a recipient too many: %v", err)
		}
		return
	}
	if m.settle(rt, request.Device, err) {
		newest[kid] = request.Device
		key.known = false
	}
}

func (m *machine) SetMinimum(rt *rapid.T) {
	name, key := m.pick(rt)
	minimum := rapid.IntRange(0, len(key.versions)+1).Draw(rt, "minimum")
	_, err := m.keyring.Configure(m.ctx, name, Settings{MinDecryptionVersion: &minimum})
	if minimum < 1 || minimum > len(key.versions) {
		if !errors.Is(err, ErrInvalid) {
			rt.Fatalf("minimum %d of %d: %v", minimum, len(key.versions), err)
		}
		return
	}
	if now := key.encrypts(key.minimum); now > 0 && key.served[now-1] && key.encrypts(minimum) == 0 {
		if !errors.Is(err, ErrNotReady) {
			rt.Fatalf("minimum %d above version %d, which serves encrypt/: %v", minimum, now, err)
		}
		return
	}
	if err != nil {
		rt.Fatal(err)
	}
	key.minimum = minimum
	key.known = false
}

func (m *machine) Acknowledge(rt *rapid.T) {
	name, key := m.pick(rt)
	yes := rapid.IntRange(0, 3).Draw(rt, "no") > 0 // most of the time
	settings := Settings{By: "model"}
	if rapid.Bool().Draw(rt, "backup") {
		settings.BackupConfirmed = &yes
		key.confirmed[len(key.confirmed)-1] = yes
		if !yes {
			clear(key.confirmed)
		}
	} else {
		settings.AcceptSingleHSM = &yes
		key.accepted = yes
	}
	if _, err := m.keyring.Configure(m.ctx, name, settings); err != nil {
		rt.Fatal(err)
	}
}

func (m *machine) Encrypt(rt *rapid.T) {
	name, key := m.pick(rt)
	want := key.encrypts(key.minimum)
	sealed, err := m.keyring.Wrap(m.ctx, name, envelope.UseTransit, []byte("x"), nil)
	if want == 0 {
		if !errors.Is(err, ErrNotReady) {
			rt.Fatalf("encrypted with a key that is not ready: %v", err)
		}
		return
	}
	if err != nil || sealed.Version != want || sealed.Recipients != len(key.versions[want-1]) {
		rt.Fatalf("encrypted with version %d for %d recipients: %v, want version %d", sealed.Version, sealed.Recipients, err, want)
	}
	if sealed.Leased && !key.lease {
		rt.Fatal("sealed in a lease that nobody gave")
	}
	key.served[want-1] = true
	m.envelopes = append(m.envelopes, modelEnvelope{
		sealed.Envelope, envelope.UseTransit, sealed.Leased, name, want, slices.Collect(maps.Keys(key.versions[want-1])), "", "x",
	})
	m.keyring.leases.work.Wait() // it may have begun to open the lease
}

// Lease gives a lease or takes it away. It changes the key record where it makes a KEK.
func (m *machine) Lease(rt *rapid.T) {
	name, key := m.pick(rt)
	key.lease = rapid.Bool().Draw(rt, "lease")
	lease := time.Duration(0)
	if key.lease {
		lease = MaxLease
	}
	before, err := m.keyring.Get(m.ctx, name)
	if err != nil {
		rt.Fatal(err)
	}
	after, err := m.keyring.Configure(m.ctx, name, Settings{Lease: &lease, By: "model"})
	if err != nil || key.lease && after.Versions[after.LatestVersion-1].KEK == "" {
		rt.Fatalf("a lease of %v: %+v, %v", lease, after, err)
	}
	key.known = key.known && before.RecordSHA256 == after.RecordSHA256
}

func (m *machine) EndLeases(*rapid.T) { m.keyring.EndLeases() }

// held tells whether the KEK of a leased envelope is in memory.
func (m *machine) held(rt *rapid.T, e modelEnvelope) bool {
	parsed, err := envelope.Parse(e.raw)
	if err != nil {
		rt.Fatal(err)
	}
	kid, _ := parsed.KEKID()
	return slices.ContainsFunc(m.keyring.Leases(), func(l Lease) bool { return l.Key == e.key && l.Version == e.version && l.KID == kid })
}

func (m *machine) Wrap(rt *rapid.T) {
	name, key := m.pick(rt)
	payload, caller := rapid.String().Draw(rt, "payload"), rapid.StringN(0, 20, 100).Draw(rt, "context")
	sealed, err := m.keyring.Wrap(m.ctx, name, envelope.UseWrap, []byte(payload), []byte(caller))
	if err != nil { // whichever devices are down
		rt.Fatal(err)
	}
	newest := key.versions[len(key.versions)-1]
	if sealed.Version != len(key.versions) || sealed.Recipients != len(newest) {
		rt.Fatalf("sealed to version %d and %d recipients, want %d and %d", sealed.Version, sealed.Recipients, len(key.versions),
			len(newest))
	}
	m.envelopes = append(m.envelopes, modelEnvelope{
		sealed.Envelope, envelope.UseWrap, false, name, sealed.Version, slices.Collect(maps.Keys(newest)), caller, payload,
	})
}

func (m *machine) pickEnvelope(rt *rapid.T) (int, modelEnvelope, *modelKey) {
	if len(m.envelopes) == 0 {
		rt.Skip("no envelope yet")
	}
	i := rapid.IntRange(0, len(m.envelopes)-1).Draw(rt, "envelope")
	return i, m.envelopes[i], m.keys[m.envelopes[i].key]
}

// opens tells what opening an envelope should give: nil, ErrVersionTooOld or hsm.ErrUnavailable.
func (m *machine) opens(e modelEnvelope, key *modelKey) error {
	if e.version < key.minimum {
		return ErrVersionTooOld
	}
	for _, kid := range e.kids {
		if !m.down[key.versions[e.version-1][kid]] {
			return nil
		}
	}
	return hsm.ErrUnavailable
}

func (m *machine) operations() int {
	sum := 0
	for _, token := range m.tokens {
		sum += token.Operations()
	}
	return sum
}

func (m *machine) Unwrap(rt *rapid.T) {
	_, e, key := m.pickEnvelope(rt)
	before, held, cost := m.operations(), m.held(rt, e), 1
	if held {
		cost = 0
	}
	opened, err := m.keyring.Unwrap(m.ctx, e.key, e.use, e.raw, []byte(e.caller))
	if want := m.opens(e, key); want != nil && (!held || want == ErrVersionTooOld) { //nolint:errorlint // as it is
		if !errors.Is(err, want) {
			rt.Fatalf("opened: %v, want %v", err, want)
		}
		return
	}
	if err != nil || string(opened.Payload) != e.payload || opened.Version != e.version {
		rt.Fatalf("opened %q of version %d: %v; want %q of %d", opened.Payload, opened.Version, err, e.payload, e.version)
	}
	if spent := m.operations() - before; spent != cost || opened.Leased != e.leased || held != (opened.Device == "") {
		rt.Fatalf("it cost %d operations, want %d: %+v", spent, cost, opened)
	}
	if e.leased && key.lease != m.held(rt, e) {
		rt.Fatalf("with a lease (%v) its KEK is held: %v", key.lease, !key.lease)
	}
	if m.down[opened.Device] {
		rt.Fatalf("device %s is down and opened it", opened.Device)
	}
}

func (m *machine) UnwrapWithAnotherContext(rt *rapid.T) {
	_, e, _ := m.pickEnvelope(rt)
	before := m.operations()
	_, err := m.keyring.Unwrap(m.ctx, e.key, e.use, e.raw, []byte(e.caller+"x"))
	if !errors.Is(err, envelope.ErrContext) || m.operations() != before {
		rt.Fatalf("opened with another context: %v", err)
	}
}

func (m *machine) Rewrap(rt *rapid.T) {
	i, e, key := m.pickEnvelope(rt)
	if e.use != envelope.UseWrap {
		rt.Skip("TestARewrapOfALeasedEnvelope does that")
	}
	newest := key.versions[len(key.versions)-1]
	changes := e.version != len(key.versions) || len(e.kids) != len(newest)
	rewrapped, err := m.keyring.Rewrap(m.ctx, e.key, e.raw, envelope.Context{Use: envelope.UseWrap, Caller: []byte(e.caller)})
	if want := m.opens(e, key); want != nil && changes {
		if !errors.Is(err, want) {
			rt.Fatalf("rewrapped: %v, want %v", err, want)
		}
		return
	}
	if err != nil || rewrapped.Changed != changes || rewrapped.Version != len(key.versions) {
		rt.Fatalf("rewrapped to %+v: %v; want a change: %v", rewrapped.Sealed, err, changes)
	}
	e.raw, e.version, e.kids = rewrapped.Envelope, rewrapped.Version, slices.Collect(maps.Keys(newest))
	m.envelopes[i] = e
}

func (m *machine) UnplugOrReplug(rt *rapid.T) {
	device := rapid.SampledFrom([]string{"one", "two", "three"}).Draw(rt, "device")
	m.down[device] = !m.down[device]
	if m.down[device] {
		m.tokens[device].SetError(hsm.ErrUnavailable)
	} else {
		m.tokens[device].SetError(nil)
		m.devices.set(device, m.tokens[device].Attach())
	}
}

func (m *machine) Backup(rt *rapid.T) {
	name, key := m.pick(rt)
	backup, err := m.keyring.Backup(m.ctx, name, "model")
	if err != nil {
		rt.Fatal(err)
	}
	key.backup, key.known = backup, true
	key.hasRead()
}

// LoseTheMount brings all keys whose record is known back in an empty store; the others are lost with their envelopes.
func (m *machine) LoseTheMount(rt *rapid.T) {
	if !rapid.Bool().Draw(rt, "really") {
		return
	}
	for _, down := range m.down {
		if down {
			rt.Skip("devices are down")
		}
	}
	m.start()
	for name, key := range m.keys {
		if !key.known {
			delete(m.keys, name)
			m.envelopes = slices.DeleteFunc(m.envelopes, func(e modelEnvelope) bool { return e.key == name })
			continue
		}
		if _, err := m.keyring.Restore(m.ctx, name, RestoreRequest{Record: key.backup.Record, SHA256: key.backup.SHA256}); err != nil {
			rt.Fatal(err)
		}
		clear(key.confirmed)
		key.accepted, key.lease = false, false
		key.hasRead()
		for i := range key.served {
			key.served[i] = true // nobody knows
		}
	}
}

func (m *machine) end() {
	if m.keyring != nil {
		_ = m.keyring.Close()
	}
}

// start makes a keyring over an empty store.
func (m *machine) start() {
	m.end()
	m.keyring = New(Config{Records: newStore(m.t), Devices: m.devices, CacheRecords: true})
}

// Check compares what the keyring tells with the model after every action.
func (m *machine) Check(rt *rapid.T) {
	names, err := m.keyring.List(m.ctx)
	if err != nil || !slices.Equal(names, slices.Sorted(maps.Keys(m.keys))) {
		rt.Fatalf("listed %v, want %v: %v", names, slices.Sorted(maps.Keys(m.keys)), err)
	}
	for name, want := range m.keys {
		key, err := m.keyring.Get(m.ctx, name)
		if err != nil {
			rt.Fatal(err)
		}
		if key.State != StateReady || key.LatestVersion != len(want.versions) || key.MinDecryptionVersion != want.minimum {
			rt.Fatalf("key %s is %+v, want %d versions, minimum %d", name, key, len(want.versions), want.minimum)
		}
		if serves := want.encrypts(want.minimum); key.EncryptVersion != serves {
			rt.Fatalf("version %d of key %s serves encrypt/, want %d: %+v", key.EncryptVersion, name, serves, key)
		}
		if want.known && key.RecordSHA256 != want.backup.SHA256 {
			rt.Fatalf("key %s has another record than the one that was read", name)
		}
		for i, v := range key.Versions {
			kids := make([]string, len(v.Recipients))
			for j, rcpt := range v.Recipients {
				kids[j] = rcpt.KID
			}
			slices.Sort(kids)
			if !slices.Equal(kids, slices.Sorted(maps.Keys(want.versions[i]))) {
				rt.Fatalf("key %s, version %d has recipients %v", name, i+1, kids)
			}
		}
	}
}

func TestTheKeyringDoesWhatItsModelDoes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		m := &machine{
			t: t, ctx: context.Background(), devices: &devices{}, tokens: map[string]*hsmtest.Memory{}, down: map[string]bool{},
			keys: map[string]*modelKey{},
		}
		for _, name := range []string{"one", "two", "three"} {
			m.tokens[name] = hsmtest.NewMemory()
			m.devices.set(name, m.tokens[name])
		}
		m.start()
		defer m.end()
		rt.Repeat(rapid.StateMachineActions(m))
	})
}
