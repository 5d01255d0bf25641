package node_test

import (
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// What is encrypted by the TLS of twenty years ago can be read by others one day: nothing is sent to a node that has no better.
func TestNothingIsSentByATLSThatIsTooOld(t *testing.T) {
	authority := nodetest.NewAuthority(t)
	for name, test := range map[string]struct {
		version uint16
		taken   bool
	}{"1.1": {tls.VersionTLS11, false}, "1.2": {tls.VersionTLS12, true}} {
		t.Run(name, func(t *testing.T) {
			var requests atomic.Int32
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				requests.Add(1)
				_, _ = io.WriteString(w, `{"type":"shamir","initialized":true,"sealed":true,"t":3,"n":5,"progress":0}`)
			}))
			server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
			server.TLS = &tls.Config{
				Certificates: []tls.Certificate{*authority.Issue(t)}, MinVersion: tls.VersionTLS10, MaxVersion: test.version,
				CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA, tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA},
			}
			server.StartTLS()
			defer server.Close()
			n, err := node.New(node.Config{Address: server.URL, TLS: node.TLS{CA: authority.PEM}})
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			_, err = n.ResetUnseal(t.Context())
			if test.taken {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || errors.Is(err, node.ErrMayHaveHappened) || requests.Load() != 0 {
				t.Errorf("%v, after %d requests", err, requests.Load())
			}
		})
	}
}
