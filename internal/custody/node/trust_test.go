package node_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

func TestANodeIsKnownByTLS(t *testing.T) {
	ours, theirs := nodetest.NewAuthority(t), nodetest.NewAuthority(t)
	plain := ours.Issue(t)
	other := ours.Issue(t)
	pin := node.Pin(plain.Leaf)
	sum := sha256.Sum256(plain.Leaf.RawSubjectPublicKeyInfo)
	inBase64 := base64.StdEncoding.EncodeToString(sum[:])
	var colons []string
	for _, b := range sum {
		colons = append(colons, strings.ToUpper(hex.EncodeToString([]byte{b})))
	}
	for name, c := range map[string]struct {
		shown *tls.Certificate
		tls   node.TLS
		words string // of the error; "": it is the node
	}{
		"a certificate of the CA":                            {plain, node.TLS{CA: ours.PEM}, ""},
		"two CAs, as in the middle of a renewal":             {plain, node.TLS{CA: append(theirs.PEM, ours.PEM...)}, ""},
		"a certificate of another CA":                        {theirs.Issue(t), node.TLS{CA: ours.PEM}, "not signed by the CA of this cluster"},
		"an expired certificate":                             {ours.Issue(t, nodetest.Expired), node.TLS{CA: ours.PEM}, "valid from"},
		"a certificate for another name":                     {ours.Issue(t, nodetest.Named("vault.example.com")), node.TLS{CA: ours.PEM}, "for another name"},
		"a certificate for the name that is asked for":       {ours.Issue(t, nodetest.Named("vault.example.com")), node.TLS{CA: ours.PEM, ServerName: "vault.example.com"}, ""},
		"one for the address where a name is asked for":      {plain, node.TLS{CA: ours.PEM, ServerName: "vault.example.com"}, "for another name"},
		"a pinned key":                                       {plain, node.TLS{Pins: []string{pin}}, ""},
		"a pin in capitals with colons":                      {plain, node.TLS{Pins: []string{strings.Join(colons, ":")}}, ""},
		"a pin in base64":                                    {plain, node.TLS{Pins: []string{"sha256/" + inBase64}}, ""},
		"a pin in base64 as curl has it":                     {plain, node.TLS{Pins: []string{"sha256//" + inBase64}}, ""},
		"the second of two pins":                             {plain, node.TLS{Pins: []string{node.Pin(other.Leaf), pin}}, ""},
		"another key than the pinned one":                    {other, node.TLS{Pins: []string{pin}}, "its key is not pinned, the pin would be " + node.Pin(other.Leaf)},
		"another key than the pinned one, of the CA":         {other, node.TLS{Pins: []string{pin}, CA: ours.PEM}, "its key is not pinned"},
		"the pinned key and the CA":                          {plain, node.TLS{Pins: []string{pin}, CA: ours.PEM}, ""},
		"the pinned key, but another CA":                     {plain, node.TLS{Pins: []string{pin}, CA: theirs.PEM}, "not signed by the CA of this cluster"},
		"the pinned certificate with the key of another one": {&tls.Certificate{Certificate: plain.Certificate, PrivateKey: other.PrivateKey}, node.TLS{Pins: []string{pin}}, "nothing was sent"},
	} {
		t.Run(name, func(t *testing.T) {
			played := nodetest.Start(t, nodetest.Options{Authority: ours})
			played.SetCertificate(c.shown)
			n, err := node.New(node.Config{Address: played.Address(), TLS: c.tls})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			_, err = n.ResetUnseal(t.Context())
			if c.words == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.Is(err, node.ErrIdentity) || errors.Is(err, node.ErrUnavailable) || errors.Is(err, node.ErrMayHaveHappened) ||
				!strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), "nothing was sent") {
				t.Errorf("%v, want ErrIdentity with %q", err, c.words)
			}
			if len(played.Requests()) > 0 {
				t.Error("it got a request")
			}
		})
	}
}

func TestAPinOutlivesTheCertificateItIsOf(t *testing.T) {
	authority := nodetest.NewAuthority(t)
	played := nodetest.Start(t, nodetest.Options{Authority: authority})
	expired := authority.Issue(t, nodetest.Expired, nodetest.Named("gone.example.com"))
	played.SetCertificate(expired)
	n, err := node.New(node.Config{Address: played.Address(), TLS: node.TLS{Pins: []string{node.Pin(expired.Leaf)}}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if _, err := n.Status(t.Context()); err != nil {
		t.Error("a pin without a CA stands for name and time as well:", err)
	}
}

func TestAStatusTellsWhenTheCertificateEnds(t *testing.T) {
	authority := nodetest.NewAuthority(t)
	played := nodetest.Start(t, nodetest.Options{Authority: authority})
	certificate := authority.Issue(t)
	played.SetCertificate(certificate)
	for name, test := range map[string]struct {
		tls  node.TLS
		want time.Time
	}{
		"by a CA":           {node.TLS{CA: authority.PEM}, certificate.Leaf.NotAfter},
		"by a CA and a pin": {node.TLS{CA: authority.PEM, Pins: []string{node.Pin(certificate.Leaf)}}, certificate.Leaf.NotAfter},
		"a pin alone":       {node.TLS{Pins: []string{node.Pin(certificate.Leaf)}}, time.Time{}},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := node.New(node.Config{Address: played.Address(), TLS: test.tls})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			for range 2 { // over a new connection, and over the kept one
				if status, err := n.Status(t.Context()); err != nil || !status.CertificateEnds.Equal(test.want) {
					t.Errorf("it ends at %v, want %v: %v", status.CertificateEnds, test.want, err)
				}
			}
		})
	}
}

