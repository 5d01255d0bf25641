package vaulttest

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// Gate stands before a server and looks at nothing: TLS goes through it. While it is shut, connections that were open are cut
// and new ones wait, as at a machine that has just come up and whose server has not; when it opens, they go through. So a test
// knows the moment at which a server is there for somebody who looks at it only now and then.
type Gate struct {
	// Address is https://127.0.0.1:PORT.
	Address string

	target   string // host:port
	listener net.Listener
	owned    sync.WaitGroup

	mu     sync.Mutex
	open   chan struct{} // closed while the gate is open
	conns  map[net.Conn]bool
	closed bool
	queue  int
}

// NewGate makes a gate before a server, open.
func NewGate(t testing.TB, address string) *Gate {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	must(t, err)
	g := &Gate{
		Address: "https://" + listener.Addr().String(), target: strings.TrimPrefix(address, "https://"), listener: listener,
		open: make(chan struct{}), conns: map[net.Conn]bool{},
	}
	close(g.open)
	g.owned.Go(g.accept)
	t.Cleanup(func() {
		_ = listener.Close() // ends accept
		g.Shut()
		g.mu.Lock()
		g.closed = true
		g.mu.Unlock()
		g.Open()
		g.owned.Wait()
	})
	return g
}

// Hold lets nothing in and keeps what is open, although the server may end: whoever waits for an answer learns that when the gate
// opens. Vault's client would ask again at once otherwise, and its patience for a new connection is ten seconds, twice.
func (g *Gate) Hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut()
}

// shut makes all wait. The caller holds mu.
func (g *Gate) shut() {
	select {
	case <-g.open:
		g.open = make(chan struct{})
	default:
	}
}

// Shut cuts what is open and lets nothing in.
func (g *Gate) Shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut()
	for conn := range g.conns {
		_ = conn.Close() // its ends are told so
	}
	clear(g.conns)
}

// Open lets everybody in.
func (g *Gate) Open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-g.open:
	default:
		close(g.open)
	}
}

// Waiting is how many connections wait.
func (g *Gate) Waiting() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.queue
}

func (g *Gate) accept() {
	for {
		conn, err := g.listener.Accept()
		if err != nil {
			return
		}
		g.owned.Go(func() { g.pass(conn) })
	}
}

func (g *Gate) pass(conn net.Conn) {
	defer conn.Close()
	g.mu.Lock()
	open := g.open
	g.queue++
	g.mu.Unlock()
	<-open
	g.mu.Lock()
	g.queue--
	if g.closed {
		g.mu.Unlock()
		return
	}
	g.conns[conn] = true
	g.mu.Unlock()

	behind, err := (&net.Dialer{}).DialContext(context.Background(), "tcp", g.target)
	if err != nil {
		return
	}
	defer behind.Close()
	g.mu.Lock()
	g.conns[behind] = true
	g.mu.Unlock()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{conn, behind}, {behind, conn}} {
		both.Go(func() {
			_, _ = io.Copy(way[0], way[1]) // one end has closed
			g.mu.Lock()
			open := g.open
			g.mu.Unlock()
			<-open
			_ = way[0].Close()
		})
	}
	both.Wait()
	g.mu.Lock()
	delete(g.conns, conn)
	delete(g.conns, behind)
	g.mu.Unlock()
}
