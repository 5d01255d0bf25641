package nodetest

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// Fault answers a request in place of the node, which it can still ask.
type Fault func(w http.ResponseWriter, r *http.Request, serve http.Handler)

type fault struct {
	path  string
	left  int // negative: without end
	fault Fault
}

// Break makes the next requests of a path below /v1/ ("" for all) fail; with a negative count all of them until Mend. Of
// several faults for one path the one added first comes first.
func (n *Node) Break(path string, times int, f Fault) {
	n.watch.Lock()
	defer n.watch.Unlock()
	n.watch.faults = append(n.watch.faults, &fault{path: path, left: times, fault: f})
}

// Mend takes all faults back.
func (n *Node) Mend() {
	n.watch.Lock()
	defer n.watch.Unlock()
	n.watch.faults = nil
}

// take finds the fault for a request. The caller holds the lock.
func (n *Node) take(path string) Fault {
	for _, f := range n.watch.faults {
		if f.left != 0 && (f.path == "" || f.path == path) {
			f.left--
			return f.fault
		}
	}
	return nil
}

// Answer answers with a status and Vault's form of an error, asking for a pause of some seconds where given.
func Answer(status, retryAfter int, messages ...string) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		drain(r)
		if retryAfter > 0 {
			w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
		}
		refuse(w, status, messages...)
	}
}

// Body answers 200 with any body.
func Body(body string) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		drain(r)
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(body))
	}
}

// Redirect answers 307 to the same path elsewhere, as a standby does that cannot pass a request on.
func Redirect(address string) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		drain(r)
		w.Header().Set("Location", address+r.URL.Path)
		w.WriteHeader(http.StatusTemporaryRedirect)
	}
}

// Cut reads the request and ends the connection, without having done anything.
func Cut(w http.ResponseWriter, r *http.Request, _ http.Handler) {
	drain(r)
	hangUp(w)
}

// Lose does what is asked, and ends the connection without a word.
func Lose(w http.ResponseWriter, r *http.Request, serve http.Handler) {
	serve.ServeHTTP(httptest.NewRecorder(), r)
	hangUp(w)
}

// Torn does what is asked, and ends the connection after the first bytes of the answer's body.
func Torn(size int) Fault {
	return func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		recorder := httptest.NewRecorder()
		serve.ServeHTTP(recorder, r)
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(recorder.Body.Len()))
		w.WriteHeader(recorder.Code)
		_, _ = w.Write(recorder.Body.Bytes()[:min(size, recorder.Body.Len())])
		_ = http.NewResponseController(w).Flush()
		hangUp(w)
	}
}

// TornAt is Torn right after the text, wherever that is in the answer.
func TornAt(text string) Fault {
	return func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		recorder := httptest.NewRecorder()
		serve.ServeHTTP(recorder, r)
		at := bytes.Index(recorder.Body.Bytes(), []byte(text))
		Torn(at+len(text))(w, r, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(recorder.Code)
			_, _ = w.Write(recorder.Body.Bytes())
		}))
	}
}

// Hang reads the request and says nothing until the client hangs up.
func Hang(w http.ResponseWriter, r *http.Request, _ http.Handler) {
	drain(r)
	<-r.Context().Done()
	hangUp(w)
}

// Slow answers after a while, or when the client has hung up; the request is carried out in both cases.
func Slow(pause time.Duration) Fault {
	return func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		body := drain(r)
		select {
		case <-time.After(pause):
		case <-r.Context().Done():
		}
		r.Body = body
		serve.ServeHTTP(w, r)
	}
}

// Huge answers 200 with more than a client should read.
func Huge(w http.ResponseWriter, r *http.Request, _ http.Handler) {
	drain(r)
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write([]byte(`{"type":"` + strings.Repeat("x", node.MaxAnswer) + `"}`))
}

// Page answers 200 with a page of something that is no Vault.
func Page(w http.ResponseWriter, r *http.Request, _ http.Handler) {
	drain(r)
	w.Header().Set("Content-Type", "text/html")
	_, _ = w.Write([]byte("<html>It works!</html>"))
}

// Then runs something once the request has arrived, and lets the node answer it.
func Then(run func()) Fault {
	return func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		body := drain(r)
		run()
		r.Body = body
		serve.ServeHTTP(w, r)
	}
}

// drain reads the body, without which the server would not see a client that hangs up, and returns it for another reader.
func drain(r *http.Request) *memory {
	m := &memory{}
	_, _ = m.ReadFrom(r.Body)
	return m
}

// memory is a body that was read.
type memory struct{ bytes.Buffer }

// Close implements io.Closer.
func (*memory) Close() error { return nil }

func hangUp(w http.ResponseWriter) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		_ = conn.Close()
	}
}
