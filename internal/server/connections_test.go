package server

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/token"
)

// TestACAThatWasReplacedVouchesForNobody, not for one more request over a connection that it let in.
func TestACAThatWasReplacedVouchesForNobody(t *testing.T) {
	w := newWorld(t)
	w.timing.certificates = 20 * time.Millisecond
	bound, free := w.token(token.Spec{CertificateNames: []string{"vault-1.example"}}), w.token(token.Spec{})
	must(t, os.WriteFile(w.file("clients.pem"), w.ca.pem(), 0o600))
	r := w.start(func(site *Site) {
		site.Listen.ClientCA = func() ([]byte, error) { return os.ReadFile(w.file("clients.pem")) }
	}).waitReady()
	thief, anonymous := r.client(w.ca.pair("vault-1.example")), r.client()
	sealed := r.encrypt(thief, bound, "prod", "a secret").data("ciphertext")
	if got := r.decrypt(anonymous, free, "prod", sealed); got.code != http.StatusOK {
		t.Fatalf("%d %s", got.code, got.raw)
	}
	must(t, os.WriteFile(w.file("clients.pem"), newAuthority(t).pem(), 0o600))
	eventually(t, "the new CA is in use", func() bool { return r.logged.count("a new certificate is in use") == 1 })
	if got, err := r.try(thief, http.MethodPut, "/v1/transit/decrypt/prod", bound, `{"ciphertext":"`+sealed+`"}`); err == nil && got.code == http.StatusOK {
		t.Errorf("with a certificate of the former CA: %d %s", got.code, got.raw)
	}
	if got := r.decrypt(anonymous, free, "prod", sealed); got.code != http.StatusOK { // it never needed a CA
		t.Errorf("without a certificate: %d %s", got.code, got.raw)
	}
}

// TestARequestThatComesAfterTheEndIsAnswered, and does not go round and round.
func TestARequestThatComesAfterTheEndIsAnswered(t *testing.T) {
	s := &server{}
	last := &service{}
	<-last.requests.close()
	s.service.Store(last)
	answered := make(chan int)
	go func() {
		recorder := httptest.NewRecorder()
		s.ServeHTTP(recorder, httptest.NewRequestWithContext(context.Background(), http.MethodGet, "/v1/sys/health", nil))
		answered <- recorder.Code
	}()
	select {
	case code := <-answered:
		if code != http.StatusServiceUnavailable {
			t.Errorf("it is answered with %d", code)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it is not answered")
	}
}

// TestStrangersDoNotTakeAllConnections: they need no token to connect.
func TestStrangersDoNotTakeAllConnections(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(func(site *Site) { site.Listen.MaxConnections = 8 }).waitReady()
	vault := r.client()
	if got := r.encrypt(vault, text, "prod", "a"); got.code != http.StatusOK {
		t.Fatalf("%d %s", got.code, got.raw)
	}
	vault.CloseIdleConnections()
	eventually(t, "nobody is connected", func() bool { return r.server.conns.Load() == 0 })
	stranger := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	for range 12 {
		conn, err := stranger.DialContext(t.Context(), "tcp", r.at)
		must(t, err)
		t.Cleanup(func() { _ = conn.Close() })
	}
	eventually(t, "some strangers are turned away", func() bool { return r.metric("nitroseal_serve_connections_refused_total") != "0" })
	if got, err := r.try(vault, http.MethodPut, "/v1/transit/encrypt/prod", text, `{"plaintext":"YQ=="}`); err != nil || got.code != http.StatusOK {
		t.Errorf("a Vault that was here before: %d, %v", got.code, err)
	}
}

// TestAConnectionWithoutAWordDelaysNoStop: Vault's client leaves such ones, and a restart should cost nobody a second.
func TestAConnectionWithoutAWordDelaysNoStop(t *testing.T) {
	w := newWorld(t)
	w.token(token.Spec{})
	r := w.start(nil).waitReady()
	r.dial()
	r.dialTLS()
	begun := time.Now()
	r.end()
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("it stopped after %v", took)
	}
}
