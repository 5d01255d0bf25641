package autounseal

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/sealtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// serve is a machine that runs `nitroseal serve`.
type serve struct {
	*vaulttest.Host
	// Address is https://127.0.0.1:PORT; the metrics are at http://Metrics.
	Address, Metrics string
	// CAFile is the CA of its certificate, which Authority signed.
	CAFile    string
	Authority *vaulttest.Authority
	Running   *vaulttest.Running

	owner   testing.TB // the process lives as long as it
	hsm     *HSM
	mu      sync.Mutex
	watched map[string]*watch
}

// watch is how the test sees what the server makes of a wrapping key.
type watch struct {
	seal  vaulttest.Seal
	first string // a ciphertext of version 1
}

const watchedText = "what the test looks at"

// newServe starts a server whose keys are in an HSM that can go away.
func newServe(t testing.TB, hsm *HSM) *serve {
	t.Helper()
	host := vaulttest.NewHost(t)
	if hsm.Token != nil {
		host.WithToken(t, &hsm.Token.Token)
	} else {
		host.WithNetHSM(t, hsm.NetHSM, nethsmtest.OperatorUser, nethsmtest.OperatorPassphrase, nethsmtest.AdminUser, nethsmtest.AdminPassphrase)
	}
	s := serveOn(t, host, "")
	s.hsm = hsm
	s.run(t)
	return s
}

// serveOn makes a machine a seal server and starts nothing. more is more of its block. Whatever test starts it, it ends with this one.
func serveOn(t testing.TB, host *vaulttest.Host, more string) *serve {
	t.Helper()
	ports := vaulttest.FreePorts(t, 2)
	s := &serve{
		Host: host, Address: "https://" + ports[0], Metrics: ports[1], CAFile: host.File("serve-ca.pem"),
		Authority: vaulttest.NewAuthority(t), owner: t, watched: map[string]*watch{},
	}
	s.Put(t, "serve-ca.pem", s.Authority.PEM)
	s.certify(t, s.Authority)
	s.block(t, more)
	return s
}

// block writes its block of the configuration.
func (s *serve) block(t testing.TB, more string) {
	t.Helper()
	s.Set(t, "serve", "listen = %q\n tls_cert_file = \"serve.pem\"\n tls_key_file = \"serve.key\"\n metrics_listen = %q\n %s",
		strings.TrimPrefix(s.Address, "https://"), s.Metrics, more)
}

// certify gives it a new certificate.
func (s *serve) certify(t testing.TB, authority *vaulttest.Authority) {
	t.Helper()
	certificate, key := authority.Issue(t)
	s.Put(t, "serve.pem", certificate)
	s.Put(t, "serve.key", key)
}

// run starts the process and waits until somebody answers.
func (s *serve) run(t testing.TB) {
	t.Helper()
	s.Running = s.Host.Start(s.owner, "serve")
	vaulttest.Eventually(t, vaulttest.Patience, "serve to answer", func() error {
		select {
		case <-s.Running.Done:
			t.Fatalf("it has ended:\n%s", s.Running.Log)
		default:
		}
		_, _, err := s.get("/v1/sys/health")
		return err
	})
}

