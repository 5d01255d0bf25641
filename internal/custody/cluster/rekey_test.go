package cluster

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func TestRekeyGivesAClusterNewKeys(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	before := y.material(KindUnseal)
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{By: "alice"})
	y.must(err)
	if result.Shares != 5 || result.Threshold != 3 || result.Kind != KindUnseal || result.Finished || result.Dropped || len(result.Items) != 1 {
		t.Errorf("result = %+v", result)
	}
	after := y.wantOneSet(KindUnseal)
	if after.active().ID == before.active().ID || after.Origin != before.Origin || after.ClusterID != y.nodes[0].ClusterID() {
		t.Errorf("the facts are %+v, were %+v", after.Facts, before.Facts)
	}
	y.restart()
	if !slices.Contains(y.acts.all(), "intent rekey") || !slices.Contains(y.acts.all(), "outcome rekey true") {
		t.Errorf("the audit log says %q", y.acts.all())
	}
}

func TestRekeyTakesOtherNumbers(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{Shares: 7, Threshold: 4})
	y.must(err)
	if st := y.status(0); result.Shares != 7 || result.Threshold != 4 || st.N != 7 || st.T != 4 {
		t.Errorf("result = %+v, Vault says %d of %d", result, st.T, st.N)
	}
	y.wantOneSet(KindUnseal)
	y.restart()
}

func TestRekeyOfRecoveryKeys(t *testing.T) {
	y := initialised(t, nodetest.Auto, 1, nil)
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	y.must(err)
	if result.Kind != KindRecovery || len(result.Items) != 1 || result.Items[0] != "recovery" {
		t.Errorf("result = %+v", result)
	}
	y.wantOneSet(KindRecovery)
}

func TestRekeyDealsASpreadAnew(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{Shares: 6, Threshold: 4})
	y.must(err)
	if len(result.Items) != 3 || result.Shares != 6 {
		t.Errorf("result = %+v", result)
	}
	y.wantOneSet(KindUnseal)
	y.restart()
}

func TestRekeyAtTheActiveNodeOfSeveral(t *testing.T) {
	y := initialised(t, nodetest.Raft, 3, nil)
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	y.must(err)
	if result.Node != y.nodes[0].Address() {
		t.Errorf("it was done at %s", result.Node)
	}
	y.nodes[0].Restart() // another one is active now
	_, err = y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), "unseal it first") {
		t.Fatalf("Rekey with a node that may want the keys from before the last one = %v", err)
	}
	y.dropFormer()
	result, err = y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	y.must(err)
	if len(result.Warnings) != 1 || !strings.Contains(result.Warnings[0], y.nodes[0].Address()) {
		t.Errorf("the warnings are %q", result.Warnings)
	}
	if result.Node == y.nodes[0].Address() {
		t.Error("it was done at a sealed node")
	}
	y.restart()
}

func TestPeopleTakeSharesThatWeNeverSee(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	alice, bob := y.person("Alice"), y.person("Bob")
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	y.must(err)
	if len(result.People) != 2 || result.People[0].Name != "Alice" || result.People[0].Index != 3 {
		t.Fatalf("people = %+v", result.People)
	}
	m := y.wantOneSet(KindUnseal)
	if held := m.take(m.active(), 5); len(held) != 3 {
		t.Errorf("%d shares are in custody, want 3", len(held))
	}
	shares := y.nodes[0].Shares()
	if got := string(decrypt(t, alice, result.People[0].Message)); got != hexOf(shares[3]) {
		t.Error("Alice reads another share than Vault's fourth")
	}
	if got := string(decrypt(t, bob, result.People[1].Message)); got != hexOf(shares[4]) {
		t.Error("Bob reads another share than Vault's fifth")
	}
	y.restart()

	y.person("Carol") // three people leave two shares, and three are needed
	_, err = y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "make more shares") {
		t.Errorf("Rekey = %v, want ErrInvalid", err)
	}
	y.wantOneSet(KindUnseal)
}

func TestRekeyRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(*yard)
		options RekeyOptions
		want    error
		says    string
	}{
		"impossible numbers": {func(*yard) {}, RekeyOptions{Shares: 3, Threshold: 4}, ErrInvalid, "threshold"},
		"an unknown kind":    {func(*yard) {}, RekeyOptions{Kind: "root"}, ErrInvalid, "unseal"},
		"recovery keys that are not there": {
			func(*yard) {}, RekeyOptions{Kind: KindRecovery}, ErrNoMaterial, "import",
		},
		"a sealed cluster": {func(y *yard) { y.nodes[0].Restart() }, RekeyOptions{}, node.ErrSealed, "unseal it first"},
		"a node that is away": {
			func(y *yard) { y.nodes[0].Down() }, RekeyOptions{}, node.ErrUnavailable, "no active node",
		},
		"another cluster at the address": {
			func(y *yard) { y.nodes[0].SetClusterID("another") }, RekeyOptions{}, ErrMismatch, "nothing was sent",
		},
		"a foreign certificate": {
			func(y *yard) { y.nodes[0].SetCertificate(nodetest.NewAuthority(y.t).Issue(y.t)) }, RekeyOptions{}, node.ErrIdentity, "",
		},
		"somebody else's rekey": {
			func(y *yard) {
				_, err := y.nodes[0].Client(y.t).RekeyStart(y.t.Context(), node.UnsealKeys, node.RekeyRequest{Shares: 1, Threshold: 1})
				y.must(err)
			}, RekeyOptions{}, ErrBusy, "-cancel -nonce=",
		},
		"a Vault that serves it to nobody": {
			func(y *yard) { y.nodes[0].Break("sys/rekey/init", 1, nodetest.Answer(403, 0, "permission denied")) },
			RekeyOptions{},
			node.ErrRefused, "disable_unauthed_rekey_endpoints",
		},
		"a key that is not ready": {
			func(y *yard) { y.notReady("office") }, RekeyOptions{}, keyring.ErrNotReady, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 1, nil)
			before := y.nodes[0].Shares()
			test.prepare(y)
			_, err := y.process().Rekey(t.Context(), y.Cluster, test.options)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Fatalf("Rekey = %v, want %q with %q", err, test.want, test.says)
			}
			if got := y.nodes[0].Count("PUT", "sys/rekey/update"); got != 0 {
				t.Errorf("%d shares were given", got)
			}
			if after := y.nodes[0].Shares(); string(after[0]) != string(before[0]) {
				t.Error("the keys are other ones")
			}
		})
	}
}

// Struck down at any step, the next run ends with new keys in custody that Vault takes, and what is in custody in between
// opens the cluster as well.
func TestARekeyThatIsCutOffIsFinishedByTheNext(t *testing.T) {
	steps := everyStep(t, allModes,
		beginning(nodetest.Raft, nil), rekeyOnce, lookAfterRekey)
	wantSteps(t, steps, []string{
		"local put attempts/prod/unseal",
		"node PUT sys/rekey/init",
		"node PUT sys/rekey/update", "node PUT sys/rekey/update", "node PUT sys/rekey/update",
		"records put material/prod/unseal", "store put material/prod/unseal", "records put material/prod/unseal",
		"node PUT sys/rekey/verify", "node PUT sys/rekey/verify", "node PUT sys/rekey/verify",
		"records put material/prod/former", "store put material/prod/former", "records put material/prod/former",
		"records put material/prod/unseal", "store put material/prod/unseal", "records put material/prod/unseal",
		"local delete attempts/prod/unseal",
	})
}

func TestARekeyOfASpreadThatIsCutOffIsFinishedByTheNext(t *testing.T) {
	everyStep(t, dying,
		beginning(nodetest.Raft, spread), rekeyOnce, lookAfterRekey)
}

func TestARekeyOfRecoveryKeysThatIsCutOffIsFinishedByTheNext(t *testing.T) {
	everyStep(t, dying,
		beginning(nodetest.Auto, nil), rekeyOnce,
		func(y *yard, _ string) {
			_, err := y.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{By: "second"})
			y.must(err)
			y.wantOneSet(KindRecovery)
		})
}

func rekeyOnce(y *yard) error {
	_, err := y.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{By: "first"})
	return err
}

func lookAfterRekey(y *yard, _ string) {
	y.restartable()
	result, err := y.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{By: "second"})
	y.must(err)
	y.t.Logf("the second run: finished=%t dropped=%t", result.Finished, result.Dropped)
	y.wantOneSet(KindUnseal)
	y.restart()
}

// The same where all nodes were restarted in between, so that Vault has forgotten what was under way.
func TestARekeyThatIsCutOffByAPowerCut(t *testing.T) {
	everyStep(t, dying,
		beginning(nodetest.Raft, nil), rekeyOnce,
		func(y *yard, _ string) {
			y.restart()
			_, err := y.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{By: "second"})
			y.must(err)
			y.wantOneSet(KindUnseal)
			y.restart()
		})
}

