package server

import (
	"hash/maphash"
	"sync"
	"time"
)

const (
	// recentFor is how long an envelope counts as sealed a moment ago: what a health check opens was.
	recentFor = time.Minute
	// maxRecent is how many are remembered of one such time.
	maxRecent = 16 << 10
)

// recent remembers what was sealed in the last minute, in bounded memory: by a hash of eight bytes with a key of its own. Two
// envelopes with the same hash would make one of them wait for others, no more.
type recent struct {
	seed maphash.Seed
	now  func() time.Time

	mu         sync.Mutex // guards what follows
	young, old map[uint64]time.Time
	turned     time.Time // when young began
}

func newRecent(now func() time.Time) *recent {
	return &recent{seed: maphash.MakeSeed(), now: now, young: map[uint64]time.Time{}, turned: now()}
}

// add remembers an envelope.
func (r *recent) add(envelope []byte) {
	hash, now := maphash.Bytes(r.seed, envelope), r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.turned) >= recentFor || len(r.young) >= maxRecent {
		r.old, r.young, r.turned = r.young, map[uint64]time.Time{}, now
	}
	r.young[hash] = now
}

// has tells whether an envelope was added in the last minute.
func (r *recent) has(envelope []byte) bool {
	hash, now := maphash.Bytes(r.seed, envelope), r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	at, found := r.young[hash]
	if !found {
		at, found = r.old[hash]
	}
	return found && now.Sub(at) < recentFor
}
