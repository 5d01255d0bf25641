package nethsm

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// enoughTime is how long a node must have been silent for that to be its fault.
	enoughTime = time.Second
	// restTries is how long after the last try a request tries a resting node again, where all nodes rest.
	restTries = time.Second
	// trialPatience is how long requests wait for such a try of another request.
	trialPatience = 250 * time.Millisecond
)

// backoff is how long a resting node is left alone between two probes. Jitter comes on top.
var backoff = []time.Duration{1 * time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, 60 * time.Second}

// node is one NetHSM of a cluster.
//
// It serves or it rests. A node that gives no answer, or one that says that it cannot serve, rests: requests avoid it while
// another node serves, and the pool probes it in the background until it is ready. Requests that find all nodes resting try
// those whose last try is a second old, so that a NetHSM which returns is used at once.
type node struct {
	index     int
	url       string // https://host:port
	host      string // host:port
	userAgent []string
	trust     *trust
	logger    *slog.Logger

	kept  *http.Transport // keeps connections
	fresh *http.Transport // makes one for each request

	certificateEnds atomic.Pointer[time.Time] // of the last certificate that it showed; nil: none seen
	epoch           atomic.Uint64             // counts how often it went to rest, from 1 on

	mu       sync.Mutex
	inFlight int
	rest     *rest     // nil: it serves
	level    int       // of backoff; 0 again after a request was served
	question *question // the state is just asked for; nil: it is not

	unlockTried  time.Time
	unlockBusy   bool // it is just tried
	unlockBarred bool // the passphrase was wrong
}

// question is a question for a node's state.
type question struct {
	answered chan struct{} // closed with the answer
	state    State         // empty: it did not say
	left     bool          // whoever asked left before the answer came; ask again
}

// rest is the rest of a node.
type rest struct {
	since time.Time
	tried time.Time     // the last try, of a request or a probe
	cause error         // of the last try
	brief bool          // the cause says little: requests need not wait before they try again
	over  chan struct{} // closed when the node serves again
	kick  chan struct{} // asks for a probe at once
	trial chan struct{} // closed when the request that tries the node has its outcome; nil: none does

	unlocking chan struct{} // closed when unlocking it by itself has ended; nil: nobody does it
	unlockErr error         // why it did not work
}

func newNode(index int, base string, options Options, trust *trust, dial dialFunc, logger *slog.Logger) *node {
	_, host, _ := strings.Cut(base, "://")
	n := &node{
		index: index, url: base, host: host, userAgent: []string{options.UserAgent}, trust: trust, logger: logger,
	}
	config := trust.config(host, logger, func(leaf *x509.Certificate) { n.certificateEnds.Store(&leaf.NotAfter) })
	n.kept = newTransport(config, dial, options.Connections)
	n.fresh = newTransport(config, dial, 0)
	n.epoch.Store(1)
	return n
}

// begin counts a request in. Where it tries a resting node, others wait for its outcome.
func (n *node) begin(trial bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.inFlight++
	if trial && n.rest != nil {
		n.rest.tried, n.rest.trial = time.Now(), make(chan struct{})
	}
}

// end counts a request out.
func (n *node) end(trial bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.inFlight--
	if trial && n.rest != nil && n.rest.trial != nil {
		close(n.rest.trial)
		n.rest.trial = nil
	}
}

// resting is the rest of the node; false where it serves.
func (n *node) resting() (rest, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.rest == nil {
		return rest{}, false
	}
	return *n.rest, true
}

// serves ends the rest. A request that was served is proof that all is well; a probe is not, so the next rest is as long as
// if this one had not ended.
func (n *node) serves(proof bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if proof {
		n.level = 0
	}
	if n.rest == nil {
		return
	}
	n.logger.Info("a node of the NetHSM serves again", "node", n.host, "after", time.Since(n.rest.since).Round(time.Millisecond))
	for _, waiting := range []chan struct{}{n.rest.trial, n.rest.unlocking, n.rest.over} {
		if waiting != nil {
			close(waiting)
		}
	}
	n.rest = nil
}

// fails lets the node rest, and returns the rest where it has just begun.
func (n *node) fails(cause error, brief bool) *rest {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.rest != nil {
		n.rest.tried, n.rest.cause, n.rest.brief = time.Now(), cause, brief
		return nil
	}
	n.epoch.Add(1)
	n.rest = &rest{
		since: time.Now(), tried: time.Now(), cause: cause, brief: brief, over: make(chan struct{}), kick: make(chan struct{}, 1),
	}
	n.logger.Warn("a node of the NetHSM rests until it answers again", "node", n.host, "cause", cause)
	return n.rest
}

// pause is how long the node is left alone before the next probe.
func (n *node) pause() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return backoff[min(n.level, len(backoff)-1)]
}

// longer makes the next pause longer.
func (n *node) longer() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.level++
}

// probeSoon makes the next probe of a resting node come at once.
func (n *node) probeSoon() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.rest == nil {
		return
	}
	select {
	case n.rest.kick <- struct{}{}:
	default:
	}
}

// measure asks for the state and how long that takes on a connection that is there.
func (n *node) measure(ctx context.Context) (State, time.Duration, error) {
	var got struct {
		State State `json:"state"`
	}
	in := call{op: "asking for the state", method: http.MethodGet, path: "/health/state", into: &got}
	var connected time.Time
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected = time.Now() }})
	_, err := n.exchange(traced, n.fresh, &in, &payload{}, "", nil)
	return got.State, time.Since(connected), err
}
