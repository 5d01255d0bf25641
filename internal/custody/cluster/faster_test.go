package cluster

import (
	"context"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// Others, who seemed to have stalled, finish at the very moment in which what they gave is to be reset: Vault refuses that, and
// the node is unsealed all the same.
func TestOthersWhoFinishAtTheMomentOfTheResetAreNoFailure(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := s.nodes[0]
	n.Restart()
	client, shares := n.Client(t), n.Shares()
	if _, err := client.Unseal(t.Context(), shares[0]); err != nil {
		t.Fatal(err)
	}
	n.Break("sys/unseal", 1, nodetest.Then(func() {
		for _, share := range shares[1:3] {
			if _, err := client.Unseal(context.WithoutCancel(t.Context()), share); err != nil {
				t.Error(err)
			}
		}
	}))
	out, err := h.tend(h.process())
	if err != nil || out.Node.Seal.Sealed || n.Sealed() {
		t.Errorf("Tend = %+v, %v", out, err)
	}
}
