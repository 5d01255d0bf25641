package main

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/server"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// sealing is a machine with a block serve, and what a client of its server needs.
type sealing struct {
	configuration, dir string
	address, metrics   string
	authority          *vaulttest.Authority
	client             *http.Client
}

// newSealing makes one with the wrapping keys "prod" and "stage", which share a key in the HSM. more is more of its block, prepare puts
// what that names.
func newSealing(t *testing.T, token *pkcs11test.Token, more string, prepare ...func(*sealing)) *sealing {
	t.Helper()
	ports := vaulttest.FreePorts(t, 2)
	s := &sealing{configuration: configured(t, token), address: ports[0], metrics: ports[1], authority: vaulttest.NewAuthority(t)}
	s.dir = filepath.Dir(s.configuration)
	s.certify(t, s.authority)
	appendTo(t, s.configuration, fmt.Sprintf("serve {\n  listen = %q\n  metrics_listen = %q\n  tls_cert_file = \"serve.pem\"\n  tls_key_file = \"serve.key\"\n%s}\n",
		s.address, s.metrics, more))
	for _, put := range prepare {
		put(s)
	}
	for _, key := range []string{"prod", "stage"} {
		must(t, s.configuration, "key", "adopt", key, "--device", "one", "--id", "01")
		must(t, s.configuration, "key", "backup", key)
		must(t, s.configuration, "key", "configure", key, "--accept-single-hsm")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.authority.Roots(), MinVersion: tls.VersionTLS12}, DisableKeepAlives: true}
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Transport: transport, Timeout: time.Minute}
	return s
}

func (s *sealing) put(t *testing.T, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *sealing) certify(t *testing.T, authority *vaulttest.Authority) {
	t.Helper()
	certificate, key := authority.Issue(t)
	s.put(t, "serve.key", key)
	s.put(t, "serve.pem", certificate)
}

// token makes one for some wrapping keys.
func (s *sealing) token(t *testing.T, keys ...string) (id, text string) {
	t.Helper()
	cmd := command(t, s.configuration, "serve", "token", "create", "test", "--key", strings.Join(keys, ","))
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	text = strings.TrimSpace(string(out))
	return strings.Split(text, ".")[1], text
}

// answer is one of the server.
type answer struct {
	code   int
	header http.Header
	Errors []string `json:"errors"`
	Data   struct {
		Ciphertext string `json:"ciphertext"`
		Plaintext  string `json:"plaintext"`
	} `json:"data"`
}

// ask does what a seal does.
func (s *sealing) ask(t *testing.T, token, path string, body map[string]string) answer {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "https://"+s.address+"/v1/"+path, bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("X-Vault-Token", token)
	response, err := s.client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	got := answer{code: response.StatusCode, header: response.Header}
	content, err := io.ReadAll(response.Body)
	if err == nil {
		err = json.Unmarshal(content, &got)
	}
	if err != nil {
		t.Fatalf("%s: %d %s: %v", path, got.code, content, err)
	}
	return got
}

func (s *sealing) encrypt(t *testing.T, token, key, plaintext string) answer {
	t.Helper()
	return s.ask(t, token, "transit/encrypt/"+key, map[string]string{"plaintext": base64.StdEncoding.EncodeToString([]byte(plaintext))})
}

func (s *sealing) decrypt(t *testing.T, token, key, ciphertext string) (got answer, plaintext string) {
	t.Helper()
	got = s.ask(t, token, "transit/decrypt/"+key, map[string]string{"ciphertext": ciphertext})
	raw, err := base64.StdEncoding.DecodeString(got.Data.Plaintext)
	if err != nil {
		t.Fatal(err)
	}
	return got, string(raw)
}

