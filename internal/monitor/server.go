// Package monitor is how a process that stays tells about itself: an address where it answers whoever asks how it fares
// ([Server]), what systemd is told ([Notifier]), and what is known of an HSM without using its keys ([Probe]). "nitroseal run" and
// "nitroseal serve" share it.
package monitor

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
)

// Listen is where a process answers about itself.
type Listen struct {
	// Address is host and port, "" for nowhere. A host that is not this machine's own (loopback) needs a certificate, or Plain.
	Address string
	// Certificate makes it TLS. Each site brings its own, so that a reload takes a renewed one.
	Certificate *tls.Certificate
	// Plain allows an address that others can reach without TLS: what is answered there is no secret, and can be forged on its way.
	Plain bool
}

// Options are what [NewServer] is made of.
type Options struct {
	Handler http.Handler
	Logger  *slog.Logger
	// Listening, where set, is called with each address that the server has begun to listen on.
	Listening func(address string)
	// Meanwhile says in the log what goes on where the address cannot be had: "nodes are unsealed meanwhile".
	Meanwhile string
}

// Server answers about a process. It can move to another address, and takes a renewed certificate, while it serves.
type Server struct {
	options Options

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
	RequestLimit  = 10 * time.Second
	maxHeader     = 8 << 10
	shutdownLimit = 2 * time.Second
	// nameLimit is how long a listener's host name may take to be resolved: nodes wait meanwhile.
	nameLimit = 2 * time.Second
	// RetryPause is how often an address that could not be had is tried again.
	RetryPause = 10 * time.Second
	// maxConnections are served at one time. Whoever can reach the listener could take all memory otherwise.
	maxConnections = 256
)

// NewServer returns a server that listens nowhere yet.
func NewServer(options Options) *Server { return &Server{options: options} }

// Check refuses an address that others reach without TLS, unless the configuration says that this is wanted.
func (l Listen) Check() error {
	if l.Address == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(l.Address)
	if err == nil {
		_, err = net.DefaultResolver.LookupPort(context.Background(), "tcp", port) // a file at most: names of services
	}
	if err != nil {
		return fmt.Errorf("the listener's address %q is not host and port: %w", l.Address, err)
	}
	if l.Certificate != nil || l.Plain || loopback(host) {
		return nil
	}
	return fmt.Errorf("other machines can reach the listener at %s, and it has no certificate: give it one, listen on 127.0.0.1, "+
		"or allow plain HTTP", l.Address)
}

// loopback tells whether a host is this machine, and nothing else. A name is asked of nobody.
func loopback(host string) bool {
	address, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && address.Unmap().IsLoopback()
}

// Begin serves at an address from now on, or as soon as it can be had: a port for metrics that somebody else has taken is no
// reason to leave a Vault sealed.
func (s *Server) Begin(l Listen) {
	s.mu.Lock()
	s.missing = l
	s.mu.Unlock()
	s.Retry()
}

// Retry serves at the address that could not be had before, where there is one.
func (s *Server) Retry() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.missing.Address == "" {
		return
	}
	if err := s.move(s.missing); err != nil {
		if !s.told {
			s.options.Logger.Error("/healthz, /readyz and /metrics are not answered; it is tried again every few seconds, and "+
				s.options.Meanwhile, "cause", err)
		}
		s.told = true
		return
	}
	if s.told {
		s.options.Logger.Info("/healthz, /readyz and /metrics are answered now", "address", s.missing.Address)
	}
	s.missing, s.told = Listen{}, false
}

// Listen serves at an address from now on, and no more at the one before. Where that fails nothing changes; an address that
// could not be had before is no failure, and stays the one that is tried again.
func (s *Server) Listen(l Listen) error {
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

// move is Listen for those who hold mu, without what is missing.
func (s *Server) move(l Listen) error {
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
func (s *Server) serve(l Listen) (*opened, error) {
	ctx, cancel := context.WithTimeout(context.Background(), nameLimit)
	defer cancel()
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", l.Address)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", l.Address, err)
	}
	s.certificate.Store(l.Certificate)
	address := listener.Addr().String()
	open := &http.Server{
		Handler: s.options.Handler, ReadHeaderTimeout: RequestLimit, ReadTimeout: RequestLimit, WriteTimeout: 2 * RequestLimit,
		IdleTimeout: time.Minute, MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(s.options.Logger.Handler(), slog.LevelDebug),
	}
	s.serving.Go(func() {
		if err := open.Serve(&armed{Listener: listener, certificate: &s.certificate}); !errors.Is(err, http.ErrServerClosed) {
			s.options.Logger.Error("the listener failed", "address", address, "cause", err)
		}
	})
	if s.options.Listening != nil {
		s.options.Listening(address)
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
func (s *Server) shut(open *opened) {
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

// Close ends it.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut(s.open)
	s.open = nil
	s.serving.Wait()
}

// Respond answers in JSON.
func Respond(w http.ResponseWriter, code int, answer any) {
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
