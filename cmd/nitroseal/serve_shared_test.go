package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestTokensInEtcdServeARestartWhileEtcdIsAway(t *testing.T) {
	etcd := etcdtest.Start(t, 1)
	s := newSealing(t, rsaToken(t), "  tokens = \"shared\"\n", func(s *sealing) {
		s.put(t, "etcd-ca.pem", etcd.CACert)
		s.put(t, "etcd.pem", etcd.ClientCert)
		s.put(t, "etcd.key", etcd.ClientKey)
		appendTo(t, s.configuration, fmt.Sprintf("store \"shared\" {\n  type = \"etcd\"\n  endpoints = [%q]\n  prefix = \"nitroseal\"\n  ca_cert_file = \"etcd-ca.pem\"\n"+
			"  client_cert_file = \"etcd.pem\"\n  client_key_file = \"etcd.key\"\n  request_timeout = \"1s\"\n}\n", etcd.Endpoints[0]))
	})
	id, token := s.token(t, "prod")
	_, kept := s.token(t, "stage")
	r := s.start(t)
	sealed := s.encrypt(t, token, "prod", "a")

	etcd.Kill(t, 0)
	r.says(t, "the store does not tell the tokens")
	if got, plaintext := s.decrypt(t, token, "prod", sealed.Data.Ciphertext); plaintext != "a" {
		t.Errorf("without etcd it answers %+v", got)
	}
	out, err := command(t, s.configuration, "serve", "token", "revoke", id).CombinedOutput()
	if got := code(t, err); got != exitUnavailable {
		t.Errorf("revoking without etcd ended with %d\n%s", got, out)
	}
	r.signal(t, syscall.SIGKILL)
	_ = r.cmd.Wait() // it was killed
	if info, err := os.Stat(filepath.Join(s.dir, "state", serveDir, tokensCopy)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the copy: %v, %v", info, err)
	}

	r = s.start(t)
	r.says(t, "those of the copy on this disk are taken")
	if got, plaintext := s.decrypt(t, token, "prod", sealed.Data.Ciphertext); plaintext != "a" {
		t.Errorf("after a restart without etcd it answers %+v", got)
	}
	etcd.Restart(t, 0)
	r.says(t, "the store tells the tokens again")
	must(t, s.configuration, "serve", "token", "revoke", id)
	until(t, "the revoked token to be refused", func() bool { return s.encrypt(t, token, "prod", "a").code == http.StatusForbidden })
	if got := s.encrypt(t, kept, "stage", "a"); got.code != http.StatusOK {
		t.Errorf("the other token is answered %+v", got)
	}
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
}

// Somebody else than the server's user would leave an audit log that the server cannot write.
func TestAnotherUserMakesAndRevokesNoTokens(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(state, 0o777); err != nil { // as good as another user's, and root can do it as well
		t.Fatal(err)
	}
	configuration := filepath.Join(dir, "nitroseal.hcl")
	content := "state_dir = \"state\"\nstore \"shared\" {\n  type = \"etcd\"\n  endpoints = [\"http://127.0.0.1:1\"]\n  prefix = \"nitroseal\"\n}\n" +
		"serve {\n  listen = \"127.0.0.1:8210\"\n  plain_http = true\n  tokens = \"shared\"\n}\n"
	if err := os.WriteFile(configuration, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"create", "x", "--key", "prod"}, {"revoke", "aaaaaaaaaa"}} {
		out, err := command(t, configuration, append([]string{"serve", "token"}, args...)...).CombinedOutput()
		if got := code(t, err); got != exitUsage || !strings.Contains(string(out), "chmod go-w") {
			t.Errorf("%v ended with %d\n%s", args, got, out)
		}
	}
	if left, err := os.ReadDir(state); err != nil || len(left) != 0 {
		t.Errorf("left are %v, %v", left, err)
	}
}

func TestATokenThatIsBoundToACertificateIsTakenWithThatAlone(t *testing.T) {
	clients := vaulttest.NewAuthority(t)
	s := newSealing(t, rsaToken(t), "  client_ca_file = \"clients.pem\"\n  client_certificates = \"optional\"\n",
		func(s *sealing) { s.put(t, "clients.pem", clients.PEM) })
	certificate, key := clients.Issue(t, "vault-1.example.org")
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	token := func(flags ...string) string {
		t.Helper()
		out, err := command(t, s.configuration, append([]string{"serve", "token", "create", "x", "--key", "prod"}, flags...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	block, _ := pem.Decode(certificate)
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	bound, other, away, free := token("--certificate-name", leaf.DNSNames[0]), token("--certificate-name", "vault-9.example.org"), token("--address", "192.0.2.0/24"), token()
	r := s.start(t)
	asks := func(who string, want map[string]int) {
		t.Helper()
		for token, code := range want {
			if got := s.encrypt(t, token, "prod", "a"); got.code != code || code != http.StatusOK && got.Errors[0] != "permission denied" {
				t.Errorf("%s, token %s: %+v", who, token[:13], got)
			}
		}
	}
	asks("without a certificate", map[string]int{bound: http.StatusForbidden, other: http.StatusForbidden, away: http.StatusForbidden, free: http.StatusOK})
	s.client = &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: s.authority.Roots(), Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true,
	}}
	asks("with one", map[string]int{bound: http.StatusOK, other: http.StatusForbidden, away: http.StatusForbidden, free: http.StatusOK})
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
}

// TestRunAndServeShareAMachine, its HSM and what is known of its PIN.
func TestRunAndServeShareAMachine(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	s := newSealing(t, rsaToken(t), "  mlock = true\n")
	if err := os.Mkdir(filepath.Join(s.dir, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.put(t, "ca.pem", n.Authority().PEM)
	appendTo(t, s.configuration, fmt.Sprintf("store \"here\" {\n  type = \"file\"\n  dir = \"store\"\n}\n"+
		"cluster \"prod\" {\n  nodes = [%q]\n  ca_cert_file = \"ca.pem\"\n  key = \"prod\"\n  store = \"here\"\n}\nrun {\n  listen = \"\"\n  interval = \"1s\"\n}\n", n.Address()))
	must(t, s.configuration, "init", "prod")
	_, token := s.token(t, "prod")
	serve := s.start(t)
	run := startRun(t, s.configuration, nil)
	for range 3 {
		n.Restart()
		sealed := s.encrypt(t, token, "prod", "a")
		until(t, "a decryption", func() bool {
			_, plaintext := s.decrypt(t, token, "prod", sealed.Data.Ciphertext)
			return plaintext == "a"
		})
		opened(t, n)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", serve.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(status), "VmLck:\t       0 kB") {
		t.Error("mlock = true locks nothing")
	}
	// "status" has both, and each what the other has not.
	until(t, "the status to be well", func() bool {
		out, err := command(t, s.configuration, "status").CombinedOutput()
		return err == nil && strings.Contains(string(out), n.Address()) && strings.Contains(string(out), "seal server "+s.address)
	})
	from := time.Now()
	serve.signal(t, syscall.SIGTERM)
	serve.ends(t, exitOK)
	if took := time.Since(from); took > 20*time.Second { // what runs may take 50
		t.Errorf("it took %v to end", took)
	}
	out, err := command(t, s.configuration, "status").CombinedOutput()
	if got := code(t, err); got != exitUnavailable || !strings.Contains(string(out), "the seal server at "+s.address) {
		t.Errorf("without the server the status ended with %d\n%s", got, out)
	}
	run.signal(t, syscall.SIGTERM)
	run.ends(t, exitOK)
}
