package cluster

import (
	"context"
	"errors"
	"net/http"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// sealedAt is what a node answers that still wants shares.
func sealedAt(progress, nonce string) nodetest.Fault {
	return nodetest.Body(`{"type":"shamir","initialized":true,"sealed":true,"t":3,"n":5,"progress":` + progress + `,"nonce":"` + nonce +
		`","migration":false,"recovery_seal":false,"storage_type":"inmem","version":"1.21.0"}`)
}

// Each answer to a share has to show that it was ours that counted. Where somebody else gives shares at the same moment, no
// further one is sent into that attempt.
func TestNoMoreSharesGoIntoAnAttemptThatIsNotOursAlone(t *testing.T) {
	for name, test := range map[string]struct {
		answers []nodetest.Fault // to the shares, one after the other
		sent    int
	}{
		"the first share counted as the second": {[]nodetest.Fault{sealedAt("2", "a")}, 1},
		"the first share counted as none":       {[]nodetest.Fault{sealedAt("0", "")}, 1},
		"the second share counted as the first": {[]nodetest.Fault{sealedAt("1", "a"), sealedAt("1", "a")}, 2},
		"the second share is of another attempt": {
			[]nodetest.Fault{sealedAt("1", "a"), sealedAt("2", "b")}, 2,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, h := inCustody(t, nodetest.Alone, 1)
			n := s.nodes[0]
			n.Restart()
			for _, answer := range test.answers {
				n.Break("sys/unseal", 1, answer)
			}
			before := sharesSent(n)
			out, err := h.tend(h.process())
			if !errors.Is(err, ErrBusy) || out.Action == ActionUnsealed {
				t.Errorf("Tend = %+v, %v, want ErrBusy", out, err)
			}
			if sent := sharesSent(n) - before; sent != test.sent {
				t.Errorf("%d shares were sent, want %d", sent, test.sent)
			}
		})
	}
}

// A raft node that has just joined takes all its shares and is sealed for a while yet: no share beyond the threshold goes there.
func TestANodeThatTakesItsTimeGetsNoShareBeyondTheThreshold(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := s.nodes[0]
	n.Restart()
	for _, answer := range []nodetest.Fault{sealedAt("1", "a"), sealedAt("2", "a"), sealedAt("0", "")} {
		n.Break("sys/unseal", 1, answer)
	}
	before := sharesSent(n)
	k := h.process()
	k.pauses.settle = 50 * time.Millisecond
	for range 3 {
		if out, err := h.tend(k); err != nil || out.Action != ActionWaiting {
			t.Errorf("Tend = %+v, %v", out, err)
		}
	}
	if sent := sharesSent(n) - before; sent != 3 {
		t.Errorf("%d shares were sent, the threshold is 3", sent)
	}
}

// Shares are worth nothing to a node that its cluster has removed, and it is opened for nobody.
func TestANodeThatWasRemovedFromItsClusterGetsNothing(t *testing.T) {
	s, h := inCustody(t, nodetest.Raft, 2)
	n := s.nodes[1]
	n.Restart()
	n.Break("sys/seal-status", -1, nodetest.Body(`{"type":"shamir","initialized":true,"sealed":true,"t":3,"n":5,"progress":0,"nonce":"","migration":false,`+
		`"recovery_seal":false,"storage_type":"raft","version":"1.21.0","removed_from_cluster":true}`))
	shares, operations := sharesSent(n), s.operations()
	_, err := h.process().Tend(context.WithoutCancel(t.Context()), s.Cluster, s.Nodes[1])
	if !errors.Is(err, ErrMismatch) {
		t.Errorf("Tend = %v, want ErrMismatch", err)
	}
	if sharesSent(n) != shares || s.operations() != operations || n.Count(http.MethodPut, "sys/unseal/reset") != 0 {
		t.Errorf("it got %d shares for %d operations", sharesSent(n)-shares, s.operations()-operations)
	}
}

// A status says how the shares lie, as the configuration says it.
func TestAStatusShowsTheSpread(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	status, err := y.process().Status(t.Context(), y.Cluster)
	y.must(err)
	if status.Spread != y.Cluster.Spread.String() || status.Spread == "" || len(status.Material) != len(y.Cluster.Spread.Keys) {
		t.Errorf("the status is %+v", status)
	}
}
