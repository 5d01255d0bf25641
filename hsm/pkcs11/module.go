package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

const (
	// greetLimit is how long a host may take to load its module and initialise it.
	greetLimit = 20 * time.Second
	// The pause before another start after two in a row that led to nothing. It doubles up to the longest, which is short enough
	// for a returned token to be in use again about a second later.
	firstPause, longestPause = 50 * time.Millisecond, 800 * time.Millisecond
	// closePatience is how long close waits for hosts and for log-ins that it interrupts. Longer takes only a process that not
	// even a kill ends, because the kernel is busy with its device, or another process that keeps the ledger's lock.
	closePatience = 6 * time.Second
	// staleAfter is how old a host has to be before the absence of a token or key is checked with a new one. A module should
	// see by itself what comes; p11-kit's client does not see a token that returned, OpenSC not a key that another program
	// made.
	staleAfter = time.Second
)

// module is one vendor's module and the hosts that it lives in: the current one, and those that finish old work.
type module struct {
	manager *Manager
	path    string
	devices map[*Device]struct{} // open ones; guarded by the manager

	// listing takes turns with listing the slots, before it is known whose turn it would be.
	listing *queue

	mu       sync.Mutex // guards what follows
	closed   bool
	current  *host
	starting *starting
	hosts    map[*host]struct{} // not gone yet
	tokens   map[string]*token  // by identity; they outlive hosts
	// failures counts the hosts since one was useful; until notBefore no other is started, because of lastErr.
	failures  int
	notBefore time.Time
	lastErr   error
	waiting   sync.WaitGroup // goroutines that start a host or wait for its end
}

// starting is a host about to be.
type starting struct {
	done chan struct{} // closed when host or err is set
	host *host
	err  error
}

func newModule(m *Manager, path string) *module {
	return &module{
		manager: m, path: path, devices: make(map[*Device]struct{}), listing: newQueue(1, queueBound),
		hosts: make(map[*host]struct{}), tokens: make(map[string]*token),
	}
}

// host returns the current host, starting one where there is none. A start is shared by all who wait for it and goes on
// without them.
func (m *module) host(ctx context.Context) (*host, error) {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil, ErrClosed
	}
	if h := m.current; h != nil {
		if !h.isDead() {
			m.mu.Unlock()
			return h, nil
		}
		m.dropLocked(h, h.cause())
	}
	s := m.starting
	if s == nil {
		if wait := time.Until(m.notBefore); wait > 0 {
			defer m.mu.Unlock()
			return nil, unavailable("the module host of %s failed %d times in a row and is started again in %v: %w",
				m.path, m.failures, wait.Round(time.Millisecond), m.lastErr)
		}
		s = &starting{done: make(chan struct{})}
		m.starting = s
		m.waiting.Go(func() { m.start(s) })
	}
	m.mu.Unlock()
	select {
	case <-s.done:
		return s.host, s.err
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the module host to start: %w", ctx.Err())
	}
}

// start makes a host the current one.
func (m *module) start(s *starting) {
	defer close(s.done)
	h, err := m.spawn()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.starting = nil
	if err != nil {
		m.failedLocked(err)
		s.err = unavailable("the PKCS#11 module %s: %w", m.path, err)
		return
	}
	if m.closed {
		h.retire()
		s.err = ErrClosed
		return
	}
	m.current, s.host = h, h
}

// spawn starts a host that is nobody's until it is installed. The caller is one of waiting.
func (m *module) spawn() (*host, error) {
	begun, stamp := time.Now(), m.manager.stamp()
	p, err := m.manager.spawn()
	if err != nil {
		return nil, err
	}
	h := newHost(p)
	h.mu.Lock()
	h.stamp = stamp
	h.mu.Unlock()
	m.mu.Lock()
	m.hosts[h] = struct{}{}
	m.waiting.Add(1)
	closed := m.closed
	m.mu.Unlock()
	if closed { // close did not see this one
		h.die(ErrClosed)
	}
	go func() {
		defer m.waiting.Done()
		<-h.gone
		m.mu.Lock()
		delete(m.hosts, h)
		m.mu.Unlock()
	}()
	if err := h.greet(wire.Hello{Version: wire.Version, Module: m.path, MaxSessions: maxSessions}, greetLimit); err != nil {
		h.die(err)
		if failure, ok := errors.AsType[*wire.Error](err); ok {
			return nil, describe(failure)
		}
		return nil, err
	}
	m.manager.logger.Debug("module host started", "module", m.path, "library", h.hello.Library,
		"memory_locked", h.hello.MemoryLocked, "took", time.Since(begun))
	return h, nil
}

// fresh starts a host now, whatever the current one does, for a look at the token that no cache can colour. The caller
// installs or retires it.
func (m *module) fresh(ctx context.Context) (*host, error) {
	type born struct {
		host *host
		err  error
	}
	ready := make(chan born)
	start := func() {
		h, err := m.spawn()
		select {
		case ready <- born{h, err}:
		case <-ctx.Done(): // a start cannot be taken back
			if err == nil {
				h.retire()
			}
		}
	}
	if !m.goWaitedFor(start) {
		return nil, ErrClosed
	}
	select {
	case b := <-ready:
		if b.err != nil {
			return nil, unavailable("the PKCS#11 module %s: %w", m.path, b.err)
		}
		return b.host, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for a fresh module host: %w", ctx.Err())
	}
}

// goWaitedFor runs f in a goroutine that close waits for; false where the module is closed already.
func (m *module) goWaitedFor(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.waiting.Go(f)
	return true
}

