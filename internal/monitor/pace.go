package monitor

import (
	"context"
	"math/rand/v2"
	"time"
)

// jitter is how much longer or shorter a pause may be, so that what is done again and again does not march in step.
const jitter = 0.2

// Jittered returns about d: up to a fifth shorter or longer.
func Jittered(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (1 - jitter + 2*jitter*rand.Float64())) //nolint:gosec // it guards nothing
}

// Sleep waits; false where ctx ended first.
func Sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