// health asks how the server is, over the listener of the metrics.
func (s *sealing) health(t *testing.T) (code int, health server.Health) {
	t.Helper()
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Get("http://" + s.metrics + "/v1/sys/health") //nolint:noctx // ends with the server
	if err != nil {
		return 0, health
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(&health); err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, health
}

// start starts the server and waits until all that it serves is open.
func (s *sealing) start(t *testing.T, args ...string) *running {
	t.Helper()
	r := startDaemon(t, s.configuration, nil, append([]string{"serve"}, args...)...)
	until(t, "the server to be ready", func() bool { code, _ := s.health(t); return code == http.StatusOK })
	return r
}

func TestTheServerServesTwoNamesOfOneHSMKey(t *testing.T) {
	s := newSealing(t, rsaToken(t), "")
	_, both := s.token(t, "prod", "stage")
	r := s.start(t)

	sealed := s.encrypt(t, both, "prod", "root key")
	if sealed.code != http.StatusOK || !strings.HasPrefix(sealed.Data.Ciphertext, "vault:v1:") {
		t.Fatalf("encrypt answers %+v", sealed)
	}
	if got, plaintext := s.decrypt(t, both, "prod", sealed.Data.Ciphertext); got.code != http.StatusOK || plaintext != "root key" {
		t.Fatalf("decrypt answers %+v", got)
	}
	// The HSM could open it; the name in it says no.
	if got, plaintext := s.decrypt(t, both, "stage", sealed.Data.Ciphertext); got.code != http.StatusBadRequest || plaintext != "" {
		t.Errorf("the other name answers %+v", got)
	}
	if got, _ := s.decrypt(t, both, "stage", s.encrypt(t, both, "stage", "other").Data.Ciphertext); got.code != http.StatusOK {
		t.Errorf("its own answers %+v", got)
	}

	var listed tokenListView
	if err := json.Unmarshal([]byte(must(t, s.configuration, "serve", "token", "list", "-o", "json")), &listed); err != nil || len(listed.Tokens) != 1 ||
		listed.Tokens[0].LastUsedHere == "" {
		t.Errorf("the list does not say when the token was used: %+v, %v", listed, err)
	}

	// A token for a key that is not there harms nobody else.
	_, typo := s.token(t, "prd")
	id, text := s.token(t, "prod")
	until(t, "the server to know it", func() bool { _, health := s.health(t); return len(health.Nitroseal.Keys) == 3 })
	if code, health := s.health(t); code != http.StatusOK || health.Sealed {
		t.Errorf("a typing mistake makes the server ill: %d, %+v", code, health)
	}
	if got := s.encrypt(t, typo, "prd", "a"); got.code != http.StatusBadRequest {
		t.Errorf("a key that is not there is answered %+v", got)
	}

	// Made and revoked while it runs.
	until(t, "the new token to be taken", func() bool { return s.encrypt(t, text, "prod", "a").code == http.StatusOK })
	if got := s.encrypt(t, text, "stage", "a"); got.code != http.StatusForbidden || len(got.Errors) != 1 || got.Errors[0] != "permission denied" {
		t.Errorf("a token for another key is answered %+v", got)
	}
	must(t, s.configuration, "serve", "token", "revoke", id)
	until(t, "the revoked token to be refused", func() bool { return s.encrypt(t, text, "prod", "a").code == http.StatusForbidden })

	// What an operator asks.
	if out := must(t, s.configuration, "config", "check"); !strings.Contains(out, s.address+"/v1/transit") || !strings.Contains(out, "systemd's journal") {
		t.Errorf("config check says\n%s", out)
	}
	if out := must(t, s.configuration, "serve", "status"); !strings.Contains(out, "key prod") || !strings.Contains(out, "1 of 1 HSM answer") ||
		!strings.Contains(out, "suffices for") {
		t.Errorf("serve status says\n%s", out)
	}
	if out := must(t, s.configuration, "doctor"); !strings.Contains(out, "seal server") || !strings.Contains(out, "it may seal for Vaults") {
		t.Errorf("the doctor says\n%s", out)
	}
	var status clustersView
	if err := json.Unmarshal([]byte(must(t, s.configuration, "status", "-o", "json")), &status); err != nil || status.SealServer == nil || !status.SealServer.Healthy ||
		len(status.SealServer.Keys) != 3 || status.SealServer.Keys[1].Capacity == 0 {
		t.Errorf("status says %+v, %v", status.SealServer, err)
	}

	// Other commands of ours use the same token meanwhile, as "nitroseal run" beside it does.
	wrapped := repeated(t, s.configuration, "value", "wrap", "prod")
	if opened := repeated(t, s.configuration, wrapped, "unwrap", "prod"); opened != "value" {
		t.Errorf("another process opens %q", opened)
	}
	// Another server of the same configuration finds the address taken, and harms nobody.
	out, err := command(t, s.configuration, "serve").CombinedOutput()
	if got := code(t, err); got != exitFailed || !strings.Contains(string(out), "address already in use; does another server run?") {
		t.Errorf("a second server ended with %d\n%s", got, out)
	}
	if got := s.encrypt(t, both, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("the first one answers %+v", got)
	}
	acts, err := os.ReadFile(filepath.Join(s.dir, "state", "audit.log"))
	if _, socket := os.Stat(journalSocket); socket != nil && (err != nil || !bytes.Contains(acts, []byte(`decrypt`)) || bytes.Contains(acts, []byte("root key"))) {
		t.Errorf("the audit log has %s, %v", acts, err)
	}
	for _, secret := range []string{both, text, both[14:], text[14:]} {
		if bytes.Contains(acts, []byte(secret)) || strings.Contains(r.said.text(), secret) {
			t.Error("a token is in a log")
		}
	}
	r.signal(t, os.Interrupt)
	r.ends(t, exitOK)
}

func TestTheServerTakesANewConfigurationAndARenewedCertificate(t *testing.T) {
	s := newSealing(t, rsaToken(t), "  keys = [\"prod\"]\n")
	_, both := s.token(t, "prod", "stage")
	r := s.start(t, "--log-format", "json")
	if got := s.encrypt(t, both, "stage", "a"); got.code == http.StatusOK {
		t.Errorf("a key that is not served answers %+v", got)
	}
	before, err := os.ReadFile(s.configuration)
	if err != nil {
		t.Fatal(err)
	}
	s.put(t, "nitroseal.hcl", []byte(strings.Replace(string(before), `keys = ["prod"]`, `keys = "prod"`, 1)))
	r.signal(t, syscall.SIGHUP)
	r.says(t, "nitroseal.hcl:")
	if got := s.encrypt(t, both, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("after a wrong configuration: %+v", got)
	}
	s.put(t, "nitroseal.hcl", []byte(strings.Replace(string(before), `keys = ["prod"]`, `keys = ["prod", "stage"]`, 1)))
	r.signal(t, syscall.SIGHUP)
	until(t, "the other key to be served", func() bool { return s.encrypt(t, both, "stage", "a").code == http.StatusOK })

	renewed := vaulttest.NewAuthority(t)
	s.certify(t, renewed)
	s.client = &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: renewed.Roots(), MinVersion: tls.VersionTLS12}, DisableKeepAlives: true,
	}}
	until(t, "the renewed certificate", func() bool {
		response, err := s.client.Get("https://" + s.address + "/v1/sys/health") //nolint:noctx // ends with the server
		if err != nil {
			return false
		}
		return response.Body.Close() == nil
	})
	if got := s.encrypt(t, both, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("after the renewal: %+v", got)
	}
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
	for line := range strings.Lines(r.said.text()) {
		if !strings.HasPrefix(line, `{"time":`) {
			t.Errorf("a line of its log is no JSON: %q", line)
		}
	}
}

