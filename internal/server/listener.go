package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// Bounds of a connection.
const (
	maxHeader    = 16 << 10
	defaultConns = 4096
)

// timing is how long things may take, and how often they are done.
type timing struct {
	// Limits of a connection. A seal's requests are small, and nobody has a reason to be slow; an answer may wait for an HSM.
	header, read, write time.Duration
	// idle is longer than what Go's clients keep idle connections for, 90 s: so it is they who end them, and no request meets a
	// connection that is just being closed.
	idle time.Duration
	// shutdown is how long what runs may take when the server stops.
	shutdown time.Duration
	// certificates is how often the files of the certificate are read.
	certificates time.Duration
	// memory is how often the limit of memory is set anew, 0 for never.
	memory time.Duration
	// settle is how long a new configuration may take for its next key to become ready, before the one in use stays.
	settle time.Duration
}

// usual is the timing of every server but those of some tests.
func usual() timing {
	const header, read = 10 * time.Second, 30 * time.Second
	return timing{
		header: header, read: read, write: openLimit + 2*read, idle: 3 * time.Minute, shutdown: openLimit + 5*time.Second,
		certificates: 5 * time.Second, settle: 30 * time.Second, memory: time.Second,
	}
}

// check says what is wrong with a listener.
func (l *Listen) check() error {
	switch {
	case l.Address == "":
		return errors.New("the server has no address to listen on")
	case l.Plain == (l.Certificate != nil):
		return errors.New("the listener is either plain, or has a certificate")
	case l.ClientCA != nil && l.Plain:
		return errors.New("client certificates need TLS")
	case l.Required && l.ClientCA == nil:
		return errors.New("client certificates that are required need a CA")
	}
	if l.Plain {
		host, _, err := net.SplitHostPort(l.Address)
		address, bad := netip.ParseAddr(host)
		if err != nil || host != "localhost" && (bad != nil || !address.Unmap().IsLoopback()) {
			return fmt.Errorf("other machines can reach the listener at %s: without TLS, tokens and keys of Vaults would pass in the clear", l.Address)
		}
	}
	if err := (monitor.Listen{Address: l.Address, Plain: true}).Check(); err != nil {
		return err
	}
	return nil
}

// front is what listens for seals at one address.
type front struct {
	http     *http.Server
	listener net.Listener
	ended    chan struct{} // closed when Serve has returned
	patience time.Duration // for what runs when it stops
	silent   silent
}

// silent are connections over which nothing was asked yet. http.Server waits five seconds for them when it stops, and Vault's client
// leaves some behind.
type silent struct {
	mu     sync.Mutex // guards what follows
	conns  map[net.Conn]struct{}
	closed bool
}

// turn is what http.Server tells of each connection.
func (s *silent) turn(conn net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case state != http.StateNew:
		delete(s.conns, conn)
	case s.closed:
		_ = under(conn).Close() // nobody asked for anything
	default:
		s.conns[conn] = struct{}{}
	}
}

// close ends them, and those that come.
func (s *silent) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for conn := range s.conns {
		_ = under(conn).Close() // nobody asked for anything
	}
}

// under is the connection below TLS. Closing that one says no farewell, which could take long.
func under(conn net.Conn) net.Conn {
	if secure, ok := conn.(*tls.Conn); ok {
		return secure.NetConn()
	}
	return conn
}

// gatekeeper accepts connections, not more than a number of them, and makes them TLS with what is in use at that moment.
type gatekeeper struct {
	net.Listener

	wardrobe *wardrobe
	most     *atomic.Int64
	open     *atomic.Int64
	regulars *recent
	refused  func()
}

// full tells whether a connection is one too many. The last quarter is for addresses from which a good token came: whoever has none
// could take the server from all others by connecting again and again.
func (g *gatekeeper) full(conn net.Conn) bool {
	open, most := g.open.Load(), g.most.Load()
	return open >= most || open >= most-most/4 && !g.regulars.has(address(conn))
}

// address is what a peer cannot choose freely of its address.
func address(conn net.Conn) []byte {
	peer, ok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return nil
	}
	const own = 8 // bytes of an IPv6 address; a network of the last ones is anybody's
	if ip := peer.AddrPort().Addr().Unmap(); ip.Is6() {
		return ip.AsSlice()[:own]
	}
	return peer.IP.To4()
}

// Accept implements [net.Listener].
func (g *gatekeeper) Accept() (net.Conn, error) {
	raw, err := g.Listener.Accept()
	for err == nil && g.full(raw) {
		g.refused()
		_ = raw.Close() // it has nothing to lose
		raw, err = g.Listener.Accept()
	}
	if err != nil {
		return nil, err
	}
	g.open.Add(1)
	worn := g.wardrobe.current.Load()
	conn := &visit{Conn: raw, gone: sync.OnceFunc(func() { g.open.Add(-1) })}
	if worn == nil {
		return conn, nil
	}
	conn.clients = worn.clients
	return tls.Server(conn, worn.config), nil
}

// visit is a connection that tells when it is closed.
type visit struct {
	net.Conn

	gone     func()
	clients  uint64      // see armour
	welcomed atomic.Bool // a good token came over it
}

// Close implements [net.Conn].
func (v *visit) Close() error {
	v.gone()
	return v.Conn.Close()
}

// visitKey is where the context of a request keeps its connection.
type visitKey struct{}

// withVisit is what http.Server asks of each new connection.
func withVisit(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, visitKey{}, under(conn))
}

// welcome notes where a good token came from.
func (s *server) welcome(r *http.Request) {
	if v, ok := r.Context().Value(visitKey{}).(*visit); ok && !v.welcomed.Load() && v.welcomed.CompareAndSwap(false, true) {
		s.regulars.add(address(v))
	}
}

// stale tells whether a request came over a connection whose client certificate was checked against CAs of before.
func stale(r *http.Request, worn *armour) bool {
	if worn == nil {
		return false
	}
	v, ok := r.Context().Value(visitKey{}).(*visit)
	return ok && v.clients != worn.clients
}

// matters tells whether a request over a stale connection gets more from it than from a new one: what its certificate was worth, or
// that it needed none.
func (a *armour) matters(r *http.Request) bool {
	return r.TLS == nil || len(r.TLS.PeerCertificates) > 0 || a.config.ClientAuth == tls.RequireAndVerifyClientCert
}

// newFront begins to listen. Nobody is answered before serve.
func newFront(ctx context.Context, address string, handler http.Handler, limits timing, logger *slog.Logger) (*front, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", address, err)
	}
	f := &front{
		silent: silent{conns: map[net.Conn]struct{}{}}, listener: listener, ended: make(chan struct{}), patience: limits.shutdown,
		http: &http.Server{
			Handler: handler, ReadHeaderTimeout: limits.header, ReadTimeout: limits.read, WriteTimeout: limits.write, IdleTimeout: limits.idle,
			MaxHeaderBytes: maxHeader, ConnContext: withVisit,
			ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
		},
	}
	f.http.ConnState = f.silent.turn
	return f, nil
}

// stop ends a front: no new connections and requests, and what runs gets the time that it may take.
func (f *front) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), f.patience)
	defer cancel()
	f.silent.close()
	if f.http.Shutdown(ctx) != nil {
		_ = f.http.Close() // it is of no use any more
	}
	_ = f.listener.Close() // closed already, unless its goroutine had no turn yet
	<-f.ended
}
