package sealtest

import (
	"context"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
)

// Balancer spreads TCP connections over servers, one after the other, and goes to the next one where a server takes none. It
// looks into nothing: TLS goes through it.
type Balancer struct {
	// Address is https://127.0.0.1:PORT.
	Address string

	listener net.Listener
	owned    sync.WaitGroup
	ctx      context.Context // ends what the balancer owns
	cancel   context.CancelFunc

	mu      sync.Mutex
	targets []string // host:port
	next    int
	served  map[string]int
}

// NewBalancer stands before servers: https://HOST:PORT or HOST:PORT each. It ends with the test.
func NewBalancer(t testing.TB, servers ...string) *Balancer {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &Balancer{Address: "https://" + listener.Addr().String(), listener: listener, served: map[string]int{}}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	b.Servers(servers...)
	b.owned.Go(b.accept)
	t.Cleanup(func() {
		_ = listener.Close() // ends accept
		b.cancel()
		b.owned.Wait()
	})
	return b
}

// Servers says which servers new connections go to.
func (b *Balancer) Servers(servers ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.targets = nil
	for _, server := range servers {
		b.targets = append(b.targets, strings.TrimPrefix(server, "https://"))
	}
}

// Served is how many connections went to a server.
func (b *Balancer) Served(server string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.served[strings.TrimPrefix(server, "https://")]
}

func (b *Balancer) accept() {
	for {
		conn, err := b.listener.Accept()
		if err != nil {
			return
		}
		b.owned.Go(func() { b.pass(conn) })
	}
}

// pass joins a connection with one to a server.
func (b *Balancer) pass(conn net.Conn) {
	defer conn.Close()
	behind := b.dial()
	if behind == nil {
		return
	}
	defer behind.Close()
	ended := context.AfterFunc(b.ctx, func() { _, _ = conn.Close(), behind.Close() })
	defer ended()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{conn, behind}, {behind, conn}} {
		both.Go(func() {
			_, _ = io.Copy(way[0], way[1]) // one end has closed
			_, _ = way[0].Close(), way[1].Close()
		})
	}
	both.Wait()
}

// dial connects to the next server that takes a connection; nil where none does.
func (b *Balancer) dial() net.Conn {
	b.mu.Lock()
	targets, first := b.targets, b.next
	b.next++
	b.mu.Unlock()
	for i := range targets {
		target := targets[(first+i)%len(targets)]
		conn, err := (&net.Dialer{}).DialContext(b.ctx, "tcp", target)
		if err == nil {
			b.mu.Lock()
			b.served[target]++
			b.mu.Unlock()
			return conn
		}
	}
	return nil
}