// install makes a fresh host the current one; the one before it finishes its work and ends.
func (m *module) install(h *host) {
	m.mu.Lock()
	before := m.current
	if m.closed {
		before = h
	} else {
		m.current = h
	}
	m.mu.Unlock()
	if before != nil {
		before.retire()
	}
}

// replace takes a host that no longer serves its token out of use. What is inside it may finish.
func (m *module) replace(h *host, cause error) {
	m.mu.Lock()
	m.dropLocked(h, cause)
	m.mu.Unlock()
	h.retire()
}

// refresh takes an old host out of use whose view of the token may be out of date, and says whether it did. That is no
// failure and causes no pause.
func (m *module) refresh(h *host) bool {
	if time.Since(h.born) < staleAfter {
		return false
	}
	m.discard(h)
	return true
}

// discard takes a host out of use without blaming it. What is inside it may finish.
func (m *module) discard(h *host) {
	m.mu.Lock()
	if m.current == h {
		m.current = nil
	}
	m.mu.Unlock()
	h.retire()
}

// upToDate returns a host that was born after the newest write to a token by any of our processes.
func (m *module) upToDate(ctx context.Context) (*host, error) {
	stamp := m.manager.stamp()
	h, err := m.host(ctx)
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	current := h.stamp == stamp
	h.mu.Unlock()
	if current {
		return h, nil
	}
	m.discard(h)
	return m.host(ctx)
}

// dropLocked makes room for another host and sets the pause before it. The caller holds mu.
func (m *module) dropLocked(h *host, cause error) {
	if m.current != h {
		return
	}
	m.current = nil
	h.mu.Lock()
	useful := h.useful
	h.mu.Unlock()
	if useful {
		m.failures, m.notBefore = 0, time.Time{}
		m.manager.logger.Warn("module host is replaced", "module", m.path, "cause", cause)
		return
	}
	m.failedLocked(cause)
}

// failedLocked counts a host that led to nothing. The caller holds mu.
func (m *module) failedLocked(cause error) {
	var pause time.Duration // none after the first: a token that was lost at that moment is back in use at once
	if m.failures > 0 {
		pause = min(firstPause<<min(m.failures-1, 10), longestPause)
		pause = pause/2 + rand.N(pause/2) //nolint:gosec // spreads load, guards nothing
	}
	m.failures++
	m.notBefore, m.lastErr = time.Now().Add(pause), cause
	if m.failures == 1 {
		m.manager.logger.Warn("module host failed", "module", m.path, "cause", cause)
	}
}

// succeeded ends a row of failures.
func (m *module) succeeded(h *host) {
	h.mu.Lock()
	already := h.useful
	h.useful = true
	h.mu.Unlock()
	if already {
		return
	}
	m.mu.Lock()
	recovered := m.failures > 0
	m.failures = 0
	m.mu.Unlock()
	if recovered {
		m.manager.logger.Info("token works again", "module", m.path)
	}
}

// token is what all devices on one token share, whatever host serves it.
type token struct {
	identity string
	parallel int
	queue    *queue
	// writing is held while an object or key is written or destroyed and checked, see [writeTurn].
	writing chan struct{}

	mu     sync.Mutex
	proved map[string]proofs // what keys were shown to do, by fingerprint; the maps inside are never changed
	// users are the open devices on the token.
	users map[*Device]struct{}
	// holders are the open devices with the PIN that logged in last, which has this digest; nil where no PIN is known to be right.
	holders map[*Device]struct{}
	digest  [32]byte
}

// token returns the token of that identity, with the parallelism of the device that asked first.
func (m *module) token(identity string, parallel int) *token {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tokens[identity]
	if t == nil {
		t = &token{
			identity: identity, parallel: parallel, queue: newQueue(parallel, queueBound), writing: make(chan struct{}, 1),
			proved: make(map[string]proofs), users: make(map[*Device]struct{}),
		}
		m.tokens[identity] = t
	}
	if t.parallel != parallel {
		m.manager.logger.Warn("devices on one token share the number of operations at a time of the first one",
			"token", identity, "in_force", t.parallel, "ignored", parallel)
	}
	return t
}

// use counts a device among those on the token, unless it was closed meanwhile.
func (t *token) use(d *Device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if d.open() == nil {
		t.users[d] = struct{}{}
	}
}

// limit is how long an operation may stay inside the module, see [Config].
func (t *token) limit(op wire.Op) (limit time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for d := range t.users {
		if op == wire.OpGenerateKey {
			limit = max(limit, d.config.GenerateLimit)
		} else {
			limit = max(limit, d.config.DecryptLimit)
		}
	}
	return limit
}

// close ends all hosts and waits for them and for whoever looks after them, but not for ever: Vault waits for us.
func (m *module) close() {
	m.mu.Lock()
	m.closed = true
	m.current = nil
	hosts := make([]*host, 0, len(m.hosts))
	for h := range m.hosts {
		hosts = append(hosts, h)
	}
	m.mu.Unlock()
	ended := make(chan struct{})
	go func() { // ends with the last host, whenever that is
		defer close(ended)
		var all sync.WaitGroup
		for _, h := range hosts {
			all.Go(h.close)
		}
		all.Wait()
		m.waiting.Wait()
	}()
	timer := time.NewTimer(m.manager.closePatience)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
		m.manager.logger.Warn("a module host, or a log-in that waits for another process, does not end; it is left to itself",
			"module", m.path, "waited", m.manager.closePatience)
	}
}
