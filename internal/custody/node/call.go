package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"strconv"
	"sync/atomic"
	"time"
)

// call is one request to the node.
type call struct {
	op     string // a gerund that the address follows: "giving a share to"
	method string
	path   string // below /v1/

	body    []byte // JSON; wiped when the call is over. nil for none
	secret  []byte // what in it must never come back in a message; the caller's
	token   []byte // the caller's
	changes bool   // a lost answer is ErrMayHaveHappened
	active  bool   // only the active node serves it, others pass it on to that one
	init    bool   // runs under the deadline of Init, and goes on when the caller's ctx ends

	// field takes a member of the answer, in place: what it keeps it copies. nil where the answer says nothing.
	field func(name string, s *scanner) error
	// check looks at what was read; an error is ErrMalformed.
	check func() error
	ends  *time.Time // takes when the node's certificate ends, nil for no interest
}

// do sends the call once. Every error is an *Error.
func (n *Node) do(ctx context.Context, c *call) error {
	defer clear(c.body)
	if err := ctx.Err(); err != nil {
		return c.failed(n, &Error{is: []error{ErrUnavailable}, what: "it was not begun", cause: err})
	}
	if n.closed.Load() {
		return c.failed(n, &Error{is: []error{ErrUnavailable}, what: "the client is closed", cause: net.ErrClosed})
	}
	timeout, limited := n.timeout, ctx
	if c.init {
		timeout, limited = n.initTimeout, context.WithoutCancel(ctx)
	}
	limited, cancel := context.WithTimeout(limited, timeout)
	defer cancel()
	defer func() {
		if n.closed.Load() { // its connection has no owner any more
			n.lines.closeIdle()
		}
	}()

	var so progress
	traced := httptrace.WithClientTrace(limited, so.trace())
	sent := &body{bytes: c.body}
	defer sent.wipe()
	request, err := n.request(traced, c, sent)
	if err != nil {
		return c.failed(n, &Error{is: []error{ErrConfig}, what: "the request cannot be made", cause: err})
	}
	response, err := n.transport.RoundTrip(request)
	if err != nil {
		return c.lost(ctx, n, err, &so, timeout)
	}
	defer response.Body.Close()
	if c.ends != nil && n.dated && response.TLS != nil {
		*c.ends = response.TLS.PeerCertificates[0].NotAfter
	}
	answer, err := readAnswer(response.Body, response.ContentLength)
	defer func() { clear(answer) }()
	if response.StatusCode < 200 || response.StatusCode > 299 {
		return c.refused(n, response, answer) // of a broken error the status is enough
	}
	if c.field == nil {
		return nil
	}
	scanned := scanObject(answer, c.field)
	if scanned == nil && c.check != nil {
		scanned = c.check()
	}
	switch {
	case errors.Is(err, errTooLarge):
		return c.malformed(n, response, "the answer is longer than "+strconv.Itoa(MaxAnswer)+" bytes")
	case err != nil:
		return c.lost(ctx, n, err, &so, timeout)
	case scanned != nil && limited.Err() != nil: // what a server says when it sees us leave
		return c.lost(ctx, n, limited.Err(), &so, timeout)
	case scanned != nil:
		return c.malformed(n, response, "the answer is none of Vault's: "+scanned.Error())
	}
	return nil
}

// progress tells how far a request came.
type progress struct {
	connected atomic.Bool           // the handshake is over: something may have been sent
	handshake atomic.Pointer[error] // why it failed
}

func (so *progress) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { so.connected.Store(true) },
		TLSHandshakeDone: func(_ tls.ConnectionState, err error) {
			if err != nil {
				so.handshake.Store(&err)
			}
		},
	}
}

// request builds the request. It cannot be sent twice: no GetBody.
func (n *Node) request(ctx context.Context, c *call, sent *body) (*http.Request, error) {
	request, err := http.NewRequestWithContext(ctx, c.method, n.address+"/v1/"+c.path, nil)
	if err != nil {
		return nil, err
	}
	if c.body != nil {
		request.Body, request.ContentLength = sent, int64(len(c.body))
		request.Header["Content-Type"] = []string{"application/json"}
	}
	request.Header["User-Agent"] = n.userAgent
	request.Header["X-Vault-Request"] = []string{"true"} // a listener may insist on it, against requests forged from browsers
	if c.token != nil {
		request.Header["X-Vault-Token"] = []string{string(c.token)}
	}
	return request, nil
}

