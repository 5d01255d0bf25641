package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// sharesSent counts the shares that a node got.
func sharesSent(n *nodetest.Node) int { return n.Count(http.MethodPut, "sys/unseal") }

// inCustody is a site whose cluster is initialised, and a host of it.
func inCustody(t *testing.T, kind nodetest.Kind, count int) (*site, *host) {
	t.Helper()
	s := newSite(t, kind, count)
	h := s.host("one")
	h.mustInit()
	s.wantAllUnsealed()
	return s, h
}

// tend tends the first node with a custodian.
func (h *host) tend(k *Custodian) (Outcome, error) {
	return k.Tend(h.t.Context(), h.Cluster, h.Nodes[0])
}

func TestTendUnsealsASealedNodeWithOneOperation(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	k := h.process()
	n := s.nodes[0]
	out, err := h.tend(k)
	if err != nil || out.Action != ActionNone {
		t.Fatalf("Tend of an unsealed node = %+v, %v", out, err)
	}
	n.Restart()
	operations, shares := s.operations(), sharesSent(n)
	out, err = h.tend(k)
	if err != nil || out.Action != ActionUnsealed || n.Sealed() || out.Node.Seal.Sealed {
		t.Fatalf("Tend of a sealed node = %+v, %v", out, err)
	}
	if spent := s.operations() - operations; spent != 1 {
		t.Errorf("it cost %d HSM operations", spent)
	}
	if sent := sharesSent(n) - shares; sent != 3 {
		t.Errorf("%d shares were sent, the threshold is 3", sent)
	}
	for range 5 {
		if _, err := h.tend(k); err != nil {
			t.Error(err)
		}
	}
	if spent := s.operations() - operations; spent != 1 {
		t.Errorf("looking at an unsealed node cost %d HSM operations", spent-1)
	}
}

func TestTendAllOpensTheKeysOnceForAllNodes(t *testing.T) {
	s, h := inCustody(t, nodetest.Raft, 3)
	for _, n := range s.nodes {
		n.Restart()
	}
	before := s.operations()
	for _, outcome := range h.process().TendAll(t.Context(), s.Cluster) {
		if outcome.Err != nil || outcome.Outcome.Action != ActionUnsealed {
			t.Errorf("node %s: %+v, %v", outcome.Address, outcome.Outcome, outcome.Err)
		}
	}
	s.wantAllUnsealed()
	if spent := s.operations() - before; spent != 1 {
		t.Errorf("it cost %d HSM operations", spent)
	}
}

func TestTendJoinsANodeThatLostItsStorage(t *testing.T) {
	for i, name := range []string{"the first node", "another node"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, h := inCustody(t, nodetest.Raft, 3)
			s.nodes[i].Wipe()
			out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[i])
			if err != nil || !out.Joined || out.Action != ActionUnsealed {
				t.Errorf("Tend = %+v, %v", out, err)
			}
			s.wantAllUnsealed()
			if s.initialisations() != 1 {
				t.Error("it was initialised anew")
			}
		})
	}
}

func TestNodeThatCannotJoinYetWaits(t *testing.T) {
	s, h := inCustody(t, nodetest.Raft, 2)
	s.nodes[1].Wipe()
	s.nodes[0].Restart()
	out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[1])
	if !errors.Is(err, ErrBusy) || out.Joined {
		t.Errorf("Tend = %+v, %v, want ErrBusy", out, err)
	}
	all := h.process().TendAll(t.Context(), s.Cluster)
	for _, outcome := range all {
		if outcome.Err != nil {
			t.Errorf("TendAll, node %s: %+v, %v", outcome.Address, outcome.Outcome, outcome.Err)
		}
	}
	s.wantAllUnsealed()
}

func TestJoinOfOthersIsNoError(t *testing.T) {
	s, h := inCustody(t, nodetest.Raft, 2)
	n := s.nodes[1]
	n.Wipe()
	client := n.Client(t)
	n.Break("sys/storage/raft/join", 1, func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		go func() { // Vault's own retry_join
			_, _ = client.Join(context.WithoutCancel(t.Context()), node.JoinRequest{LeaderAddress: s.Nodes[0], LeaderCA: s.TLS.CA})
		}()
		deadline := time.Now().Add(5 * time.Second)
		for time.Now().Before(deadline) {
			if st, err := client.Status(context.WithoutCancel(t.Context())); err == nil && st.Initialized {
				break
			}
		}
		nodetest.Answer(http.StatusInternalServerError, 0, "a join is under way")(w, r, serve)
	})
	out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[1])
	if err != nil || out.Action != ActionUnsealed {
		t.Errorf("Tend = %+v, %v", out, err)
	}
}

