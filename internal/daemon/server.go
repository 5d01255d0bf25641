package daemon

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// server answers about the daemon. It can move to another address, and takes a renewed certificate, while it serves.
type server struct {
	daemon  *daemon
	handler http.Handler

	mu      sync.Mutex // guards what follows
	at      Listen
	open    *opened // nil for none
	missing Listen  // is wanted and could not be had, no address for none: then nothing is open
	told    bool    // the log was told of what is missing
	serving sync.WaitGroup

	certificate atomic.Pointer[tls.Certificate]
}

// opened is what serves at one address.
type opened struct {
	*http.Server

	listener net.Listener
}

// Bounds of requests: the answers are small, and nobody has a reason to be slow.
const (
	requestLimit  = 10 * time.Second
	maxHeader     = 8 << 10
	shutdownLimit = 2 * time.Second
	// nameLimit is how long a listener's host name may take to be resolved: nodes wait meanwhile.
	nameLimit = 2 * time.Second
	// listenPause is how often an address that could not be had is tried again.
	listenPause = 10 * time.Second
	// maxConnections are served at one time. Whoever can reach the listener could take all memory otherwise.
	maxConnections = 256
)

func newServer(d *daemon) *server {
	s := &server{daemon: d}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4, Timeout: requestLimit,
	}))
	s.handler = mux
	return s
}

// check refuses an address that others reach without TLS, unless the configuration says that this is wanted.
func (l Listen) check() error {
	if l.Address == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(l.Address)
	if err == nil {
		_, err = net.DefaultResolver.LookupPort(context.Background(), "tcp", port) // a file at most: names of services
	}
	if err != nil {
		return fmt.Errorf("%w: the listener's address %q is not host and port: %w", ErrConfig, l.Address, err)
	}
	if l.Certificate != nil || l.Plain || loopback(host) {
		return nil
	}
	return fmt.Errorf("%w: other machines can reach the listener at %s, and it has no certificate: give it one, listen on 127.0.0.1, "+
		"or allow plain HTTP", ErrConfig, l.Address)
}

// loopback tells whether a host is this machine, and nothing else. A name is asked of nobody.
func loopback(host string) bool {
	address, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && address.Unmap().IsLoopback()
}

// begin serves at an address from now on, or as soon as it can be had: a port for metrics that somebody else has taken is no
// reason to leave a Vault sealed.
func (s *server) begin(l Listen) {
	s.mu.Lock()
	s.missing = l
	s.mu.Unlock()
	s.retry()
}

// retry serves at the address that could not be had before, where there is one.
func (s *server) retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.missing.Address == "" {
		return
	}
	if err := s.move(s.missing); err != nil {
		if !s.told {
			s.daemon.logger.Error("/healthz, /readyz and /metrics are not answered; it is tried again every few seconds, and nodes are unsealed "+
				"meanwhile", "cause", err)
		}
		s.told = true
		return
	}
	if s.told {
		s.daemon.logger.Info("/healthz, /readyz and /metrics are answered now", "address", s.missing.Address)
	}
	s.missing, s.told = Listen{}, false
}

// listen serves at an address from now on, and no more at the one before. Where that fails nothing changes; an address that
// could not be had before is no failure, and stays the one that is tried again.
func (s *server) listen(l Listen) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.move(l)
	switch {
	case err == nil:
		s.missing, s.told = Listen{}, false
	case l.Address == s.missing.Address:
		s.missing = l
		return nil
	}
	return err
}

// move is listen for those who hold mu, without what is missing.
func (s *server) move(l Listen) error {
	if l.Address == s.at.Address {
		s.at = l
		s.certificate.Store(l.Certificate)
		return nil
	}
	old := s.open
	if l.Address == "" {
		s.at, s.open = l, nil
		s.shut(old)
		return nil
	}
	open, err := s.serve(l)
	if errors.Is(err, syscall.EADDRINUSE) && samePort(l, s.at) { // ours is in the way: the host is another one
		s.shut(old)
		if open, err = s.serve(l); err != nil {
			l = s.at
			var back error
			if open, back = s.serve(l); back != nil {
				s.missing, l, err = l, Listen{}, errors.Join(err, back)
			}
		}
		s.at, s.open = l, open
		return err
	}
	if err != nil {
		return err
	}
	s.shut(old)
	s.at, s.open = l, open
	return nil
}

