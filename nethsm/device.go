package nethsm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// ErrClosed is returned by a device after its Close.
var ErrClosed = fmt.Errorf("%w: the device was closed", hsm.ErrUnavailable)

// Device is a NetHSM, of one node or several, as one mount uses it. It implements hsm.Device and what else it asserts
// below; objects only where its configuration says so.
//
// Every node can serve a private-key operation. What changes keys or objects goes to the first node that answers, in the
// order of the configuration: a node makes sure that a name is taken once, and two nodes of a cluster that are asked at
// the same moment cannot.
type Device struct {
	manager *Manager
	id      digest
	shared  *shared
	logger  *slog.Logger
	name    string // for messages
	objects bool
	tags    []string
	notes   []string
	lag     time.Duration // how long a node may be behind another one
	grace   time.Duration // how long a carrier is left to its maker

	mu     sync.Mutex // guards what follows
	closed bool
	named  map[string]hsm.ObjectRef // carriers that were seen with a value, by id
}

var (
	_ hsm.Device      = (*Device)(nil)
	_ hsm.Randomer    = (*Device)(nil)
	_ hsm.Unlocker    = (*Device)(nil)
	_ hsm.Clustered   = (*Device)(nil)
	_ hsm.ObjectStore = (*Device)(nil)
)

// shared is what devices of the same configuration have in common.
type shared struct {
	client        *Client // without credentials
	operator      *Client
	administrator *Client // nil where there is none
	operatorName  string
	users         int // devices; guarded by the manager's mu

	mu         sync.Mutex // guards what follows
	passphrase []byte     // of the automatic unlocking; nil for none
	unlocks    bool       // nodes that are found locked are unlocked by themselves
	unlocking  map[*node]chan struct{}
	wrong      map[*node]error // what nodes said of the passphrase: it is not sent there again
}

func newShared(config DeviceConfig) (*shared, error) {
	client, err := New(config.Options)
	if err != nil {
		return nil, err
	}
	s := &shared{
		client: client, operator: client.As(config.Operator), operatorName: config.Operator.Username,
		unlocking: map[*node]chan struct{}{}, wrong: map[*node]error{},
	}
	if config.Administrator != nil {
		s.administrator = client.As(*config.Administrator)
	}
	if len(config.UnlockPassphrase) > 0 {
		s.passphrase = bytes.Clone(config.UnlockPassphrase)
	}
	s.unlockByItself(true)
	return s, nil
}

func (s *shared) close() error {
	err := s.client.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.passphrase)
	s.passphrase = nil
	return err
}

func newDevice(m *Manager, id digest, s *shared, config DeviceConfig) *Device {
	var hosts []string
	for _, url := range s.client.URLs() {
		_, host, _ := strings.Cut(url, "://")
		hosts = append(hosts, host)
	}
	name := "the NetHSM at " + strings.Join(hosts, ", ")
	var notes []string
	if config.TLS.Insecure {
		notes = []string{"The certificate of this NetHSM is not checked: whoever gets between it and this machine reads passwords and " +
			"plaintexts. Give its CA or its fingerprint instead of tls_insecure."}
	}
	return &Device{
		manager: m, id: id, shared: s, name: name, objects: config.Objects, tags: slices.Clone(config.Tags), lag: cacheLag, grace: fillGrace, notes: notes,
		logger: config.Logger.With("mount", config.Owner, "nethsm", strings.Join(hosts, ",")),
		named:  map[string]hsm.ObjectRef{},
	}
}

// Close implements [hsm.Device]. With the last device that shares the client, the client is closed.
func (d *Device) Close() error {
	d.mu.Lock()
	was := d.closed
	d.closed = true
	d.mu.Unlock()
	if was {
		return nil
	}
	return d.manager.release(d)
}

// begin fails where the device is closed or the caller has already gone.
func (d *Device) begin(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	return ctx.Err()
}

// administrator is the client that may change keys.
func (d *Device) administrator() (*Client, error) {
	if d.shared.administrator == nil {
		return nil, fmt.Errorf("%w: only an Administrator may, and %s was configured with an Operator alone; "+
			"give the device an administrator's user name and password as well (admin_username, admin_password_file)", hsm.ErrForbidden, d.name)
	}
	return d.shared.administrator, nil
}

// Info implements [hsm.Device]. All nodes are asked at one time, and the first that is operational answers for the device.
// Nothing is asked that needs a password, so serial number and firmware stay empty: they belong to nodes, see Nodes.
func (d *Device) Info(ctx context.Context) (hsm.Info, error) {
	during := "asking " + d.name + " for its state"
	best := hsm.Info{State: hsm.StateAbsent}
	if err := d.begin(ctx); err != nil {
		return best, fmt.Errorf("%s: %w", during, err)
	}
	client := d.shared.client
	urls := client.URLs()
	type look struct {
		info hsm.Info
		err  error
	}
	looks := make(chan look, len(urls))
	var all sync.WaitGroup
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // runs before the waiting
	for _, url := range urls {
		node, err := client.At(url)
		if err != nil {
			return best, fmt.Errorf("%s: %w", during, err)
		}
		all.Go(func() {
			info, err := describeNode(ctx, node)
			looks <- look{info, err}
		})
	}
	var failed []error
	for range urls {
		got := <-looks
		if got.err != nil {
			failed = append(failed, got.err)
		} else if slices.Index(betterStates, got.info.State) > slices.Index(betterStates, best.State) {
			best = got.info
		}
		if best.State == hsm.StateOperational {
			break
		}
	}
	if best.State == hsm.StateAbsent {
		return best, fmt.Errorf("%s: %w", during, errors.Join(failed...))
	}
	best.Notes = slices.Clone(d.notes)
	return best, nil
}

