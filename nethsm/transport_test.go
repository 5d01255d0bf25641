package nethsm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// wire is a node that is nothing but a socket: it does with each request on each connection what a test says, and counts
// the requests that reached it.
type wire struct {
	listener net.Listener
	mu       sync.Mutex
	heads    []string // request line and headers, in order
	bodies   []string
	opened   int
	done     sync.WaitGroup
}

// answering is what a wire does with one request; false closes the connection.
type answering func(conn net.Conn, connection, request int) bool

func startWire(t *testing.T, answer answering) *wire {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{listener: listener}
	w.done.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			w.mu.Lock()
			w.opened++
			number := w.opened
			w.mu.Unlock()
			w.done.Go(func() { w.serve(conn, number, answer) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		w.done.Wait()
	})
	return w
}

func (w *wire) serve(conn net.Conn, number int, answer answering) {
	defer conn.Close()
	in := bufio.NewReader(conn)
	for request := 1; ; request++ {
		var head strings.Builder
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return
			}
			if line == "\r\n" {
				break
			}
			head.WriteString(line)
		}
		var length int
		for line := range strings.Lines(head.String()) {
			if value, is := strings.CutPrefix(line, "Content-Length: "); is {
				_, _ = fmt.Sscan(value, &length)
			}
		}
		body := make([]byte, length)
		if _, err := io.ReadFull(in, body); err != nil {
			return
		}
		w.mu.Lock()
		w.heads = append(w.heads, head.String())
		w.bodies = append(w.bodies, string(body))
		w.mu.Unlock()
		if !answer(conn, number, request) {
			return
		}
	}
}

func (w *wire) seen() (heads, bodies []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.heads...), append([]string(nil), w.bodies...)
}

// ok is a whole answer on a connection that stays.
func ok(conn net.Conn) bool {
	_, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
	return err == nil
}

// reach is a client of one URL.
func reach(t *testing.T, options Options, urls ...string) *Client {
	t.Helper()
	options.URLs = urls
	client, err := New(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return client.As(Credentials{Username: "u", Password: []byte("p")})
}

func TestWhatIsOnTheWire(t *testing.T) {
	w := startWire(t, func(conn net.Conn, _, _ int) bool { return ok(conn) })
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	t.Setenv("ALL_PROXY", "http://127.0.0.1:1")
	client := reach(t, Options{UserAgent: "test/1"}, "http://"+w.listener.Addr().String())
	tests := []struct {
		name  string
		in    call
		wants []string
		body  string
	}{
		{
			"reading",
			call{method: http.MethodGet, path: "/keys"},
			[]string{"GET /api/v1/keys HTTP/1.1", "Authorization: Basic dTpw", "User-Agent: test/1"},
			"",
		},
		{
			"an object",
			call{method: http.MethodPost, path: "/keys/a/decrypt", body: map[string]int{"a": 1}},
			[]string{"POST ", "Content-Length: 7", "Content-Type: application/json"},
			`{"a":1}`,
		},
		{
			"bytes",
			call{method: http.MethodPut, path: "/keys/a/cert", raw: []byte("xyz"), contentType: "application/octet-stream", creates: true},
			[]string{"PUT ", "Content-Length: 3", "Content-Type: application/octet-stream"},
			"xyz",
		},
		{
			"an empty body",
			call{method: http.MethodPut, path: "/keys/a/cert", raw: []byte{}, contentType: "application/octet-stream", creates: true},
			[]string{"PUT ", "Content-Length: 0", "Content-Type: application/octet-stream"},
			"",
		},
		{
			"a condition",
			call{method: http.MethodDelete, path: "/keys/a", ifMatch: `"etag"`},
			[]string{"DELETE ", `If-Match: "etag"`},
			"",
		},
		{
			"an escaped path",
			call{method: http.MethodGet, path: "/users/a~b%2Fc", public: true},
			[]string{"GET /api/v1/users/a~b%2Fc HTTP/1.1"},
			"",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if _, err := client.do(t.Context(), test.in); err != nil {
				t.Fatal(err)
			}
			heads, bodies := w.seen()
			head, body := heads[len(heads)-1], bodies[len(bodies)-1]
			for _, want := range test.wants {
				if !strings.Contains(head, want) {
					t.Errorf("no %q in\n%s", want, head)
				}
			}
			for _, never := range []string{"Accept", "Expect", "Transfer-Encoding", "Cookie", "Proxy"} {
				if strings.Contains(head, never) {
					t.Errorf("there is %q in\n%s", never, head)
				}
			}
			if test.in.public && strings.Contains(head, "Authorization") {
				t.Errorf("credentials went with a public request:\n%s", head)
			}
			if body != test.body {
				t.Errorf("body = %q, want %q", body, test.body)
			}
		})
	}
}

