package cluster

import (
	"crypto/ecdh"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// unplug takes an HSM away, and nobody has its keys in memory.
func (y *yard) unplug(name string) {
	y.hsms[name].SetError(fmt.Errorf("unplugged: %w", hsm.ErrUnavailable))
	y.keys = keyring.New(keyring.Config{Records: y.known, Devices: y.site})
}

// toVan gives a wrapping key a new version on another HSM, where its backup is confirmed.
func (y *yard) toVan(key string) {
	y.t.Helper()
	y.hsms["van"].AddEC(y.t, "spare", "78", ecdh.P256())
	_, err := y.keys.Rotate(y.t.Context(), key, keyring.RotateRequest{Adopt: &keyring.AdoptRequest{Device: "van", Label: "spare", By: "test"}})
	if err == nil {
		_, err = y.keys.Backup(y.t.Context(), key, "test")
	}
	y.must(err)
}

// wantUnsealedWithout wants that what is in custody unseals the cluster while an HSM is away.
func (y *yard) wantUnsealedWithout(device string) {
	y.t.Helper()
	y.hsms[device].SetError(fmt.Errorf("unplugged: %w", hsm.ErrUnavailable))
	defer y.hsms[device].SetError(nil)
	y.restart()
}

// The day that a spread is made for: one of its HSMs is lost. Rekeying heals it, wherever it is cut off.
func TestASpreadIsHealedAfterOneOfItsHSMsIsLost(t *testing.T) {
	for name, test := range map[string]struct {
		lost    string
		replace func(*yard)
		items   []string
		heals   bool
	}{
		"its key has a version on a new one": {
			"bank", func(y *yard) { y.toVan("bank") }, []string{"unseal.office", "unseal.bunker", "unseal.bank"}, true,
		},
		"the first, whose key has a version on a new one": {
			"office", func(y *yard) { y.toVan("office") }, []string{"unseal.office", "unseal.bunker", "unseal.bank"}, true,
		},
		"another key is taken in its place": {
			"bank",
			func(y *yard) { y.Spread = &Spread{Needed: 2, Keys: []string{"office", "bunker", "van"}} },
			[]string{"unseal.office", "unseal.bunker", "unseal.van"},
			true,
		},
		"nothing is in its place yet": {"bank", func(*yard) {}, []string{"unseal.office", "unseal.bunker", "unseal.bank"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			everyStep(t, dying, func(t *testing.T) *yard {
				t.Helper()
				y := begun(t, nodetest.Raft, spread)
				y.unplug(test.lost)
				test.replace(y)
				return y
			}, rekeyOnce, func(y *yard, struck string) {
				y.restart() // whatever was cut off, the others unseal it
				result, err := y.process().Rekey(y.t.Context(), y.Cluster, RekeyOptions{})
				y.must(err)
				slices.Sort(result.Items)
				if want := slices.Sorted(slices.Values(test.items)); !slices.Equal(result.Items, want) {
					y.t.Errorf("items = %q, want %q", result.Items, want)
				}
				if !test.heals {
					y.restart()
					return
				}
				y.wantOneSet(KindUnseal)
				for _, device := range []string{"office", "bunker", "bank", "van"} {
					if device != test.lost {
						y.wantUnsealedWithout(device)
					}
				}
			})
		})
	}
}

// Where nothing can be sealed for a lost HSM any more, the others get new shares all the same: what it had is worthless then.
func TestASpreadIsRekeyedWithoutAnHSMThatIsLost(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	y.unplug("bank")
	y.fault.set(func(call string) bool { return call == "seal probe.unseal.bank" })
	before := y.nodes[0].Shares()
	result, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	y.must(err)
	if len(result.Items) != 2 || !strings.Contains(strings.Join(result.Warnings, " "), "of no use any more") {
		t.Errorf("result = %+v", result)
	}
	if after := y.nodes[0].Shares(); string(after[0]) == string(before[0]) {
		t.Error("the keys are the old ones")
	}
	y.restart()
	y.hsms["bank"].SetError(nil) // it is found again
	y.restart()
	y.fault.reset()
	y.must(rekeyOnce(y))
	y.wantOneSet(KindUnseal)
	for _, device := range []string{"office", "bunker", "bank"} {
		y.wantUnsealedWithout(device)
	}
}

func TestExportWorksWithAsManyHSMsAsAreNeeded(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	y.unplug("bank")
	alice := newPerson(t, "Alice", nil)
	request := ExportRequest{Recipients: [][]byte{publicKey(t, alice)}, Each: true}
	exported, err := y.process().Export(t.Context(), y.Cluster, request)
	y.must(err)
	if len(exported) != 2 || exported[0].Name != "unseal-1" || exported[1].Name != "unseal-2" {
		t.Errorf("exported = %+v", exported)
	}
	result, err := y.process().Verify(t.Context(), y.Cluster, VerifyOptions{})
	y.must(err)
	if !strings.Contains(strings.Join(result.Problems, " "), "missing: unseal.bank") {
		t.Errorf("the problems are %q", result.Problems)
	}
	y.unplug("bunker")
	if _, err := y.process().Export(t.Context(), y.Cluster, request); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Export with one HSM of two = %v", err)
	}
	result, err = y.process().Verify(t.Context(), y.Cluster, VerifyOptions{})
	y.must(err)
	if text := strings.Join(result.Problems, " "); strings.Contains(text, "initialise or import") {
		t.Errorf("the problems are %q", text)
	}
}

