package transit

import (
	"sync"
	"time"
)

// quiet is how long nothing more is logged of a kind that anybody can make come as often as they like.
const quiet = 10 * time.Second

// throttle lets one line pass now and then. The zero value is ready.
type throttle struct {
	mu   sync.Mutex
	last time.Time
	held int
}

// pass tells whether a line is to be written now, and how many were not since the last one.
func (t *throttle) pass(now time.Time) (held int, yes bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.last.IsZero() && now.Sub(t.last) < quiet {
		t.held++
		return 0, false
	}
	held = t.held
	t.last, t.held = now, 0
	return held, true
}