// TestEachShareGoesToWhoShowsItsCertificateNow: a watcher's connection is old, and a share does not travel over it.
func TestEachShareGoesToWhoShowsItsCertificateNow(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	if _, err := n.Status(t.Context()); err != nil {
		t.Fatal(err)
	}
	played.SetCertificate(nodetest.NewAuthority(t).Issue(t))
	if _, err := n.Status(t.Context()); err != nil {
		t.Error("the kept connection should still serve to look:", err)
	}
	if _, err := n.Unseal(t.Context(), share); !errors.Is(err, node.ErrIdentity) {
		t.Error(err)
	}
	node.LetTimePass(n, 10*time.Minute)
	if _, err := n.Status(t.Context()); !errors.Is(err, node.ErrIdentity) {
		t.Error("a watcher should see soon, not at the next restart, that the node shows another certificate, or is elsewhere by now:", err)
	}
	played.RenewCertificate(t)
	if _, err := n.Unseal(t.Context(), share); !errors.Is(err, node.ErrUninitialized) {
		t.Error("a renewed certificate of the CA should do:", err)
	}
}

// TestNothingLeavesBeforeTheHandshake counts what arrives at a listener whose certificate is a foreign one.
func TestNothingLeavesBeforeTheHandshake(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections, arrived atomic.Int64
	var raw struct {
		sync.Mutex
		bytes []byte
	}
	foreign := nodetest.NewAuthority(t).Issue(t)
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			serving.Go(func() {
				defer conn.Close()
				tapped := tap{Conn: conn, seen: func(p []byte) {
					raw.Lock()
					defer raw.Unlock()
					raw.bytes = append(raw.bytes, p...)
				}}
				server := tls.Server(tapped, &tls.Config{Certificates: []tls.Certificate{*foreign}})
				n, _ := io.Copy(io.Discard, server)
				arrived.Add(n)
			})
		}
	})
	n, err := node.New(node.Config{Address: "https://" + listener.Addr().String(), TLS: node.TLS{CA: nodetest.NewAuthority(t).PEM}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for name, call := range calls(n) {
		if err := call(t.Context()); !errors.Is(err, node.ErrIdentity) {
			t.Errorf("%s: %v", name, err)
		}
	}
	_ = listener.Close()
	serving.Wait()
	if connections.Load() == 0 || arrived.Load() != 0 {
		t.Errorf("%d connections, over which %d bytes came", connections.Load(), arrived.Load())
	}
	for _, secret := range []string{base64.StdEncoding.EncodeToString(share), string(token), "/v1/"} {
		if strings.Contains(string(raw.bytes), secret) {
			t.Errorf("%q travelled in the clear", secret)
		}
	}
}

type tap struct {
	net.Conn
	seen func([]byte)
}

func (t tap) Read(p []byte) (int, error) {
	n, err := t.Conn.Read(p)
	t.seen(p[:n])
	return n, err
}

// TestNetworkTroubleIsNoForeignNode: what is merely down must not look like an attack.
func TestNetworkTroubleIsNoForeignNode(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	played.Down()
	for name, call := range calls(n) {
		err := call(t.Context())
		if !errors.Is(err, node.ErrUnavailable) || errors.Is(err, node.ErrIdentity) || errors.Is(err, node.ErrMayHaveHappened) {
			t.Errorf("%s: %v", name, err)
		}
	}
	played.Up(t)
	if _, err := n.Status(t.Context()); err != nil {
		t.Error(err)
	}

	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0") // takes connections, and ends them in the handshake
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	})
	cut, err := node.New(node.Config{Address: "https://" + listener.Addr().String(), TLS: played.TLS()})
	if err != nil {
		t.Fatal(err)
	}
	defer cut.Close()
	if _, err := cut.Unseal(t.Context(), share); !errors.Is(err, node.ErrUnavailable) || errors.Is(err, node.ErrIdentity) {
		t.Error(err)
	}
	_ = listener.Close()
	serving.Wait()
}

// TestTheEnvironmentSaysNothing: neither where to, nor through whom, nor whom to trust.
func TestTheEnvironmentSaysNothing(t *testing.T) {
	foreign := nodetest.NewAuthority(t)
	file := filepath.Join(t.TempDir(), "foreign.pem")
	if err := os.WriteFile(file, foreign.PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"HTTPS_PROXY": "http://192.0.2.1:1", "HTTP_PROXY": "http://192.0.2.1:1", "https_proxy": "http://192.0.2.1:1", "ALL_PROXY": "http://192.0.2.1:1",
		"VAULT_ADDR": "https://192.0.2.1:8200", "VAULT_PROXY_ADDR": "http://192.0.2.1:1", "VAULT_SKIP_VERIFY": "true", "VAULT_TOKEN": "nonsense",
		"VAULT_NAMESPACE": "nonsense", "VAULT_CACERT": file, "VAULT_TLS_SERVER_NAME": "nonsense", "VAULT_CLIENT_CERT": "/nonsense",
		"SSL_CERT_FILE": file, "SSL_CERT_DIR": filepath.Dir(file),
	} {
		t.Setenv(name, value)
	}
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := n.Init(ctx, node.InitRequest{Shares: 1, Threshold: 1}); err != nil {
		t.Error(err)
	}
	if err := n.LookupSelf(ctx, nil); err == nil {
		t.Error("a token came from somewhere")
	}
	played.SetCertificate(foreign.Issue(t))
	if _, err := n.ResetUnseal(ctx); !errors.Is(err, node.ErrIdentity) {
		t.Error("what the environment trusts is trusted:", err)
	}
}
