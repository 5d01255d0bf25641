package nethsm

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// The errors that a NetHSM has besides those of package hsm. They are wrapped: ask with errors.Is.
var (
	// ErrConfig: the options cannot work. Nothing was sent.
	ErrConfig = errors.New("the configuration of the NetHSM is not usable")
	// ErrRequest: the request is wrong, as this client or the NetHSM says. Sending it again is of no use.
	ErrRequest = errors.New("not a request that a NetHSM can serve")
	// ErrState: the node is not in the state that the request is for, or something else has to come first.
	ErrState = errors.New("the NetHSM is not in the state for that")
	// ErrManyNodes: the call concerns one node, and the client has several. Nothing was sent.
	ErrManyNodes = errors.New("this concerns one node, and the client has several: choose one with Client.At")
	// ErrAnswer: what came back is not an answer of a NetHSM.
	ErrAnswer = errors.New("the answer is not one of a NetHSM")
	// ErrContainer: the NetHSM is the software container, which has no network settings, factory reset, reboot, shutdown or
	// update of its own: whatever runs the container does that. It is an [hsm.ErrUnsupported].
	ErrContainer = fmt.Errorf("this NetHSM is a software container, and that is for the appliance: let whatever runs the "+
		"container restart, stop, connect, update or empty it: %w", hsm.ErrUnsupported)
)

// Error is an answer of a NetHSM that says no.
//
// With errors.Is it is [hsm.ErrNotFound], [hsm.ErrForbidden], [hsm.ErrExists], [hsm.ErrLocked], [hsm.ErrUnavailable],
// [hsm.ErrCiphertext] or [hsm.ErrUnsupported], or [ErrRequest] or [ErrState].
type Error struct {
	// Op is what was tried: "decrypting with key \"seal\"".
	Op string
	// Node is host:port of the node that answered.
	Node string
	// Status is the HTTP status.
	Status int
	// Message is what the NetHSM said about it. Many answers say nothing.
	Message string
	// State is the state that the node was in after a 412; empty where it is not known.
	State State
}

// Error says what was tried, where, what the NetHSM answered and what to do about it.
func (e *Error) Error() string {
	node, text := e.told()
	return fmt.Sprintf("%s at %s: %s", e.Op, node, text)
}

func (e *Error) told() (node, text string) {
	answer := fmt.Sprintf("HTTP %d", e.Status)
	if e.Message != "" {
		answer += fmt.Sprintf(" %q", e.Message)
	}
	return e.Node, fmt.Sprintf("%s (%s)", e.meaning().text, answer)
}

// Is tells what the answer means.
func (e *Error) Is(target error) bool {
	for _, kind := range e.meaning().kinds {
		if target == kind {
			return true
		}
	}
	return false
}

// meaning is what an answer comes down to: for errors.Is, and for a person.
type meaning struct {
	kinds []error
	text  string
}

func means(text string, kinds ...error) meaning { return meaning{kinds, text} }

// meaning reads the status; where that does not tell, the message, which is the NetHSM's only way to tell some apart.
func (e *Error) meaning() meaning {
	switch {
	case e.Status == http.StatusBadRequest:
		return badRequest(e.Message)
	case e.Status == http.StatusPreconditionFailed:
		return e.precondition()
	case e.Status == http.StatusForbidden && e.Message == messageTags:
		return means("the key is restricted to tags that this user has none of; give the user one of them", hsm.ErrForbidden)
	case e.Status >= 300 && e.Status < 400:
		return means("something that is not a NetHSM answered and pointed elsewhere; check the URL", hsm.ErrUnavailable)
	case e.Status >= 500 && e.Status != http.StatusNotImplemented:
		return means("the NetHSM has trouble; look at its log, and whether its database (etcd) is there", hsm.ErrUnavailable)
	}
	if meaning, known := statuses[e.Status]; known {
		return meaning
	}
	return means("the NetHSM gave an answer that this client does not know")
}

// statuses are those that need no second look.
var statuses = map[int]meaning{
	http.StatusUnauthorized: means("user name and password were refused; they may be wrong, or the NetHSM cannot reach its "+
		"database (etcd), which looks the same for a minute", hsm.ErrUnavailable),
	http.StatusForbidden: means("the user's role or namespace does not allow it; use a user that may, or ask an "+
		"Administrator of the NetHSM", hsm.ErrForbidden),
	http.StatusNotFound: means("the NetHSM has no such thing, at least not in this user's namespace", hsm.ErrNotFound),
	http.StatusMethodNotAllowed: means("this NetHSM does not know that request; its software may be too old for it",
		hsm.ErrUnsupported),
	http.StatusNotImplemented: means("this NetHSM does not know that request; its software may be too old for it",
		hsm.ErrUnsupported),
	http.StatusNotAcceptable:         means("the NetHSM has no such form of it", ErrRequest),
	http.StatusConflict:              means("there is one already; nothing was changed", hsm.ErrExists),
	http.StatusRequestEntityTooLarge: means("that is more than a NetHSM takes", ErrRequest),
	http.StatusRequestURITooLong:     means("that name is longer than a NetHSM takes", ErrRequest),
	http.StatusUnsupportedMediaType:  means("the NetHSM does not take this kind of content", ErrRequest),
	http.StatusTooManyRequests: means("a wrong password or passphrase came less than a second ago; wait for more than a "+
		"second", hsm.ErrUnavailable),
}