func (c *call) failed(n *Node, e *Error) error {
	e.Op, e.Node = c.op, n.address
	return e
}

// malformed is an answer of success that we do not understand.
func (c *call) malformed(n *Node, response *http.Response, what string) error {
	e := &Error{Status: response.StatusCode, is: []error{ErrMalformed}, what: what, advice: "check that the address is that of a Vault"}
	if c.changes {
		e.is = append(e.is, ErrMayHaveHappened)
		e.advice = "look at the state of the node before anything else"
	}
	return c.failed(n, e)
}

// refused is an answer that says no.
func (c *call) refused(n *Node, response *http.Response, answer []byte) error {
	e := &Error{Status: response.StatusCode, RetryAfter: retryAfter(response.Header.Get("Retry-After"))}
	e.Messages = c.messages(answer)
	var doubtful bool
	e.is, e.advice, doubtful = c.judge(e.Status, e.Messages)
	if doubtful {
		e.is = append(e.is[:len(e.is):len(e.is)], ErrMayHaveHappened)
	}
	if e.Is(ErrRedirect) {
		e.what = "it redirects to nowhere"
		if place, err := response.Location(); err == nil {
			target := url.URL{Scheme: place.Scheme, Host: place.Host}
			e.what = "it redirects to " + printable(target.String())
		}
	}
	return c.failed(n, e)
}

// messages are Vault's errors, if the answer is one of Vault's.
func (c *call) messages(answer []byte) []string {
	var messages []string
	err := scanObject(answer, func(name string, s *scanner) error {
		if name != "errors" {
			return s.skip()
		}
		return s.texts(func(text []byte) error {
			if len(messages) < maxMessages && len(text) > 0 && !c.echoes(text) {
				messages = append(messages, printable(string(text)))
			}
			return nil
		})
	})
	if err != nil {
		return nil
	}
	return messages
}

// echoes tells whether a message repeats a part of what must not be told, as it is, in base64 or in hex.
func (c *call) echoes(message []byte) bool {
	const part = 8 // bytes; less is chance
	for _, secret := range [][]byte{c.secret, c.token} {
		forms := [][]byte{secret, base64.StdEncoding.AppendEncode(nil, secret), hex.AppendEncode(nil, secret)}
		found := false
		for _, form := range forms {
			for at := 0; at+part <= len(form); at++ {
				found = found || bytes.Contains(message, form[at:at+part])
			}
		}
		clear(forms[1])
		clear(forms[2])
		if found {
			return true
		}
	}
	return false
}

// lost is a request without a complete answer.
func (c *call) lost(ctx context.Context, n *Node, err error, so *progress, timeout time.Duration) error {
	connected := so.connected.Load()
	e := &Error{is: []error{ErrUnavailable}, advice: "check that the node runs and can be reached"}
	if connected && c.changes {
		e.is = append(e.is, ErrMayHaveHappened)
		e.advice = "look at the state of the node before anything else"
	}
	what, advice, isForeign := "", "", false
	if !connected {
		what, advice, isForeign = foreign(err, so.handshake.Load())
	}
	switch {
	case isForeign:
		e.is, e.what, e.advice = []error{ErrIdentity}, "nothing was sent, "+what, advice
	case !c.init && ctx.Err() != nil:
		e.what, e.cause = "no answer", ctx.Err()
		if e.Is(ErrMayHaveHappened) {
			break
		}
		e.advice = ""
	case errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded):
		e.what = "no answer within " + timeout.String() // no cause: this deadline is not the caller's
		if !connected {
			e.what = "no connection within " + timeout.String()
		}
	case !connected:
		e.what, e.cause = "no connection", bare(err)
	default:
		e.what, e.cause = "the connection ended before the answer was complete", bare(err)
	}
	return c.failed(n, e)
}

// bare is a network error without the address, which the error that wraps it tells anyway.
func bare(err error) error {
	if outer, is := errors.AsType[*net.OpError](err); is {
		return outer.Err
	}
	return err
}

// retryAfter reads a Retry-After header in seconds, no more than an hour. Vault writes no dates there.
func retryAfter(text string) time.Duration {
	seconds, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0
	}
	return min(time.Duration(seconds)*time.Second, time.Hour)
}
