package server

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/transit"
)

// The rules of a gate.
const (
	// openLimit is how long an opening may take in all. A seal's client gives up after 60 s.
	openLimit = 45 * time.Second
	// maxWaiting is how many openings wait at one gate, and maxWaitingBytes what their envelopes take in memory: a seal's has one or
	// two kilobytes, and who sends the largest there is shall not take the memory of all others.
	maxWaiting      = 8192
	maxWaitingBytes = 32 << 20
	// aged is how long an opening that yields to all others does so. Then every fourth place is for those.
	aged      = 15 * time.Second
	agedShare = 4
	// shortest and longest bound the pause that is asked of those who are turned away.
	shortestPause = time.Second
	longestPause  = 20 * time.Second
)

// gate lets a bounded number of openings to the HSMs of a set of keys. It lets in twice what they do at one time, so that an
// HSM finds the next one waiting when it is done; the others wait here, where they can be put in order and turned away in time:
// an unseal goes before what only tells a Vault that its seal is well.
type gate struct {
	width func() int                     // how many are let in
	pace  func() (opening time.Duration) // between the ends of two openings when all HSMs are busy; 0 where nobody knows
	now   func() time.Time

	mu      sync.Mutex // guards what follows
	inside  int
	urgent  list.List // of *waiter: those who have come first are first
	patient list.List // those who yield
	bytes   int       // of the envelopes of those who wait
	turn    int       // of places given while aged ones waited
	closed  bool
}

// waiter is an opening that waits.
type waiter struct {
	since time.Time
	ends  time.Time  // when an operation of its own must be done; zero where that does not matter
	in    chan error // one value: nil for "you are in"
	bytes int        // of its envelope
}

// enter waits for a place with an envelope of so many bytes, and returns what gives the place back. A patient opening yields to those
// that are not. Where the wait would be longer than ctx allows, that is said at once, with a [*transit.BusyError]; but not to one
// that shares its operation with others: then nobody knows how long it is.
func (g *gate) enter(ctx context.Context, patient, shares bool, bytes int) (leave func(), err error) {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil, closing()
	}
	if g.inside < max(1, g.width()) {
		g.inside++
		g.mu.Unlock()
		return g.leave, nil
	}
	if err := g.hopeless(ctx, patient, shares, bytes); err != nil {
		g.mu.Unlock()
		return nil, err
	}
	w := &waiter{since: g.now(), in: make(chan error, 1), bytes: bytes}
	if !shares {
		w.ends, _ = ctx.Deadline()
	}
	queue := &g.urgent
	if patient {
		queue = &g.patient
	}
	place := queue.PushBack(w)
	g.bytes += bytes
	g.mu.Unlock()

	select {
	case err := <-w.in:
		if err != nil {
			return nil, err
		}
		return g.leave, nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case err := <-w.in: // the place was given meanwhile, and is not wanted any more
		if err == nil {
			g.give()
		}
	default:
		g.remove(queue, place)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil, fmt.Errorf("waiting for an HSM: %w", ctx.Err()) // nobody reads it
	}
	return nil, &transit.BusyError{After: g.after(0), Cause: "waiting for an HSM took too long"}
}

// hopeless returns why an opening need not begin to wait; nil where its turn may come in time.
func (g *gate) hopeless(ctx context.Context, patient, shares bool, bytes int) error {
	before := g.inside + g.urgent.Len()
	if patient {
		before += g.patient.Len()
	}
	wait := g.takes(before)
	deadline, bounded := ctx.Deadline()
	room := g.urgent.Len()+g.patient.Len() < maxWaiting && g.bytes+bytes <= maxWaitingBytes
	if room && (shares || !bounded || wait < deadline.Sub(g.now())) {
		return nil
	}
	return &transit.BusyError{After: g.after(wait - openLimit/2), Cause: "too many openings wait for an HSM"}
}

// takes is how long it takes until an opening with so many before it is done.
func (g *gate) takes(before int) time.Duration {
	parallel := max(1, g.width()/2) // itself lasts as long as the ends of so many are apart
	return time.Duration(before+parallel) * g.pace()
}

// after bounds a pause.
func (g *gate) after(pause time.Duration) time.Duration {
	return min(max(pause, shortestPause), longestPause)
}

// leave gives a place back.
func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.give()
}

// give gives the place that somebody left to whoever is next, unless there are too many inside.
func (g *gate) give() {
	g.inside--
	for g.inside < max(1, g.width()) {
		w := g.next()
		if w == nil {
			return
		}
		// Half as long again, because no two operations take the same time, and with a queue as long as is possible everybody has
		// just what is needed: an HSM would do them all for nobody.
		if wait := g.takes(g.inside) * 3 / 2; wait > 0 && !w.ends.IsZero() && w.ends.Sub(g.now()) < wait {
			w.in <- &transit.BusyError{
				After: g.after(g.takes(g.inside+g.urgent.Len()) - openLimit/2), Cause: "waiting for an HSM took too long",
			}
			continue
		}
		g.inside++
		w.in <- nil
	}
}

// next takes the one out of the queues who is next.
func (g *gate) next() *waiter {
	queue := &g.urgent
	if first := g.patient.Front(); first != nil {
		old := g.now().Sub(first.Value.(*waiter).since) >= aged //nolint:forcetypeassert // nothing else is in it
		if old {
			g.turn++
		}
		if g.urgent.Len() == 0 || old && g.turn%agedShare == 0 {
			queue = &g.patient
		}
	}
	first := queue.Front()
	if first == nil {
		return nil
	}
	return g.remove(queue, first)
}

// remove takes one out of its queue.
func (g *gate) remove(queue *list.List, place *list.Element) *waiter {
	w, _ := queue.Remove(place).(*waiter) // nothing else is in it
	g.bytes -= w.bytes
	return w
}

// close turns away all who wait and all who come.
func (g *gate) close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for _, queue := range []*list.List{&g.urgent, &g.patient} {
		for first := queue.Front(); first != nil; first = queue.Front() {
			g.remove(queue, first).in <- closing()
		}
	}
}

// waiting tells how many are inside, and how many wait.
func (g *gate) load() (inside, urgent, patient int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.inside, g.urgent.Len(), g.patient.Len()
}

func closing() error {
	return &transit.BusyError{After: shortestPause, Cause: "the server is stopping"}
}

// capacity is how many sealed Vaults come up within three minutes, where they all begin at one time: each needs two openings,
// and an HSM takes operation seconds for each of parallel ones.
func capacity(operation time.Duration, parallel int) int {
	if operation <= 0 {
		return 0
	}
	const window = 3 * time.Minute
	return int(math.Floor(window.Seconds() / 2 * float64(parallel) / operation.Seconds()))
}
