package nethsm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// A refused password proves nothing: for about a minute after a NetHSM has lost its database it says Operational and answers
// the right password with 401. A NetHSM has no lock-out, but after a 401 it lets the user in again only a second later. So a
// 401 opens a refusal: requests leave that node alone, one verifier tries the password with growing pauses, and "wrong
// password" is said only when for more than a minute, in state Operational, nothing but 401 came.
const (
	firstRetry  = limitPause       // from a 401 to the next try
	longRetry   = time.Minute      // between tries at most, and after the verdict
	verdictTime = 65 * time.Second // of nothing but 401; a NetHSM notices after 60 s that its database is away
	awaitTime   = 1500 * time.Millisecond
	forgetTime  = 10 * time.Minute // a refused password that nobody uses is not tried any longer
	leaseTime   = time.Second      // how long one request alone finds out whether a password is right
)

var (
	// errRefused: the node refuses the password at present; choose another.
	errRefused = errors.New("the password is refused at present")
	// errResting: the node went to rest while the request waited; choose anew.
	errResting = errors.New("the node rests")
	// errUndecided: the time was up while another request was finding out whether the password is right.
	errUndecided = errors.New("another request was finding out whether the password is right, and got no answer in time")
)

// login is a user with a password. A nil login sends none.
type login struct {
	pool     *pool
	username string
	unusable error  // no NetHSM has such a user: nothing is sent
	header   string // of Authorization. A string, as net/http wants it, cannot be wiped.
	standing []*standing
	role     atomic.Pointer[Role] // nil: not known yet
}

// standing is what one node thinks of a login.
type standing struct {
	login  *login
	node   *node
	proven atomic.Uint64 // the node's epoch in which it took the password; 0: never

	mu      sync.Mutex
	lease   *lease   // nil: no request finds out
	refusal *refusal // nil: not refused
}

// lease is the right to be the one request that finds out whether the password is right.
type lease struct {
	until time.Time
	over  chan struct{}
}

// refusal is a password that is refused.
type refusal struct {
	first     time.Time     // the first 401
	since     time.Time     // since when nothing but 401 came; zero: something else did last
	next      time.Time     // of the verifier's next try
	tried     chan struct{} // closed after that
	wrong     bool          // the verdict
	asked     time.Time     // when a call last wanted to use the password
	verifying bool          // a verifier of this refusal runs
}

func newLogin(p *pool, username, header string) *login {
	l := &login{pool: p, username: username, header: header, unusable: checkUsername(username)}
	for _, n := range p.nodes {
		l.standing = append(l.standing, &standing{login: l, node: n})
	}
	return l
}

func (l *login) authorization() string {
	if l == nil {
		return ""
	}
	return l.header
}

