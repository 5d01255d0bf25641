package cluster

import (
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// A node that joins knows the first one by the authority that the configuration names for that, and by no other.
func TestANodeJoinsWhoShowsACertificateOfTheAuthorityForThat(t *testing.T) {
	s, h := inCustody(t, nodetest.Raft, 2)
	s.nodes[1].Wipe()
	s.RaftLeaderCA = nodetest.NewAuthority(t).PEM
	if out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[1]); err == nil || out.Joined {
		t.Errorf("Tend with another authority = %+v, %v", out, err)
	}
	s.RaftLeaderCA = s.TLS.CA
	if out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[1]); err != nil || !out.Joined {
		t.Errorf("Tend = %+v, %v", out, err)
	}
	s.wantAllUnsealed()
}