func TestTheServerStartsWithoutItsHSMAndServesWhenThatIsThere(t *testing.T) {
	card := pkcs11test.Card(t)
	card.GenerateKey(t, "rsa:2048", "unseal", "01")
	s := newSealing(t, &card.Token, "")
	_, token := s.token(t, "prod")
	card.Remove(t, pkcs11test.CardRemoved)

	r := startDaemon(t, s.configuration, nil, "serve")
	until(t, "the server to answer", func() bool { code, _ := s.health(t); return code != 0 })
	until(t, "the card to be missed", func() bool {
		_, health := s.health(t)
		return len(health.Nitroseal.Keys) == 1 && !health.Nitroseal.Keys[0].Opens
	})
	if got := s.encrypt(t, token, "prod", "a"); got.code != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" {
		t.Errorf("without its HSM since the start it answers %+v", got)
	}
	out, err := command(t, s.configuration, "serve", "status").CombinedOutput()
	if got := code(t, err); got != exitFailed || !strings.Contains(string(out), "NEITHER SEALS NOR OPENS") {
		t.Errorf("serve status ended with %d\n%s", got, out)
	}
	card.Return(t)
	until(t, "the server to be ready", func() bool { code, _ := s.health(t); return code == http.StatusOK })
	sealed := s.encrypt(t, token, "prod", "a")
	if got, plaintext := s.decrypt(t, token, "prod", sealed.Data.Ciphertext); plaintext != "a" {
		t.Errorf("with its HSM it answers %+v", got)
	}
	card.Remove(t, pkcs11test.CardRemoved) // what was open once seals on
	until(t, "a decryption to fail", func() bool {
		got, _ := s.decrypt(t, token, "prod", sealed.Data.Ciphertext)
		return got.code == http.StatusServiceUnavailable
	})
	if got := s.encrypt(t, token, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("without its HSM it answers %+v", got)
	}
	card.Return(t)
	until(t, "a decryption to succeed", func() bool {
		got, _ := s.decrypt(t, token, "prod", sealed.Data.Ciphertext)
		return got.code == http.StatusOK
	})
	if tries := card.WrongPINs(t); tries != 0 {
		t.Errorf("%d wrong PINs were sent", tries)
	}
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
}

