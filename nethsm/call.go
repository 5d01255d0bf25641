package nethsm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// apiPath is where every path of the API begins.
const apiPath = "/api/v1"

// defaultLimit is how large an answer may be where the call does not say.
const defaultLimit = 1 << 20

// limitPause is how long a request that came too soon after a wrong password waits before its second try. A NetHSM asks for
// a second.
const limitPause = 1100 * time.Millisecond

// call is one request to a NetHSM.
type call struct {
	op     string // what it does, a gerund for errors: "decrypting with key \"k\""
	method string
	path   string // below /api/v1, escaped
	query  url.Values

	body        any    // sent as JSON and wiped; passphrases in it are [secret]
	raw         []byte // sent as it is, with contentType; the caller's, who may wipe it when do has returned
	contentType string // of raw
	ifMatch     string // an ETag; empty: no condition

	into any       // where a JSON answer goes; the body is wiped afterwards
	sink io.Writer // where any other answer goes piece by piece
	ok   []int     // the statuses that are no error; nil: 200, 201 and 204

	creates bool          // not repeated unless the first surely did not happen
	public  bool          // no credentials are sent
	timeout time.Duration // of the whole call; 0: the client's
	limit   int64         // largest answer in bytes; 0: 1 MiB
}

// answer is what a NetHSM said.
type answer struct {
	status int
	header http.Header
	body   []byte // empty where the call had into or sink
	node   string // host:port of the node that answered
}

func (in *call) accepts(status int) bool {
	if in.ok == nil {
		return status == http.StatusOK || status == http.StatusCreated || status == http.StatusNoContent
	}
	return slices.Contains(in.ok, status)
}

// do sends a call to the node that is best placed to serve it, and to the next one while that is harmless and of use: where
// a node does not answer or cannot serve, and the call changes nothing or surely did not happen there.
//
// An answer that says no is an [*Error]. No usable answer is hsm.ErrUnavailable, with hsm.ErrMayHaveHappened where the call
// creates and may have been carried out; where several nodes were asked, the error has each one's own cause. When ctx ends,
// its error is among them. A password that is refused for more than a minute is an hsm.PINError.
func (c *Client) do(ctx context.Context, in call) (answer, error) {
	timeout := in.timeout
	if timeout == 0 {
		timeout = c.pool.timeout
	}
	if !in.public && c.login != nil && c.login.unusable != nil {
		return answer{}, fmt.Errorf("%s: %w", in.op, c.login.unusable)
	}
	bytes := in.raw
	if in.body != nil {
		var err error
		if bytes, err = encodeJSON(in.body); err != nil {
			return answer{}, fmt.Errorf("%s: %w", in.op, err)
		}
	}
	if in.sink != nil {
		in.sink = &tally{to: in.sink}
	}
	limited, cancel := context.WithTimeout(ctx, timeout)
	j := &job{client: c, in: &in, body: &payload{bytes: bytes}, caller: ctx}
	if !in.public {
		j.login = c.login
	}
	if in.body != nil {
		defer c.pool.wipe(j.body)
	} else {
		defer j.body.settle()
	}
	defer cancel() // first: it ends what may still read the body
	return j.run(limited)
}

// job is a call on its way.
type job struct {
	client *Client
	in     *call
	body   *payload
	login  *login          // nil: no credentials are sent
	caller context.Context // without the time-out of the call

	tried    set
	limited  set // those that said 429
	causes   map[*node]error
	paused   bool // for 429
	awaited  bool // a refused password was waited for once
	unlocked bool // an unlocking was waited for once
	looked   bool // another request's trial was waited for once
}

// run sends the call to one node after the other.
func (j *job) run(ctx context.Context) (answer, error) {
	p := j.client.pool
	for ctx.Err() == nil && p.ctx.Err() == nil {
		next := j.next()
		if next.node == nil {
			if !j.wait(ctx, next) {
				break
			}
			continue
		}
		out, again, err := j.attempt(ctx, next)
		if err == nil || !again {
			return out, err
		}
	}
	return answer{}, j.unserved()
}

// next is the node to try next. A view of one node asks that one, whatever is known about it, and so does what needs no
// credentials: it is asked of nodes that cannot serve otherwise.
func (j *job) next() choice {
	return j.client.pool.choose(j.client.nodes(), j.tried, j.login, j.client.only != nil || j.in.public)
}

