package nethsm

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// request is what a node saw of a call.
type request struct {
	method, path, contentType, body string
	length                          int64
	authorized, accept              bool
}

// fakeNode answers every request the same way and remembers what it was asked.
type fakeNode struct {
	mutex    sync.Mutex
	requests []request
	answer   http.HandlerFunc
}

func (f *fakeNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	seen := request{
		method: r.Method, path: r.URL.RequestURI(), contentType: r.Header.Get("Content-Type"), body: string(body),
		length: r.ContentLength,
	}
	_, _, seen.authorized = r.BasicAuth()
	_, seen.accept = r.Header["Accept"]
	f.mutex.Lock()
	f.requests = append(f.requests, seen)
	f.mutex.Unlock()
	f.answer(w, r)
}

// seen are the requests so far, but for those that ask how the node fares.
func (f *fakeNode) seen() []request {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	var out []request
	for _, r := range f.requests {
		if !strings.HasPrefix(r.path, apiPath+"/health/") {
			out = append(out, r)
		}
	}
	return out
}

// startNode serves answer on loopback and returns a client with credentials for it.
func startNode(t *testing.T, answer http.HandlerFunc) (*Client, *fakeNode) {
	t.Helper()
	node := &fakeNode{answer: answer}
	server := httptest.NewServer(node)
	t.Cleanup(server.Close)
	client, err := New(Options{URLs: []string{server.URL}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return client.As(Credentials{Username: "ns~user", Password: []byte("password of the user")}), node
}

// replying answers with a status and, where there is one, a body.
func replying(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if body != "" {
			w.Header().Set("Content-Type", "application/json")
		}
		w.WriteHeader(status)
		_, _ = io.WriteString(w, body)
	}
}
