package nethsm

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"time"
	"weak"

	"vault-plugin-secrets-nitrokey/hsm"
)

const (
	defaultTimeout     = 10 * time.Second
	defaultConnections = 32
	defaultUserAgent   = "nitroseal"
	maxNodes           = 64
	probeTimeout       = 5 * time.Second
	stateTimeout       = 2 * time.Second
	unlockTimeout      = 30 * time.Second // it takes about 2 s
)

// errClosed is the cause of what fails because of Close.
var errClosed = fmt.Errorf("the client was closed: %w", hsm.ErrUnavailable)

// pool is what all views of a client share: the nodes, their connections and what is known about them. It owns every
// goroutine of the client.
//
// The order of the package's locks, of which a goroutine that holds one takes only those further right:
//
//	pool.choosing → standing.mu → pool.mu
//	pool.choosing → node.mu
//
// payload.mu and connections.mu stand alone, and no lock is held over I/O or a wait. A lock may be held over a line of the log.
type pool struct {
	nodes       []*node
	timeout     time.Duration
	logger      *slog.Logger
	connections *connections

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wait   sync.WaitGroup

	choosing sync.Mutex
	turn     int // where the search for a node begins, so that equals take turns

	mu       sync.Mutex // nothing is locked under it
	closed   bool
	unlocker unlocker
	logins   map[[sha256.Size]byte]weak.Pointer[login] // a login goes with the last view or verifier that uses it
	key      [sha256.Size]byte                         // of the fingerprints in logins
}

func newPool(options Options, dial dialFunc) (*pool, error) {
	switch {
	case len(options.URLs) == 0:
		return nil, fmt.Errorf("%w: there is no URL; give at least one, https://host:port", ErrConfig)
	case len(options.URLs) > maxNodes:
		return nil, fmt.Errorf("%w: there are %d URLs, and %d at most are allowed", ErrConfig, len(options.URLs), maxNodes)
	case options.Timeout < 0 || options.Connections < 0:
		return nil, fmt.Errorf("%w: the time-out and the number of connections cannot be negative", ErrConfig)
	}
	if options.Timeout == 0 {
		options.Timeout = defaultTimeout
	}
	if options.Connections == 0 {
		options.Connections = defaultConnections
	}
	if options.UserAgent == "" {
		options.UserAgent = defaultUserAgent
	}
	if strings.ContainsFunc(options.UserAgent, func(r rune) bool { return r < ' ' || r > '~' }) {
		return nil, fmt.Errorf("%w: the user agent has other characters than a header can have", ErrConfig)
	}
	if options.Logger == nil {
		options.Logger = slog.New(slog.DiscardHandler)
	}
	trust, err := newTrust(options.TLS)
	if err != nil {
		return nil, err
	}
	p := &pool{timeout: options.Timeout, logger: options.Logger, logins: make(map[[sha256.Size]byte]weak.Pointer[login])}
	if _, err := rand.Read(p.key[:]); err != nil {
		return nil, fmt.Errorf("making a random key: %w", err)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.connections = newConnections(p.ctx, dial)
	known := make(map[string]bool)
	for i, text := range options.URLs {
		base, err := parseURL(text)
		if err != nil {
			return nil, errors.Join(err, p.close())
		}
		if known[base] {
			return nil, errors.Join(fmt.Errorf("%w: the URL %s is given twice", ErrConfig, base), p.close())
		}
		known[base] = true
		p.nodes = append(p.nodes, newNode(i, base, options, trust, p.connections.dial, options.Logger))
	}
	return p, nil
}

// close ends what runs in the background and every connection.
func (p *pool) close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.connections.close()
	p.wait.Wait()
	for _, n := range p.nodes {
		n.kept.CloseIdleConnections()
		n.fresh.CloseIdleConnections()
	}
	return nil
}

// start runs something in the background until close, which waits for it; after close it does not, and is false.
func (p *pool) start(run func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.wait.Go(run)
	return true
}

// login returns the login with these credentials; views with the same ones share it.
func (p *pool) login(credentials Credentials) *login {
	pair := append([]byte(credentials.Username+":"), credentials.Password...)
	defer clear(pair)
	mac := hmac.New(sha256.New, p.key[:])
	mac.Write(pair)
	fingerprint := [sha256.Size]byte(mac.Sum(nil))
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.logins[fingerprint].Value(); known != nil {
		return known
	}
	l := newLogin(p, credentials.Username, "Basic "+base64.StdEncoding.EncodeToString(pair))
	p.logins[fingerprint] = weak.Make(l)
	runtime.AddCleanup(l, p.forget, fingerprint)
	return l
}

// forget drops a login that nobody uses any longer, unless somebody has begun to use the same credentials again.
func (p *pool) forget(fingerprint [sha256.Size]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.logins[fingerprint].Value() == nil {
		delete(p.logins, fingerprint)
	}
}

// set is a set of nodes, by their index.
type set uint64

func (s set) has(n *node) bool { return s&(1<<n.index) != 0 }
func (s *set) add(n *node)     { *s |= 1 << n.index }

// choice is the node that a request should try next.
type choice struct {
	node  *node
	trial bool            // it rests, and the request finds out whether it still must
	left  int             // nodes to try, this one included
	wait  <-chan struct{} // node is nil: closed when another request's trial has its outcome
}

// choose picks a node that was not tried, and counts the request in there: of those that serve, and that do not refuse the
// login, the one with the fewest requests in flight; equals take turns. Where there is none, a resting one whose last try is
// long enough ago, or any that rests where resting says so.
func (p *pool) choose(nodes []*node, tried set, login *login, resting bool) choice {
	p.choosing.Lock()
	defer p.choosing.Unlock()
	p.turn++
	next := p.serving(nodes, tried, login)
	if next.node == nil {
		next = p.returning(nodes, tried, login, resting)
	}
	if next.node != nil {
		next.node.begin(next.trial)
	}
	return next
}

// serving is the choice among the nodes that serve.
func (p *pool) serving(nodes []*node, tried set, login *login) choice {
	var best choice
	fewest := 0
	for i := range nodes {
		n := nodes[(p.turn+i)%len(nodes)]
		if tried.has(n) || login.refusedAt(n) {
			continue
		}
		n.mu.Lock()
		rests, load := n.rest != nil, n.inFlight
		n.mu.Unlock()
		if rests {
			continue
		}
		best.left++
		if best.node == nil || load < fewest {
			best.node, fewest = n, load
		}
	}
	return best
}

// returning is the choice among the nodes that rest.
func (p *pool) returning(nodes []*node, tried set, login *login, resting bool) choice {
	var best choice
	for i := range nodes {
		n := nodes[(p.turn+i)%len(nodes)]
		if tried.has(n) || login.refusedAt(n) {
			continue
		}
		n.mu.Lock()
		due := resting || n.rest == nil || n.rest.brief || time.Since(n.rest.tried) >= restTries
		if n.rest != nil && n.rest.trial != nil && !resting {
			best.wait, due = n.rest.trial, false
		}
		n.mu.Unlock()
		if !due {
			continue
		}
		best.left++
		if best.node == nil {
			best.node, best.trial = n, !resting
		}
	}
	return best
}

// jittered is a pause and up to a fifth of it more, so that many clients do not come back at one time.
func jittered(pause time.Duration) time.Duration { return pause + spread(pause/5) }

// spread is a random time up to limit.
func spread(limit time.Duration) time.Duration {
	return mathrand.N(limit + 1) //nolint:gosec // it spreads load and guards nothing
}
