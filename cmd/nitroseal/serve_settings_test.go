package main

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestTheServerDoesWhatItsBlockSays: each setting has its effect in the process that an operator starts.
func TestTheServerDoesWhatItsBlockSays(t *testing.T) {
	const most = 3
	clients := vaulttest.NewAuthority(t)
	s := newSealing(t, rsaToken(t), fmt.Sprintf("  mount = \"seals/eu/\"\n  rate = 1\n  burst = 4\n  max_body = 196608\n  max_connections = %d\n"+
		"  client_ca_file = \"clients.pem\"\n  client_certificates = \"required\"\n", most), func(s *sealing) { s.put(t, "clients.pem", clients.PEM) })
	must(t, s.configuration, "key", "configure", "prod", "--lease", "10m")
	_, limited := s.token(t, "prod")
	out, err := command(t, s.configuration, "serve", "token", "create", "free", "--key", "prod", "--rate", "0").Output()
	if err != nil {
		t.Fatal(err)
	}
	free := strings.TrimSpace(string(out))
	r := s.start(t)

	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+s.address+"/v1/sys/health", nil)
	if err != nil {
		t.Fatal(err)
	}
	if response, err := s.client.Do(request); err == nil {
		_ = response.Body.Close()
		t.Errorf("without a certificate it answers %s", response.Status)
	}
	pair, err := tls.X509KeyPair(clients.Issue(t, "vault-1.example.org"))
	if err != nil {
		t.Fatal(err)
	}
	trust := &tls.Config{RootCAs: s.authority.Roots(), Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	transport := &http.Transport{TLSClientConfig: trust} // one connection, kept: net/http reads what is refused of a body only where more may follow
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Transport: transport, Timeout: time.Minute}

	value := map[string]string{"plaintext": "YQ=="}
	if got := s.ask(t, free, "seals/eu/encrypt/prod", value); got.code != http.StatusOK {
		t.Errorf("at its mount it answers %+v", got)
	}
	if got := s.ask(t, free, "transit/encrypt/prod", value); got.code != http.StatusNotFound {
		t.Errorf("at another mount it answers %+v", got)
	}
	large := map[string]string{"plaintext": strings.Repeat("A", 192<<10)} // up to 256 KiB, so that the client can send it to its end
	if got := s.ask(t, free, "seals/eu/encrypt/prod", large); got.code != http.StatusRequestEntityTooLarge {
		t.Errorf("a body that is larger than max_body is answered %+v", got)
	}

	// The one token has the limit of the block, the other its own, which is none.
	refused := 0
	for range 12 {
		if got := s.ask(t, limited, "seals/eu/encrypt/prod", value); got.code == http.StatusTooManyRequests {
			if refused++; got.header.Get("Retry-After") == "" {
				t.Errorf("it does not say when to come again: %+v", got)
			}
		}
		if got := s.ask(t, free, "seals/eu/encrypt/prod", value); got.code != http.StatusOK {
			t.Errorf("a token without a limit is answered %+v", got)
		}
	}
	if refused == 0 {
		t.Error("a token may ask more often than the block says")
	}

	// A connection counts from its first moment to its end, which the server sees a little later than its client.
	transport.CloseIdleConnections()
	for range most {
		until(t, "there is room for a connection", func() bool {
			conn, err := (&tls.Dialer{Config: trust}).DialContext(t.Context(), "tcp", s.address)
			if err == nil {
				t.Cleanup(func() { _ = conn.Close() })
			}
			return err == nil
		})
	}
	if conn, err := (&tls.Dialer{Config: trust}).DialContext(t.Context(), "tcp", s.address); err == nil {
		_ = conn.Close()
		t.Errorf("it takes more than %d connections", most)
	}

	// What the lease holds does not outlive the server.
	r.says(t, "lease opened")
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
	if _, after, _ := strings.Cut(r.said.text(), "msg=stopping"); !strings.Contains(after, "lease ended") {
		t.Errorf("it kept the key of its lease\n%s", r.said.text())
	}
}
