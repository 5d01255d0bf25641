package pkcs11

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm"
)

// queue lets a fixed number of operations at a time into a token. A card is serial and a module has no time limits, so
// work waits here, where a caller can leave at its deadline, and not inside the module, where nobody can.
//
// Owners take turns: one that asks a thousand times delays another by one operation, not by a thousand. The number of
// waiters is bounded. Where it is reached, the newest waiter of the owner with the most gives way to an owner with
// fewer, so that nobody fills the queue for the others; everybody else is refused at once.
type queue struct {
	bound int

	mu      sync.Mutex
	free    int
	waiting int
	// lines holds the owners with waiters, the one whose turn is next first.
	lines []*line
}

// line is the waiters of one owner, the oldest first. It is never empty while in a queue.
type line struct {
	owner   string
	waiters []*waiter
}

// waiter is one call of acquire. Its fields are guarded by the queue's mu until ready is closed.
type waiter struct {
	ready chan struct{} // closed when the wait is over
	err   error         // why it was turned away; nil where it got a place
}

// newQueue returns a queue that lets parallel operations in at a time (at least one) and keeps bound waiting.
func newQueue(parallel, bound int) *queue {
	return &queue{free: max(parallel, 1), bound: bound}
}

// acquire waits for a place and returns what gives it back, to be called once the operation is over; calling it again
// does nothing. It fails with the error of ctx as soon as that ends, and with hsm.ErrUnavailable where too many wait.
func (q *queue) acquire(ctx context.Context, owner string) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w, err := q.join(owner)
	if err != nil {
		return nil, err
	}
	select {
	case <-w.ready:
	case <-ctx.Done():
		q.leave(w, owner)
		return nil, ctx.Err()
	}
	if w.err != nil {
		return nil, w.err
	}
	return sync.OnceFunc(q.release), nil
}

// join gives the caller a place or makes it wait.
func (q *queue) join(owner string) (*waiter, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	w := &waiter{ready: make(chan struct{})}
	if q.free > 0 { // then nobody waits
		q.free--
		close(w.ready)
		return w, nil
	}
	if q.waiting >= q.bound && !q.makeRoom(owner) {
		return nil, q.refusal()
	}
	i := slices.IndexFunc(q.lines, func(l *line) bool { return l.owner == owner })
	if i < 0 {
		i = len(q.lines)
		q.lines = append(q.lines, &line{owner: owner})
	}
	q.lines[i].waiters = append(q.lines[i].waiters, w)
	q.waiting++
	return w, nil
}

// makeRoom turns away the newest waiter of the longest line, where owner's own would still be no longer than that one.
func (q *queue) makeRoom(owner string) bool {
	var own int
	longest := -1
	for i, l := range q.lines {
		if l.owner == owner {
			own = len(l.waiters)
		}
		if longest < 0 || len(l.waiters) > len(q.lines[longest].waiters) {
			longest = i
		}
	}
	if longest < 0 || len(q.lines[longest].waiters) <= own+1 {
		return false
	}
	l := q.lines[longest]
	last := l.waiters[len(l.waiters)-1]
	l.waiters = l.waiters[:len(l.waiters)-1] // one is left at least: it was longer than own+1
	q.waiting--
	last.err = q.refusal()
	close(last.ready)
	return true
}

func (q *queue) refusal() error {
	return fmt.Errorf("%d operations wait for the token already, try again later: %w", q.bound, hsm.ErrUnavailable)
}

// leave takes a waiter whose caller gave up out of its line. A place that it was given meanwhile goes to the next.
func (q *queue) leave(w *waiter, owner string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-w.ready:
		if w.err == nil {
			q.pass()
		}
		return
	default:
	}
	i := slices.IndexFunc(q.lines, func(l *line) bool { return l.owner == owner })
	l := q.lines[i]
	l.waiters = slices.DeleteFunc(l.waiters, func(other *waiter) bool { return other == w })
	if len(l.waiters) == 0 {
		q.lines = slices.Delete(q.lines, i, i+1)
	}
	q.waiting--
}

func (q *queue) release() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pass()
}

// pass gives a place that became free to the oldest waiter of the owner whose turn it is. The caller holds mu.
func (q *queue) pass() {
	if len(q.lines) == 0 {
		q.free++
		return
	}
	l := q.lines[0]
	next := l.waiters[0]
	l.waiters = l.waiters[1:]
	q.lines = q.lines[1:]
	if len(l.waiters) > 0 {
		q.lines = append(q.lines, l)
	}
	q.waiting--
	close(next.ready)
}