// Headers and body come in one piece: a node that saw the headers alone could answer and close before the rest has come, and
// what it said would be lost.
func TestRequestComesInOnePiece(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	pieces := make(chan string, 8)
	var all sync.WaitGroup
	defer all.Wait()
	client := reach(t, Options{}, "http://"+listener.Addr().String())
	for name, in := range map[string]call{
		"an object":       {op: "sending", method: http.MethodPost, path: "/x", body: map[string]string{"a": "sesame"}},
		"a secret object": {op: "sending", method: http.MethodPost, path: "/x", body: passphraseBody{secret("sesame")}, creates: true},
		"bytes":           {op: "sending", method: http.MethodPut, path: "/x", raw: []byte("sesame"), contentType: "a/b", creates: true},
	} {
		all.Go(func() {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			piece := make([]byte, 4096)
			n, _ := conn.Read(piece)
			pieces <- string(piece[:n])
			_, _ = io.WriteString(conn, "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
		})
		_, _ = client.do(t.Context(), call{
			op: in.op, method: in.method, path: in.path, body: in.body, raw: in.raw, contentType: in.contentType, creates: in.creates, public: true,
		})
		if piece := <-pieces; !strings.Contains(piece, "sesame") {
			t.Errorf("%s: the first piece ends before the body:\n%s", name, piece)
		}
	}
}

// A kept connection that the node has closed meanwhile: what changes nothing goes once more on a new one, with a method that
// net/http does not repeat as well.
func TestStaleConnectionIsReplacedForReads(t *testing.T) {
	for name, send := range map[string]func(context.Context, *Client) error{"GET": ask, "POST": post} {
		t.Run(name, func(t *testing.T) {
			w := startWire(t, func(conn net.Conn, connection, request int) bool {
				return (connection > 1 || request == 1) && ok(conn) // the first one ends with its second request
			})
			client := reach(t, Options{}, "http://"+w.listener.Addr().String())
			for range 2 {
				if err := send(t.Context(), client); err != nil {
					t.Fatal(err)
				}
			}
			if heads, _ := w.seen(); len(heads) != 3 {
				t.Errorf("%d requests arrived, want 3: one, one lost, one more", len(heads))
			}
		})
	}
}

// It is once: a node that closes the new connection as well has trouble.
func TestFreshConnectionThatEndsIsAnError(t *testing.T) {
	w := startWire(t, func(conn net.Conn, connection, _ int) bool { return connection == 1 && ok(conn) })
	client := reach(t, Options{}, "http://"+w.listener.Addr().String())
	if err := post(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	_ = w.listener.Close()
	// The kept connection serves as long as it lives.
	if err := post(t.Context(), client); err != nil {
		t.Errorf("on the kept connection: %v", err)
	}
	twice := startWire(t, func(net.Conn, int, int) bool { return false })
	client = reach(t, Options{}, "http://"+twice.listener.Addr().String())
	if err := post(t.Context(), client); !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrMayHaveHappened) {
		t.Errorf("error = %v, want ErrUnavailable alone", err)
	}
	if heads, _ := twice.seen(); len(heads) != 1 {
		t.Errorf("%d requests arrived, want 1", len(heads))
	}
}

// A request that creates is never sent twice, whatever becomes of its connection.
func TestCreationIsNeverSentTwice(t *testing.T) {
	const half = "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"id\":"
	tests := []struct {
		name   string
		answer string
	}{
		{"closed without an answer", ""},
		{"closed within the status line", "HTTP/1.1 2"},
		{"closed within the headers", "HTTP/1.1 201 Created\r\nContent-"},
		{"closed within the body", half},
		{"no HTTP", "SSH-2.0-OpenSSH_9.2\r\n"},
		{"a body that is no JSON", "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 5\r\n\r\nhello"},
		{"500", "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"},
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete} {
		for _, body := range []any{nil, struct{}{}} {
			for _, test := range tests {
				t.Run(fmt.Sprintf("%s, %s, body %v", test.name, method, body != nil), func(t *testing.T) {
					var mu sync.Mutex
					warm := true
					w := startWire(t, func(conn net.Conn, _, _ int) bool {
						mu.Lock()
						defer mu.Unlock()
						if warm {
							return ok(conn)
						}
						_, _ = io.WriteString(conn, test.answer)
						return false
					})
					other := startWire(t, func(conn net.Conn, _, _ int) bool { return ok(conn) })
					client := reach(t, Options{}, "http://"+w.listener.Addr().String(), "http://"+other.listener.Addr().String())
					for range 4 { // so that connections are kept
						if err := post(t.Context(), client); err != nil {
							t.Fatal(err)
						}
					}
					mu.Lock()
					warm = false
					mu.Unlock()
					heads, _ := w.seen()
					more, _ := other.seen()
					before := len(heads) + len(more)
					client.pool.choosing.Lock()
					client.pool.turn = 1 // the first node is next
					client.pool.choosing.Unlock()
					_, err := client.do(t.Context(), call{op: "creating", method: method, path: "/x", body: body, creates: true, into: new(any)})
					if !errors.Is(err, hsm.ErrUnavailable) || !errors.Is(err, hsm.ErrMayHaveHappened) {
						t.Errorf("error = %v, want ErrUnavailable and ErrMayHaveHappened", err)
					}
					heads, _ = w.seen()
					more, _ = other.seen()
					if sent := len(heads) + len(more) - before; sent != 1 {
						t.Errorf("it was sent %d times", sent)
					}
				})
			}
		}
	}
}

// Kept connections that the node has closed do not make a creation doubtful: it has one of its own.
func TestCreationDoesNotTrustAKeptConnection(t *testing.T) {
	var mu sync.Mutex
	restarted := 0
	w := startWire(t, func(conn net.Conn, connection, _ int) bool {
		mu.Lock()
		defer mu.Unlock()
		return connection > restarted && ok(conn)
	})
	client := reach(t, Options{}, "http://"+w.listener.Addr().String())
	if err := ask(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	restarted = 1
	mu.Unlock()
	if err := create(t.Context(), client); err != nil {
		t.Errorf("error = %v", err)
	}
}

// While the transport may still read a body, nobody wipes it: the race detector watches.
func TestBodyIsWipedWhenNobodyReadsIt(t *testing.T) {
	w := startWire(t, func(conn net.Conn, _, _ int) bool { return ok(conn) })
	early, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() { // answers when it has hardly read anything
		for {
			conn, err := early.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				_, _ = io.CopyN(io.Discard, conn, 100)
				_, _ = io.WriteString(conn, "HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 0\r\n\r\n")
				_, _ = io.CopyN(io.Discard, conn, 100)
			})
		}
	})
	defer all.Wait()
	defer early.Close()
	for _, address := range []net.Addr{w.listener.Addr(), early.Addr()} {
		client := reach(t, Options{}, "http://"+address.String())
		for _, creates := range []bool{false, true} {
			raw := bytes.Repeat([]byte("secret"), 500_000)
			_, _ = client.do(t.Context(), call{op: "sending", method: http.MethodPost, path: "/x", raw: raw, contentType: "a/b", creates: creates})
			clear(raw) // the caller's own: he may, now that do has returned
			body := &struct {
				Passphrase secret `json:"passphrase"`
			}{secret(bytes.Repeat([]byte("x"), 1_000_000))}
			_, _ = client.do(t.Context(), call{op: "sending", method: http.MethodPost, path: "/x", body: body, creates: creates})
		}
	}
}