func TestAFullDiskIsToldAndLeavesTheServerWell(t *testing.T) {
	s := newSealing(t, rsaToken(t), "")
	content, err := os.ReadFile(s.configuration)
	if err != nil {
		t.Fatal(err)
	}
	content = append(content, "\naudit \"file\" {\n  path = \"state/audit.log\"\n}\n"...) // without it, machines with systemd have the journal
	if err := os.WriteFile(s.configuration, content, 0o600); err != nil {
		t.Fatal(err)
	}
	_, token := s.token(t, "prod")
	r := s.start(t)
	sealed := s.encrypt(t, token, "prod", "a")
	diskFull(t, r.cmd.Process.Pid)
	if got, _ := s.decrypt(t, token, "prod", sealed.Data.Ciphertext); got.code != http.StatusServiceUnavailable { // nobody opens unseen
		t.Errorf("with a full disk it answers %+v", got)
	}
	if got := s.encrypt(t, token, "prod", "a"); got.code != http.StatusOK { // no Vault is kept from starting
		t.Errorf("with a full disk it does not seal: %+v", got)
	}
	diskFree(t, r.cmd.Process.Pid)
	until(t, "a decryption to succeed", func() bool {
		got, _ := s.decrypt(t, token, "prod", sealed.Data.Ciphertext)
		return got.code == http.StatusOK
	})
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
}

func TestATokenThatCannotBeKeptIsNone(t *testing.T) {
	s := newSealing(t, rsaToken(t), "")
	id, _ := s.token(t, "prod")
	file := filepath.Join(s.dir, "x.token")
	diskFull(t, os.Getpid()) // what is started from here has it, too
	out, err := command(t, s.configuration, "serve", "token", "create", "x", "--key", "prod", "--out", file).CombinedOutput()
	revoked, revoking := command(t, s.configuration, "serve", "token", "revoke", id).CombinedOutput()
	diskFree(t, os.Getpid())
	if got := code(t, err); got == exitOK || !strings.Contains(string(out), "file too large") {
		t.Errorf("it ended with %d\n%s", got, out)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a file is left for a token that is none")
	}
	// Nor is one whose reader went away.
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	reader.Close()
	defer writer.Close()
	cmd := command(t, s.configuration, "serve", "token", "create", "x", "--key", "prod")
	var said transcript
	cmd.Stdout, cmd.Stderr = writer, &said
	if got := code(t, cmd.Run()); got != exitFailed || !strings.Contains(said.text(), "the token was revoked, since nobody saw it") {
		t.Errorf("without a reader it ended with %d\n%s", got, said.text())
	}
	if got := code(t, revoking); got != exitOK || !strings.Contains(string(revoked), "it is done all the same") {
		t.Errorf("with a full disk revoking ended with %d\n%s", got, revoked)
	}
	if listed := must(t, s.configuration, "serve", "token", "list"); strings.Count(listed, "\n") != 1 {
		t.Errorf("left are\n%s", listed)
	}
}

