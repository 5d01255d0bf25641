package cluster

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// site is a cluster with what its hosts share: the store "main", HSMs, the wrapping keys "office", "bunker", "bank" and "van", each on
// an HSM of its own, and "twin", which is on office's HSM as well.
type site struct {
	t     *testing.T
	hsms  map[string]*hsmtest.Memory
	keys  *keyring.Keyring
	known *volatile // records of the wrapping keys
	main  *volatile
	nodes []*nodetest.Node
	clock *clock
	*Cluster
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

// newSite runs that many nodes of a kind, with what they need.
func newSite(t *testing.T, kind nodetest.Kind, count int) *site {
	t.Helper()
	return newSiteOf(t, nodetest.Options{Kind: kind, Authority: nodetest.NewAuthority(t)}, count)
}

// newSiteOf is newSite with any options for the nodes.
func newSiteOf(t *testing.T, options nodetest.Options, count int) *site {
	t.Helper()
	s := &site{t: t, hsms: map[string]*hsmtest.Memory{}, known: newStore()}
	s.keys = keyring.New(keyring.Config{Records: s.known, Devices: s})
	for i, name := range []string{"office", "bunker", "bank", "van"} {
		s.hsms[name] = hsmtest.NewMemory()
		s.hsms[name].AddEC(t, name, fmt.Sprintf("0%d", i+1), ecdh.P256())
		s.addKey(name, name, name)
	}
	s.hsms["office"].AddEC(t, "twin", "0a", ecdh.P256())
	s.addKey("twin", "office", "twin")
	s.begin(options, count)
	return s
}

// again is a new cluster with the same HSMs and wrapping keys, for tests that need very many: its node speaks plain http.
func (s *site) again(t *testing.T) *site {
	t.Helper()
	other := &site{t: t, hsms: s.hsms, keys: s.keys, known: s.known}
	other.begin(nodetest.Options{Kind: nodetest.Alone, Plain: true}, 1)
	return other
}

func (s *site) begin(options nodetest.Options, count int) {
	s.t.Helper()
	s.main, s.clock = newStore(), &clock{now: time.Now()}
	s.Cluster = &Cluster{Name: "prod", Key: "office", Store: "main"}
	for range count {
		n := nodetest.Start(s.t, options)
		s.nodes = append(s.nodes, n)
		s.Nodes = append(s.Nodes, n.Address())
	}
	s.TLS = s.nodes[0].TLS()
}

func (s *site) addKey(name, device, label string) {
	s.t.Helper()
	yes := true
	_, err := s.keys.Adopt(s.t.Context(), name, keyring.AdoptRequest{Device: device, Label: label, By: "test"})
	if err == nil {
		_, err = s.keys.Backup(s.t.Context(), name, "test")
	}
	if err == nil {
		_, err = s.keys.Configure(s.t.Context(), name, keyring.Settings{AcceptSingleHSM: &yes, By: "test"})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// Device implements keyring.Devices.
func (s *site) Device(_ context.Context, name string) (hsm.Device, error) {
	if device, found := s.hsms[name]; found {
		return device, nil
	}
	return nil, keyring.ErrNoDevice
}

// operations counts what all HSMs did.
func (s *site) operations() (all int) {
	for _, device := range s.hsms {
		all += device.Operations()
	}
	return all
}

// host is a machine with a disk of its own. Its processes come and go.
type host struct {
	*site

	name    string
	local   *volatile
	records *volatile
	fault   *fault
	acts    *acts
}

func (s *site) host(name string) *host {
	return &host{site: s, name: name, local: newStore(), records: newStore(), fault: new(fault), acts: new(acts)}
}

// Store implements custody.Stores.
func (h *host) Store(_ context.Context, name string) (store.Store, error) {
	if name != "main" {
		return nil, fmt.Errorf("no store %q is configured", name)
	}
	return faultyStore{h.main, "store", h.fault}, nil
}

// process is a new process of the host. It ends with the test.
func (h *host) process() *Custodian {
	records := faultyStore{h.records, "records", h.fault}
	keys := faultyKeys{h.keys, h.fault}
	k := New(Config{
		Keeper: custody.New(custody.Config{Keys: keys, Stores: h, Records: records, Shared: true, Now: h.clock.Now}),
		Keys:   keys, Stores: h, Local: faultyLocal{faultyStore{h.local, "local", h.fault}, h.local}, Audit: faultyAudit{h.acts, h.fault},
		Now: h.clock.Now, Host: h.name,
		Transport: func(next http.RoundTripper) http.RoundTripper { return faultyLine{next, h.fault} },
	})
	k.pauses = pauses{
		look: 50 * time.Millisecond, settle: 20 * time.Second, poll: time.Millisecond, pollLast: 20 * time.Millisecond, wait: 5 * time.Millisecond,
		keepFirst: time.Millisecond, keepLast: 5 * time.Millisecond, lock: 20 * time.Millisecond,
	}
	h.t.Cleanup(func() {
		if err := k.Close(); err != nil {
			h.t.Error(err)
		}
	})
	return k
}

// mustInit initialises the cluster.
func (h *host) mustInit() InitResult {
	h.t.Helper()
	result, err := h.process().Init(h.t.Context(), h.Cluster, InitOptions{By: "alice"})
	if err != nil {
		h.t.Fatalf("Init = %v", err)
	}
	return result
}

// wantAllUnsealed fails unless every node is, or becomes so.
func (s *site) wantAllUnsealed() {
	s.t.Helper()
	for _, n := range s.nodes {
		deadline := time.Now().Add(5 * time.Second)
		for n.Sealed() && time.Now().Before(deadline) {
			runtime.Gosched()
		}
		if n.Sealed() {
			s.t.Errorf("node %s is sealed", n.Address())
		}
	}
}

// initialisations counts the calls of sys/init that nodes got.
func (s *site) initialisations() (all int) {
	for _, n := range s.nodes {
		all += n.Count(http.MethodPut, "sys/init")
	}
	return all
}

// acts is an audit log in memory.
type acts struct {
	mu    sync.Mutex
	lines []string
}

func (a *acts) add(line string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.lines = append(a.lines, line)
}

func (a *acts) all() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.lines)
}

// faultyAudit is an audit log whose sinks may all be full.
type faultyAudit struct {
	*acts
	*fault
}

func (a faultyAudit) Begin(_ context.Context, act audit.Act) (end func(error), err error) {
	err = a.around("audit "+act.Verb, func() error { a.add("intent " + act.Verb); return nil })
	if err != nil {
		return nil, fmt.Errorf("%w: %w", audit.ErrNoSink, err)
	}
	return func(err error) { a.add(fmt.Sprintf("outcome %s %t", act.Verb, err == nil)) }, nil
}

// mode is what happens to a call of the outside world.
type mode string

// The modes. After a crash nothing happens any more: the goroutines of the process end at their next call.
const (
	refused     mode = "refused"        // it does not take place
	lost        mode = "lost"           // it takes place, and its answer is lost
	crashBefore mode = "crashed before" // the process dies before it
	crashAfter  mode = "crashed after"  // the process dies when it has taken place
)

// fault strikes one call: the at-th, or all of those that always names.
type fault struct {
	mu     sync.Mutex
	at     int // from 1; 0 for none
	mode   mode
	always func(call string) bool

	calls  []string
	struck string
	dead   bool
}

var errFault = errors.New("a fault of this test")

// around makes a call, with whatever the fault does to it.
func (f *fault) around(what string, call func() error) error {
	f.mu.Lock()
	if f.dead {
		f.mu.Unlock()
		runtime.Goexit()
	}
	f.calls = append(f.calls, what)
	strikes := len(f.calls) == f.at
	if strikes {
		f.struck = what
	}
	how := f.mode
	if f.always != nil && f.always(what) {
		strikes, how = true, refused
	}
	if strikes && how == crashBefore {
		f.dead = true
	}
	f.mu.Unlock()
	if !strikes {
		return call()
	}
	switch how {
	case crashBefore:
		runtime.Goexit()
	case lost, crashAfter:
		_ = call()
	}
	if how == crashAfter {
		f.mu.Lock()
		f.dead = true
		f.mu.Unlock()
		runtime.Goexit()
	}
	return errFault
}

// set makes it strike, set nil nothing.
func (f *fault) set(always func(call string) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.always = always
}

// reset is a new process in a world without faults.
func (f *fault) reset() (calls []string, struck string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls, struck = f.calls, f.struck
	f.at, f.always, f.calls, f.struck, f.dead = 0, nil, nil, "", false
	return calls, struck
}

// in runs the work of a process, which may end in the middle.
func (f *fault) in(work func() error) (err error, survived bool) { //nolint:revive // the error is beside the point where it crashed
	done := make(chan struct{})
	go func() {
		defer close(done)
		err = work()
		survived = true
	}()
	<-done
	return err, survived
}

// volatile is a store, and a disk.
type volatile struct {
	mu     sync.Mutex
	values map[string]store.Entry
	puts   int
	locks  map[string]chan struct{}
}

func newStore() *volatile {
	return &volatile{values: map[string]store.Entry{}, locks: map[string]chan struct{}{}}
}

func (m *volatile) Get(_ context.Context, name string) (store.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	entry, found := m.values[name]
	if !found {
		return store.Entry{}, fmt.Errorf("reading %q: %w", name, store.ErrNotFound)
	}
	entry.Value = slices.Clone(entry.Value) // its reader may wipe it
	return entry, nil
}

func (m *volatile) Put(_ context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := store.CheckName(name); err != nil {
		return store.NoRevision, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.values[name].Revision != expected {
		return store.NoRevision, fmt.Errorf("writing %q: %w", name, store.ErrConflict)
	}
	m.puts++
	entry := store.Entry{Value: slices.Clone(value), Revision: store.Revision(fmt.Sprint(m.puts))}
	m.values[name] = entry
	return entry.Revision, nil
}

func (m *volatile) List(_ context.Context, prefix string) (names []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.values {
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (m *volatile) Delete(_ context.Context, name string, expected store.Revision) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch entry, found := m.values[name]; {
	case !found:
		return fmt.Errorf("deleting %q: %w", name, store.ErrNotFound)
	case entry.Revision != expected:
		return fmt.Errorf("deleting %q: %w", name, store.ErrConflict)
	}
	delete(m.values, name)
	return nil
}

func (m *volatile) Close() error { return nil }

// Lock implements Local.
func (m *volatile) Lock(ctx context.Context, name string) (unlock func(), err error) {
	m.mu.Lock()
	if m.locks[name] == nil {
		m.locks[name] = make(chan struct{}, 1)
	}
	lock := m.locks[name]
	m.mu.Unlock()
	select { // one that is free is got, however late it is
	case lock <- struct{}{}:
		return func() { <-lock }, nil
	default:
	}
	select {
	case lock <- struct{}{}:
		return func() { <-lock }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// faultyStore is a store whose calls may fail.
type faultyStore struct {
	under *volatile
	name  string
	*fault
}

func (s faultyStore) do(what, name string, call func() error) error {
	err := s.around(s.name+" "+what+" "+plain(name), call)
	if errors.Is(err, errFault) {
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
	return err
}

// plain is a name without what differs from run to run.
func plain(name string) string {
	if before, _, found := strings.Cut(name, "rehearsal."); found {
		return before + "rehearsal"
	}
	if before, _, found := strings.Cut(name, "alarms/prod/"); found {
		return before + "alarms/prod/<node>"
	}
	if before, id := name[:strings.LastIndex(name, "/")+1], name[strings.LastIndex(name, "/")+1:]; validID(id) {
		return before + "<id>"
	}
	return name
}

func (s faultyStore) Get(ctx context.Context, name string) (entry store.Entry, err error) {
	err = s.do("get", name, func() (err error) { entry, err = s.under.Get(ctx, name); return err })
	return entry, err
}

func (s faultyStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (revision store.Revision, err error) {
	err = s.do("put", name, func() (err error) { revision, err = s.under.Put(ctx, name, value, expected); return err })
	return revision, err
}

func (s faultyStore) List(ctx context.Context, prefix string) (names []string, err error) {
	err = s.do("list", prefix, func() (err error) { names, err = s.under.List(ctx, prefix); return err })
	return names, err
}

func (s faultyStore) Delete(ctx context.Context, name string, expected store.Revision) error {
	return s.do("delete", name, func() error { return s.under.Delete(ctx, name, expected) })
}

func (s faultyStore) Close() error { return nil }

type faultyLocal struct {
	faultyStore

	locks *volatile
}

func (l faultyLocal) Lock(ctx context.Context, name string) (unlock func(), err error) {
	return l.locks.Lock(ctx, name)
}

// faultyKeys is a keyring whose HSM may be away.
type faultyKeys struct {
	*keyring.Keyring
	*fault
}

func (k faultyKeys) Open(ctx context.Context, name string, raw []byte, want envelope.Context) (opened keyring.Opened, err error) {
	err = k.around("hsm open "+plain(want.Name), func() (err error) { opened, err = k.Keyring.Open(ctx, name, raw, want); return err })
	if errors.Is(err, errFault) {
		clear(opened.Payload)
		return keyring.Opened{}, fmt.Errorf("%w: %w", hsm.ErrUnavailable, err)
	}
	return opened, err
}

func (k faultyKeys) Seal(ctx context.Context, name string, c envelope.Context, payload []byte) (sealed keyring.Sealed, err error) {
	err = k.around("seal "+plain(c.Name), func() (err error) { sealed, err = k.Keyring.Seal(ctx, name, c, payload); return err })
	return sealed, err
}

// faultyLine is a line to a node that may break.
type faultyLine struct {
	next http.RoundTripper
	*fault
}

func (l faultyLine) RoundTrip(request *http.Request) (answer *http.Response, err error) {
	err = l.around("node "+request.Method+" "+strings.TrimPrefix(request.URL.Path, "/v1/"), func() (err error) {
		answer, err = l.next.RoundTrip(request) //nolint:bodyclose // closed below, or by the client
		return err
	})
	if errors.Is(err, errFault) && answer != nil {
		answer.Body.Close()
		return nil, err
	}
	return answer, err
}