// refusedAt is true where the node refuses the password at present.
func (l *login) refusedAt(n *node) bool {
	if l == nil {
		return false
	}
	s := l.standing[n.index]
	if s.proven.Load() == n.epoch.Load() {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refusal != nil
}

func (l *login) refusedAnywhere() bool {
	for _, s := range l.standing {
		if l.refusedAt(s.node) {
			return true
		}
	}
	return false
}

// pass is the leave to send a password to a node.
type pass struct {
	standing *standing
	epoch    uint64
	lease    *lease // nil: it is known to be right
}

// enter waits for the leave to send the password to a node. A password that the node has taken since it last rested goes at
// once; one that is not known there goes with one request at a time, so that a wrong one does not come from all at once.
func (l *login) enter(ctx context.Context, n *node) (*pass, error) {
	if l == nil {
		return nil, nil
	}
	s, epoch := l.standing[n.index], n.epoch.Load()
	if s.proven.Load() == epoch {
		return &pass{standing: s, epoch: epoch}, nil
	}
	for {
		s.mu.Lock()
		switch now := time.Now(); {
		case s.refusal != nil:
			s.mu.Unlock()
			return nil, errRefused
		case s.proven.Load() == n.epoch.Load():
			s.mu.Unlock()
			return &pass{standing: s, epoch: n.epoch.Load()}, nil
		case s.lease == nil || !now.Before(s.lease.until):
			s.lease = &lease{until: now.Add(leaseTime), over: make(chan struct{})}
			p := &pass{standing: s, epoch: n.epoch.Load(), lease: s.lease}
			s.mu.Unlock()
			return p, nil
		}
		other := s.lease
		s.mu.Unlock()
		timer := time.NewTimer(time.Until(other.until))
		select {
		case <-other.over:
		case <-timer.C:
		case <-ctx.Done():
		case <-l.pool.ctx.Done():
		}
		timer.Stop()
		switch {
		case ctx.Err() != nil || l.pool.ctx.Err() != nil:
			return nil, errUndecided
		case n.epoch.Load() != epoch:
			return nil, errResting
		}
	}
}

// done tells what came of the request.
func (p *pass) done(err error) {
	if p == nil {
		return
	}
	s := p.standing
	switch saidOf(err) {
	case taken:
		if p.lease != nil {
			s.accept(p.epoch)
		}
	case refused:
		s.refuse(p.epoch, p.lease != nil)
	case unsaid:
	}
	if p.lease != nil {
		s.mu.Lock()
		if s.lease == p.lease {
			s.lease = nil
		}
		close(p.lease.over)
		s.mu.Unlock()
	}
}

// said is what an answer says about the password.
type said int

const (
	unsaid said = iota
	taken
	refused
)

// saidOf reads an answer. A NetHSM looks at its state first, then at the password, then at all else.
func saidOf(err error) said {
	answer, is := errors.AsType[*Error](err)
	switch {
	case err == nil:
		return taken
	case !is:
		return unsaid
	}
	switch answer.Status {
	case http.StatusUnauthorized:
		return refused
	case http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusNotModified, http.StatusNotAcceptable,
		http.StatusConflict, http.StatusUnsupportedMediaType, http.StatusRequestEntityTooLarge:
		return taken
	default:
		return unsaid
	}
}

// accept ends a refusal.
func (s *standing) accept(epoch uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.proven.Store(epoch)
	if s.refusal == nil {
		return
	}
	s.login.pool.logger.Info("a node of the NetHSM takes the password again", "node", s.node.host, "user", s.login.username,
		"after", time.Since(s.refusal.first).Round(time.Second))
	s.refusal = nil
}

// refuse opens a refusal, unless the 401 is older than what is known by now.
func (s *standing) refuse(epoch uint64, found bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refusal != nil || !found && s.proven.Load() != epoch {
		return
	}
	now := time.Now()
	s.proven.Store(0)
	s.refusal = &refusal{first: now, since: now, asked: now}
	s.login.pool.logger.Warn("a node of the NetHSM refuses the password; it is tried again, because a NetHSM without its database does "+
		"that as well", "node", s.node.host, "user", s.login.username)
	s.verifyLocked(firstRetry)
}

// verifyLocked starts the verifier where it does not run. The caller holds the lock.
func (s *standing) verifyLocked(pause time.Duration) {
	if s.refusal.verifying {
		return
	}
	s.refusal.verifying = true
	s.refusal.next, s.refusal.tried = time.Now().Add(pause), make(chan struct{})
	r := s.refusal
	s.login.pool.start(func() { s.verify(r) })
}

// finding is what the verifier found out.
type finding int

const (
	nothing finding = iota // 429: it came too soon after another's wrong try
	other                  // no answer, or another state: not the password's fault
	denied                 // 401 in state Operational
)

// stands is true as long as a refusal has not ended. When it has, another one may have begun, with a verifier of its own.
func (s *standing) stands(r *refusal) (next time.Time, yes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return r.next, s.refusal == r
}

// verify tries a refused password until it is taken, nobody wants to use it any longer, or the pool closes.
func (s *standing) verify(r *refusal) {
	p, pause := s.login.pool, firstRetry
	for {
		if next, yes := s.stands(r); !yes || !s.sleep(next) {
			return
		}
		if _, yes := s.stands(r); !yes { // a request that was on its way for long was served meanwhile
			return
		}
		found := s.try()
		s.mu.Lock()
		if s.refusal != r || p.ctx.Err() != nil { // taken, or closed
			s.mu.Unlock()
			return
		}
		now := time.Now()
		switch {
		case found == nothing:
		case found == other:
			r.since, r.wrong = time.Time{}, false
			pause = min(2*pause, longRetry)
		case r.since.IsZero():
			r.since, pause = now, firstRetry
		case now.Sub(r.since) > verdictTime:
			if !r.wrong {
				r.wrong = true
				p.logger.Error("the password is wrong: the NetHSM has refused it for more than a minute, in state Operational",
					"node", s.node.host, "user", s.login.username, "since", r.since)
			}
			pause = longRetry
		default: // not beyond the time of the verdict
			pause = max(min(2*pause, r.since.Add(verdictTime+time.Second).Sub(now)), firstRetry)
		}
		close(r.tried)
		r.next, r.tried = now.Add(pause+spread(firstRetry/10)), make(chan struct{})
		r.verifying = now.Sub(r.asked) <= forgetTime
		if !r.verifying {
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
	}
}

// sleep waits for the next try. A node that rested meanwhile and serves again is tried earlier. It is false when the pool
// closes.
func (s *standing) sleep(next time.Time) bool {
	p := s.login.pool
	if resting, is := s.node.resting(); is && time.Until(next) > firstRetry {
		return p.sleep(p.ctx, firstRetry, nil) && p.sleep(p.ctx, max(time.Until(next), 0), resting.over)
	}
	return p.sleep(p.ctx, max(time.Until(next), 0), nil)
}

// try sends the password once, with a request that every role may make or is at least known by name for.
func (s *standing) try() finding {
	p, n, epoch := s.login.pool, s.node, s.node.epoch.Load()
	ctx, cancel := context.WithTimeout(p.ctx, probeTimeout)
	defer cancel()
	in := call{op: "finding out whether the password is right", method: http.MethodGet, path: "/users/" + url.PathEscape(s.login.username)}
	_, err := n.exchange(ctx, n.kept, &in, &payload{}, s.login.header, nil)
	switch saidOf(err) {
	case taken:
		n.serves(true)
		s.accept(epoch)
		return nothing
	case refused:
		state := n.askState(ctx)
		if state == StateOperational {
			return denied
		}
		if state != "" {
			p.rests(n, &Error{Op: in.op, Node: n.host, Status: http.StatusPreconditionFailed, Message: messageState, State: state}, false)
		}
		return other
	}
	answer, is := errors.AsType[*Error](err)
	switch {
	case is && answer.Status == http.StatusTooManyRequests:
		return nothing
	case is && answer.Status == http.StatusPreconditionFailed:
		answer.State = n.askState(ctx)
	}
	p.rests(n, err, is)
	return other
}

// await waits for the next try of the verifier at one of the nodes, if that comes soon, and returns the node where the
// password is taken now.
func (l *login) await(ctx context.Context, nodes []*node) *node {
	var soonest *standing
	var next time.Time
	var tried chan struct{}
	for _, n := range nodes {
		s := l.standing[n.index]
		s.mu.Lock()
		if s.refusal != nil {
			s.refusal.asked = time.Now()
			s.verifyLocked(max(firstRetry-time.Since(s.refusal.next), 0)) // where it had been given up
			if soonest == nil || s.refusal.next.Before(next) {
				soonest, next, tried = s, s.refusal.next, s.refusal.tried
			}
		}
		s.mu.Unlock()
	}
	if soonest == nil {
		return nil
	}
	end, limited := ctx.Deadline()
	if time.Until(next) > awaitTime || limited && end.Before(next) || !l.pool.sleep(ctx, awaitTime, tried) || l.refusedAt(soonest.node) {
		return nil
	}
	return soonest.node
}

// hasten has nodes probed that rest and refuse the password, at most once a second, because no request finds out whether they
// have returned.
func (l *login) hasten(nodes []*node) {
	for _, n := range nodes {
		if !l.refusedAt(n) {
			continue
		}
		n.mu.Lock()
		due := n.rest != nil && time.Since(n.rest.tried) >= restTries
		if due {
			n.rest.tried = time.Now()
		}
		n.mu.Unlock()
		if due {
			n.probeSoon()
		}
	}
}

// refusal is the error of a call that a node did not get because it refuses the password; nil where it does not. It is
// doubtful where something else came between the refusals.
func (l *login) refusal(n *node, op string) (doubtful bool, err error) {
	if l == nil {
		return false, nil
	}
	s := l.standing[n.index]
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.refusal
	if r == nil {
		return false, nil
	}
	now := time.Now()
	refused := now.Sub(r.first).Round(time.Second)
	switch {
	case r.wrong:
		return false, &hsm.PINError{TriesLeft: -1, Wrong: true, Detail: fmt.Sprintf("%s at %s: the password of user %q is wrong: for %v, since %s, "+
			"the NetHSM has answered nothing but HTTP 401, in state Operational; correct the password, here or on the NetHSM, which has "+
			"no lock-out: it is tried once a minute", op, n.host, l.username, refused, r.since.UTC().Format(time.RFC3339))}
	case r.since.IsZero():
		return true, &failure{op: op, node: n.host, text: fmt.Sprintf("the password of user %q has been refused for %v (HTTP 401), and the node "+
			"has had other trouble meanwhile; both come of a lost database (etcd), so look at that first; the password is tried again and "+
			"again", l.username, refused)}
	default:
		left := max(verdictTime-now.Sub(r.since), time.Second).Round(time.Second)
		return false, &failure{op: op, node: n.host, text: fmt.Sprintf("the password of user %q has been refused for %v (HTTP 401); a NetHSM that "+
			"has lost its database (etcd) does that too, for about a minute, so it is tried again, and called wrong in %v if nothing else "+
			"comes", l.username, refused, left)}
	}
}
