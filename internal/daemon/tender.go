package daemon

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// lanes keep the acts apart, those of a site that was replaced and still has one under way included: one for each cluster,
// maxActs in all.
type lanes struct {
	slots chan struct{}

	mu       sync.Mutex // guards what follows
	clusters map[string]chan struct{}
	began    map[string]time.Time // of the acts under way, by cluster
}

func newLanes() *lanes {
	return &lanes{slots: make(chan struct{}, maxActs), clusters: map[string]chan struct{}{}, began: map[string]time.Time{}}
}

// enter waits for the cluster's turn and for a free slot.
func (l *lanes) enter(ctx context.Context, cluster string) (leave func(), err error) {
	l.mu.Lock()
	lane := l.clusters[cluster]
	if lane == nil {
		lane = make(chan struct{}, 1)
		l.clusters[cluster] = lane
	}
	l.mu.Unlock()
	for _, gate := range []chan struct{}{lane, l.slots} {
		select {
		case gate <- struct{}{}:
		case <-ctx.Done():
			if gate != lane {
				<-lane
			}
			return nil, ctx.Err()
		}
	}
	l.note(cluster, time.Now())
	return func() { l.note(cluster, time.Time{}); <-l.slots; <-lane }, nil
}

// note notes when the act on a cluster began, zero for its end.
func (l *lanes) note(cluster string, began time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.began[cluster] = began; began.IsZero() {
		delete(l.began, cluster)
	}
}

// stuck names a cluster on which an act has taken longer than it may, "" for none.
func (l *lanes) stuck(now time.Time) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	for cluster, began := range l.began {
		if now.Sub(began) > actLimit+turnSlack {
			return cluster
		}
	}
	return ""
}

// tender has the nodes of one cluster tended: one act at a time, for all nodes that wait for it.
type tender struct {
	cluster   string
	custodian Custodian
	lanes     *lanes
	watches   []*watch // all of the cluster
	// stop ends the waiting for a turn, acts is the ctx of acts, which goes on for a while after stop.
	stop, acts context.Context
	running    *sync.WaitGroup // the goroutines of acts

	mu      sync.Mutex // guards what follows
	waiting []request
	active  bool
	settle  time.Time // when nodes that are well are tended next, see unsettled
}

// request is a node that waits to be tended.
type request struct {
	address string
	result  chan Result // takes one without waiting
}

// join asks for a node to be tended. The answer comes on the channel, once.
func (t *tender) join(address string) <-chan Result {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := request{address, make(chan Result, 1)}
	t.waiting = append(t.waiting, r)
	if !t.active {
		t.active = true
		t.running.Go(t.run)
	}
	return r.result
}

// unsettled tells whether a node that is well is to be tended nevertheless: at the start, and once an hour, because somebody may
// have left something to be finished (material held on the local disk, a root token to be revoked); soon again where that failed.
func (t *tender) unsettled(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Before(t.settle) {
		return false
	}
	t.settle = now.Add(settlePause)
	return true
}

func (t *tender) settled(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.settle = now.Add(monitor.Jittered(settleInterval))
}

// run tends until nobody waits.
func (t *tender) run() {
	for {
		t.gather()
		leave, err := t.lanes.enter(t.stop, t.cluster)
		batch := t.take()
		if err != nil {
			for _, r := range batch {
				r.result <- Result{Address: r.address, Err: err}
			}
		} else {
			t.act(batch)
			leave()
		}
		t.mu.Lock()
		if t.active = len(t.waiting) > 0; !t.active {
			t.mu.Unlock()
			return
		}
		t.mu.Unlock()
	}
}

// take returns all who wait.
func (t *tender) take() []request {
	t.mu.Lock()
	defer t.mu.Unlock()
	batch := t.waiting
	t.waiting = nil
	return batch
}

// act tends the nodes of a batch.
func (t *tender) act(batch []request) {
	ctx, cancel := context.WithTimeout(t.acts, actLimit)
	defer cancel()
	addresses := make([]string, len(batch))
	for i, r := range batch {
		addresses[i] = r.address
	}
	results := t.custodian.Tend(ctx, t.cluster, addresses)
	for _, r := range batch {
		at := slices.IndexFunc(results, func(result Result) bool { return result.Address == r.address })
		if at < 0 {
			r.result <- Result{Address: r.address, Err: fmt.Errorf("tending the node %s of cluster %q: no result", r.address, t.cluster)}
			continue
		}
		r.result <- results[at]
	}
}

// gather lets the other nodes of the cluster be looked at now, and waits a moment for those that answered lately: who is
// sealed shares the opening. Nodes that are out of reach are not waited for.
func (t *tender) gather() {
	var looks sync.WaitGroup
	for _, w := range t.watches {
		if t.waits(w.address) || !w.reachable() {
			continue
		}
		looks.Add(1)
		if !w.kick(looks.Done) {
			looks.Done()
		}
	}
	all := make(chan struct{})
	t.running.Go(func() { looks.Wait(); close(all) }) // every watch answers its kicks, also when it ends
	limit := time.NewTimer(gatherLimit)
	defer limit.Stop()
	select {
	case <-all:
	case <-limit.C:
	case <-t.stop.Done():
	}
}

func (t *tender) waits(address string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.ContainsFunc(t.waiting, func(r request) bool { return r.address == address })
}
