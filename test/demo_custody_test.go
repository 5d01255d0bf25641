package test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestTwoCustodyDemosAtATimeRunToTheirEndAndCleanUp(t *testing.T) {
	t.Parallel()
	first := startDemo(t, "demo-custody")
	vaulttest.Eventually(t, 5*time.Minute, "the first to have built what it needs", func() error {
		select {
		case err := <-first.ended:
			t.Fatalf("scripts/demo-custody: %v\n%s", err, first.out.String())
		default:
		}
		if !strings.Contains(first.out.String(), "Starting etcd") {
			return fmt.Errorf("it says\n%s", first.out.String())
		}
		return nil
	})
	for _, d := range []*demo{startDemo(t, "demo-custody"), first} {
		if err := d.wait(t); err != nil {
			t.Fatalf("scripts/demo-custody: %v\n%s", err, d.out.String())
		}
		for _, step := range []string{
			"is not initialised", "initialised now", "joined; unsealed now", "The power fails", "All nodes are unsealed again", "would be unsealed",
			"7 shares", "Total Shares", "revoked", `"verb":"root"`, "That was it",
		} {
			if !strings.Contains(d.out.String(), step) {
				t.Errorf("%q is missing in\n%s", step, d.out.String())
			}
		}
		d.leavesNothing(t)
	}
}

func TestCtrlCEndsTheCustodyDemoAndWhatItStarted(t *testing.T) {
	t.Parallel()
	ctrlCEndsIt(t, startDemo(t, "demo-custody"), "A daemon keeps it unsealed")
}