// The messages that decide something. Nothing else in this package compares text.
const (
	messageTags  = "tags restriction not met"
	messageState = "Service not available"
)

// badRequests tell the many meanings of 400 apart, which the NetHSM does by its message alone. A message is in the table by
// its beginning, its end or as a whole: "Decryption failed: …", "… already exists".
var badRequests = []struct {
	message string
	meaning meaning
}{
	{"Decryption failure", means("the ciphertext does not decrypt under this key", hsm.ErrCiphertext)},
	{"Decryption failed: …", means("the ciphertext does not decrypt under this key", hsm.ErrCiphertext)},
	{"Key mechanisms do not allow requested …", means("the key lacks the mechanism for that, and none can be added to a key; "+
		"use one that has it", hsm.ErrUnsupported)},
	{"decrypt mode not supported by Generic key", means("a Generic key decrypts AES_CBC only", hsm.ErrUnsupported)},
	{"Decryption only supported for RSA and Generic keys.", means("this type of key does not decrypt", hsm.ErrUnsupported)},
	{"Generic keys can't sign.", means("a Generic key does not sign", hsm.ErrUnsupported)},
	{"Generic keys have no public key", means("a Generic key has no public key", hsm.ErrUnsupported)},
	{"invalid sign mode", means("this type of key does not sign that way", hsm.ErrUnsupported)},
	{"Signing failure: RSA key too short.", means("the key is too short for that hash", hsm.ErrUnsupported)},
	{"… already exists", means("there is one already; nothing was changed", hsm.ErrExists)},
	{"Invalid JSON: …", means("the NetHSM did not understand the request; it may be of another version than this client "+
		"was made for", ErrRequest)},
	{"Invalid data for JSON schema: …", means("the NetHSM did not understand the request; it may be of another version than "+
		"this client was made for", ErrRequest)},
}

func badRequest(message string) meaning {
	for _, known := range badRequests {
		begin, end, open := strings.Cut(known.message, "…")
		if message == known.message ||
			open && len(message) > len(begin)+len(end) && strings.HasPrefix(message, begin) && strings.HasSuffix(message, end) {
			return known.meaning
		}
	}
	return means("the NetHSM refused the request as it was made; change it as the NetHSM says", ErrRequest)
}

// precondition tells the meanings of 412 apart: the node is in another state, or something else has to come first.
func (e *Error) precondition() meaning {
	switch {
	case e.State == StateLocked:
		return means("the NetHSM is Locked; unlock it with its unlock passphrase", ErrState, hsm.ErrLocked)
	case e.State == StateUnprovisioned:
		return means("the NetHSM is Unprovisioned: it is new or was reset; provision it, or restore a backup", ErrState,
			hsm.ErrUnavailable)
	case e.State == StateFailed:
		return means("the NetHSM is Failed; most often its database (etcd) or the other nodes of its cluster are away, and it "+
			"recovers when they return", ErrState, hsm.ErrUnavailable)
	case e.outOfService() && e.State == StateOperational:
		return means("the NetHSM is Operational, and either that is for another state or it has just changed; try again if "+
			"it needs an Operational NetHSM", ErrState, hsm.ErrUnavailable)
	case e.outOfService():
		return means("the NetHSM is not in the state for that; look at its state", ErrState, hsm.ErrUnavailable)
	default:
		return means("the NetHSM wants something else first", ErrState)
	}
}

// outOfService is true for the 412 of a node whose state does not allow the request, in contrast to that of a condition
// that does not hold (If-Match, a backup without a backup passphrase).
func (e *Error) outOfService() bool {
	return e.Status == http.StatusPreconditionFailed && (e.Message == messageState || e.State != "" && e.State != StateOperational)
}

// wrongPassphrase turns the refusal of a passphrase into an [*hsm.PINError]: 403, and where only a role may ask at all and
// so 403 has two meanings, the one that says something.
func wrongPassphrase(err error, what string, public bool) error {
	var answer *Error
	if !errors.As(err, &answer) || answer.Status != http.StatusForbidden || !public && answer.Message == "" {
		return err
	}
	return &hsm.PINError{TriesLeft: -1, Wrong: true, Detail: fmt.Sprintf(
		"%s at %s: the %s is wrong; a NetHSM does not lock for that, try the right one after a second", answer.Op, answer.Node, what)}
}
