package daemon

import (
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// Hundreds of watches that began together must not march in step.
func TestNoTwoWatchesMarchInStep(t *testing.T) {
	shortest, longest := time.Hour, time.Duration(0)
	for range 1000 {
		p := monitor.Jittered(defaultInterval)
		shortest, longest = min(shortest, p), max(longest, p)
	}
	if shortest > defaultInterval*9/10 || longest < defaultInterval*11/10 {
		t.Errorf("of 1000 pauses of about %v the shortest is %v and the longest %v", defaultInterval, shortest, longest)
	}
}