// stranger initialises another node by hand and puts it at the address of the cluster's first node, known by the same CA.
func (h *host) stranger(kind nodetest.Kind, shares, threshold int) *nodetest.Node {
	h.t.Helper()
	n := nodetest.Start(h.t, nodetest.Options{Kind: kind, Authority: h.nodes[0].Authority()})
	request := node.InitRequest{Shares: shares, Threshold: threshold}
	if kind == nodetest.Auto {
		request = node.InitRequest{RecoveryShares: shares, RecoveryThreshold: threshold}
	}
	if _, err := n.Client(h.t).Init(h.t.Context(), request); err != nil {
		h.t.Fatal(err)
	}
	h.Cluster.Nodes = []string{n.Address()}
	return n
}

func TestNodeThatDiffersFromWhatIsRecordedGetsNothing(t *testing.T) {
	for name, begin := range map[string]func(h *host) *nodetest.Node{
		"other numbers of shares": func(h *host) *nodetest.Node { return h.stranger(nodetest.Alone, 3, 2) },
		"another storage":         func(h *host) *nodetest.Node { return h.stranger(nodetest.Raft, 5, 3) },
		"a migration": func(h *host) *nodetest.Node {
			n := h.nodes[0]
			n.Restart()
			n.Break("sys/seal-status", -1, nodetest.Body(`{"type":"shamir","initialized":true,"sealed":true,"t":3,"n":5,"progress":0,"migration":true,`+
				`"recovery_seal":false,"storage_type":"inmem","version":"1.21.0"}`))
			return n
		},
		"a recovery seal": func(h *host) *nodetest.Node {
			n := h.nodes[0]
			n.Restart()
			n.Break("sys/seal-status", -1, nodetest.Body(`{"type":"pkcs11","initialized":true,"sealed":true,"t":3,"n":5,"progress":0,"migration":false,`+
				`"recovery_seal":true,"storage_type":"inmem","version":"1.21.0"}`))
			return n
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, h := inCustody(t, nodetest.Alone, 1)
			n := begin(h)
			shares, operations := sharesSent(n), s.operations()
			k := h.process()
			for range 3 {
				out, err := h.tend(k)
				if name == "a recovery seal" {
					if err != nil || out.Action != ActionAutoSeal {
						t.Fatalf("Tend = %+v, %v", out, err)
					}
				} else if !errors.Is(err, ErrMismatch) {
					t.Fatalf("Tend = %+v, %v, want ErrMismatch", out, err)
				}
			}
			if sent := sharesSent(n) - shares; sent != 0 {
				t.Errorf("it got %d shares", sent)
			}
			if spent := s.operations() - operations; spent > 1 {
				t.Errorf("the HSM was asked %d times", spent)
			}
		})
	}
}

func TestWrongSharesAreNotSentAgainUntilSomethingChanges(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := h.stranger(nodetest.Alone, 5, 3)
	k := h.process()
	before := s.operations()
	for range 3 {
		if out, err := h.tend(k); !errors.Is(err, ErrWrongShares) || !errors.Is(err, node.ErrWrongShares) {
			t.Fatalf("Tend = %+v, %v, want ErrWrongShares", out, err)
		}
	}
	if sharesSent(n) != 3 || s.operations()-before != 1 {
		t.Fatalf("%d shares were sent and %d HSM operations made", sharesSent(n), s.operations()-before)
	}
	h.clock.advance(refusalTime + time.Second)
	if _, err := h.tend(k); !errors.Is(err, ErrWrongShares) || sharesSent(n) != 6 {
		t.Errorf("after an hour: %v, %d shares", err, sharesSent(n))
	}
	// The keys of that node come into custody.
	m, err := k.loadMost(t.Context(), s.Cluster, KindUnseal)
	if err != nil {
		t.Fatal(err)
	}
	defer m.wipe()
	m.ClusterID = ""
	shares := map[int][]byte{}
	for i, share := range n.Shares() {
		shares[i] = slices.Clone(share)
	}
	m.drop(m.active().ID)
	m.add(Set{ID: newID(), Shares: 5, Threshold: 3, State: SetActive, Made: k.today()}, shares, nil)
	if err := k.save(t.Context(), s.Cluster, m, "test", ""); err != nil {
		t.Fatal(err)
	}
	if out, err := h.tend(k); err != nil || out.Action != ActionUnsealed {
		t.Errorf("Tend with new material = %+v, %v", out, err)
	}
}