func TestAnswersThatAreNone(t *testing.T) {
	const sesame = "sesame-open-thyself"
	tests := []struct {
		name   string
		answer string
		into   bool
		speaks []string
	}{
		{"HTML where JSON is needed", "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: 19\r\n\r\n" + sesame, true, []string{"text/html", "19 bytes"}},
		{"nothing where JSON is needed", "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 0\r\n\r\n", true, []string{"application/json", "0 bytes"}},
		{"no content type", "HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n" + sesame, true, []string{"nothing"}},
		{"JSON of another kind", "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 23\r\n\r\n[\"" + sesame + "\"]", true, []string{"another kind"}},
		{"half of an answer", "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 40\r\n\r\n{\"a\":\"" + sesame, true, []string{"broke off"}},
		{"half of an answer in chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n13\r\n" + sesame + "\r\n", false, []string{"broke off"}},
		{"too much, announced", "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + sesame, false, []string{"more than 1048576 bytes"}},
		{"half of an error", "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{\"message\":\"" + sesame, true, []string{"broke off"}},
		{"headers without end", "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 200), false, nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := startWire(t, func(conn net.Conn, _, _ int) bool {
				_, _ = io.WriteString(conn, test.answer)
				return false
			})
			client := reach(t, Options{}, "http://"+w.listener.Addr().String())
			in := call{op: "reading", method: http.MethodGet, path: "/x"}
			if test.into {
				in.into = new(map[string]string)
			}
			_, err := client.do(t.Context(), in)
			if !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("error = %v, want ErrUnavailable", err)
			}
			if err != nil && strings.Contains(err.Error(), sesame) {
				t.Errorf("the error tells what was in the answer: %v", err)
			}
			for _, part := range test.speaks {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("error = %v, want it to say %q", err, part)
				}
			}
		})
	}
}

