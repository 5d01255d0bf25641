package nethsmtest

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// etcdPatience is how long a node without etcd goes on saying that it is operational.
const etcdPatience = time.Minute

// nodeRecord is what belongs to one node, as it is written.
type nodeRecord struct {
	ID             int64       `json:"id"` // in the list of members
	Lock           *lockRecord `json:"lock,omitempty"`
	UnattendedBoot bool        `json:"unattendedBoot"`
	TLS            *pairRecord `json:"tls,omitempty"`
	Network        network     `json:"network"`
	Logging        logging     `json:"logging"`
	// TimeOffset is what was added to the clock by setting the time, in nanoseconds.
	TimeOffset time.Duration `json:"timeOffset"`
}

// Node is one node of the cluster. It serves its API to whoever calls ServeHTTP, and over TLS between Start and Stop.
type Node struct {
	hsm   *HSM
	index int
	slots chan struct{} // places for operations; nil: as many as come

	mu       sync.Mutex
	locked   bool
	forced   State // set from outside; empty: the natural state
	etcdLost time.Time
	failures map[failure]time.Time
	faults   []*injected
	requests []Request
	shown    *tls.Certificate // of the TLS listener
	address  string
	server   *http.Server
	served   chan struct{} // closed when the server has ended
	stop     chan struct{} // closed when the node is told to stop
	active   int           // requests in flight
	idle     *sync.Cond    // of mu: active became zero
	choked   bool          // a huge chunked upload came: writes hang until a restart

	operations, decrypts, handshakes, generated, held atomic.Int64
	updating                                          atomic.Bool // an image was uploaded and not yet installed or dropped
	started                                           time.Time
}

// Request is one line of a node's log. It never holds a password.
type Request struct {
	Method, Path, User string
	// Status is 0 where no answer was sent.
	Status int
}

// requestsKept is how many requests the log holds; older ones go.
const requestsKept = 10_000

func newNodeRecord() *nodeRecord {
	return &nodeRecord{
		ID:      int64(binary.BigEndian.Uint64(random(8)) >> 1), // positive
		Network: network{IPAddress: "192.168.1.1", Netmask: "255.255.255.0", Gateway: "0.0.0.0"},
		Logging: logging{IPAddress: "0.0.0.0", Port: 514, LogLevel: "info"},
	}
}

func newNode(h *HSM, index int) (*Node, error) {
	n := &Node{hsm: h, index: index, failures: map[failure]time.Time{}, stop: make(chan struct{}), started: h.now()}
	n.idle = sync.NewCond(&n.mu)
	if h.options.Parallel > 0 {
		n.slots = make(chan struct{}, h.options.Parallel)
	}
	r := n.record()
	if r.TLS == nil {
		pair, err := h.firstCertificate()
		if err != nil {
			return nil, err
		}
		r.TLS = pair
	}
	return n, n.show(r.TLS)
}

// record is the node's part of the database. Whoever calls it holds the store's lock, or is alone.
func (n *Node) record() *nodeRecord { return n.hsm.store.record.Nodes[n.index] }

// boot is what a node does when it starts: without unattended boot it wants its passphrase. Where its etcd is away it is
// Failed at once, and knows no certificate but one that it makes for itself.
func (n *Node) boot() {
	if n.blind() {
		if pair, err := n.hsm.selfSigned(); err == nil {
			_ = n.show(pair) // it was just made
		}
	}
	var provisioned, unattended bool
	n.hsm.store.read(func(r *record) {
		provisioned, unattended = r.DomainKey != nil, n.record().UnattendedBoot
	})
	n.mu.Lock()
	defer n.mu.Unlock()
	n.locked = provisioned && !unattended
	n.forced, n.choked = "", false
	if !n.etcdLost.IsZero() {
		n.etcdLost = n.hsm.now().Add(-etcdPatience)
	}
	clear(n.failures)
	n.started = n.hsm.now()
}

func (n *Node) unlocked() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.locked = false
}

// State is what the node says of itself at this moment.
func (n *Node) State() State {
	provisioned := false
	n.hsm.store.read(func(r *record) { provisioned = r.DomainKey != nil })
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.forced != "":
		return n.forced
	case !n.etcdLost.IsZero() && n.hsm.now().Sub(n.etcdLost) >= etcdPatience:
		return Failed
	case !provisioned:
		return Unprovisioned
	case n.locked:
		return Locked
	default:
		return Operational
	}
}

// startedAt is when the node was started last.
func (n *Node) startedAt() time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.started
}

// blind says whether the node's etcd is away.
func (n *Node) blind() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.etcdLost.IsZero()
}

// ServeHTTP answers one request.
func (n *Node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.enter()
	defer n.leave()
	seen := Request{Method: r.Method, Path: r.URL.RequestURI(), User: userName(r)}
	defer func() { n.log(seen) }()
	f := n.fault(r)
	if f != nil && !n.delay(r, f) {
		panic(http.ErrAbortHandler)
	}
	if f != nil && f.answers() {
		seen.Status = f.serve(w, r)
		return
	}
	x := &exchange{hsm: n.hsm, node: n, w: w, r: r, client: clientAddress(r), header: http.Header{}}
	a := x.serve()
	// An unread body would make net/http close the connection.
	_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, ordinaryLimit))
	if f != nil && f.Cut {
		f.cutOff(w, a)
	}
	seen.Status = a.status
	a.write(w, r.Method == http.MethodHead)
	if x.after != nil {
		_ = http.NewResponseController(w).Flush() // else the connection might close before net/http sends it
		n.hsm.owned.Go(x.after)
	}
}

// enter and leave count the requests in flight.
func (n *Node) enter() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.active++
}