func TestPendingSetIsTriedOnce(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	k := h.process()
	m, err := k.loadMost(t.Context(), s.Cluster, KindUnseal)
	if err != nil {
		t.Fatal(err)
	}
	defer m.wipe()
	m.ClusterID = "" // that of the stranger, below
	n := h.stranger(nodetest.Alone, 5, 3)
	shares := map[int][]byte{}
	for i, share := range n.Shares() {
		shares[i] = slices.Clone(share)
	}
	m.add(Set{ID: newID(), Shares: 5, Threshold: 3, State: SetPending, Made: k.today()}, shares, nil)
	if err := k.save(t.Context(), s.Cluster, m, "test", ""); err != nil {
		t.Fatal(err)
	}
	out, err := h.tend(k)
	if err != nil || out.Action != ActionUnsealed || sharesSent(n) != 6 {
		t.Errorf("Tend = %+v, %v, after %d shares", out, err, sharesSent(n))
	}
}

func TestSharesThatWentToAnotherClusterAreAnAlarmUntilItIsCleared(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := s.nodes[0]
	own := n.ClusterID()
	n.SetClusterID("11111111-2222-3333-4444-555555555555")
	n.Restart()
	k := h.process()
	out, err := h.tend(k)
	if !errors.Is(err, ErrForeignCluster) || out.Node.Alarm == nil || out.Node.Alarm.Recorded != own || !strings.Contains(err.Error(), "rekey") {
		t.Fatalf("Tend = %+v, %v, want ErrForeignCluster", out, err)
	}
	if !slices.Contains(h.acts.all(), "outcome unseal false") {
		t.Errorf("the audit log says %q", h.acts.all())
	}
	shares := sharesSent(n)
	for name, k := range map[string]*Custodian{"this process": k, "another process": h.process()} {
		for range 2 {
			n.Restart()
			if out, err := h.tend(k); !errors.Is(err, ErrForeignCluster) {
				t.Errorf("%s: Tend = %+v, %v, want ErrForeignCluster", name, out, err)
			}
		}
		status, err := k.Status(t.Context(), s.Cluster)
		if err != nil || status.Nodes[0].Alarm == nil || !strings.Contains(strings.Join(status.Warnings, " "), "rekey") {
			t.Errorf("%s: Status = %+v, %v", name, status, err)
		}
	}
	if sent := sharesSent(n) - shares; sent != 0 {
		t.Errorf("%d more shares were sent", sent)
	}
	n.SetClusterID(own)
	if err := h.process().ClearAlarm(t.Context(), s.Cluster, s.Nodes[0]); err != nil { // by the command
		t.Fatal(err)
	}
	if out, err := h.tend(k); err != nil || out.Action != ActionUnsealed {
		t.Errorf("Tend after it was cleared = %+v, %v", out, err)
	}
}

func TestAlarmStandsWhereTheDiskDoesNotTakeIt(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := s.nodes[0]
	n.SetClusterID("11111111-2222-3333-4444-555555555555")
	n.Restart()
	k := h.process()
	h.fault.set(func(call string) bool { return call == "local put alarms/prod/<node>" })
	for range 2 {
		if out, err := h.tend(k); !errors.Is(err, ErrForeignCluster) {
			t.Errorf("Tend = %+v, %v, want ErrForeignCluster", out, err)
		}
		n.Restart()
	}
	if sharesSent(n) != 6 { // three of Init
		t.Errorf("%d shares were sent", sharesSent(n))
	}
}