// Bodies of errors are never assumed: those of 401 and others are empty, whatever their content type says.
func TestErrorsWithoutABody(t *testing.T) {
	for _, status := range []int{400, 401, 403, 404, 405, 406, 409, 413, 415, 500, 501, 503} {
		for kind, body := range map[string]string{"": "", "application/json": "", "text/plain": "Not found", "text/html": "<html>"} {
			t.Run(fmt.Sprintf("%d %s", status, kind), func(t *testing.T) {
				server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					w.Header().Set("Content-Type", kind)
					w.WriteHeader(status)
					_, _ = io.WriteString(w, body)
				}))
				defer server.Close()
				client := reach(t, Options{}, server.URL)
				client.login = nil
				_, err := client.do(t.Context(), call{op: "reading", method: http.MethodGet, path: "/x", into: new(any)})
				refused, is := errors.AsType[*Error](err)
				if !is || refused.Status != status || refused.Message != "" || refused.Op != "reading" ||
					refused.Node != strings.TrimPrefix(server.URL, "http://") {
					t.Errorf("error = %#v", err)
				}
			})
		}
	}
}

// Megabytes of an answer are not read, and the connection they come on is given up.
func TestAnswerIsLimited(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	client := reach(t, Options{TLS: TLS{CA: h.CA()}}, h.URLs()...)
	client = client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
	if err := ask(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	h.Node(0).ResetCounters()
	h.Node(0).HugeAnswer(64<<20, 1)
	err := ask(t.Context(), client)
	if !errors.Is(err, ErrAnswer) || !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "1048576 bytes") {
		t.Errorf("error = %v, want ErrAnswer", err)
	}
	if err := ask(t.Context(), client); err != nil {
		t.Errorf("after it: %v", err)
	}
	if n := h.Node(0).Handshakes(); n != 1 {
		t.Errorf("%d handshakes, want 1: the connection should have been given up", n)
	}
	h.Node(0).Inject(nethsmtest.Fault{Status: http.StatusForbidden, Huge: 64 << 20, Times: 1})
	if err := ask(t.Context(), client); !errors.Is(err, hsm.ErrForbidden) {
		t.Errorf("error = %v, want ErrForbidden", err)
	}
	h.Node(0).HugeAnswer(3<<20, 1)
	var sink bytes.Buffer
	_, err = client.do(t.Context(), call{op: "backing up", method: http.MethodPost, path: "/x", sink: &sink, limit: 1 << 21})
	if !errors.Is(err, ErrAnswer) || sink.Len() > 1<<21+1 {
		t.Errorf("error = %v with %d bytes", err, sink.Len())
	}
}

