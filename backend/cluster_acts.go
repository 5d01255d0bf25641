package backend

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// acts are the verbs at work on clusters: init, unseal, rekey, root. One works on a cluster at a time, and it outlives the
// request that began it: sys/init runs on when its client goes away, and a client that gets no answer sends its request
// again. The repetition joins the act, or gets the answer that nobody took.
type acts struct {
	mu       sync.Mutex
	clusters map[string]*act // by cluster: the one at work, or the last one
	count    int             // of all that were begun: each is a job of its own name
}

// act is one of them. All but done is written before done is closed, and read afterwards, or guarded by acts.mu.
type act struct {
	verb string
	// request tells one request from another: only the same one joins.
	request string
	by      string
	// kept is true where an answer that nobody took is worth keeping: the act makes what is made once. An old answer to what
	// can be done at any time would tell how things were.
	kept  bool
	began time.Time
	done  chan struct{}

	ended  time.Time
	answer *logical.Response // shared by those that joined: read only
	err    error
	// taken is true once a request has got the answer. One that wants the same later wants it done anew.
	taken bool
}

// answerKept is for how long an answer that nobody took waits for the repetition of its request.
const answerKept = 10 * time.Minute

// errAtWork: the act goes on, and its request's time is over.
var errAtWork = errors.New("it is still at work")

// running tells whether the act has not ended.
func (a *act) running() bool {
	select {
	case <-a.done:
		return false
	default:
		return true
	}
}

// perform runs a verb on a cluster, or joins the same one, and waits for it. It returns errAtWork where ctx ends before;
// the act goes on. Other verbs on that cluster wait for their turn.
func (b *backend) perform(ctx context.Context, name string, wanted act, run func(context.Context) (*logical.Response, error)) (*logical.Response, error) {
	for {
		mine, other := b.clusters.acts.join(name, wanted)
		if mine == nil && other == nil {
			if mine = b.begin(name, wanted, run); mine == nil {
				continue // another request was faster, or the mount is being cleaned up
			}
		}
		waiting := mine
		if mine == nil {
			waiting = other
		}
		select {
		case <-waiting.done:
			switch {
			case mine == nil:
			case ctx.Err() != nil: // nobody hears it any more: it waits for the repetition
				return nil, errAtWork
			default:
				return b.clusters.acts.take(mine)
			}
		case <-ctx.Done():
			if mine != nil {
				return nil, errAtWork
			}
			return nil, &statusError{http.StatusServiceUnavailable, fmt.Errorf("cluster %q: another %s is at work, begun by %s: %w; try again",
				name, other.verb, other.by, ctx.Err())}
		}
	}
}

// join returns the act that a request is about: the same one at work, or its own, ended, with an answer that nobody took. Else it
// returns the other one at work, which is waited for, or neither.
func (a *acts) join(name string, wanted act) (mine, other *act) {
	a.mu.Lock()
	defer a.mu.Unlock()
	last := a.clusters[name]
	switch {
	case last == nil:
		return nil, nil
	case last.running() && last.same(wanted):
		return last, nil
	case last.running():
		return nil, last
	case last.same(wanted) && last.by == wanted.by && last.kept && !last.taken && time.Since(last.ended) < answerKept:
		return last, nil
	default:
		return nil, nil
	}
}

func (a *act) same(other act) bool { return a.verb == other.verb && a.request == other.request }

// begin starts an act in the background; nil where another one is at work by now.
func (b *backend) begin(name string, wanted act, run func(context.Context) (*logical.Response, error)) *act {
	a := &b.clusters.acts
	a.mu.Lock()
	defer a.mu.Unlock()
	if last := a.clusters[name]; last != nil && last.running() {
		return nil
	}
	begun := wanted
	begun.began, begun.done = time.Now(), make(chan struct{})
	work := func(ctx context.Context) {
		answer, err := run(ctx)
		a.end(&begun, answer, err)
	}
	if a.clusters == nil {
		a.clusters = map[string]*act{}
	}
	a.clusters[name] = &begun
	a.count++
	if !b.jobs.start(b.closing, fmt.Sprintf("custody %s %d", name, a.count), work) {
		begun.err, begun.ended = b.closing.Err(), time.Now()
		close(begun.done)
	}
	return &begun
}

func (a *acts) end(ended *act, answer *logical.Response, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ended.answer, ended.err, ended.ended = answer, err, time.Now()
	close(ended.done)
}

// take hands out the answer of an act that has ended.
func (a *acts) take(ended *act) (*logical.Response, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ended.taken = true
	if ended.answer == nil {
		return nil, ended.err
	}
	own := &logical.Response{Data: maps.Clone(ended.answer.Data)} // what carries it out may add to it
	for _, warning := range ended.answer.Warnings {
		own.AddWarning(warning)
	}
	return own, ended.err
}

// forget drops the last act on a cluster.
func (a *acts) forget(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if last := a.clusters[name]; last != nil && !last.running() {
		delete(a.clusters, name)
	}
}

// busy tells whether an act is at work on a cluster.
func (a *acts) busy(name string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	last := a.clusters[name]
	return last != nil && last.running()
}

// atWork names the clusters that acts are at work on.
func (a *acts) atWork() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var names []string
	for name, last := range a.clusters {
		if last.running() {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// show describes the last act on a cluster, without its answer.
func (a *acts) show(name string) map[string]any {
	a.mu.Lock()
	defer a.mu.Unlock()
	last := a.clusters[name]
	if last == nil {
		return map[string]any{}
	}
	shown := map[string]any{"verb": last.verb, "by": last.by, "began": stamp(last.began), "state": "running", "ended": "", "error": ""}
	if !last.running() {
		shown["state"], shown["ended"] = "done", stamp(last.ended)
		if last.err != nil {
			shown["state"], shown["error"] = "failed", last.err.Error()
		}
	}
	return shown
}