// serve begins to serve at an address.
func (s *server) serve(l Listen) (*opened, error) {
	ctx, cancel := context.WithTimeout(context.Background(), nameLimit)
	defer cancel()
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", l.Address)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", l.Address, err)
	}
	s.certificate.Store(l.Certificate)
	address := listener.Addr().String()
	open := &http.Server{
		Handler: s.handler, ReadHeaderTimeout: requestLimit, ReadTimeout: requestLimit, WriteTimeout: 2 * requestLimit,
		IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(s.daemon.logger.Handler(), slog.LevelDebug),
	}
	s.serving.Go(func() {
		if err := open.Serve(&armed{Listener: listener, certificate: &s.certificate}); !errors.Is(err, http.ErrServerClosed) {
			s.daemon.logger.Error("the listener failed", "address", address, "cause", err)
		}
	})
	if s.daemon.options.Listening != nil {
		s.daemon.options.Listening(address)
	}
	return &opened{open, listener}, nil
}

// samePort tells whether two addresses differ in their host only.
func samePort(a, b Listen) bool {
	_, first, _ := net.SplitHostPort(a.Address)
	_, second, _ := net.SplitHostPort(b.Address)
	return first == second
}

// armed is a listener whose connections are TLS while there is a certificate, so that a reload may bring one, renew it or
// take it away without giving up the address.
type armed struct {
	net.Listener

	certificate *atomic.Pointer[tls.Certificate]
	connections atomic.Int64
}

// Accept implements [net.Listener].
func (a *armed) Accept() (net.Conn, error) {
	raw, err := a.Listener.Accept()
	for err == nil && a.connections.Load() >= maxConnections {
		_ = raw.Close() // it has nothing to lose
		raw, err = a.Listener.Accept()
	}
	if err != nil {
		return nil, err
	}
	a.connections.Add(1)
	conn := &counted{Conn: raw, gone: sync.OnceFunc(func() { a.connections.Add(-1) })}
	certificate := a.certificate.Load()
	if certificate == nil {
		return conn, nil
	}
	return tls.Server(conn, &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, Certificates: []tls.Certificate{*certificate},
	}), nil
}

// counted is a connection that tells when it is closed.
type counted struct {
	net.Conn

	gone func()
}

// Close implements [net.Conn].
func (c *counted) Close() error {
	c.gone()
	return c.Conn.Close()
}

// shut ends a server that has little to finish.
func (s *server) shut(open *opened) {
	if open == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	if open.Shutdown(ctx) != nil {
		_ = open.Close() // it is of no use any more
	}
	_ = open.listener.Close() // closed already, unless its goroutine had no turn yet
}

func (s *server) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut(s.open)
	s.open = nil
	s.serving.Wait()
}

// healthz: the process lives and its loops turn. Whoever restarts it for want of that does no harm.
func (s *server) healthz(w http.ResponseWriter, _ *http.Request) {
	if err := s.daemon.healthy(); err != nil {
		respond(w, http.StatusServiceUnavailable, map[string]any{"healthy": false, "reason": err.Error()})
		return
	}
	respond(w, http.StatusOK, map[string]any{"healthy": true})
}

// readyz: every node was looked at, an HSM and the store answer where they are needed, and an act could be announced.
func (s *server) readyz(w http.ResponseWriter, _ *http.Request) {
	r := s.daemon.readiness()
	code := http.StatusOK
	if !r.Ready {
		code = http.StatusServiceUnavailable
	}
	respond(w, code, r)
}

func respond(w http.ResponseWriter, code int, answer any) {
	text, err := json.MarshalIndent(answer, "", "  ")
	if err != nil {
		http.Error(w, "encoding the answer failed", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(append(text, '\n')) // whoever went away does not read it
}
