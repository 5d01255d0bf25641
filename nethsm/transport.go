package nethsm

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

const (
	dialTimeout  = 10 * time.Second // of TCP and TLS each; a call's own deadline is shorter most of the time
	idleTimeout  = 90 * time.Second
	errorLimit   = 64 << 10 // of an answer that says no
	headerLimit  = 64 << 10
	keepAliveTCP = 15 * time.Second
)

// newTransport makes the connections to one node. A NetHSM speaks HTTP/1.1. Nothing comes from the environment: a proxy
// there would see where the HSM is asked.
//
// A transport that keeps connections may find one that the node has closed meanwhile. Package net/http then sends a GET, and
// whatever it has not begun to write, once more by itself; anything else fails, although the node most likely never saw it.
// What creates must not live with that doubt, so it goes over a transport that keeps none (keep 0).
func newTransport(config *tls.Config, dial dialFunc, keep int) *http.Transport {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		DialContext:            dial,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    dialTimeout,
		DisableKeepAlives:      keep == 0,
		MaxIdleConnsPerHost:    keep,
		MaxConnsPerHost:        keep,
		IdleConnTimeout:        idleTimeout,
		DisableCompression:     true,
		MaxResponseHeaderBytes: headerLimit,
		Protocols:              &protocols,
	}
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// connections are those that a pool has open, so that Close can end them.
type connections struct {
	dialer dialFunc
	ctx    context.Context // ends with Close
	mu     sync.Mutex
	open   map[*connection]struct{} // nil: closed
}

// connection leaves the list when it is closed.
type connection struct {
	net.Conn
	list *connections
}

func newConnections(ctx context.Context, dialer dialFunc) *connections {
	if dialer == nil {
		dialer = (&net.Dialer{KeepAlive: keepAliveTCP}).DialContext
	}
	return &connections{dialer: dialer, ctx: ctx, open: make(map[*connection]struct{})}
}

// dial goes on when the call that needed the connection has given up, because the next one can use it; so it has a limit of
// its own, and ends with Close.
func (c *connections) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if so, is := ctx.Value(progressKey{}).(*progress); is {
		now := time.Now()
		so.dialled.CompareAndSwap(nil, &now)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	defer context.AfterFunc(c.ctx, cancel)()
	raw, err := c.dialer(ctx, network, address)
	if err != nil {
		return nil, err
	}
	conn := &connection{raw, c}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		_ = raw.Close()
		return nil, net.ErrClosed
	}
	c.open[conn] = struct{}{}
	return conn, nil
}

// Close implements net.Conn.
func (c *connection) Close() error {
	c.list.mu.Lock()
	delete(c.list.open, c)
	c.list.mu.Unlock()
	return c.Conn.Close()
}

// close ends all connections; none can be opened afterwards.
func (c *connections) close() {
	c.mu.Lock()
	open := c.open
	c.open = nil
	c.mu.Unlock()
	for conn := range open {
		_ = conn.Conn.Close()
	}
}

// failure is a request without a usable answer. It is [hsm.ErrUnavailable], and [hsm.ErrMayHaveHappened] where the node may
// have done what it was asked to create.
type failure struct {
	op, node string
	text     string // what happened; empty: what cause says
	cause    error  // for errors.Is and errors.As; never a deadline that was not the caller's
	lost     bool   // of a request that creates and was, or may have been, sent
	stale    bool   // a kept connection had ended before the request came
	brief    bool   // says little about the node: it did something, or had hardly time to
	busy     bool   // says nothing about the node: the time was spent waiting for a connection that others used
}

func (f *failure) Error() string {
	node, text := f.told()
	return fmt.Sprintf("%s at %s: %s", f.op, node, text)
}

func (f *failure) told() (node, text string) {
	text = f.text
	switch {
	case text == "":
		text = f.cause.Error()
	case f.cause != nil:
		text += ": " + f.cause.Error()
	}
	if f.lost {
		text += "; " + hsm.ErrMayHaveHappened.Error()
	}
	return f.node, text
}

func (f *failure) Is(target error) bool {
	return target == hsm.ErrUnavailable || f.lost && target == hsm.ErrMayHaveHappened
}

func (f *failure) Unwrap() error { return f.cause }

// progress tells how far a request came.
type progress struct {
	begun             time.Time
	dialled           atomic.Pointer[time.Time] // when a connection was begun for it; nil: it waited for one that others used
	connected, reused bool
	sent              time.Time   // when it got its connection
	began             atomic.Bool // the node began to answer
}

// silence is how long the node has been silent, and whether the request waited longer for others than for the node.
func (so *progress) silence() (silent time.Duration, busy bool) {
	from := so.sent
	if dialled := so.dialled.Load(); !so.connected && dialled != nil {
		from = *dialled
	} else if !so.connected {
		from = time.Now()
	}
	silent = time.Since(from)
	return silent, silent < enoughTime && from.Sub(so.begun) > silent
}

// progressKey leads from the ctx of a dial to the progress of the request that began it.
type progressKey struct{}

