package node_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

func TestMain(m *testing.M) {
	if os.Getenv(serverVariable) != "" {
		os.Exit(serveStatus())
	}
	goleak.VerifyTestMain(m)
}

func TestConfigurationsThatAreRefused(t *testing.T) {
	ca := nodetest.NewAuthority(t).PEM
	pin := strings.Repeat("ab", 32)
	for name, c := range map[string]struct {
		config node.Config
		words  string
	}{
		"no address":                      {node.Config{TLS: node.TLS{CA: ca}}, "https://host:port"},
		"an address that is no URL":       {node.Config{Address: "https://a b:8200", TLS: node.TLS{CA: ca}}, "https://host:port"},
		"no scheme":                       {node.Config{Address: "vault.example.com:8200", TLS: node.TLS{CA: ca}}, "https://host:port"},
		"another scheme":                  {node.Config{Address: "unix:///run/vault", TLS: node.TLS{CA: ca}}, "not https"},
		"a path":                          {node.Config{Address: "https://a:8200/vault", TLS: node.TLS{CA: ca}}, "more than a host"},
		"a query":                         {node.Config{Address: "https://a:8200/?", TLS: node.TLS{CA: ca}}, "more than a host"},
		"a user":                          {node.Config{Address: "https://me:hunter2@a:8200", TLS: node.TLS{CA: ca}}, "holds a user"},
		"nothing to know the node by":     {node.Config{Address: "https://a:8200"}, "CA"},
		"http without leave":              {node.Config{Address: "http://127.0.0.1:8200"}, "plain_http"},
		"http beyond loopback":            {node.Config{Address: "http://192.0.2.1:8200", TLS: node.TLS{PlainHTTP: true}}, "not on loopback"},
		"http to a name":                  {node.Config{Address: "http://localhost.example.com", TLS: node.TLS{PlainHTTP: true}}, "not on loopback"},
		"leave for http is none for TLS":  {node.Config{Address: "https://127.0.0.1:8200", TLS: node.TLS{PlainHTTP: true}}, "CA"},
		"a CA that is none":               {node.Config{Address: "https://a:8200", TLS: node.TLS{CA: []byte("hello")}}, "no certificate"},
		"a CA that holds something else":  {node.Config{Address: "https://a:8200", TLS: node.TLS{CA: []byte("-----BEGIN KEY-----\nAAAA\n-----END KEY-----\n")}}, "KEY"},
		"a CA that ends in the middle":    {node.Config{Address: "https://a:8200", TLS: node.TLS{CA: append(ca, ca[:40]...)}}, "damaged"},
		"a pin that is too short":         {node.Config{Address: "https://a:8200", TLS: node.TLS{Pins: []string{pin, "abcd"}}}, "pin 2"},
		"a pin that is no base64":         {node.Config{Address: "https://a:8200", TLS: node.TLS{Pins: []string{"sha256/" + pin}}}, "pin 1"},
		"a time-out before the beginning": {node.Config{Address: "https://a:8200", TLS: node.TLS{CA: ca}, Timeout: -1}, "negative"},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := node.New(c.config)
			if n != nil || !errors.Is(err, node.ErrConfig) || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%v, want ErrConfig with %q", err, c.words)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Error("a password came back")
			}
		})
	}
}

func TestAddressesAreReturnedInOneForm(t *testing.T) {
	ca := nodetest.NewAuthority(t).PEM
	for given, want := range map[string]string{
		"https://a:8200": "https://a:8200", "https://a:8200/": "https://a:8200", "HTTPS://[::1]:8200": "https://[::1]:8200",
		"http://localhost:8200": "http://localhost:8200", "http://[::1]:8200/": "http://[::1]:8200", "http://127.9.9.9:1": "http://127.9.9.9:1",
	} {
		n, err := node.New(node.Config{Address: given, TLS: node.TLS{CA: ca, PlainHTTP: true}})
		if err != nil || n.Address() != want {
			t.Errorf("%s: %v, want %s", given, err, want)
		}
	}
}

func TestPlainHTTPOnLoopback(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{Plain: true})
	n := played.Client(t)
	if status, err := n.Status(t.Context()); err != nil || status.Type != "shamir" {
		t.Error(status, err)
	}
	if _, err := n.Init(t.Context(), node.InitRequest{Shares: 1, Threshold: 1}); err != nil {
		t.Error(err)
	}
}

