package server

import (
	"hash/maphash"
	"sync"
	"time"
)

const (
	// recentFor is how long an envelope counts as sealed a moment ago: what a health check opens was.
	recentFor = time.Minute
	// regularFor is how long a good token makes its address welcome where there are many connections.
	regularFor = 24 * time.Hour
	// maxRecent is how many are remembered of one such time.
	maxRecent = 16 << 10
)

// recent remembers for a while what it was given, in bounded memory: by a hash of eight bytes with a key of its own. Two envelopes
// with the same hash would make one of them wait for others, no more.
type recent struct {
	seed  maphash.Seed
	lasts time.Duration
	now   func() time.Time

	mu         sync.Mutex // guards what follows
	young, old map[uint64]time.Time
	turned     time.Time // when young began
}

func newRecent(lasts time.Duration, now func() time.Time) *recent {
	return &recent{seed: maphash.MakeSeed(), lasts: lasts, now: now, young: map[uint64]time.Time{}, turned: now()}
}

// add remembers something: an envelope, an address.
func (r *recent) add(what []byte) {
	hash, now := maphash.Bytes(r.seed, what), r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.turned) >= r.lasts || len(r.young) >= maxRecent {
		r.old, r.young, r.turned = r.young, map[uint64]time.Time{}, now
	}
	r.young[hash] = now
}

// has tells whether it was added a while ago at most.
func (r *recent) has(what []byte) bool {
	hash, now := maphash.Bytes(r.seed, what), r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	at, found := r.young[hash]
	if !found {
		at, found = r.old[hash]
	}
	return found && now.Sub(at) < r.lasts
}
