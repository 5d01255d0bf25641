package cluster

import (
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
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
