package sealtest_test

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/test/sealtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// server is a seal server that keeps nothing secret: a ciphertext is the plaintext in base64.
type server struct {
	*httptest.Server

	mu      sync.Mutex
	version string
	wrong   bool
	refuse  []refusal // the next answers
	heard   []string  // "encrypt 48"
	headers http.Header
}

type refusal struct {
	status int
	after  string
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{version: "v1"}
	s.Server = httptest.NewUnstartedServer(s)
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.headers = r.Header
	raw, _ := io.ReadAll(r.Body)
	var body struct {
		Plaintext  []byte `json:"plaintext"`
		Ciphertext string `json:"ciphertext"`
	}
	_ = json.Unmarshal(raw, &body)
	if len(s.refuse) > 0 {
		refusal := s.refuse[0]
		s.refuse = s.refuse[1:]
		s.heard = append(s.heard, "refused")
		if refusal.after != "" {
			w.Header().Set("Retry-After", refusal.after)
		}
		w.WriteHeader(refusal.status)
		_, _ = io.WriteString(w, `{"errors":["not now"]}`)
		return
	}
	answer := map[string]any{}
	switch r.URL.Path {
	case "/v1/auth/token/renew-self":
		s.heard = append(s.heard, "renew")
		answer["auth"] = map[string]any{"client_token": r.Header.Get("X-Vault-Token"), "renewable": true, "lease_duration": 60}
	case "/v1/transit/encrypt/prod":
		s.heard = append(s.heard, "encrypt "+strconv.Itoa(len(body.Plaintext)))
		answer["data"] = map[string]any{"ciphertext": "vault:" + s.version + ":" + base64.StdEncoding.EncodeToString(body.Plaintext)}
	case "/v1/transit/decrypt/prod":
		s.heard = append(s.heard, "decrypt")
		plaintext := strings.Split(body.Ciphertext, ":")[2]
		if s.wrong {
			plaintext = "AAAA"
		}
		answer["data"] = map[string]any{"plaintext": plaintext}
	default:
		w.WriteHeader(http.StatusNotFound)
	}
	_ = json.NewEncoder(w).Encode(answer)
}

// took is what the server has heard since it was last asked.
func (s *server) took() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	heard := s.heard
	s.heard = nil
	return heard
}