// attempt asks one node. The second result is true where another node, or this one in a moment, may serve.
func (j *job) attempt(ctx context.Context, next choice) (answer, bool, error) {
	n, p := next.node, j.client.pool
	defer n.end(next.trial)
	pass, err := j.login.enter(ctx, n)
	switch {
	case errors.Is(err, errResting), errors.Is(err, errRefused):
		return answer{}, true, err // choose anew
	case err != nil:
		return answer{}, true, j.failed(n, &failure{op: j.in.op, node: n.host, text: err.Error(), cause: j.caller.Err()})
	}
	out, err := j.send(ctx, next)
	pass.done(err)

	if err == nil {
		j.answered(n)
		return out, false, nil
	}
	if failed := j.sinkFailed(); failed != nil {
		j.answered(n)
		return answer{}, false, fmt.Errorf("%s: writing down what %s answers: %w", j.in.op, n.host, failed)
	}
	if lost, is := errors.AsType[*failure](err); is {
		if ended := j.caller.Err(); ended != nil && lost.cause == nil {
			lost.cause = ended
		}
		if !lost.busy && !errors.Is(j.caller.Err(), context.Canceled) {
			p.rests(n, err, lost.brief)
		}
		return answer{}, !lost.lost && !j.written(), j.failed(n, err)
	}
	refused, is := errors.AsType[*Error](err)
	if !is {
		return answer{}, false, err // the request could not be made
	}
	switch status := refused.Status; {
	case status == http.StatusPreconditionFailed:
		refused.State = n.askState(ctx)
		if refused.outOfService() && refused.State != StateOperational {
			p.rests(n, refused, false)
			return answer{}, true, j.failed(n, refused)
		}
		if refused.outOfService() && !j.in.public { // it has just become Operational, and did nothing before
			return answer{}, true, j.failed(n, refused)
		}
	case status == http.StatusTooManyRequests:
		j.limited.add(n)
		return answer{}, true, j.failed(n, refused)
	case status == http.StatusUnauthorized && j.login != nil:
		return answer{}, true, j.failed(n, refused)
	case status >= 500, status >= 300 && status < 400:
		p.rests(n, refused, true)
		if !j.in.creates || undone(status) {
			return answer{}, true, j.failed(n, refused)
		}
		return out, false, fmt.Errorf("%w; %w", refused, hsm.ErrMayHaveHappened)
	default:
		j.answered(n)
	}
	return out, false, refused
}

// undone is true for those answers of something in trouble, or of something else, which say that the request was not looked at.
func undone(status int) bool {
	switch status {
	case http.StatusNotImplemented, http.StatusMovedPermanently, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	default:
		return false
	}
}

// answered notes that a node gave an answer of its own. What needs no credentials is answered in every state, so it is no
// proof that the node serves; but it may have returned, or been unlocked.
func (j *job) answered(n *node) {
	if !j.in.public {
		n.serves(true)
		return
	}
	if resting, is := n.resting(); is && (j.in.method != http.MethodGet || errors.As(resting.cause, new(*failure))) {
		n.probeSoon()
	}
}

// send asks one node, a second time where its connection turns out to have ended before.
func (j *job) send(ctx context.Context, next choice) (answer, error) {
	n := next.node
	var connected func()
	if next.left > 1 { // a node that hangs must leave time for the others
		if end, limited := ctx.Deadline(); limited {
			share, cancel := context.WithCancel(ctx)
			defer cancel()
			limit := func() time.Duration { return time.Until(end) / time.Duration(next.left) }
			timer := time.AfterFunc(limit(), cancel)
			defer timer.Stop()
			connected = func() { timer.Reset(limit()) } // the wait for a connection is not the node's silence
			if j.in.creates {                           // once sent, nobody else can be asked
				connected = func() { timer.Stop() }
			}
			if sink, is := j.in.sink.(*tally); is { // once part of the answer is there, no other one can replace it
				sink.begun = func() { timer.Stop() }
			}
			ctx = share
		}
	}
	over := n.kept
	if j.in.creates {
		over = n.fresh
	}
	out, err := n.exchange(ctx, over, j.in, j.body, j.login.authorization(), connected)
	if lost, is := errors.AsType[*failure](err); is && lost.stale && ctx.Err() == nil && !j.written() {
		return n.exchange(ctx, n.fresh, j.in, j.body, j.login.authorization(), connected)
	}
	return out, err
}

