package transit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/token"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// keys is a wrapping key "prod" whose envelopes hide nothing.
type keys struct {
	mu    sync.Mutex
	err   error // of the next operations
	panic bool
	asked int
}

// Wrap implements [Keys].
func (k *keys) Wrap(_ context.Context, name string, use envelope.Use, plaintext, caller []byte) (keyring.Sealed, error) {
	if err := k.enter(name); err != nil {
		return keyring.Sealed{}, err
	}
	if use != envelope.UseTransit || caller != nil {
		return keyring.Sealed{}, fmt.Errorf("use %q, context %q", use, caller)
	}
	return keyring.Sealed{Envelope: fmt.Appendf(nil, "envelope(%s)", plaintext), Version: 3, Recipients: 1}, nil
}

// Open implements [Keys].
func (k *keys) Open(_ context.Context, name string, raw []byte, want envelope.Context) (keyring.Opened, error) {
	if err := k.enter(name); err != nil {
		return keyring.Opened{}, err
	}
	payload, found := strings.CutPrefix(string(raw), "envelope(")
	if !found || want.Use != envelope.UseTransit || want.Key != "" {
		return keyring.Opened{}, fmt.Errorf("key %q: %w", name, envelope.ErrMalformed)
	}
	if want.Version != 3 {
		return keyring.Opened{}, fmt.Errorf("key %q: %w", name, &envelope.ContextError{Field: "wrapping key version", Claimed: "3", Wanted: fmt.Sprint(want.Version)})
	}
	return keyring.Opened{Payload: []byte(strings.TrimSuffix(payload, ")")), Version: 3}, nil
}

func (k *keys) enter(name string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked++
	if k.panic {
		panic("out of order")
	}
	if k.err != nil {
		return k.err
	}
	if name != "prod" {
		return fmt.Errorf("key %q: %w", name, keyring.ErrKeyNotFound)
	}
	return nil
}

// tokens are two: "ns.good" for prod and absent, "ns.other" for another key.
type tokens struct{}

// Authenticate implements [Tokens].
func (tokens) Authenticate(text string, peer token.Peer) (*token.Grant, error) {
	switch text {
	case "ns.good":
		return &token.Grant{ID: "goodgoodid", Name: "vault-1", Keys: []string{"prod", "absent"}}, nil
	case "ns.limited":
		return &token.Grant{ID: "limitedid2", Name: "vault-2", Keys: []string{"prod"}}, nil
	case "ns.home":
		if peer.Address != netip.MustParseAddr("192.0.2.1") {
			return nil, fmt.Errorf("%w: token homehomeid from %s", token.ErrDenied, peer.Address)
		}
		return &token.Grant{ID: "homehomeid", Name: "home", Keys: []string{"prod"}}, nil
	}
	return nil, fmt.Errorf("%w: there is no such token", token.ErrDenied)
}

// diary is an audit log that remembers.
type diary struct {
	mu    sync.Mutex
	err   error
	lines []string
}

// Begin implements [Auditor].
func (d *diary) Begin(_ context.Context, act audit.Act) (func(error), error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	d.lines = append(d.lines, fmt.Sprintf("intent %s by %s: %v", act.Verb, act.By, act.Detail))
	return func(err error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.lines = append(d.lines, fmt.Sprintf("outcome %s: %v", act.Verb, err))
	}, nil
}

// fixture is a handler with everything in it.
type fixture struct {
	http.Handler

	keys  *keys
	diary *diary
	log   *strings.Builder
	seen  []Observation
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{keys: &keys{}, diary: &diary{}, log: &strings.Builder{}}
	handler, err := NewHandler(HandlerOptions{
		Keys: f.keys, Tokens: tokens{}, Mount: "/transit/", Auditor: f.diary, MaxBody: 4096,
		Limit: func(_ *http.Request, grant *token.Grant) time.Duration {
			if grant.ID == "limitedid2" {
				return 1500 * time.Millisecond
			}
			return 0
		},
		Health: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = w.Write([]byte("health"))
		}),
		Observe: func(o Observation) { f.seen = append(f.seen, o) },
		Logger:  slog.New(slog.NewTextHandler(f.log, nil)),
	})
	must(t, err)
	f.Handler = handler
	return f
}

// ask sends a request with the good token.
func (f *fixture) ask(method, path, body string) *httptest.ResponseRecorder {
	request := httptest.NewRequestWithContext(context.Background(), method, path, strings.NewReader(body))
	request.Header.Set("X-Vault-Token", "ns.good")
	recorder := httptest.NewRecorder()
	f.ServeHTTP(recorder, request)
	return recorder
}

var errOdd = errors.New("something odd")
