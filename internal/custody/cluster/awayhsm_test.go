package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// What is in hand is not what Vault takes: the keys from before a rekey that was cut off open without the HSM that is away, and
// the new ones, which Vault has verified, do not.
func TestNewKeysAreNotDroppedWhileTheirHSMIsAway(t *testing.T) {
	for name, options := range map[string]RekeyOptions{"another rekey": {}, "cancelling it": {Cancel: true}} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 1, func(c *Cluster) {
				c.Key, c.Spread = "", &Spread{Needed: 2, Keys: []string{"office", "bunker"}}
				c.Shares, c.Threshold = 2, 2
			})
			y.Spread = &Spread{Needed: 2, Keys: []string{"van", "bunker"}}
			y.fault.set(func(call string) bool { return strings.Contains(call, " put ") && strings.Contains(call, "former") })
			if err := rekeyOnce(y); err == nil {
				t.Fatal("the rekey was not cut off")
			}
			y.fault.reset()
			y.unplug("van")
			if _, err := y.process().Rekey(t.Context(), y.Cluster, options); !errors.Is(err, ErrWrongShares) {
				t.Errorf("Rekey = %v, want ErrWrongShares", err)
			}
			y.hsms["van"].SetError(nil)
			y.restart()
			y.must(rekeyOnce(y))
			y.wantOneSet(KindUnseal)
		})
	}
}

// A host that did not see the last rekey heals a spread like any other.
func TestAHostThatIsBehindHealsASpread(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	other := &yard{y.site.host("host-2")}
	spread(other.Cluster)
	other.must(rekeyOnce(other))
	y.must(rekeyOnce(y))
	y.must(rekeyOnce(y))
	y.unplug("bank")
	y.toVan("bank")
	other.must(rekeyOnce(other))
	other.wantOneSet(KindUnseal)
	other.wantUnsealedWithout("office")
}

// That an HSM is plugged in again is no change that a custodian could see: what was tried without it is tried again soon.
func TestANodeIsTriedAgainSoonWhereAnHSMWasAway(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, func(c *Cluster) {
		c.Key, c.Spread = "", &Spread{Needed: 2, Keys: []string{"office", "bunker"}}
		c.Shares, c.Threshold = 2, 2
	})
	y.Spread = &Spread{Needed: 2, Keys: []string{"van", "bunker"}}
	y.fault.set(func(call string) bool { return strings.Contains(call, " put ") && strings.Contains(call, "former") })
	if err := rekeyOnce(y); err == nil {
		t.Fatal("the rekey was not cut off")
	}
	y.fault.reset()
	y.unplug("van")
	k := y.process()
	y.nodes[0].Restart()
	for range 3 {
		if _, err := k.Tend(t.Context(), y.Cluster, y.nodes[0].Address()); !errors.Is(err, ErrWrongShares) {
			t.Fatalf("Tend = %v, want ErrWrongShares", err)
		}
	}
	if sent := sharesSent(y.nodes[0]); sent != 4 { // at the beginning and now
		t.Errorf("%d shares were sent", sent)
	}
	y.hsms["van"].SetError(nil)
	y.clock.advance(partialRefusalTime + time.Second)
	if out, err := k.Tend(t.Context(), y.Cluster, y.nodes[0].Address()); err != nil || out.Action != ActionUnsealed {
		t.Errorf("Tend = %+v, %v", out, err)
	}
}

// An item that the configuration does not name any more, and whose HSM is away, may hold shares that Vault takes.
func TestPresentSharesAreNotDeletedBeforeTheyAreDealtAnew(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	y.Spread = &Spread{Needed: 2, Keys: []string{"office", "bunker"}}
	y.Shares, y.Threshold = 4, 3
	y.unplug("bank")
	_, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{Cancel: true})
	y.must(err)
	y.hsms["bank"].SetError(nil)
	y.wantUnsealedWithout("office")
	y.unplug("bank")
	_, err = y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{Shares: 4, Threshold: 3})
	y.must(err)
	names, err := y.process().kindItems(t.Context(), y.Cluster, KindUnseal)
	if y.must(err); strings.Join(names, " ") != "unseal.bunker unseal.office" {
		t.Errorf("the items are %q", names)
	}
}

// A store that fails is no reason to go on without the keys from before a rekey, wherever they lie.
func TestTheFormerKeysOfAnotherSpreadAreNotLostWithAStore(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	before := y.material(KindUnseal).active().ID
	y.Key, y.Spread = "bunker", nil
	y.fault.set(func(call string) bool { return strings.Contains(call, " put ") && strings.Contains(call, "former.") })
	if err := rekeyOnce(y); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Rekey = %v, want ErrUnavailable", err)
	}
	y.fault.reset()
	y.must(rekeyOnce(y))
	y.wantOneSet(KindUnseal)
	former, err := y.process().loadFormer(t.Context(), y.Cluster, KindUnseal)
	y.must(err)
	defer former.wipe()
	if former == nil || former.formerSet() == nil || former.formerSet().ID != before {
		t.Errorf("the former keys are %+v", former)
	}
}

// Where HSMs that are away have shares, the others are not given alone: nobody would ever give the rest.
func TestNoPartOfASetIsGivenWhereItsHSMIsAway(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, spread)
	y.Spread, y.Threshold = &Spread{Needed: 3, Keys: y.Spread.Keys}, 3
	y.fault.set(func(call string) bool { return strings.Contains(call, " put ") && strings.Contains(call, "former") })
	if _, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{Shares: 3, Threshold: 3}); err == nil {
		t.Fatal("the rekey was not cut off")
	}
	y.fault.reset()
	y.unplug("bank")
	k := y.process()
	y.nodes[0].Restart()
	before := sharesSent(y.nodes[0])
	if out, err := k.Tend(t.Context(), y.Cluster, y.nodes[0].Address()); err == nil || sharesSent(y.nodes[0]) != before {
		t.Errorf("Tend = %+v, %v, with %d shares", out, err, sharesSent(y.nodes[0])-before)
	}
	y.hsms["bank"].SetError(nil)
	if out, err := k.Tend(t.Context(), y.Cluster, y.nodes[0].Address()); err != nil || out.Action != ActionUnsealed {
		t.Errorf("Tend = %+v, %v", out, err)
	}
}
