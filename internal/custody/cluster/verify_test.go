package cluster

import (
	"crypto/ecdh"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func TestVerifyFindsNothingWhereAllIsWell(t *testing.T) {
	for name, test := range map[string]struct {
		kind   nodetest.Kind
		nodes  int
		change func(*Cluster)
	}{
		"one node":      {nodetest.Raft, 1, nil},
		"three nodes":   {nodetest.Raft, 3, nil},
		"a spread":      {nodetest.Raft, 1, spread},
		"recovery keys": {nodetest.Auto, 1, nil},
		"a kept token":  {nodetest.Raft, 1, func(c *Cluster) { c.RootToken = RootKeep }},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, test.kind, test.nodes, test.change)
			before := len(y.nodes[0].Requests())
			result, err := y.process().Verify(t.Context(), y.Cluster, VerifyOptions{})
			y.must(err)
			if len(result.Problems) != 0 || result.Kind == "" || len(result.Items) == 0 || len(result.Nodes) != test.nodes || result.Proved {
				t.Errorf("result = %+v", result)
			}
			for _, request := range y.nodes[0].Requests()[before:] {
				if request.Method != http.MethodGet {
					t.Errorf("it asked %v", request)
				}
			}
			proved, err := y.process().Verify(t.Context(), y.Cluster, VerifyOptions{Prove: true})
			y.must(err)
			if len(proved.Problems) != 0 || !proved.Proved {
				t.Errorf("result = %+v", proved)
			}
		})
	}
}

func TestVerifyTellsAllProblems(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*Cluster)
		prepare func(*yard)
		options VerifyOptions
		says    []string
	}{
		"a node that is sealed and one that is away": {
			nil, func(y *yard) { y.nodes[0].Restart(); y.nodes[1].Down() }, VerifyOptions{}, []string{"is sealed", "could not be asked"},
		},
		"another cluster": {nil, func(y *yard) { y.nodes[0].SetClusterID("other") }, VerifyOptions{}, []string{"does not match"}},
		"numbers of the configuration that are others": {
			func(c *Cluster) { c.Shares, c.Threshold = 5, 3 }, func(y *yard) { y.Threshold = 2 }, VerifyOptions{}, []string{"the configuration says 5 and 2"},
		},
		"an HSM that is away": {
			spread, func(y *yard) { y.hsms["bunker"].SetError(hsm.ErrUnavailable) }, VerifyOptions{}, []string{`"unseal.bunker" does not open`, "Of 3 items 2"},
		},
		"an item that is gone": {
			spread, func(y *yard) { y.remove("unseal.bank") }, VerifyOptions{}, []string{"vanished", "Of 3 items 2"},
		},
		"nothing at all": {
			nil, func(y *yard) { y.must(y.process().dropItem(y.t.Context(), y.Cluster, "unseal")) }, VerifyOptions{}, []string{"initialise or import"},
		},
		"a rekey that somebody else did": {
			nil, func(y *yard) { y.rekeyByHand() }, VerifyOptions{Prove: true}, []string{"import them with --replace"},
		},
		"a rekey that was cut off": {
			nil, func(y *yard) { y.cutOff("node PUT sys/rekey/verify", rekeyOnce) },
			VerifyOptions{},
			[]string{"`nitroseal rekey prod` finishes or undoes it"},
		},
		"a person without a share": {nil, func(y *yard) { y.person("Alice") }, VerifyOptions{}, []string{`"Alice"`}},
		"a key with a newer version": {
			nil, func(y *yard) { y.rotate("office") }, VerifyOptions{}, []string{"`nitroseal rewrap"},
		},
		"a token that is left": {
			nil, func(y *yard) { y.must(y.process().putLocal(y.t.Context(), "tokens/prod", []byte("x"))) }, VerifyOptions{}, []string{"--revoke"},
		},
		"another spread than the configuration's": {
			func(c *Cluster) { c.Shares, c.Threshold = 3, 2 }, func(y *yard) { spread(y.Cluster) },
			VerifyOptions{},
			[]string{"deals the shares anew"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 2, test.change)
			test.prepare(y)
			result, err := y.process().Verify(t.Context(), y.Cluster, test.options)
			y.must(err)
			all := strings.Join(result.Problems, "\n")
			for _, says := range test.says {
				if !strings.Contains(all, says) {
					t.Errorf("no problem says %q:\n%s", says, all)
				}
			}
			for _, problem := range result.Problems {
				if !strings.HasSuffix(problem, ".") || strings.HasSuffix(problem, "..") {
					t.Errorf("it is no sentence: %q", problem)
				}
			}
			drilled, err := y.process().Drill(t.Context(), y.Cluster, DrillOptions{})
			t.Logf("a drill says %t: %q, %v", drilled.Ready, drilled.Problems, err)
		})
	}
}