func TestUnsealedNodeOfAnotherClusterIsNamed(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	k := h.process()
	s.nodes[0].Restart()
	if _, err := h.tend(k); err != nil {
		t.Fatal(err)
	}
	s.nodes[0].SetClusterID("11111111-2222-3333-4444-555555555555")
	if out, err := h.tend(k); !errors.Is(err, ErrMismatch) {
		t.Errorf("Tend = %+v, %v, want ErrMismatch", out, err)
	}
}

func TestNoShareLeavesForWhoIsNotTheNode(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*testing.T, *nodetest.Node)
		want   error
	}{
		"a foreign certificate": {func(t *testing.T, n *nodetest.Node) {
			t.Helper()
			n.SetCertificate(nodetest.NewAuthority(t).Issue(t))
		}, node.ErrIdentity},
		"a redirect":       {func(_ *testing.T, n *nodetest.Node) { n.Break("", -1, nodetest.Redirect("https://127.0.0.1:1")) }, node.ErrRedirect},
		"a page":           {func(_ *testing.T, n *nodetest.Node) { n.Break("", -1, nodetest.Page) }, node.ErrMalformed},
		"nobody":           {func(_ *testing.T, n *nodetest.Node) { n.Down() }, node.ErrUnavailable},
		"too many queries": {func(_ *testing.T, n *nodetest.Node) { n.Break("", -1, nodetest.Answer(429, 5)) }, node.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, h := inCustody(t, nodetest.Alone, 1)
			n := s.nodes[0]
			n.Restart()
			c.change(t, n)
			shares, operations := sharesSent(n), s.operations()
			if out, err := h.tend(h.process()); !errors.Is(err, c.want) {
				t.Errorf("Tend = %+v, %v, want %v", out, err, c.want)
			}
			if sharesSent(n) != shares || s.operations() != operations {
				t.Errorf("%d shares were sent, the HSM was asked %d times", sharesSent(n)-shares, s.operations()-operations)
			}
		})
	}
}

func TestWhatIsAwayIsNamedAndTheNextCallWorks(t *testing.T) {
	for name, c := range map[string]struct {
		call string
		want error
	}{
		"the HSM":        {"hsm open unseal", hsm.ErrUnavailable},
		"the store":      {"store get material/prod/unseal", store.ErrUnavailable},
		"the local disk": {"local get alarms/prod/<node>", store.ErrUnavailable},
		"the audit log":  {"audit unseal", audit.ErrNoSink},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, h := inCustody(t, nodetest.Alone, 1)
			s.nodes[0].Restart()
			shares := sharesSent(s.nodes[0])
			k := h.process()
			h.fault.set(func(call string) bool { return call == c.call })
			if out, err := h.tend(k); !errors.Is(err, c.want) {
				t.Errorf("Tend = %+v, %v, want %v", out, err, c.want)
			}
			if sharesSent(s.nodes[0]) != shares {
				t.Error("shares were sent")
			}
			h.fault.set(nil)
			if out, err := h.tend(k); err != nil || out.Action != ActionUnsealed {
				t.Errorf("Tend afterwards = %+v, %v", out, err)
			}
		})
	}
}

func TestUnsealingThatSomebodyLeftIsReset(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := s.nodes[0]
	n.Restart()
	if _, err := n.Client(t).Unseal(t.Context(), []byte("a share of something else, 33 by.")); err != nil {
		t.Fatal(err)
	}
	if out, err := h.tend(h.process()); err != nil || out.Action != ActionUnsealed {
		t.Errorf("Tend = %+v, %v", out, err)
	}
}

func TestUnsealingThatOthersAreAtIsLeftToThem(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := s.nodes[0]
	n.Restart()
	client := n.Client(t)
	all := n.Shares()
	if _, err := client.Unseal(t.Context(), all[0]); err != nil {
		t.Fatal(err)
	}
	looks := 0
	n.Break("sys/seal-status", -1, nodetest.Then(func() {
		if looks++; looks == 2 {
			_, _ = client.Unseal(context.WithoutCancel(t.Context()), all[4])
		}
	}))
	out, err := h.tend(h.process())
	if !errors.Is(err, ErrBusy) || sharesSent(n) != 3+2 {
		t.Errorf("Tend = %+v, %v, after %d shares; want ErrBusy", out, err, sharesSent(n))
	}
}