// failed keeps why a node did not serve.
func (j *job) failed(n *node, err error) error {
	if j.causes == nil {
		j.causes = make(map[*node]error)
	}
	j.tried.add(n)
	j.causes[n] = err
	return err
}

// written is true where part of an answer reached the caller: another one cannot replace it.
func (j *job) written() bool {
	sink, is := j.in.sink.(*tally)
	return is && sink.written
}

// sinkFailed is what kept the sink from taking the answer.
func (j *job) sinkFailed() error {
	if sink, is := j.in.sink.(*tally); is {
		return sink.err
	}
	return nil
}

// wait waits, once for each reason, for what may let a node serve; false where nothing will.
func (j *job) wait(ctx context.Context, next choice) bool {
	p := j.client.pool
	if next.wait != nil && !j.looked {
		j.looked = true
		return p.sleep(ctx, trialPatience, next.wait)
	}
	if j.limited != 0 && !j.paused {
		j.paused = true
		if !p.sleep(ctx, jittered(limitPause), nil) {
			return false
		}
		j.tried &^= j.limited
		j.limited = 0
		return true
	}
	if j.login != nil && !j.awaited {
		j.awaited = true
		j.login.hasten(j.client.nodes())
		for n, cause := range j.causes { // it was refused, and another request has found out meanwhile that it is right
			if saidOf(cause) == refused && !j.login.refusedAt(n) {
				j.tried &^= 1 << n.index
				return true
			}
		}
		if n := j.login.await(ctx, j.client.nodes()); n != nil {
			j.tried &^= 1 << n.index
			return true
		}
	}
	if j.client.only == nil && !j.in.public && !j.unlocked {
		j.unlocked = true
		for _, n := range j.client.nodes() {
			if resting, is := n.resting(); is && resting.unlocking != nil {
				if !p.sleep(ctx, noLimit, resting.unlocking) {
					return false
				}
				j.tried &^= 1 << n.index
				return true
			}
		}
	}
	return false
}

// noLimit lets sleep wait for its event alone.
const noLimit time.Duration = -1

// sleep waits until the time is over, the event comes (nil: none does) or ctx or the pool ends, in which case it is false. A
// wait for the time alone that ctx would cut short is not begun.
func (p *pool) sleep(ctx context.Context, limit time.Duration, event <-chan struct{}) bool {
	var over <-chan time.Time
	if limit != noLimit {
		if end, limited := ctx.Deadline(); event == nil && limited && time.Until(end) <= limit {
			return false
		}
		timer := time.NewTimer(limit)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-over:
	case <-event:
	case <-ctx.Done():
		return false
	case <-p.ctx.Done():
		return false
	}
	return true
}

// unserved is the error of a call that no node served: each node's own cause.
func (j *job) unserved() error {
	if j.client.pool.ctx.Err() != nil {
		return fmt.Errorf("%s: %w", j.in.op, errClosed)
	}
	nodes := j.client.nodes()
	all := &unserved{op: j.in.op}
	for _, n := range nodes {
		all.causes = append(all.causes, j.cause(n))
	}
	if err := j.caller.Err(); err != nil {
		all.ended = err
	}
	if len(nodes) == 1 && (all.ended == nil || errors.Is(all.causes[0], all.ended)) {
		return all.causes[0]
	}
	return all
}

// cause is why a node did not serve this call.
func (j *job) cause(n *node) error {
	resting, is := n.resting()
	if doubtful, refusal := j.login.refusal(n, j.in.op); refusal != nil && !(is && doubtful) {
		return refusal
	}
	cause, tried := j.causes[n]
	switch {
	case tried:
	case is:
		cause = reworded(resting.cause, j.in.op)
	default:
		cause = &failure{op: j.in.op, node: n.host, text: "it was not asked any more: the time was up"}
	}
	if is && resting.unlockErr != nil {
		return &unlockError{cause, resting.unlockErr}
	}
	return cause
}

// tally notes that a sink has got something, or could not take it.
type tally struct {
	to      io.Writer
	begun   func() // called with the first piece; nil: nobody wants to know
	written bool
	err     error
}

func (t *tally) Write(p []byte) (int, error) {
	if !t.written && t.begun != nil {
		t.begun()
	}
	t.written = true
	n, err := t.to.Write(p)
	if err != nil {
		t.err = err
	}
	return n, err
}
