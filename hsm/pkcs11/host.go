package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

const (
	// pipeRoom is how many bytes may be on their way to the host when a caller writes its frame itself. A pipe takes
	// 64 KiB without a reader, so that such a write waits for nobody, not even for a host that was stopped; what would
	// exceed it is left to a goroutine.
	pipeRoom = 48 << 10
	// farewell is how long a host may take to end after its pipe was closed, before it is killed.
	farewell = 2 * time.Second
	// maxSessions bounds the sessions open on one slot; more calls than a token's Parallel never reach the host.
	maxSessions = 64
	// frameOverhead is what a frame adds to its Meta and Data, in bytes.
	frameOverhead = 18
)

// hostDiedError says that a call got no answer because its host ended. What became of the call is unknown.
type hostDiedError struct {
	// culprit is true for the one call that the host most likely died of: the one inside longest, or over its limit.
	culprit bool
	cause   error
}

func (e *hostDiedError) Error() string { return fmt.Sprintf("the module host ended: %v", e.cause) }
func (e *hostDiedError) Unwrap() error { return e.cause }

// errRetired says that a call was not sent, because the host is dead or takes no more of them.
var errRetired = errors.New("the module host is being replaced")

// host is one running module host: a lock for those who write requests, a goroutine that reads answers and hands each
// to its caller, and a watchdog.
type host struct {
	process *process
	born    time.Time
	hello   wire.HelloReply

	// writing is held while a frame is written; a channel, so that waiting for it can end with a ctx.
	writing chan struct{}
	// writers are the goroutines that write large frames.
	writers sync.WaitGroup
	// dead is closed when no call will be answered any more, gone when the process was waited for and all goroutines
	// have ended.
	dead chan struct{}
	gone chan struct{}

	mu       sync.Mutex // guards what follows
	nextID   uint64
	inside   map[uint64]*call
	bytes    int // of the requests inside
	watchdog *time.Timer
	due      time.Time // when the watchdog fires next; zero where it does not
	retired  bool      // ends with its last call
	err      error     // why it is dead
	useful   bool      // did something that only a working token does
	stamp    string    // of the newest write that it can know of

	attachments map[string]*attachment // by token identity
}

// call is one request on its way.
type call struct {
	id    uint64
	size  int    // of the request in bytes
	token string // calls of one token wait for each other inside the module
	limit time.Duration
	// progress is when the call entered the module, or when one that it may have waited for last returned.
	progress  time.Time
	abandoned bool
	answer    chan result // buffered: whoever delivers never waits
	// returned runs exactly once, when the call is no longer inside the module.
	returned func()
}

type result struct {
	frame wire.Frame
	err   error
}

// request is what a caller wants sent.
type request struct {
	op    wire.Op
	meta  any
	data  []byte // stays the caller's
	token string
	limit time.Duration
	// returned may be nil.
	returned func()
}

// newHost takes over a process, which has to be greeted next.
func newHost(p *process) *host {
	h := &host{
		process: p, born: time.Now(), writing: make(chan struct{}, 1), dead: make(chan struct{}), gone: make(chan struct{}),
		inside: make(map[uint64]*call), attachments: make(map[string]*attachment),
	}
	h.watchdog = time.AfterFunc(time.Hour, h.bark)
	h.watchdog.Stop()
	go h.read()
	return h
}

// greet lets the host load its module. The limit is for that and C_Initialize.
func (h *host) greet(hello wire.Hello, limit time.Duration) error {
	frame, err := h.call(context.Background(), request{op: wire.OpHello, meta: hello, limit: limit})
	if err != nil {
		return err
	}
	if err := wire.Decode(frame.Meta, &h.hello); err != nil {
		return err
	}
	if h.hello.Version != wire.Version {
		return fmt.Errorf("the module host speaks version %d of the protocol, not %d: restart the plugin", h.hello.Version, wire.Version)
	}
	return nil
}

