package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// watch looks at one node, for ever.
type watch struct {
	cluster, address string
	custodian        Custodian
	tender           *tender
	interval         time.Duration
	logger           *slog.Logger
	notes            notes       // of the loop alone
	first            func()      // called when the node was looked at, more than once does no harm
	kicks            chan func() // "look now, and call this when it is known whether the node waits to be tended"

	mu   sync.Mutex // guards what follows
	view view
	due  time.Time // when the loop must have turned, see turnSlack
	end  bool      // no more kicks are answered
}

// run looks at the node until ctx ends, or done, where it is given, says that this is enough.
func (w *watch) run(ctx context.Context, done func(view) bool) {
	var pending []func() // kicks to be answered by the round that begins
	defer func() { w.close(pending) }()
	rounds := 0 // in which the node was not well
	for {
		before := w.snapshot()
		w.round(ctx, pending)
		pending = nil
		if ctx.Err() != nil {
			return
		}
		after := w.snapshot()
		if done != nil && done(after) {
			return
		}
		wait := w.interval
		switch {
		case after.well():
			rounds = 0
		default:
			if before.up != after.up || before.state != after.state {
				rounds = 0 // something moves
			}
			wait = pause(rounds)
			rounds++
		}
		wait = max(monitor.Jittered(wait), retryAfter(after.err))
		timer := time.NewTimer(wait)
		w.expect(wait)
		select {
		case <-timer.C:
		case answer := <-w.kicks:
			pending = append(pending, answer)
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// round looks at the node once, and has it tended where that is needed. It calls every answered as soon as it is known
// whether the node waits to be tended.
func (w *watch) round(ctx context.Context, answers []func()) {
	state, err := w.look(ctx)
	if ctx.Err() != nil {
		answer(answers)
		return
	}
	w.mu.Lock()
	w.view.afterLook(state, err, time.Now())
	w.view.told = w.view.condition()
	v := w.view
	w.mu.Unlock()
	w.first()
	w.notes.looked(w.logger, v)
	if err != nil || !w.free(ctx, v) || v.well() && !w.tender.unsettled(v.looked) {
		answer(answers)
		return
	}
	result := w.tender.join(w.address)
	answer(answers)
	w.answerKicks() // of who gathers: this node waits already
	w.expect(0)
	w.tended(ctx, <-result) // also where ctx has ended: an act that began is worth knowing about
}

// look asks the node how it fares.
func (w *watch) look(ctx context.Context) (State, error) {
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	w.expect(lookLimit)
	return w.custodian.Look(ctx, w.cluster, w.address)
}

// free tells whether the custodian may be asked to tend the node: no bar stands, or the material changed since, and the node is
// none that seals itself as fast as it is unsealed.
func (w *watch) free(ctx context.Context, v view) bool {
	now := time.Now()
	if v.state.Sealed && v.relapses > relapses && now.Sub(v.unsealed) < pause(v.relapses-relapses) {
		return false
	}
	if !now.Before(v.barred) {
		return true
	}
	if v.generation == "" || now.Sub(v.asked) < barLook {
		return false
	}
	generation, err := w.generation(ctx)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.view.asked = now
	if err != nil || generation == v.generation {
		return false
	}
	w.view.barred = time.Time{}
	return true
}

// generation names the state of the cluster's material.
func (w *watch) generation(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	return w.custodian.Generation(ctx, w.cluster)
}

// tended takes in what came of tending the node.
func (w *watch) tended(ctx context.Context, r Result) {
	if ctx.Err() != nil && errors.Is(r.Err, context.Canceled) {
		return // the daemon stops
	}
	if r.Err == nil && !r.State.Sealed {
		w.tender.settled(time.Now())
	}
	generation := ""
	if alarmOf(r.Err) != AlarmNone {
		generation, _ = w.generation(ctx) // "" for not known: then only time and a reload lift the bar
	}
	w.mu.Lock()
	w.view.afterTend(r, generation, time.Now())
	v := w.view
	w.mu.Unlock()
	w.notes.tended(w.logger, v, r)
}

func (w *watch) snapshot() view {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.view
}

// reachable tells whether the node may answer soon: it did when it was last looked at, or that is under way for the first time.
func (w *watch) reachable() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return (w.view.up || w.view.looked.IsZero()) && !w.end
}

// kick has the node looked at now and answered called; false where the watch is busy or has ended.
func (w *watch) kick(answered func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.end {
		return false
	}
	select {
	case w.kicks <- answered:
		return true
	default:
		return false
	}
}

// close answers the kicks that nobody will look at any more.
func (w *watch) close(pending []func()) {
	w.mu.Lock()
	w.end = true
	w.mu.Unlock()
	answer(pending)
	w.answerKicks()
}

func (w *watch) answerKicks() {
	for {
		select {
		case answered := <-w.kicks:
			answered()
		default:
			return
		}
	}
}

// expect says how long the loop may take to its next turn; 0 for as long as it likes, because somebody else is watched
// instead.
func (w *watch) expect(within time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.due = time.Time{}
	if within > 0 {
		w.due = time.Now().Add(within + turnSlack)
	}
}

// stuck tells whether the loop does not turn.
func (w *watch) stuck(now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.end && !w.due.IsZero() && now.After(w.due)
}

func answer(kicks []func()) {
	for _, answered := range kicks {
		answered()
	}
}