// betterStates has the states from the worst to the best: a locked node is one passphrase away from serving.
var betterStates = []hsm.State{hsm.StateAbsent, hsm.StateFailed, hsm.StateUnprovisioned, hsm.StateLocked, hsm.StateOperational}

// describeNode asks one node what it is and how it fares.
func describeNode(ctx context.Context, node *Client) (hsm.Info, error) {
	state, err := node.State(ctx)
	if err != nil {
		return hsm.Info{}, err
	}
	product, err := node.Info(ctx)
	if err != nil {
		return hsm.Info{}, err
	}
	return hsm.Info{
		Vendor: product.Vendor, Model: product.Product, State: state.HSM(), Mechanisms: []string{string(ourMechanism)},
	}, nil
}

// Nodes implements [hsm.Clustered].
func (d *Device) Nodes(ctx context.Context) []hsm.Node {
	if err := d.begin(ctx); err != nil {
		var nodes []hsm.Node
		for _, url := range d.shared.client.URLs() {
			nodes = append(nodes, hsm.Node{URL: url, State: hsm.StateAbsent, Err: err})
		}
		return nodes
	}
	if d.shared.administrator != nil {
		return d.shared.administrator.Nodes(ctx)
	}
	return d.shared.client.Nodes(ctx)
}

// Random implements [hsm.Randomer].
func (d *Device) Random(ctx context.Context, n int) ([]byte, error) {
	if err := d.begin(ctx); err != nil {
		return nil, fmt.Errorf("making random bytes on %s: %w", d.name, err)
	}
	return d.shared.operator.Random(ctx, n)
}

// Unlock implements [hsm.Unlocker]. Without a passphrase it takes the one of the configuration. Where a node is open then, those
// that are found locked are unlocked by themselves again, where the configuration says so.
func (d *Device) Unlock(ctx context.Context, passphrase []byte) error {
	if err := d.begin(ctx); err != nil {
		return fmt.Errorf("unlocking %s: %w", d.name, err)
	}
	if len(passphrase) == 0 {
		passphrase = d.shared.unlockPassphrase()
		defer clear(passphrase)
	}
	if len(passphrase) == 0 {
		return fmt.Errorf("unlocking %s: %w: no passphrase was given, and none is configured", d.name, hsm.ErrLocked)
	}
	var opened atomic.Bool
	err := d.each(ctx, d.shared.client, "unlocking", func(node *Client) error {
		state, err := node.State(ctx)
		if err == nil && state == StateLocked {
			err = node.Unlock(ctx, passphrase)
			if answer, is := errors.AsType[*Error](err); is && answer.State == StateOperational {
				err = nil // somebody else was faster
			}
		} else if err == nil && state != StateOperational {
			err = fmt.Errorf("%w: it is not locked, it is %s", hsm.ErrUnavailable, strings.ToLower(string(state)))
		}
		if err == nil {
			opened.Store(true)
			node.only.returns(ctx)
		}
		return err
	})
	if opened.Load() {
		d.shared.mu.Lock()
		clear(d.shared.wrong)
		d.shared.mu.Unlock()
		d.shared.unlockByItself(true)
	}
	return err
}

// returns waits a moment until requests go to a node again that was just found to serve.
func (n *node) returns(ctx context.Context) {
	resting, is := n.resting()
	if !is {
		return
	}
	n.probeSoon()
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	select {
	case <-resting.over:
	case <-ctx.Done():
	}
}

// Lock implements [hsm.Unlocker]. Nodes then stay locked until Unlock: this device, and those that share its client, unlock
// them no more by themselves. Others with an unlock passphrase do, in this process or another one.
func (d *Device) Lock(ctx context.Context) error {
	if err := d.begin(ctx); err != nil {
		return fmt.Errorf("locking %s: %w", d.name, err)
	}
	administrator, err := d.administrator()
	if err != nil {
		return fmt.Errorf("locking %s: %w", d.name, err)
	}
	var locked atomic.Bool
	before := d.shared.unlockByItself(false)
	err = d.each(ctx, administrator, "locking", func(node *Client) error {
		if err := d.shared.settle(ctx, node.only); err != nil {
			return err
		}
		state, err := node.State(ctx)
		if err == nil && state != StateLocked {
			err = node.Lock(ctx)
		}
		if errors.Is(err, hsm.ErrLocked) {
			err = nil // somebody else was faster
		}
		if err == nil {
			locked.Store(true)
		}
		return err
	})
	if before && !locked.Load() {
		d.shared.unlockByItself(true)
	}
	return err
}