// Vault may lose the rekey at the very moment that it is finished. Then it is undone, and another one is made.
func TestARekeyThatVaultLosesWhileItIsFinished(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	before := y.material(KindUnseal).active().ID
	y.cutOff("node PUT sys/rekey/verify", rekeyOnce)
	y.nodes[0].Break("sys/rekey/verify", 1, nodetest.Answer(http.StatusBadRequest, 0, "no rekey in progress"))
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	y.must(err)
	if !result.Dropped || result.Finished || result.Made != 5 {
		t.Errorf("result = %+v", result)
	}
	if y.wantOneSet(KindUnseal).active().ID == before {
		t.Error("the keys are the old ones")
	}
	y.restart()
}

// A verification that Vault refuses leaves everything as it was, and says so.
func TestARekeyWhoseVerificationIsRefused(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	before := y.material(KindUnseal).active().ID
	y.nodes[0].Break("sys/rekey/verify", -1, nodetest.Answer(http.StatusBadRequest, 0, "no rekey in progress"))
	_, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	if err == nil || !strings.Contains(err.Error(), "those from before are as they were; run it again") {
		t.Errorf("Rekey = %v", err)
	}
	y.nodes[0].Mend()
	if y.wantOneSet(KindUnseal).active().ID != before {
		t.Error("the keys are other ones")
	}
	y.restart()
}

// Another host has no note of what was under way: where the store tells, it goes on, else it says who has to.
func TestAnotherHostAfterARekeyThatWasCutOff(t *testing.T) {
	everyStep(t, dying,
		beginning(nodetest.Raft, nil), rekeyOnce,
		func(y *yard, struck string) {
			other := &yard{y.site.host("host-2")}
			_, err := other.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{By: "second"})
			if errors.Is(err, ErrBusy) {
				y.restartable()
				_, err = other.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{By: "second", Cancel: true})
			}
			other.must(err)
			other.wantOneSet(KindUnseal)
			other.restart()
		})
}

func TestCancelEndsARekeyWhoeverBeganIt(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	before := y.material(KindUnseal).active().ID
	_, err := y.nodes[0].Client(t).RekeyStart(t.Context(), node.UnsealKeys, node.RekeyRequest{Shares: 1, Threshold: 1})
	y.must(err)
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{Cancel: true})
	y.must(err)
	if !result.Cancelled || result.Shares != 5 {
		t.Errorf("result = %+v", result)
	}
	if y.wantOneSet(KindUnseal).active().ID != before {
		t.Error("there are new keys")
	}
}

// Shares go to other HSMs than before, and the new keys are never under the old ones.
func TestRekeyAfterTheConfigurationNamesOtherKeys(t *testing.T) {
	onto := func(y *yard, key string, to *Spread) { y.Key, y.Spread = key, to }
	twoOfThree := &Spread{Needed: 2, Keys: []string{"office", "bunker", "bank"}}
	small := func(c *Cluster) { c.Shares, c.Threshold = 3, 2 }
	for name, test := range map[string]struct {
		from  func(*Cluster)
		to    func(*yard)
		items []string
	}{
		"from one key to a spread": {small, func(y *yard) { onto(y, "", twoOfThree) }, []string{"unseal.office", "unseal.bunker", "unseal.bank"}},
		"from a spread to one key": {spread, func(y *yard) { onto(y, "bank", nil) }, []string{"unseal"}},
		"to a spread that shares keys": {
			spread, func(y *yard) { onto(y, "", &Spread{Needed: 2, Keys: []string{"office", "bunker", "van"}}) },
			[]string{"unseal.office", "unseal.bunker", "unseal.van"},
		},
		"from one key to another": {small, func(y *yard) { onto(y, "bank", nil) }, []string{"unseal"}},
	} {
		t.Run(name, func(t *testing.T) {
			steps := everyStep(t, dying,
				func(t *testing.T) *yard {
					t.Helper()
					y := begun(t, nodetest.Raft, test.from)
					test.to(y)
					return y
				}, rekeyOnce,
				func(y *yard, _ string) {
					result, err := y.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{})
					y.must(err)
					if !slices.Equal(result.Items, test.items) {
						y.t.Errorf("items = %q, want %q", result.Items, test.items)
					}
					y.wantOneSet(KindUnseal)
					refs, _, err := y.process().keeper.List(y.t.Context(), y.Name)
					y.must(err)
					refs = slices.DeleteFunc(refs, func(ref custody.Ref) bool { return strings.HasPrefix(ref.Name, itemFormer) })
					if len(refs) != len(test.items) {
						y.t.Errorf("the store has %v, want %q", refs, test.items)
					}
					y.restart()
				})
			t.Logf("%d steps", len(steps))
		})
	}
}
