// Package nodetest plays nodes of Vault clusters for tests: over real TLS on loopback, with the states, answers, codes and
// messages of Vault 1.21.0, and with the mishaps that a test asks for.
//
// [Start] runs one node. Nodes with raft storage become a cluster when they are joined by the API, as real ones do; calls
// that the active node serves are passed on to it. [Node.Break] makes calls fail in many ways. Shares are no real secret
// sharing: the node knows its shares and compares, which no client can tell apart.
//
// [Conform] is the suite that this double and a real Vault both pass.
package nodetest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// Version is what the nodes say they are.
const Version = "1.21.0"

// Kind says what a node stores to and how it is unsealed.
type Kind string

// The kinds.
const (
	Raft  Kind = "raft"  // Shamir seal, raft storage
	Alone Kind = "inmem" // Shamir seal, a storage without HA
	Auto  Kind = "auto"  // auto-seal with recovery keys, a storage without HA
)

// Options of a node. The zero value fits most tests.
type Options struct {
	Kind Kind // "": Raft
	// Authority signs its certificate; nil: one of its own. Nodes of one cluster should share theirs.
	Authority *Authority
	// Plain serves http.
	Plain bool
	// JoinLooks is for how many looks at its seal status a node that has joined stays sealed after its unsealing; 0: 1.
	JoinLooks int
}

// Node is a playing node.
type Node struct {
	t       testing.TB
	options Options
	address string // host:port
	*state         // guarded by mu

	serving struct {
		sync.Mutex
		server *http.Server
		done   chan struct{}
	}
	handler http.Handler

	watch struct {
		sync.Mutex
		certificate *tls.Certificate
		requests    []Request
		faults      []*fault
	}
}

// Request is one that a node got.
type Request struct{ Method, Path string } // below /v1/

// Start runs a node that is not initialised. It ends with the test.
func Start(t testing.TB, options Options) *Node {
	t.Helper()
	if options.Kind == "" {
		options.Kind = Raft
	}
	if options.Authority == nil {
		options.Authority = NewAuthority(t)
	}
	n := &Node{t: t, options: options, state: &state{}}
	n.RenewCertificate(t)
	n.handler = n.routes()
	n.listen(t, "127.0.0.1:0")
	mu.Lock()
	running[n.Address()] = n
	mu.Unlock()
	t.Cleanup(func() {
		n.Down()
		mu.Lock()
		defer mu.Unlock()
		delete(running, n.Address())
	})
	return n
}

// Address is https://127.0.0.1:PORT, or http.
func (n *Node) Address() string {
	if n.options.Plain {
		return "http://" + n.address
	}
	return "https://" + n.address
}

// TLS is how a client knows the node.
func (n *Node) TLS() node.TLS {
	if n.options.Plain {
		return node.TLS{PlainHTTP: true}
	}
	return node.TLS{CA: n.options.Authority.PEM}
}

// Authority is what signs the node's certificate.
func (n *Node) Authority() *Authority { return n.options.Authority }

// Client returns a client of the node, closed with the test.
func (n *Node) Client(t testing.TB) *node.Node {
	t.Helper()
	client, err := node.New(node.Config{Address: n.Address(), TLS: n.TLS()})
	must(t, err)
	t.Cleanup(client.Close)
	return client
}

// Requests lists what the node got, also what it answered with a fault. A refused handshake brings none.
func (n *Node) Requests() []Request {
	n.watch.Lock()
	defer n.watch.Unlock()
	return append([]Request(nil), n.watch.requests...)
}

// Count counts the requests with a method and a path below /v1/.
func (n *Node) Count(method, path string) int {
	count := 0
	for _, r := range n.Requests() {
		if r.Method == method && r.Path == path {
			count++
		}
	}
	return count
}

// RenewCertificate gives the node a new certificate with a new key. Connections that exist go on.
func (n *Node) RenewCertificate(t testing.TB) {
	t.Helper()
	n.SetCertificate(n.options.Authority.Issue(t))
}

// SetCertificate gives the node any certificate.
func (n *Node) SetCertificate(certificate *tls.Certificate) {
	n.watch.Lock()
	defer n.watch.Unlock()
	n.watch.certificate = certificate
}

// Certificate is the node's present one.
func (n *Node) Certificate() *x509.Certificate {
	n.watch.Lock()
	defer n.watch.Unlock()
	return n.watch.certificate.Leaf
}

// Down ends all connections and lets nobody in, as a process that has ended. The state stays, sealed, for Up.
func (n *Node) Down() {
	n.serving.Lock()
	defer n.serving.Unlock()
	if n.serving.server == nil {
		return
	}
	_ = n.serving.server.Close()
	<-n.serving.done
	n.serving.server = nil
	n.Restart()
}

// Up listens again after Down, at the same address.
func (n *Node) Up(t testing.TB) {
	t.Helper()
	n.listen(t, n.address)
}

// Restart makes the node what it is after a new start of its process: sealed, with no attempt under way. One with an
// auto-seal unseals itself.
func (n *Node) Restart() {
	mu.Lock()
	defer mu.Unlock()
	n.seal()
}

func (n *Node) listen(t testing.TB, address string) {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", address)
	must(t, err)
	n.address = listener.Addr().String()
	if !n.options.Plain {
		listener = tls.NewListener(listener, &tls.Config{
			MinVersion: tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				n.watch.Lock()
				defer n.watch.Unlock()
				return n.watch.certificate, nil
			},
		})
	}
	//nolint:gosec // no time-outs: tests end it
	server := &http.Server{Handler: http.HandlerFunc(n.serve), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener) // ends with Down
	}()
	n.serving.Lock()
	defer n.serving.Unlock()
	n.serving.server, n.serving.done = server, done
}

// serve notes a request and answers it, or fails as asked.
func (n *Node) serve(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/v1/")
	n.watch.Lock()
	n.watch.requests = append(n.watch.requests, Request{r.Method, path})
	f := n.take(path)
	n.watch.Unlock()
	if f != nil {
		f(w, r, n.handler)
		return
	}
	n.handler.ServeHTTP(w, r)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