func (s *server) set(change func(s *server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *server) config() sealtest.Config {
	trust := s.Client().Transport.(*http.Transport).TLSClientConfig.Clone()
	return sealtest.Config{
		Address: s.URL, Key: "prod", Token: "ns.one", TLS: &tls.Config{RootCAs: trust.RootCAs, MinVersion: tls.VersionTLS12},
		RetryWait: time.Millisecond, UnsealWait: time.Millisecond,
	}
}

func newSeal(t *testing.T, s *server, config sealtest.Config) *sealtest.Seal {
	t.Helper()
	seal := sealtest.New(config)
	t.Cleanup(seal.Close)
	return seal
}

func TestASealMakesTheCallsThatWereObserved(t *testing.T) {
	s := newServer(t)
	seal := newSeal(t, s, s.config())
	for _, step := range []struct {
		name  string
		do    func(context.Context) error
		heard []string
	}{
		{"the start", seal.Start, []string{"renew", "encrypt 1", "renew"}},
		{"init", seal.Init, []string{
			"encrypt 48", "encrypt 13", "decrypt", "encrypt 32",
			"decrypt", "encrypt 1", "encrypt 1", "encrypt 13", "decrypt",
		}},
		{"the power comes back", seal.PowerUp, []string{
			"renew", "encrypt 1", "renew", "decrypt", "encrypt 1", "encrypt 1", "encrypt 13", "decrypt",
		}},
		{"the wrapping key was rotated", func(ctx context.Context) error {
			s.set(func(s *server) { s.version = "v2" })
			return seal.Unseal(ctx)
		}, []string{
			"decrypt", "encrypt 1", "encrypt 1", "decrypt", "encrypt 32", "decrypt", "encrypt 48", "encrypt 13", "decrypt",
		}},
		{"once more", seal.Unseal, []string{"decrypt", "encrypt 1", "encrypt 1", "encrypt 13", "decrypt"}},
		{"a snapshot", func(ctx context.Context) error {
			_, err := seal.Snapshot(ctx)
			return err
		}, []string{"encrypt 152"}},
	} {
		t.Run(step.name, func(t *testing.T) {
			if err := step.do(t.Context()); err != nil {
				t.Fatal(err)
			}
			if heard := s.took(); !slices.Equal(heard, step.heard) {
				t.Errorf("the server heard %q, want %q", heard, step.heard)
			}
		})
	}
	if got := s.headers; got.Get("X-Vault-Token") != "ns.one" || got.Get("X-Vault-Request") != "true" || got.Get("Content-Type") != "" {
		t.Errorf("the headers are %v", got)
	}
	if version := sealtest.Version(seal.Root()); version != "v2" {
		t.Errorf("the root key is sealed under %q", version)
	}
}

func TestASealIsAsPatientAsVault(t *testing.T) {
	s := newServer(t)
	tally := sealtest.NewTally()
	config := s.config()
	config.Observe = tally.Add
	seal := newSeal(t, s, config)
	if err := seal.Prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.took()
	refuse := func(all ...refusal) { s.set(func(s *server) { s.refuse = all }) }

	refuse(refusal{503, ""}, refusal{429, ""})
	if err := seal.Check(t.Context()); err != nil {
		t.Errorf("a call refused twice: %v", err)
	}
	refuse(refusal{503, ""}, refusal{503, ""}, refusal{503, ""})
	var refused *sealtest.StatusError
	if err := seal.Check(t.Context()); !errors.As(err, &refused) || refused.Status != 503 || refused.Errors[0] != "not now" {
		t.Errorf("a call refused three times: %v", err)
	}
	refuse(refusal{403, ""})
	if err := seal.Check(t.Context()); !errors.As(err, &refused) || refused.Status != 403 {
		t.Errorf("a call with a bad token: %v", err)
	}
	began := time.Now()
	refuse(refusal{503, "1"})
	if err := seal.Check(t.Context()); err != nil || time.Since(began) < time.Second {
		t.Errorf("a call that shall come again in a second: %v after %s", err, time.Since(began))
	}
	if unfair := tally.Unfair(); !strings.Contains(unfair, "1 encrypt were answered with 403") || !strings.Contains(unfair, "5 of 429 and 503 had no Retry-After") {
		t.Errorf("unfair is %q", unfair)
	}
	if got := tally.Count(sealtest.Encrypt, 503); got != 5 {
		t.Errorf("503 was counted %d times:\n%s", got, tally)
	}

	s.took()
	refuse(refusal{403, ""}, refusal{403, ""}, refusal{403, ""}, refusal{400, ""})
	if err := seal.PowerUp(t.Context()); err != nil {
		t.Errorf("a power-up with a renewal and two starts refused: %v", err)
	}
	s.set(func(s *server) { s.wrong = true })
	if err := seal.PowerUp(t.Context()); !errors.Is(err, sealtest.ErrWrong) {
		t.Errorf("another plaintext: %v", err)
	}
}

func TestAStormComesToItsEnd(t *testing.T) {
	s := newServer(t)
	balancer := sealtest.NewBalancer(t, closed(t), s.URL)
	tally := sealtest.NewTally()
	config := s.config()
	config.Address, config.Observe, config.Key = balancer.Address, tally.Add, "prod"
	var seals []*sealtest.Seal
	for range 20 {
		seals = append(seals, newSeal(t, s, config))
	}
	prepare := func(seal *sealtest.Seal) error { return seal.Prepare(t.Context()) }
	if outcome := sealtest.Each(seals, prepare); outcome.Healthy != len(seals) {
		t.Fatalf("%s: %v", outcome, outcome.Failures)
	}
	if outcome := sealtest.Storm(t.Context(), seals); outcome.Healthy != len(seals) || len(outcome.Times) != len(seals) {
		t.Errorf("%s: %v", outcome, outcome.Failures)
	}
	if unfair := tally.Unfair(); unfair != "" {
		t.Error(unfair)
	}
	if got := tally.Count(sealtest.Decrypt); got != 2*len(seals) {
		t.Errorf("%d decrypts:\n%s", got, tally)
	}
	// A transport may lack its connection for a moment after its first answer, and make another one.
	if got := balancer.Served(s.URL); got < len(seals) || got > 2*len(seals) {
		t.Errorf("the balancer gave %d connections to the server", got)
	}

	balancer.Servers(closed(t))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	fresh := newSeal(t, s, config)
	if outcome := sealtest.Storm(ctx, []*sealtest.Seal{fresh}); outcome.Healthy != 0 || len(outcome.Failures) != 1 || len(tally.Lost()) == 0 {
		t.Errorf("with no server: %s, %v", outcome, outcome.Failures)
	}
}

// closed is an address at which nobody listens.
func closed(t *testing.T) string {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}