func (n *Node) leave() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.active--
	n.idle.Broadcast()
}

func userName(r *http.Request) string {
	name, _, _ := r.BasicAuth()
	return name
}

func (n *Node) log(r Request) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.requests) >= requestsKept {
		n.requests = append(n.requests[:0], n.requests[requestsKept/2:]...)
	}
	n.requests = append(n.requests, r)
}

// operate runs work as the HSM's engine does: a bounded number at a time, each for the service time at least. It says
// false when the client left while waiting.
func (n *Node) operate(ctx context.Context, work func()) bool {
	if n.slots != nil {
		select {
		case n.slots <- struct{}{}:
			defer func() { <-n.slots }()
		case <-ctx.Done():
			return false
		case <-n.stopping():
			return false
		}
	}
	begin := time.Now()
	work()
	return n.pause(ctx, n.hsm.options.ServiceTime-time.Since(begin))
}

// pause waits for d, or until ctx ends or the node stops, and then says false.
func (n *Node) pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	case <-n.stopping():
		return false
	}
}

// listen lets the node serve on the i-th port from base on.
func (n *Node) listen(base string, i int) error {
	address := "127.0.0.1:0"
	if base != "" {
		host, port, err := net.SplitHostPort(base)
		if err != nil {
			return err
		}
		first, err := strconv.Atoi(port)
		if err != nil {
			return fmt.Errorf("reading the port of %q: %w", base, err)
		}
		if first != 0 {
			first += i
		}
		address = net.JoinHostPort(host, strconv.Itoa(first))
	}
	n.mu.Lock()
	n.address = address
	n.mu.Unlock()
	return n.Start()
}

// Start listens at the address that the node had before; it does nothing where it listens already.
func (n *Node) Start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.server != nil {
		return nil
	}
	if n.address == "" {
		return errors.New("starting a node: it never had an address; use Serve or Start")
	}
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", n.address)
	if n.served != nil { // somebody else may have been given its port while it was down, for a moment
		for deadline := time.Now().Add(10 * time.Second); errors.Is(err, syscall.EADDRINUSE) && time.Now().Before(deadline); {
			<-time.After(20 * time.Millisecond)
			listener, err = (&net.ListenConfig{}).Listen(context.Background(), "tcp", n.address)
		}
	}
	if err != nil {
		return fmt.Errorf("starting a node: %w", err)
	}
	n.address = listener.Addr().String()
	n.stop = make(chan struct{})
	n.served = make(chan struct{})
	n.server = &http.Server{
		Handler:           n,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug), // handshakes fail here on purpose
	}
	config := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"}, // the original speaks no HTTP/2
		GetCertificate: n.certificate,
		VerifyConnection: func(tls.ConnectionState) error {
			n.handshakes.Add(1)
			return nil
		},
	}
	go func(server *http.Server, served chan struct{}) {
		defer close(served)
		_ = server.Serve(silent{tls.NewListener(listener, config)}) // always ErrServerClosed
	}(n.server, n.served)
	return nil
}

// silent is a listener whose connections never say 100 Continue: the original does not either, and a client that sends
// Expect waits for its own time-out.
type silent struct{ net.Listener }

func (l silent) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return silentConn{conn}, nil
}

type silentConn struct{ net.Conn }

func (c silentConn) Write(p []byte) (int, error) {
	if string(p) == "HTTP/1.1 100 Continue\r\n\r\n" {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// Stop closes the listener and every connection, as pulling the plug does, and waits for the requests in flight.
func (n *Node) Stop() {
	n.mu.Lock()
	server, served := n.server, n.served
	if server == nil {
		n.mu.Unlock()
		return
	}
	n.server = nil
	close(n.stop)
	n.mu.Unlock()
	_ = server.Close()
	<-served
	n.mu.Lock()
	defer n.mu.Unlock()
	for n.active > 0 {
		n.idle.Wait()
	}
}

// Restart reboots the node: connections close, and it comes back Locked, or Operational with unattended boot.
func (n *Node) Restart() error {
	n.mu.Lock()
	listening := n.server != nil
	n.mu.Unlock()
	n.Stop()
	n.boot()
	if listening {
		return n.Start()
	}
	return nil
}

// stopping is closed when the node stops.
func (n *Node) stopping() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stop
}

// URL is https://host:port; empty where the node never listened.
func (n *Node) URL() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.address == "" {
		return ""
	}
	return "https://" + n.address
}

// Address is host:port.
func (n *Node) Address() string { return strings.TrimPrefix(n.URL(), "https://") }

// Pin is the SHA-256 of the certificate that the node shows, in hexadecimal.
func (n *Node) Pin() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	sum := sha256.Sum256(n.shown.Certificate[0])
	return hex.EncodeToString(sum[:])
}

// Certificate is the certificate that the node shows, PEM.
func (n *Node) Certificate() []byte {
	n.mu.Lock()
	defer n.mu.Unlock()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: n.shown.Certificate[0]})
}

// Operations counts private-key operations (decrypt, sign) that were carried out, failed ones included.
func (n *Node) Operations() int { return int(n.operations.Load()) }

// Decrypts counts decryptions alone.
func (n *Node) Decrypts() int { return int(n.decrypts.Load()) }

// Handshakes counts TLS handshakes, resumed ones included.
func (n *Node) Handshakes() int { return int(n.handshakes.Load()) }

// Requests are the requests answered so far, the oldest first; no more than the last ten thousand.
func (n *Node) Requests() []Request {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]Request(nil), n.requests...)
}

// ResetCounters sets all counters to zero and empties the log.
func (n *Node) ResetCounters() {
	n.operations.Store(0)
	n.decrypts.Store(0)
	n.handshakes.Store(0)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests = nil
}
