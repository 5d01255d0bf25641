package node

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
	"unicode"
)

// What an error is, for errors.Is. An error can be more than one of them.
var (
	// ErrConfig: the configuration cannot be used. Nothing was sent.
	ErrConfig = errors.New("the configuration of a node is wrong")
	// ErrUnavailable: no answer, or one that says to try again (429, most of 5xx).
	ErrUnavailable = errors.New("the node is unavailable")
	// ErrIdentity: what answers is not the node that we know by TLS. Nothing was sent.
	ErrIdentity = errors.New("the node is not the one that is known by TLS")
	// ErrRedirect: the node sent us elsewhere. We do not go.
	ErrRedirect = errors.New("the node redirects")
	// ErrRefused: the node refused the request (4xx), and would again.
	ErrRefused = errors.New("the node refuses")
	// ErrDenied: the token is not valid, or may not do this (403). It is ErrRefused as well.
	ErrDenied = errors.New("the token is refused")
	// ErrSealed: the node is sealed. It is ErrUnavailable as well.
	ErrSealed = errors.New("the node is sealed")
	// ErrUninitialized: the node has no keys yet.
	ErrUninitialized = errors.New("the node is not initialized")
	// ErrAlreadyInitialized: the node has been initialised before. This request changed nothing.
	ErrAlreadyInitialized = errors.New("the node is already initialized")
	// ErrWrongShares: the shares given so far do not open it, or one is no share at all.
	ErrWrongShares = errors.New("the shares do not open it")
	// ErrInProgress: another attempt is under way.
	ErrInProgress = errors.New("another attempt is under way")
	// ErrNotInProgress: there is no attempt to take part in.
	ErrNotInProgress = errors.New("no attempt is under way")
	// ErrMayHaveHappened: the answer was lost; the node may have done it.
	ErrMayHaveHappened = errors.New("it may have happened nevertheless")
	// ErrStandby: the active node must serve this, and this one could not pass it on.
	ErrStandby = errors.New("the active node must serve this")
	// ErrMalformed: the answer is none that Vault gives.
	ErrMalformed = errors.New("the answer is malformed")
)

// Error is a call that failed. It holds no secret.
type Error struct {
	Op   string // a gerund: "reading the seal status of"
	Node string // its address
	// Status is the HTTP status of the answer; 0 where there was none.
	Status int
	// Messages are Vault's own: printable, bounded, and none that repeats what was sent.
	Messages []string
	// RetryAfter is how long the node asked to be left alone; 0 where it did not say.
	RetryAfter time.Duration

	is     []error // of the errors above
	what   string  // what happened, where Status does not tell
	advice string  // what to do next
	cause  error   // the caller's context error or a network error; nil where what says it all
}

// Error says what happened, at which node, and what to do next.
func (e *Error) Error() string {
	var text strings.Builder
	fmt.Fprintf(&text, "%s %s: ", e.Op, e.Node)
	switch {
	case e.what != "":
		text.WriteString(e.what)
	case e.Status != 0:
		fmt.Fprintf(&text, "the answer is %d %s", e.Status, http.StatusText(e.Status))
	}
	if len(e.Messages) > 0 {
		fmt.Fprintf(&text, ": %s", strings.Join(e.Messages, "; "))
	}
	if e.cause != nil {
		fmt.Fprintf(&text, ": %s", printable(e.cause.Error()))
	}
	if e.Is(ErrMayHaveHappened) {
		text.WriteString("; it may have happened nevertheless")
	}
	if e.advice != "" {
		text.WriteString("; " + e.advice)
	}
	return text.String()
}

// Is implements errors.Is.
func (e *Error) Is(target error) bool {
	for _, kind := range e.is {
		if kind == target {
			return true
		}
	}
	return false
}

// Unwrap implements errors.Is and errors.As for the cause.
func (e *Error) Unwrap() error { return e.cause }

// Bounds of what is shown of an answer.
const (
	maxMessages = 4
	maxMessage  = 300 // bytes of each
)

// printable makes foreign text fit for a line of a log or a terminal.
func printable(text string) string {
	var out strings.Builder
	blank := false
	for _, r := range text {
		if out.Len() >= maxMessage {
			out.WriteString("…")
			break
		}
		switch {
		case unicode.IsSpace(r):
			blank = out.Len() > 0
			continue
		case !unicode.IsPrint(r):
			r = '?'
		}
		if blank {
			out.WriteByte(' ')
			blank = false
		}
		out.WriteRune(r)
	}
	return out.String()
}
