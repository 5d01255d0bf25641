package test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// front is what answers at a node's address: Vault behind it, or something else in its place. It counts what it is asked
// and every share that it is given, whether it passes that on or not.
type front struct {
	*httptest.Server

	mu       sync.Mutex
	fault    func(http.ResponseWriter, *http.Request) (answered bool)
	requests int
	shares   int
}

// newFront stands before a Vault, with a certificate of an authority for loopback, or for names.
func newFront(t *testing.T, vault *vaulttest.Server, authority *vaulttest.Authority, names ...string) *front {
	t.Helper()
	behind, err := url.Parse(vault.Address)
	must(t, err)
	ca, err := os.ReadFile(vault.CAFile)
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(behind) },
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true},
		ErrorLog:  slog.NewLogLogger(slog.DiscardHandler, slog.LevelError),
	}
	f := &front{}
	f.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		f.mu.Lock()
		f.requests++
		if carriesShare(r.URL.Path, body) {
			f.shares++
		}
		fault := f.fault
		f.mu.Unlock()
		if fault == nil || !fault(w, r) {
			proxy.ServeHTTP(w, r)
		}
	}))
	f.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	f.TLS = authority.TLS(t, names...)
	f.StartTLS()
	t.Cleanup(f.Close)
	return f
}

// carriesShare tells whether a request has a share in it.
func carriesShare(path string, body []byte) bool {
	for _, end := range []string{"sys/unseal", "/update", "/verify"} {
		if strings.HasSuffix(path, end) && bytes.Contains(body, []byte(`"key"`)) {
			return true
		}
	}
	return false
}

// breaks makes it answer in another way, where the function does; nil mends it.
func (f *front) breaks(fault func(http.ResponseWriter, *http.Request) (answered bool)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
}

// seen returns how many requests came so far, and how many shares in them.
func (f *front) seen() (requests, shares int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests, f.shares
}

// status answers everything with a status.
func status(code int, header ...string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		return true
	}
}

// slowInit lets sys/init take until goOn is closed, and tells when it has begun.
func slowInit(begun chan<- bool, goOn <-chan bool) func(http.ResponseWriter, *http.Request) bool {
	return func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, "sys/init") && r.Method != http.MethodGet {
			begun <- true
			<-goOn
		}
		return false
	}
}