// get asks without a token.
func (s *serve) get(path string) (code int, body string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	address := s.Address
	if path == "/metrics" || path == "/readyz" || path == "/healthz" {
		address = "http://" + s.Metrics
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, address+path, nil)
	if err != nil {
		return 0, "", err
	}
	client := http.Client{Transport: &http.Transport{TLSClientConfig: s.trust(), DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(response.Body)
	return response.StatusCode, string(raw), err
}

// metric reads one number.
func (s *serve) metric(t testing.TB, name string) float64 {
	t.Helper()
	code, body, err := s.get("/metrics")
	must(t, err)
	for line := range strings.Lines(body) {
		if value, found := strings.CutPrefix(line, name+" "); found {
			number, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			must(t, err)
			return number
		}
	}
	t.Fatalf("there is no %s among the metrics: %d", name, code)
	return 0
}

// trust is what a client trusts.
func (s *serve) trust() *tls.Config {
	return &tls.Config{RootCAs: s.Authority.Roots(), MinVersion: tls.VersionTLS12}
}

// healthy waits until all keys that it serves can open.
func (s *serve) healthy(t testing.TB) {
	t.Helper()
	s.health(t, http.StatusOK)
}

// health waits until sys/health answers with a status.
func (s *serve) health(t testing.TB, status int) {
	t.Helper()
	vaulttest.Eventually(t, vaulttest.Patience, "the server's health to be "+strconv.Itoa(status), func() error {
		code, body, err := s.get("/v1/sys/health")
		if err == nil && code != status {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
}

// key is a stanza for a wrapping key, with a new token that is for it alone.
func (s *serve) key(t testing.TB, key string, flags ...string) vaulttest.Seal {
	t.Helper()
	create := append([]string{"serve", "token", "create", "seal-of-" + key, "--key", key, "--rate", "0"}, flags...)
	return s.with(strings.TrimSpace(s.Must(t, create...)), key)
}

func (s *serve) with(token, key string) vaulttest.Seal {
	return vaulttest.Seal{Address: s.Address, CAFile: s.CAFile, Mount: "transit/", Key: key, Token: token}
}

// served waits until the server knows a stanza's token and serves its key.
func (s *serve) served(t testing.TB, seal vaulttest.Seal) vaulttest.Seal {
	t.Helper()
	vaulttest.Eventually(t, vaulttest.Patience, "the server to know the token", func() error {
		got := call(t, seal, http.MethodPut, path(seal, "encrypt"), vaulttest.Fields{"plaintext": "YQ=="})
		if got.Code != http.StatusOK {
			return fmt.Errorf("%d %s", got.Code, got.Raw)
		}
		return nil
	})
	return seal
}

// AddKey implements [SealServer].
func (s *serve) AddKey(t testing.TB, key string) {
	t.Helper()
	s.Must(t, "key", "generate", key, "--device", "hsm", "--algorithm", "rsa-2048")
	s.keepRecord(t, key)
	seal := s.served(t, s.key(t, key))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watched[key] = &watch{seal, encrypts(t, seal, watchedText)}
}

// keepRecord reads the key record, as everybody must before a key serves seals.
func (s *serve) keepRecord(t testing.TB, key string) {
	t.Helper()
	s.Must(t, "key", "backup", key, "--out", filepath.Join(t.TempDir(), "record"))
	s.Must(t, "key", "configure", key, "--accept-single-hsm")
}

func (s *serve) watch(key string) *watch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.watched[key]
}

// Seal implements [SealServer].
func (s *serve) Seal(t testing.TB, key string) vaulttest.Seal {
	t.Helper()
	return s.served(t, s.key(t, key))
}

// Rotate implements [SealServer].
func (s *serve) Rotate(t testing.TB, key string) {
	t.Helper()
	before := s.version(t, key)
	s.Must(t, "key", "rotate", key, "--device", "hsm", "--generate", "--algorithm", "rsa-2048")
	s.keepRecord(t, key)
	vaulttest.Eventually(t, vaulttest.Patience, "the server to seal with the next version", func() error {
		if now := s.version(t, key); now == before {
			return fmt.Errorf("it seals with %s", now)
		}
		return nil
	})
}

// version is what the server seals with: "v1".
func (s *serve) version(t testing.TB, key string) string {
	t.Helper()
	return sealtest.Version(encrypts(t, s.watch(key).seal, watchedText))
}

// Minimum implements [SealServer].
func (s *serve) Minimum(t testing.TB, key string, version int) {
	t.Helper()
	s.Must(t, "key", "configure", key, "--min-decryption-version", strconv.Itoa(version))
	w := s.watch(key)
	vaulttest.Eventually(t, vaulttest.Patience, "the server to follow", func() error {
		err := opens(t, w.seal, w.first, watchedText)
		if version == 1 {
			return err
		}
		if err == nil {
			return fmt.Errorf("version 1 opens")
		}
		return nil
	})
}

// Lose implements [SealServer].
func (s *serve) Lose(t testing.TB, keys ...string) {
	t.Helper()
	type kept struct{ file, sum string }
	records := map[string]kept{}
	for _, key := range keys {
		file := filepath.Join(t.TempDir(), "record")
		shown := vaulttest.Decode[struct {
			SHA256 string `json:"record_sha256"`
		}](t, s.Must(t, "key", "backup", key, "--out", file, "-o", "json"))
		records[key] = kept{file, shown.SHA256}
	}
	s.Kill(t)
	state := s.File("state")
	entries, err := os.ReadDir(state)
	must(t, err)
	for _, entry := range entries {
		if entry.Name() != "serve" {
			must(t, os.RemoveAll(filepath.Join(state, entry.Name())))
		}
	}
	for key, record := range records {
		s.Must(t, "key", "restore", key, "--in", record.file, "--sha256", record.sum)
		s.keepRecord(t, key)
	}
	for key := range s.watched {
		if !slices.Contains(keys, key) {
			delete(s.watched, key)
		}
	}
	s.Start(t)
}

// Kill implements [SealServer].
func (s *serve) Kill(t testing.TB) {
	t.Helper()
	children := s.Running.Children()
	s.Running.End(syscall.SIGKILL)
	vaulttest.WaitGone(t, vaulttest.Patience, children...)
}

// Start implements [SealServer].
func (s *serve) Start(t testing.TB) {
	t.Helper()
	s.run(t)
	if len(s.watched) == 0 {
		s.healthy(t)
		return
	}
	// A token that names a key that was lost keeps the server's health bad for good reason.
	for _, w := range s.watched {
		opensAgain(t, s.served(t, w.seal), w.first, watchedText)
	}
}

// HSM implements [SealServer].
func (s *serve) HSM() *HSM { return s.hsm }

// double is a seal that is played, with a stanza's settings.
func (s *serve) double(t testing.TB, seal vaulttest.Seal, tally *sealtest.Tally) *sealtest.Seal {
	t.Helper()
	config := sealtest.Config{Address: seal.Address, Mount: strings.TrimSuffix(seal.Mount, "/"), Key: seal.Key, Token: seal.Token, TLS: s.trust()}
	if tally != nil {
		config.Observe = tally.Add
	}
	made := sealtest.New(config)
	t.Cleanup(made.Close)
	return made
}
