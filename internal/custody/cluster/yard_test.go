package cluster

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"testing"

	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// yard is a host with a cluster in custody.
type yard struct{ *host }

// initialised is a yard whose cluster was taken into custody from its beginning, and is unsealed.
func initialised(t *testing.T, kind nodetest.Kind, nodes int, change func(*Cluster)) *yard {
	t.Helper()
	return initialisedOf(t, nodetest.Options{Kind: kind, Authority: nodetest.NewAuthority(t)}, nodes, change)
}

// begun is initialised with one node, for everyStep, which needs very many: it speaks plain http.
func begun(t *testing.T, kind nodetest.Kind, change func(*Cluster)) *yard {
	t.Helper()
	return initialisedOf(t, nodetest.Options{Kind: kind, Plain: true}, 1, change)
}

func initialisedOf(t *testing.T, options nodetest.Options, nodes int, change func(*Cluster)) *yard {
	t.Helper()
	y := &yard{newSiteOf(t, options, nodes).host("host-1")}
	if change != nil {
		change(y.Cluster)
	}
	y.mustInit()
	y.wantAllUnsealed()
	y.fault.reset()
	return y
}

// beginning is how everyStep begins where there is nothing but such a yard.
func beginning(kind nodetest.Kind, change func(*Cluster)) func(*testing.T) *yard {
	return func(t *testing.T) *yard {
		t.Helper()
		return begun(t, kind, change)
	}
}

// spread makes two of three HSMs take part.
func spread(c *Cluster) {
	c.Key, c.Spread = "", &Spread{Needed: 2, Keys: []string{"office", "bunker", "bank"}}
	c.Shares, c.Threshold = 3, 2
}

func (y *yard) must(err error) {
	y.t.Helper()
	if err != nil {
		y.t.Fatal(err)
	}
}

// restart seals all nodes and has the custodian unseal them: the proof that what is in custody opens them.
func (y *yard) restart() {
	y.t.Helper()
	for _, n := range y.nodes {
		n.Restart()
	}
	for range 5 {
		for _, n := range y.process().TendAll(y.t.Context(), y.Cluster) {
			if n.Err != nil {
				y.t.Logf("tending %s: %v", n.Address, n.Err)
			}
		}
		if !slices.ContainsFunc(y.nodes, (*nodetest.Node).Sealed) {
			break
		}
	}
	y.wantAllUnsealed()
}

// material opens what is in custody.
func (y *yard) material(kind Kind) *material {
	y.t.Helper()
	m, err := y.process().loadMost(y.t.Context(), y.Cluster, kind)
	y.must(err)
	y.t.Cleanup(m.wipe)
	return m
}

// wantOneSet wants one active set in custody, with shares that Vault takes, and nothing left over.
func (y *yard) wantOneSet(kind Kind) *material {
	y.t.Helper()
	m := y.material(kind)
	if len(m.Sets) != 1 || m.active() == nil {
		y.t.Fatalf("there are %d sets, want one that is active: %+v", len(m.Sets), m.Sets)
	}
	vault := y.nodes[0].Shares()
	for _, share := range m.take(m.active(), m.active().Shares) {
		if !slices.ContainsFunc(vault, func(other []byte) bool { return bytes.Equal(share, other) }) {
			y.t.Fatal("a share in custody is none of Vault's")
		}
	}
	y.wantNothingLeft(kind)
	return m
}

func (y *yard) wantNothingLeft(kind Kind) {
	y.t.Helper()
	for _, prefix := range []string{"attempts/", "tokens/", "imports/", "held/"} {
		left, err := y.local.List(y.t.Context(), prefix)
		y.must(err)
		if len(left) > 0 {
			y.t.Errorf("left on the local disk: %q", left)
		}
	}
	st, err := y.nodes[0].Client(y.t).RekeyStatus(y.t.Context(), kind.nodeKind())
	y.must(err)
	if st.Started {
		y.t.Error("a rekey is still under way in Vault")
	}
}

