package test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestTwoSealDemosAtATimeRunToTheirEndAndCleanUp(t *testing.T) {
	t.Parallel()
	first := startDemo(t, "demo-seal")
	vaulttest.Eventually(t, 5*time.Minute, "the first to have built what it needs", func() error {
		select {
		case err := <-first.ended:
			t.Fatalf("scripts/demo-seal: %v\n%s", err, first.out.String())
		default:
		}
		if !strings.Contains(first.out.String(), "The server is started") {
			return fmt.Errorf("it says\n%s", first.out.String())
		}
		return nil
	})
	for _, d := range []*demo{startDemo(t, "demo-seal"), first} {
		if err := d.wait(t); err != nil {
			t.Fatalf("scripts/demo-seal: %v\n%s", err, d.out.String())
		}
		for _, step := range []string{
			"No unseal keys", "Recovery Seal Type       shamir", "connection refused", "Vault is unsealed again", "leased until",
			"permission denied", `"verb":"decrypt"`, "That was it",
		} {
			if !strings.Contains(d.out.String(), step) {
				t.Errorf("%q is missing in\n%s", step, d.out.String())
			}
		}
		if kept := strings.Count(d.out.String(), "00000000\n"); kept < 3 {
			t.Errorf("the secret was read %d times, want it after the power cut, the rotation and with the lease\n%s", kept, d.out.String())
		}
		d.leavesNothing(t)
	}
}

func TestCtrlCEndsTheSealDemoAndWhatItStarted(t *testing.T) {
	t.Parallel()
	ctrlCEndsIt(t, startDemo(t, "demo-seal"), "No unseal keys")
}