func TestTwoHostsTendAtOnce(t *testing.T) {
	s, first := inCustody(t, nodetest.Raft, 3)
	second := s.host("two")
	for range 5 {
		for _, n := range s.nodes {
			n.Restart()
		}
		var group sync.WaitGroup
		for _, h := range []*host{first, second} {
			k := h.process()
			group.Go(func() {
				for _, outcome := range k.TendAll(t.Context(), s.Cluster) {
					if outcome.Err != nil && !errors.Is(outcome.Err, ErrBusy) {
						t.Errorf("host %q, node %s: %v", h.name, outcome.Address, outcome.Err)
					}
				}
			})
		}
		group.Wait()
		for range 5 {
			if !slices.ContainsFunc(s.nodes, (*nodetest.Node).Sealed) {
				break
			}
			first.process().TendAll(t.Context(), s.Cluster)
		}
		s.wantAllUnsealed()
	}
	if first.wantMaterial(); s.initialisations() != 1 {
		t.Error("it was initialised again")
	}
}

func TestLostAnswerOfTheLastShareIsNoFailure(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	n := s.nodes[0]
	n.Restart()
	sent := 0
	n.Break("sys/unseal", -1, func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		if sent++; sent == 3 {
			nodetest.Lose(w, r, serve)
			return
		}
		serve.ServeHTTP(w, r)
	})
	if out, err := h.tend(h.process()); err != nil || out.Action != ActionUnsealed {
		t.Errorf("Tend = %+v, %v", out, err)
	}
}

// A fault at any call of TendAll costs that call, not the cluster: the next one finishes it.
func TestTendSurvivesAFaultAtEveryCall(t *testing.T) {
	for _, how := range []mode{refused, lost, crashBefore, crashAfter} {
		t.Run(string(how), func(t *testing.T) {
			t.Parallel()
			s, h := inCustody(t, nodetest.Raft, 2)
			for at := 1; ; at++ {
				s.nodes[0].Restart()
				s.nodes[1].Wipe()
				h.fault.reset()
				h.fault.at, h.fault.mode = at, how
				_, _ = h.fault.in(func() error { h.process().TendAll(t.Context(), s.Cluster); return nil })
				_, call := h.fault.reset()
				if call == "" {
					return
				}
				k := h.process()
				var failed []error
				for range 3 {
					failed = nil
					for _, outcome := range k.TendAll(t.Context(), s.Cluster) {
						failed = append(failed, outcome.Err)
					}
					if join(failed...) == nil {
						break
					}
				}
				if err := join(failed...); err != nil || s.nodes[0].Sealed() {
					t.Fatalf("call %d, %q, %s: afterwards TendAll says %v", at, call, how, err)
				}
				s.wantAllUnsealed()
				if t.Failed() {
					t.Fatalf("call %d, %q, %s", at, call, how)
				}
			}
		})
	}
}

func TestSpreadWantsAsManyHSMsAsItSays(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	s.Cluster.Key, s.Cluster.Spread = "", &Spread{Needed: 2, Keys: []string{"office", "bunker", "bank"}}
	h := s.host("one")
	result := h.mustInit()
	if !slices.Equal(result.Items, []string{"unseal.office", "unseal.bunker", "unseal.bank"}) {
		t.Errorf("the items are %q", result.Items)
	}
	m := h.wantMaterial()
	for _, item := range m.items {
		fields, err := m.fields(item)
		if err != nil || len(fields)-1 >= 3 {
			t.Errorf("item %q alone holds %d shares, the threshold is 3 (%v)", item.name, len(fields)-1, err)
		}
	}
	away := fmt.Errorf("unplugged: %w", hsm.ErrUnavailable)
	for name, gone := range map[string][]string{
		"all are there": nil, "the first is away": {"office"}, "the last is away": {"bank"}, "two are away": {"office", "bank"},
	} {
		for _, device := range s.hsms {
			device.SetError(nil)
		}
		for _, device := range gone {
			s.hsms[device].SetError(away)
		}
		s.nodes[0].Restart()
		before := s.operations()
		out, err := h.tend(h.process())
		switch {
		case len(gone) == 2:
			if !errors.Is(err, hsm.ErrUnavailable) || !s.nodes[0].Sealed() {
				t.Errorf("%s: Tend = %+v, %v", name, out, err)
			}
		case err != nil || s.nodes[0].Sealed():
			t.Errorf("%s: Tend = %+v, %v", name, out, err)
		case len(gone) == 0 && s.operations()-before != 2:
			t.Errorf("%s: it cost %d HSM operations", name, s.operations()-before)
		}
	}
}

