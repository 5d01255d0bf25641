package test

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

var updateNode = flag.Bool("update-node", false, "write what Vault answers to the golden files of nodetest, after looking at what changed")

// TestVaultIsAsItIsPlayed runs the suite of the playing nodes over real ones: that every other test of custody may use the
// former rests on it.
func TestVaultIsAsItIsPlayed(t *testing.T) {
	authority := vaulttest.NewAuthority(t)
	update := ""
	if *updateNode {
		update = filepath.Join(vaulttest.Root(), "internal", "custody", "node", "nodetest")
	}
	nodetest.Conform(t, func(t *testing.T, kind nodetest.Kind) nodetest.Subject {
		t.Helper()
		options := vaulttest.Options{Bare: true, Authority: authority}
		switch kind {
		case nodetest.Raft:
		case nodetest.Alone:
			options.Storage = vaulttest.InMem
		case nodetest.Auto:
			options.Storage, options.Seals = vaulttest.InMem, []vaulttest.Seal{vaulttest.StartTransit(t)}
		}
		server := vaulttest.Start(t, options)
		ca, err := os.ReadFile(server.CAFile)
		must(t, err)
		return nodetest.Subject{
			Address: server.Address, TLS: node.TLS{CA: ca},
			Restart: func(t *testing.T) {
				t.Helper()
				server.Restarted(t)
			},
		}
	}, update)
}