// TestWhatAnswersWithoutTLS: an address with https never falls back.
func TestWhatAnswersWithoutTLS(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{Plain: true})
	n, err := node.New(node.Config{Address: strings.Replace(played.Address(), "http:", "https:", 1), TLS: node.TLS{CA: played.Authority().PEM}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	_, err = n.Unseal(t.Context(), share)
	if !errors.Is(err, node.ErrIdentity) || errors.Is(err, node.ErrMayHaveHappened) {
		t.Error(err)
	}
}

func TestARequestSaysWhoSendsIt(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	var seen http.Header
	n, err := node.New(node.Config{
		Address: played.Address(), TLS: played.TLS(), UserAgent: "nitroseal/1",
		Transport: func(inner http.RoundTripper) http.RoundTripper {
			return trip(func(r *http.Request) (*http.Response, error) {
				seen = r.Header.Clone()
				return inner.RoundTrip(r)
			})
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if _, err = n.ResetUnseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"User-Agent": "nitroseal/1", "X-Vault-Request": "true", "Content-Type": "application/json",
		"X-Vault-Token": "", "X-Vault-Namespace": "", "Authorization": "", "Cookie": "",
	} {
		if got := seen.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

func TestAClosedClientSendsNothing(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	if _, err := n.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.Close()
	n.Close()
	before := len(played.Requests())
	if _, err := n.Status(t.Context()); !errors.Is(err, node.ErrUnavailable) {
		t.Error(err)
	}
	if after := len(played.Requests()); after != before {
		t.Error("a request was sent")
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	secret := []byte("supersecret")
	for _, holder := range []any{
		node.InitAnswer{Shares: [][]byte{secret}, RootToken: secret},
		&node.InitAnswer{RecoveryShares: [][]byte{secret}, RootToken: secret},
		node.RekeyAnswer{Shares: [][]byte{secret}},
		node.RootStatus{OTP: secret},
		node.RootAnswer{EncodedToken: secret},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			if text := fmt.Sprintf(verb, holder); strings.Contains(text, "supersecret") || strings.Contains(text, "115") ||
				strings.Contains(text, "7375706572") {
				t.Errorf("%T %s: %s", holder, verb, text)
			}
		}
	}
}

// share is one of no cluster.
var share = []byte("this share is of no cluster, 33 b")

type trip func(*http.Request) (*http.Response, error)

func (f trip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// calls are all calls of a node, by the path below /v1/ that they ask.
func calls(n *node.Node) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"GET sys/seal-status": func(ctx context.Context) error { _, err := n.Status(ctx); return err },
		"GET sys/leader":      func(ctx context.Context) error { _, err := n.Role(ctx); return err },
		"PUT sys/init": func(ctx context.Context) error {
			_, err := n.Init(ctx, node.InitRequest{Shares: 3, Threshold: 2})
			return err
		},
		"PUT sys/unseal": func(ctx context.Context) error { _, err := n.Unseal(ctx, share); return err },
		"PUT sys/storage/raft/join": func(ctx context.Context) error {
			_, err := n.Join(ctx, node.JoinRequest{LeaderAddress: "https://a:8200"})
			return err
		},
		"GET sys/rekey/init": func(ctx context.Context) error { _, err := n.RekeyStatus(ctx, node.UnsealKeys); return err },
		"PUT sys/rekey/init": func(ctx context.Context) error {
			_, err := n.RekeyStart(ctx, node.UnsealKeys, node.RekeyRequest{Shares: 3, Threshold: 2, Verify: true})
			return err
		},
		"DELETE sys/rekey/init": func(ctx context.Context) error { return n.RekeyCancel(ctx, node.UnsealKeys, "n") },
		"PUT sys/rekey/update":  func(ctx context.Context) error { _, err := n.RekeyUpdate(ctx, node.UnsealKeys, share, "n"); return err },
		"GET sys/rekey/verify":  func(ctx context.Context) error { _, err := n.VerifyStatus(ctx, node.UnsealKeys); return err },
		"PUT sys/rekey/verify": func(ctx context.Context) error {
			_, err := n.VerifyUpdate(ctx, node.UnsealKeys, share, "n")
			return err
		},
		"DELETE sys/rekey/verify": func(ctx context.Context) error { _, err := n.VerifyCancel(ctx, node.UnsealKeys); return err },
		"PUT sys/rekey-recovery-key/update": func(ctx context.Context) error {
			_, err := n.RekeyUpdate(ctx, node.RecoveryKeys, share, "n")
			return err
		},
		"GET sys/generate-root/attempt":    func(ctx context.Context) error { _, err := n.RootStatus(ctx); return err },
		"PUT sys/generate-root/attempt":    func(ctx context.Context) error { _, err := n.RootStart(ctx, ""); return err },
		"DELETE sys/generate-root/attempt": n.RootCancel,
		"PUT sys/generate-root/update":     func(ctx context.Context) error { _, err := n.RootUpdate(ctx, share, "n"); return err },
		"PUT auth/token/revoke-self":       func(ctx context.Context) error { return n.RevokeSelf(ctx, token) },
		"GET auth/token/lookup-self":       func(ctx context.Context) error { return n.LookupSelf(ctx, token) },
	}
}

var token = []byte("hvs.thisTokenIsOfNoCluster00")