// call sends a request and waits for its answer or for ctx. A call given up before it was sent never reaches the
// module; one given up later goes on there, and its result is wiped when it comes. An answer that reports a failure is
// a *wire.Error, the end of the host an *hostDiedError. Where the call was not sent at all, and that is not ctx's doing, it
// is errRetired.
func (h *host) call(ctx context.Context, r request) (wire.Frame, error) {
	c := &call{token: r.token, limit: r.limit, answer: make(chan result, 1), returned: r.returned}
	if c.returned == nil {
		c.returned = func() {}
	}
	frame := wire.Frame{Op: r.op, Data: r.data}
	if r.meta != nil {
		frame.Meta = wire.Encode(r.meta)
	}
	c.size = frameOverhead + len(frame.Meta) + len(frame.Data)
	select {
	case h.writing <- struct{}{}:
	case <-h.dead:
		c.returned()
		return wire.Frame{}, fmt.Errorf("%w: %w", errRetired, h.cause())
	case <-ctx.Done():
		c.returned()
		return wire.Frame{}, ctx.Err()
	}
	fits, err := h.enter(c)
	if err != nil {
		<-h.writing
		c.returned()
		return wire.Frame{}, err
	}
	frame.ID = c.id
	if fits {
		h.write(frame)
	} else {
		frame.Data = append([]byte(nil), r.data...) // the caller may wipe its own while we still write
		h.writers.Add(1)
		go func() {
			defer h.writers.Done()
			h.write(frame)
			clear(frame.Data)
		}()
	}
	select {
	case answer := <-c.answer:
		return open(answer)
	case <-ctx.Done():
	}
	h.mu.Lock()
	_, still := h.inside[c.id]
	c.abandoned = still
	h.mu.Unlock()
	if !still { // it came at the same moment
		return open(<-c.answer)
	}
	return wire.Frame{}, ctx.Err()
}

// open turns an answer that reports a failure into an error.
func open(answer result) (wire.Frame, error) {
	if answer.err != nil {
		return wire.Frame{}, answer.err
	}
	if !answer.frame.Failed {
		return answer.frame, nil
	}
	clear(answer.frame.Data)
	failure := new(wire.Error)
	if err := wire.Decode(answer.frame.Meta, failure); err != nil {
		return wire.Frame{}, &hostDiedError{cause: err}
	}
	return wire.Frame{}, failure
}

// enter counts a call as inside the module, and says whether the pipe surely takes its request at once. The caller holds
// writing, so that ids are in the order of the frames.
func (h *host) enter(c *call) (fits bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.err != nil:
		return false, fmt.Errorf("%w: %w", errRetired, h.err)
	case h.retired:
		return false, errRetired
	}
	h.nextID++
	c.id, c.progress = h.nextID, time.Now()
	h.inside[c.id] = c
	h.bytes += c.size
	h.watch()
	return h.bytes <= pipeRoom, nil
}

// write sends a frame and gives back writing. A pipe that does not take it is the end of the host.
func (h *host) write(frame wire.Frame) {
	err := wire.WriteFrame(h.process.requests, frame)
	<-h.writing
	if err != nil {
		h.die(fmt.Errorf("writing to the module host: %w", err))
	}
}

// read hands out answers until the host ends, then waits for the process and its writers.
func (h *host) read() {
	var err error
	for {
		var frame wire.Frame
		if frame, err = wire.ReadFrame(h.process.answers); err != nil {
			break
		}
		if !h.deliver(frame) {
			clear(frame.Data)
			err = fmt.Errorf("%w: an answer to no question", wire.ErrMalformed)
			break
		}
	}
	if (errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed)) && !h.isDead() {
		err = h.lastWords()
	}
	h.die(err)
	_ = h.process.requests.Close() // asks a host that still runs to end
	_ = h.process.answers.Close()
	select {
	case <-h.process.ended:
	case <-time.After(farewell):
		h.process.kill()
		<-h.process.ended
	}
	h.writers.Wait()
	close(h.gone)
}

// lastWords says how a process ended that has closed its pipe. The two happen at nearly the same moment.
func (h *host) lastWords() error {
	select {
	case <-h.process.ended:
		return errors.New(h.process.status)
	case <-time.After(farewell / 10):
		return errors.New("it closed its pipe")
	}
}

