package nodetest_test

import (
	"testing"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestTheDoubleIsAVault runs the suite that a real Vault passes in the end-to-end tests.
func TestTheDoubleIsAVault(t *testing.T) {
	authority := nodetest.NewAuthority(t)
	nodetest.Conform(t, func(t *testing.T, kind nodetest.Kind) nodetest.Subject {
		t.Helper()
		n := nodetest.Start(t, nodetest.Options{Kind: kind, Authority: authority})
		return nodetest.Subject{Address: n.Address(), TLS: n.TLS(), Restart: func(*testing.T) { n.Restart() }}
	}, "")
}
