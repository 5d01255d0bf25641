package nethsm

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// network is a network in memory, so that the clock of testing/synctest moves while everything waits for something: a
// minute of refused passwords takes milliseconds.
type network struct {
	mu    sync.Mutex
	hosts map[string]*host
	dials map[string]int
}

type host struct {
	accept chan net.Conn
	closed chan struct{}
	server *http.Server
	hole   bool // takes packets and never answers
	conns  []net.Conn
}

func newNetwork() *network {
	return &network{hosts: make(map[string]*host), dials: make(map[string]int)}
}

// start lets a handler answer at an address.
func (n *network) start(address string, handler http.Handler) {
	h := &host{accept: make(chan net.Conn), closed: make(chan struct{})}
	h.server = &http.Server{Handler: handler, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[address] = h
	go func() { _ = h.server.Serve(h) }()
}

// stop pulls the plug: connections end, and new ones are refused.
func (n *network) stop(address string) {
	n.mu.Lock()
	h := n.hosts[address]
	delete(n.hosts, address)
	n.mu.Unlock()
	if h != nil {
		_ = h.server.Close()
	}
}

// swallow makes an address a black hole.
func (n *network) swallow(address string, yes bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[address].hole = yes
	if yes {
		for _, conn := range n.hosts[address].conns {
			_ = conn.Close()
		}
		n.hosts[address].conns = nil
	}
}

func (n *network) close() {
	for _, address := range n.addresses() {
		n.stop(address)
	}
}

func (n *network) addresses() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for address := range n.hosts {
		out = append(out, address)
	}
	return out
}

// dialled is how often somebody wanted a connection.
func (n *network) dialled(address string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dials[address]
}