func TestSpreadOverOneHSMIsRefused(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	s.Cluster.Key, s.Cluster.Spread = "", &Spread{Needed: 2, Keys: []string{"office", "twin", "bank"}}
	_, err := s.host("one").process().Init(t.Context(), s.Cluster, InitOptions{})
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "twin") || s.initialisations() != 0 {
		t.Errorf("Init = %v", err)
	}
}

func TestPeopleTakeSharesAtInit(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	alice, bob := newPerson(t, "Alice", nil), newPerson(t, "Bob", nil)
	s.People = []Person{{"alice", publicKey(t, alice)}, {"bob", publicKey(t, bob)}}
	h := s.host("one")
	result := h.mustInit()
	s.wantAllUnsealed()
	if len(result.People) != 2 || result.People[1].Name != "bob" || result.People[1].Index != 4 {
		t.Fatalf("the people are %+v", result.People)
	}
	shares := s.nodes[0].Shares()
	if got := decrypt(t, bob, result.People[1].Message); string(got) != hexOf(shares[4]) {
		t.Error("the message is not bob's share")
	}
	m := h.wantMaterial()
	if len(m.messages) != 2 || len(m.take(m.active(), 5)) != 3 {
		t.Errorf("%d messages and %d shares are in custody", len(m.messages), len(m.take(m.active(), 5)))
	}
}

func TestHSMWithFewerSharesThanTheThresholdWaitsForPeople(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	alice, bob := newPerson(t, "Alice", nil), newPerson(t, "Bob", nil)
	s.Shares, s.Threshold = 3, 2
	s.People = []Person{{"alice", publicKey(t, alice)}, {"bob", publicKey(t, bob)}}
	h := s.host("one")
	result := h.mustInit()
	n := s.nodes[0]
	if out := result.Nodes[0].Outcome; out.Action != ActionWaiting || out.People != 1 || !n.Sealed() {
		t.Fatalf("after Init the node is %+v", out)
	}
	k := h.process()
	for range 3 {
		if out, err := h.tend(k); err != nil || out.Action != ActionWaiting || out.People != 1 {
			t.Fatalf("Tend = %+v, %v", out, err)
		}
	}
	if _, err := n.Client(t).Unseal(t.Context(), n.Shares()[2]); err != nil || n.Sealed() {
		t.Fatalf("the person's share does not unseal it: %v", err)
	}
	if out, err := h.tend(k); err != nil || out.Action != ActionNone || !out.RootRevoked || n.Tokens() != 0 {
		t.Errorf("Tend = %+v, %v", out, err)
	}
	// A person who was faster is not reset.
	n.Restart()
	if _, err := n.Client(t).Unseal(t.Context(), n.Shares()[1]); err != nil {
		t.Fatal(err)
	}
	if out, err := h.tend(k); err != nil || n.Sealed() {
		t.Errorf("Tend after a person = %+v, %v", out, err)
	}
}

func TestRootTokenIsKept(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	s.RootToken = RootKeep
	h := s.host("one")
	result := h.mustInit()
	if result.RootRevoked || s.nodes[0].Tokens() != 1 {
		t.Fatalf("%+v, and %d root tokens live", result, s.nodes[0].Tokens())
	}
	s.RootToken = RootDiscard // a change of mind is no order to revoke what was to be kept
	k, before := h.process(), s.operations()
	for range 3 {
		if _, err := h.tend(k); err != nil {
			t.Fatal(err)
		}
		h.clock.advance(2 * rootAgain)
	}
	if spent := s.operations() - before; spent != 1 {
		t.Errorf("finding that out cost %d HSM operations", spent)
	}
	root, err := h.process().openRoot(t.Context(), s.Cluster)
	if err != nil {
		t.Fatal(err)
	}
	defer root.wipe()
	if err := s.nodes[0].Client(t).LookupSelf(t.Context(), root.token); err != nil {
		t.Errorf("the kept token: %v", err)
	}
}