// remove deletes an item from the store behind everybody's back.
func (y *yard) remove(item string) {
	y.t.Helper()
	entry, err := y.main.Get(y.t.Context(), "material/prod/"+item)
	y.must(err)
	y.must(y.main.Delete(y.t.Context(), "material/prod/"+item, entry.Revision))
}

// rekeyByHand gives the cluster keys that are not in custody.
func (y *yard) rekeyByHand() {
	y.t.Helper()
	client := y.nodes[0].Client(y.t)
	st, err := client.RekeyStart(y.t.Context(), node.UnsealKeys, node.RekeyRequest{Shares: 5, Threshold: 3})
	y.must(err)
	for _, share := range y.nodes[0].Shares()[:3] {
		_, err = client.RekeyUpdate(y.t.Context(), node.UnsealKeys, share, st.Nonce)
		y.must(err)
	}
}

// cutOff has a process die before the last one of a call.
func (y *yard) cutOff(call string, act func(*yard) error) {
	y.t.Helper()
	twin := initialised(y.t, nodetest.Raft, len(y.nodes), nil)
	_, _ = twin.fault.in(func() error { return act(twin) })
	calls, _ := twin.fault.reset()
	slices.Reverse(calls)
	y.fault.reset()
	y.fault.mu.Lock()
	y.fault.mode, y.fault.at = crashBefore, len(calls)-slices.Index(calls, call)
	y.fault.mu.Unlock()
	_, survived := y.fault.in(func() error { return act(y) })
	if _, struck := y.fault.reset(); survived || struck != call {
		y.t.Fatalf("it died before %q", struck)
	}
}

func (y *yard) rotate(key string) {
	y.t.Helper()
	y.hsms[key].AddEC(y.t, key+"-2", "77", ecdh.P256())
	_, err := y.keys.Rotate(y.t.Context(), key, keyring.RotateRequest{Adopt: &keyring.AdoptRequest{Device: key, Label: key + "-2", By: "test"}})
	y.must(err)
	_, err = y.keys.Backup(y.t.Context(), key, "test")
	y.must(err)
}

func TestDrillSaysWhetherARestartWouldBeUnsealed(t *testing.T) {
	y := initialised(t, nodetest.Raft, 3, nil)
	result, err := y.process().Drill(t.Context(), y.Cluster, DrillOptions{By: "alice"})
	y.must(err)
	if !result.Ready || !result.Proved || result.Items != 1 || len(result.Nodes) != 3 || result.Opened <= 0 {
		t.Errorf("result = %+v", result)
	}
	for _, n := range result.Nodes {
		if n.RoundTrip <= 0 || n.Unsealed != result.Opened+3*n.RoundTrip || n.Problem != "" {
			t.Errorf("node = %+v", n)
		}
	}
	for _, n := range y.nodes {
		if got := n.Count("PUT", "sys/unseal"); got > 3 {
			t.Errorf("a share was given to sys/unseal: %d calls", got)
		}
	}
	y.wantOneSet(KindUnseal)

	without, err := y.process().Drill(t.Context(), y.Cluster, DrillOptions{WithoutProof: true})
	y.must(err)
	if !without.Ready || without.Proved || without.NotProved == "" {
		t.Errorf("result = %+v", without)
	}
}

func TestDrillFails(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*Cluster)
		prepare func(*yard)
		says    string
		ready   bool
	}{
		"where the HSM is away":             {nil, func(y *yard) { y.hsms["office"].SetError(hsm.ErrUnavailable) }, "do not open", false},
		"where a node is away":              {nil, func(y *yard) { y.nodes[0].Down() }, "would not be unsealed", false},
		"where a node is a foreign one":     {nil, func(y *yard) { y.nodes[0].SetCertificate(nodetest.NewAuthority(y.t).Issue(y.t)) }, "would not be unsealed", false},
		"where the keys are others":         {nil, func(y *yard) { y.rekeyByHand() }, "does not take the shares", false},
		"where people hold too many":        {func(c *Cluster) { c.Shares, c.Threshold = 2, 2 }, func(y *yard) { y.withoutShare() }, "one person would have to give theirs", false},
		"but not where one HSM of three is": {spread, func(y *yard) { y.hsms["bank"].SetError(hsm.ErrUnavailable) }, "", true},
		"but not where Vault is busy": {nil, func(y *yard) {
			_, err := y.nodes[0].Client(y.t).RekeyStart(y.t.Context(), node.UnsealKeys, node.RekeyRequest{Shares: 1, Threshold: 1})
			y.must(err)
		}, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 1, test.change)
			test.prepare(y)
			result, err := y.process().Drill(t.Context(), y.Cluster, DrillOptions{})
			y.must(err)
			if result.Ready != test.ready || !strings.Contains(strings.Join(result.Problems, "\n"), test.says) {
				t.Errorf("result = %+v", result)
			}
		})
	}
	t.Run("where nothing is in custody", func(t *testing.T) {
		y, _, _ := foreignCluster(t, nodetest.Raft, nil)
		if _, err := y.process().Drill(t.Context(), y.Cluster, DrillOptions{}); !errors.Is(err, ErrNoMaterial) {
			t.Errorf("Drill = %v, want ErrNoMaterial", err)
		}
	})
}