func TestAServerThatCannotWorkEndsAtOnce(t *testing.T) {
	s := newSealing(t, rsaToken(t), "")
	content, err := os.ReadFile(s.configuration)
	if err != nil {
		t.Fatal(err)
	}
	state := filepath.Join(s.dir, "state")
	for name, test := range map[string]struct {
		change func(string) string
		spoil  func() (mend func() error)
		code   int
		says   string
	}{
		"without a block": {change: func(c string) string { before, _, _ := strings.Cut(c, "serve {"); return before }, code: exitUsage, says: "has no block serve"},
		"without its certificate": {
			change: func(c string) string { return strings.Replace(c, "serve.pem", "none.pem", 1) },
			code:   exitUsage, says: "none.pem: no such file",
		},
		"with a key of another certificate": {
			change: func(c string) string { return strings.Replace(c, `"serve.key"`, `"pin"`, 1) },
			code:   exitUsage, says: "tls_cert_file and tls_key_file",
		},
		"with a key that others may write": {
			spoil: func() func() error {
				key := filepath.Join(s.dir, "serve.key")
				if err := os.Chmod(key, 0o666); err != nil {
					t.Fatal(err)
				}
				return func() error { return os.Chmod(key, 0o600) }
			},
			code: exitUsage, says: "chmod go-w",
		},
		"with an authority that is none": {
			change: func(c string) string { return strings.Replace(c, "serve {", "serve {\n  client_ca_file = \"pin\"", 1) },
			code:   exitUsage, says: "client_ca_file",
		},
		"with a state directory that others may write": {
			spoil: func() func() error {
				if err := os.Chmod(state, 0o777); err != nil {
					t.Fatal(err)
				}
				return func() error { return os.Chmod(state, 0o700) }
			},
			code: exitUsage, says: "chmod go-w",
		},
		"with a state directory of another user": {
			spoil: func() func() error {
				if os.Geteuid() != 0 {
					t.Skip("only root can give it away")
				}
				if err := os.Chown(state, 65534, 65534); err != nil {
					t.Fatal(err)
				}
				return func() error { return os.Chown(state, 0, 0) }
			},
			code: exitUsage, says: "belongs to another user",
		},
		"with tokens that others may make": {
			spoil: func() func() error {
				dir := filepath.Join(state, serveDir)
				if err := os.MkdirAll(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.Chmod(dir, 0o777); err != nil {
					t.Fatal(err)
				}
				return func() error { return os.RemoveAll(dir) }
			},
			code: exitRefused, says: "chmod 700",
		},
		"at an address of another machine": {
			change: func(c string) string { return strings.Replace(c, s.address, "192.0.2.1:8210", 1) },
			code:   exitFailed, says: "192.0.2.1:8210",
		},
	} {
		t.Run(name, func(t *testing.T) {
			changed := string(content)
			if test.change != nil {
				changed = test.change(changed)
			}
			s.put(t, "nitroseal.hcl", []byte(changed))
			if test.spoil != nil {
				mend := test.spoil()
				defer func() {
					if err := mend(); err != nil {
						t.Fatal(err)
					}
				}()
			}
			out, err := command(t, s.configuration, "serve").CombinedOutput()
			if got := code(t, err); got != test.code || !strings.Contains(string(out), test.says) {
				t.Errorf("it ended with %d, want %d and %q\n%s", got, test.code, test.says, out)
			}
		})
	}
}

// A program at the server's address must not pass for it.
func TestTheStatusKnowsAStranger(t *testing.T) {
	s := newSealing(t, rsaToken(t), "")
	content, err := os.ReadFile(s.configuration)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", s.metrics)
	if err != nil {
		t.Fatal(err)
	}
	stranger := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"initialized":true,"sealed":false}`)
		}),
	}
	var serving sync.WaitGroup
	serve := func(listener net.Listener) { serving.Go(func() { _ = stranger.Serve(listener) }) } // until it is closed
	serve(listener)
	defer serving.Wait()
	defer func() { _ = stranger.Close() }()
	says := func(want string) {
		t.Helper()
		out, err := command(t, s.configuration, "serve", "status").CombinedOutput()
		if got := code(t, err); got != exitFailed || !strings.Contains(string(out), want) {
			t.Errorf("serve status ended with %d\n%s", got, out)
		}
	}
	says("does not answer as a seal server")

	// Without a listener for the metrics it is known by its certificate.
	certificate, key := vaulttest.NewAuthority(t).Issue(t)
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	other, err := tls.Listen("tcp", s.address, &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	serve(other)
	s.put(t, "nitroseal.hcl", []byte(strings.Replace(string(content), fmt.Sprintf("metrics_listen = %q", s.metrics), `metrics_listen = ""`, 1)))
	says("another certificate than")
}