// A sink that got something cannot take the answer of another node.
func TestSinkIsNotFedTwice(t *testing.T) {
	half := func(conn net.Conn, _, _ int) bool {
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
		return false
	}
	one, two := startWire(t, half), startWire(t, half)
	client := reach(t, Options{}, "http://"+one.listener.Addr().String(), "http://"+two.listener.Addr().String())
	var sink bytes.Buffer
	_, err := client.do(t.Context(), call{op: "backing up", method: http.MethodPost, path: "/x", sink: &sink})
	if !errors.Is(err, hsm.ErrUnavailable) || sink.String() != "half" {
		t.Errorf("error = %v, sink %q", err, sink.String())
	}
	a, _ := one.seen()
	b, _ := two.seen()
	if len(a)+len(b) != 1 {
		t.Errorf("it was sent %d times", len(a)+len(b))
	}
}

// A redirect is not followed, and where it points is told without what it holds.
func TestRedirectIsRefused(t *testing.T) {
	target := startWire(t, func(conn net.Conn, _, _ int) bool { return ok(conn) })
	for _, status := range []int{301, 302, 303, 307, 308} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", "http://user:secret@"+target.listener.Addr().String()+"/login?token=secret")
			w.WriteHeader(status)
		}))
		client := reach(t, Options{}, server.URL)
		for _, send := range []func(context.Context, *Client) error{ask, post, create} {
			err := send(t.Context(), client)
			if !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "http://"+target.listener.Addr().String()+"/login") {
				t.Errorf("%d: error = %v, want one that names where it points", status, err)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("%d: error = %v tells too much", status, err)
			}
		}
		server.Close()
	}
	if heads, _ := target.seen(); len(heads) > 0 {
		t.Errorf("the target got %d requests", len(heads))
	}
}

// 32 clients share the connections that are kept: no more handshakes than those.
func TestConnectionsAreReused(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	for _, connections := range []int{4, 32} {
		client := reach(t, Options{TLS: TLS{CA: h.CA()}, Connections: connections}, h.URLs()...)
		client = client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
		h.Node(0).ResetCounters()
		var all sync.WaitGroup
		for range 32 {
			all.Go(func() {
				for range 20 {
					if err := ask(t.Context(), client); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
		if n := h.Node(0).Handshakes(); n > connections {
			t.Errorf("%d handshakes for %d connections", n, connections)
		}
	}
}

// Close ends calls in flight, and leaves no goroutine: TestMain looks.
func TestCloseEndsCallsInFlight(t *testing.T) {
	arrived := make(chan struct{}, 8)
	w := startWire(t, func(conn net.Conn, _, _ int) bool {
		arrived <- struct{}{}
		_, _ = io.Copy(io.Discard, conn)
		return false
	})
	hole, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0") // connects, and never shakes hands
	if err != nil {
		t.Fatal(err)
	}
	defer hole.Close()
	client, err := New(Options{URLs: []string{"http://" + w.listener.Addr().String(), "https://" + hole.Addr().String()}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	errs := make(chan error, 8)
	for range 8 {
		all.Go(func() { errs <- post(t.Context(), client) })
	}
	<-arrived
	began := time.Now()
	if err := client.Close(); err != nil {
		t.Error(err)
	}
	all.Wait()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	close(errs)
	for err := range errs {
		if !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("error = %v, want ErrUnavailable", err)
		}
	}
	if err := post(t.Context(), client); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "closed") {
		t.Errorf("after Close: %v", err)
	}
	if err := client.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
}