// Unsealing goes by how the shares are dealt. The configuration may be ahead of that until the next rekey.
func TestUnsealingGoesByHowTheSharesAreDealt(t *testing.T) {
	for name, test := range map[string]struct{ from, to func(*Cluster) }{
		"from one key to a spread": {func(c *Cluster) { c.Key = "office" }, spread},
		"from a spread to one key": {spread, func(c *Cluster) { c.Key, c.Spread = "bank", nil }},
		"from a spread to another": {spread, func(c *Cluster) { c.Spread = &Spread{Needed: 2, Keys: []string{"van", "bunker", "bank"}} }},
		"from one key to another":  {func(c *Cluster) { c.Key = "office" }, func(c *Cluster) { c.Key = "bank" }},
		"to one that wants all keys": {spread, func(c *Cluster) {
			c.Spread, c.Threshold = &Spread{Needed: 3, Keys: []string{"office", "bunker", "van"}}, 3
		}},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 1, test.from)
			test.to(y.Cluster)
			y.restart()
			other := &yard{y.site.host("host-2")} // without any record
			other.restart()
			drill, err := y.process().Drill(t.Context(), y.Cluster, DrillOptions{})
			if err != nil || drill.Opened == 0 || len(drill.Problems) > 0 {
				t.Errorf("Drill = %+v, %v", drill, err)
			}
			y.nodes[0].Wipe()
			if _, err := other.process().Init(t.Context(), y.Cluster, InitOptions{}); !errors.Is(err, ErrExists) {
				t.Errorf("Init of a cluster whose keys are dealt otherwise = %v", err)
			}
		})
	}
}

// A node of raft storage that missed a rekey wants the keys from before it.
func TestANodeThatMissedARekeyIsUnsealed(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*Cluster)
		options RekeyOptions
	}{
		"with the same numbers": {nil, RekeyOptions{}},
		"with other numbers":    {nil, RekeyOptions{Shares: 7, Threshold: 4}},
		"of a spread":           {spread, RekeyOptions{}},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 3, test.change)
			y.nodes[2].Restart()
			_, err := y.process().Rekey(t.Context(), y.Cluster, test.options)
			y.must(err)
			out, err := y.process().Tend(t.Context(), y.Cluster, y.nodes[2].Address())
			if err != nil || out.Action != ActionUnsealed || y.nodes[2].Sealed() {
				t.Fatalf("Tend = %+v, %v", out, err)
			}
			y.restart() // it has caught up
			status, err := y.process().Status(t.Context(), y.Cluster)
			y.must(err)
			if !slices.ContainsFunc(status.Material, func(item MaterialStatus) bool { return strings.HasPrefix(item.Item, "former") && item.HSMs == 1 }) {
				t.Errorf("the status shows %+v", status.Material)
			}
		})
	}
}

func TestAnotherRekeyTakesThePlaceOfTheFormerKeys(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	y.must(rekeyOnce(y))
	first := y.material(KindUnseal).active().ID
	y.Key, y.Spread = "bunker", nil
	y.must(rekeyOnce(y))
	y.must(rekeyOnce(y)) // by then, those of the spread are gone
	second := y.material(KindUnseal).active().ID
	y.must(rekeyOnce(y))
	k := y.process()
	former, err := k.loadFormer(t.Context(), y.Cluster, KindUnseal)
	y.must(err)
	defer former.wipe()
	if set := former.formerSet(); set == nil || set.ID != second || set.ID == first {
		t.Errorf("the former set is %+v, want %s", set, second)
	}
	names, err := k.formerItems(t.Context(), y.Cluster, KindUnseal)
	if y.must(err); !slices.Equal(names, []string{"former"}) {
		t.Errorf("the former items are %q", names)
	}
	alice := newPerson(t, "Alice", nil)
	request := ExportRequest{Recipients: [][]byte{publicKey(t, alice)}, Former: true}
	if exported, err := y.process().Export(t.Context(), y.Cluster, request); err != nil || len(exported) != 1 {
		t.Errorf("Export = %+v, %v", exported, err)
	}
	// Another host has never opened them, and writes over them all the same.
	other := &yard{y.site.host("host-2")}
	y.must(rekeyOnce(other))
	y.must(rekeyOnce(y))
	for _, item := range []string{"former", "former.office", "former-recovery", "unseal", "root"} {
		if !IsItem(item) {
			t.Errorf("%q is not taken for an item of custody", item)
		}
	}
	if IsItem("formerly") || IsItem("token") {
		t.Error("what people keep beside it is taken for an item of custody")
	}
	if _, err := y.process().keeper.Get(t.Context(), y.Name, "former", custody.ReadOptions{Store: "main"}); err != nil {
		t.Error(err)
	}
}

// Where all nodes lost their storage, none of them waits for another one to be unsealed.
func TestWipedNodesDoNotWaitForEachOther(t *testing.T) {
	y := initialised(t, nodetest.Raft, 3, nil)
	for _, n := range y.nodes {
		n.Wipe()
	}
	for _, n := range y.process().TendAll(t.Context(), y.Cluster) {
		if !errors.Is(n.Err, ErrNotInitialized) || errors.Is(n.Err, ErrBusy) {
			t.Errorf("Tend = %v", n.Err)
		}
	}
}
