package nethsmtest

import (
	"bytes"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Fault is something that goes wrong with requests.
type Fault struct {
	// Method and Path choose the requests: Path is a prefix of what follows /api/v1. Empty matches all.
	Method, Path string
	// Times is how many requests it strikes; 0 means every one until it is removed.
	Times int
	// Latency is waited before the request is looked at.
	Latency time.Duration
	// Hang holds the request until the fault is removed or the client leaves; then the connection closes unanswered. The
	// request is not carried out.
	Hang bool
	// Drop closes the connection unanswered; the request is not carried out.
	Drop bool
	// Cut carries the request out and closes the connection after the first After bytes of the answer's body; with a
	// negative After before anything of the answer was sent.
	Cut   bool
	After int
	// Status answers with it at once; 0: the request goes its way. Body and Header are sent with it; where Body is nil the
	// original's own body for that status is.
	Status int
	Header http.Header
	Body   []byte
	// Huge sends so many bytes of JSON with Status (200 if that is 0).
	Huge int64
}

// injected is a fault on its way.
type injected struct {
	Fault

	left    int // Times that remain
	removed chan struct{}
	once    sync.Once
}

func (f *injected) remove() { f.once.Do(func() { close(f.removed) }) }

// Inject adds a fault; of several that match a request the first one strikes. remove takes it away again and releases
// what it holds.
func (n *Node) Inject(f Fault) (remove func()) {
	i := &injected{Fault: f, left: f.Times, removed: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.faults = append(n.faults, i)
	return i.remove
}

// ClearFaults removes all faults and releases what they hold. State and etcd stay as they are.
func (n *Node) ClearFaults() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, f := range n.faults {
		f.remove()
	}
	n.faults = nil
}

// fault picks the fault that strikes a request; nil for none.
func (n *Node) fault(r *http.Request) *injected {
	path := "/" + strings.TrimPrefix(r.URL.Path, apiPrefix)
	n.mu.Lock()
	defer n.mu.Unlock()
	var hit *injected
	kept := n.faults[:0]
	for _, f := range n.faults {
		select {
		case <-f.removed:
			continue
		default:
		}
		if hit == nil && (f.Method == "" || f.Method == r.Method) && strings.HasPrefix(path, f.Path) {
			hit = f
			if f.Times > 0 {
				if f.left--; f.left == 0 {
					continue
				}
			}
		}
		kept = append(kept, f)
	}
	n.faults = kept
	return hit
}

// delay is what a fault does before the request is looked at. It says false where no answer is to be sent.
func (n *Node) delay(r *http.Request, f *injected) bool {
	if !n.pause(r.Context(), f.Latency) {
		return false
	}
	if f.Hang {
		// Reading notices a client that leaves; its body is small.
		_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, ordinaryLimit))
		n.held.Add(1)
		defer n.held.Add(-1)
		select {
		case <-f.removed:
		case <-r.Context().Done():
		case <-n.stopping():
		}
		return false
	}
	return !f.Drop
}

// answers says whether the fault answers by itself.
func (f *injected) answers() bool { return f.Status != 0 || f.Huge > 0 }

// serve is the fault's own answer; it returns the status.
func (f *injected) serve(w http.ResponseWriter, r *http.Request) int {
	_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, ordinaryLimit))
	if f.Huge > 0 {
		return f.flood(w)
	}
	a := usualAnswer(f.Status)
	if f.Body != nil {
		a.body = f.Body
		if a.kind == "" || a.kind == "none" {
			a.kind = typeJSON
		}
	}
	for name, values := range f.Header {
		if http.CanonicalHeaderKey(name) == "Content-Type" {
			a.kind = values[0]
			continue
		}
		if a.header == nil {
			a.header = http.Header{}
		}
		a.header[http.CanonicalHeaderKey(name)] = values
	}
	a.write(w, r.Method == http.MethodHead)
	return a.status
}

// usualAnswer is what the original sends with a status where nothing else is known.
func usualAnswer(status int) answer {
	switch status {
	case http.StatusUnauthorized:
		return *unauthorized("invalid authorization")
	case http.StatusPreconditionFailed:
		return notAvailable()
	case http.StatusTooManyRequests:
		return refuse(status, "Too many requests")
	case http.StatusInternalServerError:
		return databaseTrouble("read from")
	case http.StatusServiceUnavailable:
		return crash("Stdlib.Exit")
	case http.StatusBadGateway, http.StatusGatewayTimeout: // of something between
		return answer{status: status, kind: "text/html", body: []byte("<html><body>" + http.StatusText(status) + "</body></html>")}
	default:
		return empty(status)
	}
}