func TestRootTokenIsEncryptedToAPerson(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	alice := newPerson(t, "Alice", nil)
	s.RootToken, s.RootPGPKey = RootPGP, publicKey(t, alice)
	h := s.host("one")
	result := h.mustInit()
	token := decrypt(t, alice, result.RootPGP)
	if err := s.nodes[0].Client(t).LookupSelf(t.Context(), token); err != nil {
		t.Errorf("the token of the message: %v", err)
	}
	root, err := h.process().openRoot(t.Context(), s.Cluster)
	if err != nil || string(root.message) != string(unarmored(t, result.RootPGP)) || root.Fingerprint == "" {
		t.Errorf("the kept message is %+v, %v", root, err)
	}
}

func unarmored(t *testing.T, message []byte) []byte {
	t.Helper()
	binary, err := unarmor(message)
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// What was opened is wiped when the call ends, however it ends.
func TestSharesAreWipedAlsoAfterAPanic(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	s.nodes[0].Restart()
	k := h.process()
	var seen *material
	o := &opening{load: func(ctx context.Context) (m *material, err error) {
		seen, err = k.load(ctx, s.Cluster, KindUnseal)
		return seen, err
	}}
	k.audit = panicking{}
	func() {
		defer func() {
			if recover() == nil {
				t.Error("it did not panic")
			}
		}()
		defer o.wipe()
		_, _ = k.tend(t.Context(), s.Cluster, s.Nodes[0], o)
	}()
	if len(seen.shares) != 5 {
		t.Fatalf("%d shares were opened", len(seen.shares))
	}
	for name, share := range seen.shares {
		if slices.ContainsFunc(share, func(b byte) bool { return b != 0 }) {
			t.Errorf("share %d is still in memory", name.index)
		}
	}
}

type panicking struct{}

func (panicking) Begin(context.Context, audit.Act) (func(error), error) {
	return func(error) { panic("a bug") }, nil
}

// Where nobody can write down that a node is to be unsealed, its keys stay sealed.
func TestNothingIsOpenedThatNobodyCanWriteDown(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	s.nodes[0].Restart()
	k := h.process()
	k.audit = full{}
	before := s.operations()
	if _, err := k.Tend(t.Context(), s.Cluster, s.Nodes[0]); !errors.Is(err, audit.ErrNoSink) {
		t.Errorf("Tend = %v", err)
	}
	if spent := s.operations() - before; spent != 0 || !s.nodes[0].Sealed() {
		t.Errorf("%d HSM operations", spent)
	}
}

type full struct{}

func (full) Begin(context.Context, audit.Act) (func(error), error) { return nil, audit.ErrNoSink }

func TestStatusTouchesNoHSM(t *testing.T) {
	s, h := inCustody(t, nodetest.Raft, 3)
	s.nodes[2].Down()
	for _, device := range s.hsms {
		device.SetError(hsm.ErrUnavailable)
	}
	before := s.operations()
	status, err := h.process().Status(t.Context(), s.Cluster)
	if err != nil || s.operations() != before {
		t.Fatalf("Status = %v, %d HSM operations", err, s.operations()-before)
	}
	if status.Nodes[0].Role != node.RoleActive || status.Nodes[1].Role != node.RoleStandby || status.Nodes[1].Leader == "" {
		t.Errorf("the nodes are %+v", status.Nodes)
	}
	if !errors.Is(status.Nodes[2].Err, node.ErrUnavailable) {
		t.Errorf("the node that is down: %+v", status.Nodes[2])
	}
	if len(status.Material) != 1 || status.Material[0].Item != "unseal" || status.Material[0].HSMs != 1 || status.Material[0].State != custody.StateCurrent {
		t.Errorf("the material is %+v", status.Material)
	}
	if len(status.Warnings) > 0 { // of the one HSM, whose backup is confirmed, somebody knows
		t.Errorf("the warnings are %q", status.Warnings)
	}
}
