package nethsm

import (
	"context"
	"errors"
	"net/http"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// rests lets a node rest because of the outcome of a request, and has it probed until it serves again.
func (p *pool) rests(n *node, cause error, brief bool) {
	if p.ctx.Err() != nil {
		return
	}
	begun := n.fails(cause, brief)
	announced := errors.Is(cause, hsm.ErrLocked) && p.announceUnlock(n)
	switch {
	case begun != nil:
		p.start(func() { p.probe(n, begun.over, begun.kick) })
	case announced:
		n.probeSoon()
	}
}

// probe asks a resting node whether it is ready, with growing pauses, until this rest is over. The next one has a prober of its
// own.
func (p *pool) probe(n *node, over, kick <-chan struct{}) {
	for {
		if !p.unlock(n) { // after unlocking it is asked at once
			timer := time.NewTimer(jittered(n.pause()))
			select {
			case <-timer.C:
				n.longer()
			case <-kick:
				timer.Stop()
			case <-over:
				timer.Stop()
				return
			case <-p.ctx.Done():
				timer.Stop()
				return
			}
		}
		err := p.ready(n)
		select {
		case <-over: // what was asked is of yesterday
			return
		case <-p.ctx.Done():
			return
		default:
		}
		if err == nil {
			n.serves(false)
		} else {
			p.rests(n, err, false)
		}
	}
}

// ready asks a node whether it can serve. Where its state does not allow it, the error tells the state.
func (p *pool) ready(n *node) error {
	ctx, cancel := context.WithTimeout(p.ctx, probeTimeout)
	defer cancel()
	in := call{op: "asking whether it is ready", method: http.MethodGet, path: "/health/ready", public: true}
	_, err := n.exchange(ctx, n.fresh, &in, &payload{}, "", nil)
	if refused, is := errors.AsType[*Error](err); is && refused.Status == http.StatusPreconditionFailed {
		refused.State = n.askState(ctx)
	}
	return err
}

// askState asks a node for its state: empty where it does not say. Requests that want to know at one time ask once.
func (n *node) askState(ctx context.Context) State {
	n.mu.Lock()
	for n.question != nil {
		asked := n.question
		n.mu.Unlock()
		select {
		case <-asked.answered:
		case <-ctx.Done():
			return ""
		}
		if !asked.left {
			return asked.state
		}
		n.mu.Lock()
	}
	mine := &question{answered: make(chan struct{})}
	n.question = mine
	n.mu.Unlock()

	limited, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	mine.state, _, _ = n.measure(limited)
	mine.left = mine.state == "" && ctx.Err() != nil

	n.mu.Lock()
	n.question = nil
	n.mu.Unlock()
	close(mine.answered)
	return mine.state
}