// exchange sends a request to a node over one of its transports, once, and reads the answer. The error is an *Error, or a
// *failure.
func (n *node) exchange(ctx context.Context, over *http.Transport, in *call, body *payload, authorization string, connected func()) (answer, error) {
	so := &progress{begun: time.Now()}
	traced := httptrace.WithClientTrace(context.WithValue(ctx, progressKey{}, so), &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			so.connected, so.reused, so.sent = true, info.Reused, time.Now()
			body.begin()
			if connected != nil {
				connected()
			}
		},
		WroteRequest:         func(httptrace.WroteRequestInfo) { body.end() },
		GotFirstResponseByte: func() { so.began.Store(true) },
	})
	request, err := n.request(traced, in, body, authorization)
	if err != nil {
		return answer{}, err
	}
	response, err := over.RoundTrip(request)
	if err != nil {
		return answer{}, n.failed(ctx, over, in, so, err)
	}
	defer response.Body.Close()
	out := answer{status: response.StatusCode, header: response.Header, node: n.host}
	if !in.accepts(out.status) {
		text, err := readBody(response.Body, response.ContentLength, errorLimit)
		if err != nil && !errors.Is(err, errTooLarge) {
			return answer{}, n.failed(ctx, over, in, so, err)
		}
		refused := &Error{Op: in.op, Node: n.host, Status: out.status, Message: message(text)}
		if place, err := response.Location(); err == nil && out.status >= 300 && out.status < 400 {
			refused.Message = fmt.Sprintf("Location: %s://%s%s", place.Scheme, place.Host, place.EscapedPath())
		}
		return out, refused
	}
	if err := in.read(&out, response); err != nil {
		return answer{}, n.failed(ctx, over, in, so, err)
	}
	return out, nil
}

// request builds the request. It has no Accept header, which some endpoints would answer with 406, and no Expect, which a
// NetHSM leaves without an answer. The length is always announced.
func (n *node) request(ctx context.Context, in *call, body *payload, authorization string) (*http.Request, error) {
	address := n.url + apiPath + in.path
	if len(in.query) > 0 {
		address += "?" + in.query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, in.method, address, bytes.NewReader(body.bytes))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", in.op, err)
	}
	if in.creates {
		request.GetBody = nil // net/http cannot send it again
	}
	request.Header["User-Agent"] = n.userAgent
	if in.contentType != "" {
		request.Header["Content-Type"] = []string{in.contentType}
	} else if in.body != nil {
		request.Header["Content-Type"] = contentJSON
	}
	if in.ifMatch != "" {
		request.Header["If-Match"] = []string{in.ifMatch}
	}
	if authorization != "" {
		request.Header["Authorization"] = []string{authorization}
	}
	return request, nil
}

var contentJSON = []string{"application/json"}

// read takes the body of an answer to where the call wants it.
func (in *call) read(out *answer, response *http.Response) error {
	limit := in.limit
	if limit == 0 {
		limit = defaultLimit
	}
	if in.sink != nil {
		written, err := io.Copy(in.sink, io.LimitReader(response.Body, limit+1))
		if err == nil && written > limit {
			err = errTooLarge
		}
		return err
	}
	body, err := readBody(response.Body, response.ContentLength, limit)
	if err != nil {
		return err
	}
	if in.into == nil {
		out.body = body
		return nil
	}
	defer clear(body)
	if err := decodeJSON(body, out.header, in.into); err != nil {
		return fmt.Errorf("%w: %w", ErrAnswer, err)
	}
	return nil
}

// bare is the error of a dial without the address, which the error that wraps it tells anyway.
func bare(err error) error {
	for {
		switch outer := err.(type) { //nolint:errorlint // one layer at a time, from the outside
		case *net.OpError:
			if outer.Op != "dial" {
				return err
			}
			err = outer.Err
		case *os.SyscallError:
			err = outer.Err
		default:
			return err
		}
	}
}

// failed says what happened to a request without a usable answer.
func (n *node) failed(ctx context.Context, over *http.Transport, in *call, so *progress, err error) error {
	f := &failure{op: in.op, node: n.host, lost: in.creates && so.connected, cause: err}
	switch {
	case errors.Is(err, errTooLarge):
		limit := in.limit
		if limit == 0 {
			limit = defaultLimit
		}
		f.text, f.cause, f.brief = fmt.Sprintf("the answer has more than %d bytes, which no answer to this has", limit), ErrAnswer, true
	case errors.Is(err, ErrAnswer):
		f.brief = true
	case ctx.Err() != nil || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled):
		silent, busy := so.silence()
		f.cause, f.brief, f.busy = nil, silent < enoughTime || f.lost, busy
		switch {
		case !busy && so.connected:
			f.text = fmt.Sprintf("no answer within %v", silent.Round(time.Millisecond))
		case !busy:
			f.text = fmt.Sprintf("no connection within %v", silent.Round(time.Millisecond))
		default:
			f.text = fmt.Sprintf("no answer within %v, most of that because the connections to it, %d at most, were all in use; send less at "+
				"a time, or allow more connections", time.Since(so.begun).Round(time.Millisecond), over.MaxConnsPerHost)
		}
	case !so.connected:
		if certificate := n.trust.certificateError(n.host, err); certificate != nil {
			n.certificateEnds.Store(&certificate.NotAfter)
			f.cause = certificate
		} else {
			f.text, f.cause = "no connection", bare(err)
		}
	case so.began.Load():
		f.text, f.brief = "the answer broke off", true
	default:
		f.text, f.brief = "the connection ended before an answer came", true
		f.stale = so.reused && !in.creates
	}
	return f
}