// each runs do on every node at one time. Nodes that do not answer are no error where one does; they are logged.
func (d *Device) each(ctx context.Context, view *Client, doing string, do func(*Client) error) error {
	urls := view.URLs()
	results := make([]error, len(urls))
	var all sync.WaitGroup
	for i, url := range urls {
		node, err := view.At(url)
		if err != nil {
			return fmt.Errorf("%s %s: %w", doing, d.name, err)
		}
		all.Go(func() { results[i] = do(node) })
	}
	all.Wait()
	var answered, silent []error
	for i, err := range results {
		switch {
		case err == nil:
		case unreached(err):
			silent = append(silent, fmt.Errorf("%s the node %s: %w", doing, urls[i], err))
		default:
			answered = append(answered, fmt.Errorf("%s the node %s: %w", doing, urls[i], err))
		}
	}
	if len(silent) == len(urls) || ctx.Err() != nil {
		answered = append(answered, silent...)
		silent = nil
	}
	for _, err := range silent {
		d.logger.Warn("a node of the NetHSM did not answer and is left as it is", "error", err)
	}
	return errors.Join(answered...)
}

// inOrder runs do on the first node that serves, in the order of the configuration; those of which it is known that they do
// not come last. The next one is asked only where it is sure that nothing happened. Where none serves and one is just being
// unlocked by itself, all are asked once more.
func (d *Device) inOrder(ctx context.Context, view *Client, do func(*Client) error) error {
	for awaited := false; ; awaited = true {
		failed := &unserved{op: "asking one node after the other"}
		for _, n := range ordered(view) {
			err := do(&Client{pool: view.pool, login: view.login, only: n})
			elsewhere := errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrLocked)
			if !elsewhere || errors.Is(err, hsm.ErrMayHaveHappened) || ctx.Err() != nil {
				return err
			}
			failed.causes = append(failed.causes, err)
		}
		if !awaited && view.pool.unlocked(ctx) {
			continue
		}
		if len(failed.causes) == 1 {
			return failed.causes[0]
		}
		return failed
	}
}

// ordered are the nodes of a view, those that rest or refuse the password last.
func ordered(view *Client) []*node {
	var serving, others []*node
	for _, n := range view.nodes() {
		if _, rests := n.resting(); rests || view.login.refusedAt(n) {
			others = append(others, n)
		} else {
			serving = append(serving, n)
		}
	}
	return append(serving, others...)
}

// unlocked waits for a node that is being unlocked by itself; false where none is.
func (p *pool) unlocked(ctx context.Context) bool {
	for _, n := range p.nodes {
		if resting, is := n.resting(); is && resting.unlocking != nil {
			return p.sleep(ctx, -1, resting.unlocking)
		}
	}
	return false
}

// unreached tells whether a node gave no answer at all.
func unreached(err error) bool {
	_, is := errors.AsType[*failure](err)
	return is
}

// unlockPassphrase is a copy of the configured one, for the caller to wipe; nil for none.
func (s *shared) unlockPassphrase() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.passphrase)
}

// unlockByItself lets nodes that are found locked be unlocked, where there is a passphrase for that, or not. It tells how it
// was before.
func (s *shared) unlockByItself(yes bool) (before bool) {
	s.mu.Lock()
	before, s.unlocks = s.unlocks, yes && s.passphrase != nil
	now := s.unlocks
	s.mu.Unlock()
	if now {
		s.client.pool.setUnlocker(s.unlock)
	} else {
		s.client.pool.setUnlocker(nil)
	}
	return before
}

// errKeptLocked is why a node is not unlocked by itself that was locked meanwhile.
var errKeptLocked = fmt.Errorf("it was locked on purpose: %w", hsm.ErrLocked)

// unlock unlocks a node that was found locked. The pool logs the error, and asks for one node once at a time.
func (s *shared) unlock(ctx context.Context, at *Client) error {
	s.mu.Lock()
	if wrong := s.wrong[at.only]; wrong != nil || !s.unlocks {
		s.mu.Unlock()
		return cmp.Or(wrong, errKeptLocked)
	}
	passphrase, over := bytes.Clone(s.passphrase), make(chan struct{})
	s.unlocking[at.only] = over
	s.mu.Unlock()
	defer clear(passphrase)
	defer close(over)

	err := at.Unlock(ctx, passphrase)
	s.mu.Lock()
	delete(s.unlocking, at.only)
	if _, is := errors.AsType[*hsm.PINError](err); is {
		s.wrong[at.only] = err
	}
	s.mu.Unlock()
	if err == nil {
		s.client.pool.logger.Info("a node of the NetHSM was unlocked by itself", "node", at.only.host)
	}
	return err
}

// settle waits for the end of an unlocking that is on its way.
func (s *shared) settle(ctx context.Context, n *node) error {
	s.mu.Lock()
	over := s.unlocking[n]
	s.mu.Unlock()
	if over == nil {
		return nil
	}
	select {
	case <-over:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for an unlocking that is on its way: %w", ctx.Err())
	}
}