// restartable wants what is in custody right now to unseal the cluster, whatever was cut off.
func (y *yard) restartable() {
	y.t.Helper()
	m := y.material(KindUnseal)
	vault := y.nodes[0].Shares()
	for i := range m.Sets {
		set := &m.Sets[i]
		held := m.take(set, set.Threshold)
		if m.everywhere(set.ID) && !slices.ContainsFunc(held, func(share []byte) bool {
			return !slices.ContainsFunc(vault, func(other []byte) bool { return bytes.Equal(share, other) })
		}) {
			return
		}
	}
	y.t.Fatal("no set in custody opens the cluster")
}

// dropFormer deletes the keys from before the last rekey.
func (y *yard) dropFormer() {
	y.t.Helper()
	k := y.process()
	names, err := k.formerItems(y.t.Context(), y.Cluster, KindUnseal)
	y.must(err)
	for _, name := range names {
		y.must(k.dropItem(y.t.Context(), y.Cluster, name))
	}
}

// person adds somebody who takes a share.
func (y *yard) person(name string) *openpgp.Entity {
	y.t.Helper()
	entity := newPerson(y.t, name, nil)
	y.People = append(y.People, Person{Name: name, PGPKey: publicKey(y.t, entity)})
	return entity
}

// status is what a node says of itself.
func (y *yard) status(i int) node.Status {
	y.t.Helper()
	st, err := y.nodes[i].Client(y.t).Status(y.t.Context())
	y.must(err)
	return st
}

func hexOf(raw []byte) string { return hex.EncodeToString(raw) }

func (y *yard) notReady(key string) {
	y.t.Helper()
	no := false
	_, err := y.keys.Configure(y.t.Context(), key, keyring.Settings{AcceptSingleHSM: &no, By: "test"})
	y.must(err)
}

// lasting tells whether a call is one that outlives the process: a write, or a call of Vault that changes something.
func lasting(call string) bool {
	return strings.Contains(call, " put ") || strings.Contains(call, " delete ") || strings.HasPrefix(call, "node P") || strings.HasPrefix(call, "node D")
}

// everyStep runs an act again and again, each time in a yard of its own in which another one of its lasting calls is struck
// down in one of the modes, and has what is left looked at. It returns the lasting calls of a whole run.
func everyStep(t *testing.T, modes []mode, begin func(*testing.T) *yard, act func(*yard) error, look func(y *yard, struck string)) []string {
	t.Helper()
	whole := begin(t)
	if err, _ := whole.fault.in(func() error { return act(whole) }); err != nil { //nolint:revive // of in
		t.Fatal(err)
	}
	calls, _ := whole.fault.reset()
	look(whole, "")
	var steps []string
	for i, call := range calls {
		if !lasting(call) {
			continue
		}
		steps = append(steps, call)
		for _, how := range modes {
			t.Run(fmt.Sprintf("%d %s %s", i+1, call, how), func(t *testing.T) {
				y := begin(t)
				y.fault.mu.Lock()
				y.fault.at, y.fault.mode = i+1, how
				y.fault.mu.Unlock()
				err, survived := y.fault.in(func() error { return act(y) }) //nolint:revive // of in
				_, struck := y.fault.reset()
				if struck != call {
					t.Fatalf("%q was struck, want %q", struck, call)
				}
				t.Logf("survived=%t err=%v", survived, err)
				look(y, struck)
			})
		}
	}
	return steps
}

// Dying before a lasting call leaves what dying after the one before it leaves.
var (
	allModes = []mode{refused, lost, crashAfter}
	dying    = []mode{crashAfter}
)

// wantSteps fails where the steps are not those that the table in the code has.
func wantSteps(t *testing.T, steps, want []string) {
	t.Helper()
	if strings.Join(steps, "\n") != strings.Join(want, "\n") {
		t.Errorf("the steps are:\n%s\nand these are known:\n%s", strings.Join(steps, "\n"), strings.Join(want, "\n"))
	}
}