// deliver hands an answer to its caller, or wipes it where the caller has gone.
func (h *host) deliver(frame wire.Frame) bool {
	h.mu.Lock()
	c := h.inside[frame.ID]
	if c == nil {
		h.mu.Unlock()
		return false
	}
	delete(h.inside, c.id)
	h.bytes -= c.size
	now := time.Now()
	for _, other := range h.inside {
		// What entered later, or works on the same token, may have waited for this one all the time.
		if other.id > c.id || other.token == c.token {
			other.progress = now
		}
	}
	h.watch()
	abandoned := c.abandoned
	last := h.retired && len(h.inside) == 0
	h.mu.Unlock()
	c.returned()
	if abandoned {
		clear(frame.Data)
	} else {
		c.answer <- result{frame: frame}
	}
	if last {
		h.hangUp()
	}
	return true
}

// watch sets the watchdog to the moment at which a call will have been without progress for the limit of the slowest
// operation inside. The caller holds mu.
func (h *host) watch() {
	due, _ := h.deadline()
	switch {
	case due.IsZero():
		h.due = due
		h.watchdog.Stop()
	case h.due.IsZero() || due.Before(h.due):
		h.due = due
		h.watchdog.Reset(time.Until(due))
	}
	// Where the new moment is later the timer fires at the old one, and bark looks again: cheaper than a reset a call.
}

// deadline returns when the host has to be killed and the call that will be the reason; zero for an idle one. The caller
// holds mu.
func (h *host) deadline() (time.Time, *call) {
	var slowest time.Duration
	var stuck *call
	for _, c := range h.inside {
		slowest = max(slowest, c.limit)
		if stuck == nil || c.progress.Before(stuck.progress) || c.progress.Equal(stuck.progress) && c.id < stuck.id {
			stuck = c
		}
	}
	if stuck == nil {
		return time.Time{}, nil
	}
	return stuck.progress.Add(slowest), stuck
}

// bark runs when the watchdog fires.
func (h *host) bark() {
	h.mu.Lock()
	due, stuck := h.deadline()
	switch {
	case h.retired && stuck == nil:
		h.mu.Unlock()
		h.die(errors.New("it did not end when it was asked to"))
		return
	case h.err != nil || stuck == nil:
		h.due = time.Time{}
		h.mu.Unlock()
		return
	case time.Until(due) > 0:
		h.due = due
		h.watchdog.Reset(time.Until(due))
		h.mu.Unlock()
		return
	}
	h.mu.Unlock()
	h.dieOf(stuck, fmt.Errorf("nothing came back from the module for %v; it was killed", stuck.limit))
}

// die ends the host because of something that no call in particular is to blame for: the one inside longest is.
func (h *host) die(cause error) { h.dieOf(nil, cause) }

// dieOf kills the process and fails every call inside. Only the first cause counts.
func (h *host) dieOf(culprit *call, cause error) {
	h.mu.Lock()
	if h.err != nil {
		h.mu.Unlock()
		return
	}
	h.err = cause
	h.due = time.Time{}
	h.watchdog.Stop()
	calls := h.inside
	h.inside = make(map[uint64]*call)
	if culprit == nil {
		for _, c := range calls {
			if culprit == nil || c.id < culprit.id {
				culprit = c
			}
		}
	}
	close(h.dead)
	h.mu.Unlock()
	h.process.kill()
	_ = h.process.answers.Close() // nobody waits for more, and a process that the module started may hold the other end
	for _, c := range calls {
		c.returned()
		c.answer <- result{err: &hostDiedError{culprit: c == culprit, cause: cause}}
	}
}

// cause is why the host is dead.
func (h *host) cause() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// retire lets the host take no more calls and end when those inside have returned.
func (h *host) retire() {
	h.mu.Lock()
	idle := !h.retired && len(h.inside) == 0
	h.retired = true
	h.mu.Unlock()
	if idle {
		h.hangUp()
	}
}

// hangUp asks the process to end by closing its pipe; the watchdog kills one that does not.
func (h *host) hangUp() {
	h.writing <- struct{}{} // nothing is inside, so nobody is kept here by a frame that the host does not take
	_ = h.process.requests.Close()
	<-h.writing
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.watchdog.Reset(farewell)
	}
}

// close ends the host and waits until it is gone. What is inside has a moment to finish.
func (h *host) close() {
	h.retire()
	select {
	case <-h.gone:
	case <-time.After(farewell):
		h.die(errors.New("the last device on the module was closed"))
		<-h.gone
	}
}

// isDead reports whether calls are still answered.
func (h *host) isDead() bool {
	select {
	case <-h.dead:
		return true
	default:
		return false
	}
}