func (n *network) dial(ctx context.Context, network, address string) (net.Conn, error) {
	n.mu.Lock()
	h := n.hosts[address]
	n.dials[address]++
	hole := h != nil && h.hole
	n.mu.Unlock()
	refused := &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	switch {
	case h == nil:
		return nil, refused
	case hole:
		<-ctx.Done()
		return nil, &net.OpError{Op: "dial", Net: network, Err: ctx.Err()}
	}
	ours, theirs := net.Pipe()
	n.mu.Lock()
	h.conns = append(h.conns, ours)
	n.mu.Unlock()
	select {
	case h.accept <- theirs:
		return ours, nil
	case <-h.closed:
		return nil, refused
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (h *host) Accept() (net.Conn, error) {
	select {
	case conn := <-h.accept:
		return conn, nil
	case <-h.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (h *host) Close() error {
	select {
	case <-h.closed:
	default:
		close(h.closed)
	}
	return nil
}

// Addr implements net.Listener.
func (h *host) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// seen is a request as a node saw it.
type seen struct {
	at     time.Time
	method string
	path   string
	user   string
	status int
}

// peer is a node with a log: a handler of the test's own, or a double.
type peer struct {
	address string
	mu      sync.Mutex
	handler http.Handler
	log     []seen
}

func (p *peer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	handler := p.handler
	p.mu.Unlock()
	r.RemoteAddr = "127.0.0.1:1"
	user, _, _ := r.BasicAuth()
	out := &statusWriter{ResponseWriter: w}
	entry := seen{at: time.Now(), method: r.Method, path: strings.TrimPrefix(r.URL.EscapedPath(), apiPath), user: user}
	defer func() {
		entry.status = out.status
		p.mu.Lock()
		p.log = append(p.log, entry)
		p.mu.Unlock()
	}()
	handler.ServeHTTP(out, r)
}

// answers changes what the node answers.
func (p *peer) answers(handler http.HandlerFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handler = handler
}

// saw lists the requests to a path; an empty one to any.
func (p *peer) saw(path string) []seen {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []seen
	for _, s := range p.log {
		if path == "" || s.path == path {
			out = append(out, s)
		}
	}
	return out
}

func (p *peer) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = nil
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(p []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(p)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// scene is a client with the nodes that it knows, all in one bubble.
type scene struct {
	network *network
	peers   []*peer
	client  *Client
	log     *lines
	T       *testing.T // of the bubble
}

// lines are what was logged.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// within runs a test in a bubble with a client of nodes that these handlers are.
func within(t *testing.T, options Options, handlers []http.Handler, test func(s *scene)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &scene{network: newNetwork(), log: &lines{}, T: t}
		for i, handler := range handlers {
			p := &peer{address: fmt.Sprintf("127.0.0.1:%d", i+1), handler: handler}
			s.peers = append(s.peers, p)
			s.network.start(p.address, p)
			options.URLs = append(options.URLs, "http://"+p.address)
		}
		options.Logger = slog.New(slog.NewTextHandler(s.log, nil))
		pool, err := newPool(options, s.network.dial)
		if err != nil {
			t.Fatal(err)
		}
		s.client = &Client{pool: pool}
		defer s.network.close()
		defer func() {
			if err := s.client.Close(); err != nil {
				t.Error(err)
			}
		}()
		test(s)
	})
}

// withDouble runs a test in a bubble with a double of so many nodes.
func withDouble(t *testing.T, nodes int, test func(s *scene, h *nethsmtest.HSM)) {
	t.Helper()
	h, err := nethsmtest.New(nethsmtest.Options{Nodes: nodes, Provisioned: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	withHSM(t, h, test)
}

func withHSM(t *testing.T, h *nethsmtest.HSM, test func(s *scene, h *nethsmtest.HSM)) {
	t.Helper()
	var handlers []http.Handler
	for _, n := range h.Nodes() {
		handlers = append(handlers, n)
	}
	within(t, Options{}, handlers, func(s *scene) { test(s, h) })
}

// later lets time go by.
func later(d time.Duration) { <-time.After(d) }

// operator is a view with the double's operator.
func (s *scene) operator() *Client {
	return s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
}

// ask sends a small request that changes nothing.
func ask(ctx context.Context, c *Client) error {
	_, err := c.do(ctx, call{op: "listing the keys", method: http.MethodGet, path: "/keys", into: new(any)})
	return err
}

// post sends a request that changes nothing, with a method that net/http does not repeat.
func post(ctx context.Context, c *Client) error {
	_, err := c.do(ctx, call{op: "decrypting", method: http.MethodPost, path: "/keys/k/decrypt", body: struct{}{}, into: new(any)})
	return err
}

// create sends a request that creates.
func create(ctx context.Context, c *Client) error {
	_, err := c.do(ctx, call{op: "making a key", method: http.MethodPost, path: "/keys/generate", body: struct{}{}, into: new(any), creates: true})
	return err
}

// healthy answers everything as a node does that is well.
func healthy(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	switch strings.TrimPrefix(r.URL.Path, apiPath) {
	case "/health/state":
		_, _ = w.Write([]byte(`{"state":"Operational"}`))
	case "/health/ready":
	default:
		_, _ = w.Write([]byte(`{}`))
	}
}

// inState answers as a node that is not operational.
func inState(state State) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.HasSuffix(r.URL.Path, "/health/state") {
			_, _ = fmt.Fprintf(w, `{"state":%q}`, state)
			return
		}
		w.WriteHeader(http.StatusPreconditionFailed)
		_, _ = w.Write([]byte(`{"message":"Service not available"}`))
	}
}

// saying answers everything but the questions for health with a status.
func saying(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/health/") {
			healthy(w, r)
			return
		}
		w.WriteHeader(status)
	}
}

// hanging reads everything and answers nothing until the client leaves.
func hanging(_ http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body) // only then the server notices that a client leaves
	<-r.Context().Done()
}

func handlers(all ...http.HandlerFunc) []http.Handler {
	var out []http.Handler
	for _, one := range all {
		out = append(out, one)
	}
	return out
}

// gaps are the times between the requests.
func gaps(all []seen) []time.Duration {
	var out []time.Duration
	for i := 1; i < len(all); i++ {
		out = append(out, all[i].at.Sub(all[i-1].at))
	}
	return out
}

// withStatus keeps those that were answered with a status.
func withStatus(all []seen, status int) []seen {
	return slices.DeleteFunc(slices.Clone(all), func(s seen) bool { return s.status != status })
}