// withoutShare takes a share out of custody, as one that a person has.
func (y *yard) withoutShare() {
	y.t.Helper()
	m := y.material(KindUnseal)
	for id, its := range m.items[0].sets {
		its.indices = its.indices[:1]
		m.items[0].sets[id] = its
	}
	y.must(y.process().save(y.t.Context(), y.Cluster, m, "test", newID()))
}

func TestRewrapSealsAnewWhatIsDue(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	k := y.process()
	_, err := k.keeper.Put(t.Context(), y.Name, "tls-key", custody.Fields{"pem": []byte("x")}, custody.PutOptions{Key: "bank", Store: "main"})
	y.must(err)
	result, err := k.Rewrap(t.Context(), []*Cluster{y.Cluster}, RewrapOptions{})
	y.must(err)
	if result.Envelopes != 4 || result.Rewrapped != 0 || len(result.Failed) != 0 || result.SingleHSM != 4 {
		t.Errorf("result = %+v", result)
	}
	y.rotate("office")
	y.rotate("bank")
	before := y.operations()
	var seen []string
	result, err = k.Rewrap(t.Context(), []*Cluster{y.Cluster}, RewrapOptions{By: "alice", Progress: func(step RewrapStep) {
		seen = append(seen, step.Item)
		if step.Err != nil || step.All != 4 || step.Done != len(seen) {
			t.Errorf("step = %+v", step)
		}
	}})
	y.must(err)
	if result.Rewrapped != 3 || y.operations()-before != 3 {
		t.Errorf("result = %+v with %d operations", result, y.operations()-before)
	}
	if want := []string{"tls-key", "unseal.bank", "unseal.bunker", "unseal.office"}; !slices.Equal(seen, want) {
		t.Errorf("order = %q, want %q", seen, want)
	}
	y.wantOneSet(KindUnseal)
	y.restart()
}

// A version whose record nobody has read is none to begin a cluster with, and none to move one to.
func TestRewrapWaitsForAKeyThatIsReady(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	y.rotate("office")
	y.notReady("office")
	result, err := y.process().Rewrap(t.Context(), []*Cluster{y.Cluster}, RewrapOptions{})
	y.must(err)
	if len(result.Failed) != 1 || !errors.Is(result.Failed[0].Err, keyring.ErrNotReady) || result.Rewrapped != 0 {
		t.Errorf("result = %+v", result)
	}
}

func TestRewrapToAnotherKeyAndOfWhatWaitsOnTheDisk(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	k := y.process()
	sealed, err := y.keys.Seal(t.Context(), "office", leftTokenContext(y.Cluster), []byte("hvs.x"))
	y.must(err)
	y.must(k.putLocal(t.Context(), leftTokenPath(y.Cluster), sealed.Envelope))
	y.rotate("office")
	y.Key = "bank"
	result, err := k.Rewrap(t.Context(), []*Cluster{y.Cluster}, RewrapOptions{})
	y.must(err)
	if result.Envelopes != 2 || result.Rewrapped != 2 {
		t.Errorf("result = %+v", result)
	}
	metadata, err := k.keeper.Get(t.Context(), y.Name, "unseal", custody.ReadOptions{Store: "main"})
	y.must(err)
	if metadata.Key != "bank" {
		t.Errorf("it is sealed with %q", metadata.Key)
	}
	again, err := k.Rewrap(t.Context(), []*Cluster{y.Cluster}, RewrapOptions{})
	y.must(err)
	if again.Rewrapped != 0 {
		t.Errorf("again = %+v", again)
	}
}

// Struck down at any step, the next run goes on with what is left.
func TestARewrapThatIsCutOffIsFinishedByTheNext(t *testing.T) {
	rewrap := func(y *yard) error {
		result, err := y.process().Rewrap(y.t.Context(), []*Cluster{y.Cluster}, RewrapOptions{})
		if err == nil && len(result.Failed) > 0 {
			err = result.Failed[0].Err
		}
		return err
	}
	everyStep(t, allModes,
		func(t *testing.T) *yard {
			t.Helper()
			y := begun(t, nodetest.Raft, spread)
			for _, key := range []string{"office", "bunker", "bank"} {
				y.rotate(key)
			}
			return y
		}, rewrap,
		func(y *yard, _ string) {
			y.must(rewrap(y))
			result, err := y.process().Rewrap(y.t.Context(), []*Cluster{y.Cluster}, RewrapOptions{})
			y.must(err)
			if result.Envelopes != 3 || result.Rewrapped != 0 {
				y.t.Errorf("afterwards, %+v", result)
			}
			y.wantOneSet(KindUnseal)
			y.restart()
		})
}