// flood sends a JSON text of f.Huge bytes.
func (f *injected) flood(w http.ResponseWriter) int {
	status := f.Status
	if status == 0 {
		status = http.StatusOK
	}
	w.Header().Set("Content-Type", typeJSON)
	w.WriteHeader(status)
	block := bytes.Repeat([]byte("A"), 32<<10)
	_, err := io.WriteString(w, `{"message":"`)
	for left := f.Huge; left > 0 && err == nil; left -= int64(len(block)) {
		_, err = w.Write(block[:min(left, int64(len(block)))])
	}
	_, _ = io.WriteString(w, `"}`)
	return status
}

// cutOff sends the head and the first bytes of an answer and breaks the connection.
func (f *injected) cutOff(w http.ResponseWriter, a answer) {
	if f.After >= 0 {
		w.Header().Set("Content-Type", a.kind)
		for name, values := range a.header {
			w.Header()[name] = values
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(a.body)+1)) // promise more than comes, even for an empty body
		w.WriteHeader(max(a.status, http.StatusOK))
		_, _ = w.Write(a.body[:min(f.After, len(a.body))])
		_ = http.NewResponseController(w).Flush()
	}
	panic(http.ErrAbortHandler)
}

// SetLatency lets every request wait for d; 0 ends it.
func (n *Node) SetLatency(d time.Duration) {
	n.replace(func(f *injected) bool { return f.Latency > 0 && !f.Hang }, Fault{Latency: d}, d > 0)
}

// SetHang holds every request until it is set to false or the client leaves.
func (n *Node) SetHang(hang bool) {
	n.replace(func(f *injected) bool { return f.Hang }, Fault{Hang: true}, hang)
}

// Held is how many requests hang at this moment because of a fault.
func (n *Node) Held() int { return int(n.held.Load()) }

// replace takes the faults away that old chooses, and adds one.
func (n *Node) replace(old func(*injected) bool, f Fault, add bool) {
	n.mu.Lock()
	for _, one := range n.faults {
		if old(one) {
			one.remove()
		}
	}
	n.mu.Unlock()
	if add {
		n.Inject(f)
	}
}

// CutConnection carries out the next times requests and breaks their connections after so many bytes of the answer's
// body; a negative number breaks them before the answer begins.
func (n *Node) CutConnection(after, times int) {
	n.Inject(Fault{Cut: true, After: after, Times: times})
}

// DropConnection closes the connections of the next times requests without carrying them out.
func (n *Node) DropConnection(times int) { n.Inject(Fault{Drop: true, Times: times}) }

// Fail answers the next times requests with status, and with the body that the original sends with it; 0 times means
// until ClearFaults.
func (n *Node) Fail(status, times int) { n.Inject(Fault{Status: status, Times: times}) }

// FailPath is Fail for requests whose path below /api/v1 begins with path ("/keys/").
func (n *Node) FailPath(path string, status, times int) {
	n.Inject(Fault{Path: path, Status: status, Times: times})
}

// Redirect sends every request elsewhere: 307 to target and the path that was asked for; empty ends it.
func (n *Node) Redirect(target string) {
	n.replace(func(f *injected) bool { return f.Status == http.StatusTemporaryRedirect },
		Fault{Status: http.StatusTemporaryRedirect, Header: http.Header{"Location": {target}}}, target != "")
}

// HugeAnswer answers the next times requests with 200 and so many bytes of JSON.
func (n *Node) HugeAnswer(bytes int64, times int) { n.Inject(Fault{Huge: bytes, Times: times}) }

// WrongShape answers the next times requests with 200, content type application/json and body, whatever was asked.
func (n *Node) WrongShape(body string, times int) {
	n.Inject(Fault{Status: http.StatusOK, Body: []byte(body), Times: times})
}

// SetState puts the node into a state: Locked as if somebody had locked it (an unlock opens it), Operational as if
// somebody had unlocked it, Failed and Unprovisioned until the next SetState or restart. The empty state ends what a
// former SetState forced.
func (n *Node) SetState(state State) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.forced = ""
	switch state {
	case Locked:
		n.locked = true
	case Operational:
		n.locked = false
		n.etcdLost = time.Time{}
	case Failed, Unprovisioned:
		n.forced = state
	}
}

// LoseEtcd takes the node's etcd away. For a minute of the double's clock the state stays Operational, readiness 200,
// and every right password is 401; then the node is Failed. One that starts without its etcd is Failed at once and shows a
// certificate that nobody knows.
func (n *Node) LoseEtcd() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.etcdLost.IsZero() {
		n.etcdLost = n.hsm.now()
	}
}

// ReturnEtcd gives it back: the node is what it was, with no unlock; one that was restarted meanwhile finds its
// certificate again.
func (n *Node) ReturnEtcd() {
	var pair *pairRecord
	n.hsm.store.read(func(*record) { pair = n.record().TLS })
	_ = n.show(pair) // it was shown before
	n.mu.Lock()
	defer n.mu.Unlock()
	n.etcdLost = time.Time{}
}
