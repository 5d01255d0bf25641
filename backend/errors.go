package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// retryAfter is the pause that a 503 asks for. It reaches clients of a mount that was tuned with
// -allowed-response-headers=Retry-After.
const retryAfter = 2 * time.Second

// statusError is an error whose HTTP code the handler chose itself.
type statusError struct {
	code int
	err  error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

// mistake is an error of the user: 400 with a sentence that says what to do.
func mistake(format string, args ...any) error {
	return &statusError{http.StatusBadRequest, fmt.Errorf(format, args...)}
}

// absent is 404. Only for writes: a read answers 404 by a nil response.
func absent(format string, args ...any) error {
	return &statusError{http.StatusNotFound, fmt.Errorf(format, args...)}
}

// status is the HTTP code of an error.
func status(err error) int {
	if chosen := (*statusError)(nil); errors.As(err, &chosen) {
		return chosen.code
	}
	for _, group := range statuses {
		for _, sentinel := range group.errors {
			if errors.Is(err, sentinel) {
				return group.code
			}
		}
	}
	if pin := (*hsm.PINError)(nil); errors.As(err, &pin) {
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

// passing are the states that pass by themselves, or by a hand that plugs something in.
var passing = []error{
	context.DeadlineExceeded, context.Canceled,
	hsm.ErrUnavailable, store.ErrUnavailable, device.ErrClosed, keyring.ErrGenerating,
	hsm.ErrMayHaveHappened, node.ErrMayHaveHappened, // every write here knows its own repetition
	node.ErrUnavailable, cluster.ErrBusy, cluster.ErrIntentElsewhere,
	cluster.ErrHeld,      // the repetition stores what is held
	cluster.ErrTokenLeft, // and revokes what is left
	errAbsent,
}

// alarms want a person, whatever else is the matter: shares went to another cluster, or a cluster's keys are lost.
var alarms = []error{cluster.ErrForeignCluster, cluster.ErrEmpty}

// passes tells whether the same request may succeed a little later.
func passes(err error) bool {
	return slices.ContainsFunc(passing, func(sentinel error) bool { return errors.Is(err, sentinel) })
}

// statuses is read from the top: an error that joins several, as one of a key with two HSMs does, gets the first code
// that fits. So "one HSM is away" wins over "and the other cannot open it": a repeat may succeed.
//
// A client repeats what failed with 5xx. That is harmless for every error here: what was begun before it is either
// undone or resumed by the repeated request.
var statuses = []struct {
	code   int
	errors []error
}{
	{http.StatusConflict, alarms},
	{http.StatusServiceUnavailable, passing},
	// What lies in a store is damaged: nobody's mistake in this request either, and a backup mends it. The parts of a
	// record have mistakes of their own, which are none of the request's.
	{http.StatusServiceUnavailable, []error{keyring.ErrRecordMalformed, custody.ErrRecordMalformed, cluster.ErrFacts, store.ErrCorrupt}},
	// A node and what is kept of its cluster do not fit, and no repeat mends that. Before what is said of the item.
	{http.StatusConflict, []error{cluster.ErrMismatch, cluster.ErrWrongShares, cluster.ErrExists, node.ErrWrongShares, node.ErrAlreadyInitialized, node.ErrInProgress}},
	{http.StatusNotFound, []error{cluster.ErrNoMaterial, keyring.ErrKeyNotFound, custody.ErrNotFound, store.ErrNotFound}},
	{http.StatusConflict, []error{store.ErrAmbiguous}},
	{http.StatusInsufficientStorage, []error{hsm.ErrFull, store.ErrFull}},
	{http.StatusBadRequest, []error{
		errNoStore, device.ErrConfig, transit.ErrMalformed,
		envelope.ErrMalformed, envelope.ErrContext, envelope.ErrNotAuthentic, envelope.ErrDecrypt, envelope.ErrNotRecipient,
		envelope.ErrTooLarge, envelope.ErrInvalid,
		hsm.ErrCiphertext, hsm.ErrExists,
		store.ErrConflict, store.ErrInvalidName, store.ErrTooLarge,
		keyring.ErrInvalid, keyring.ErrKeyExists, keyring.ErrVersionTooOld, keyring.ErrVersionUnknown, keyring.ErrNotReady,
		keyring.ErrDeleting, keyring.ErrWeakKey, keyring.ErrUnusableKey, keyring.ErrSameKey, keyring.ErrInUse,
		keyring.ErrDeletionNotAllowed, keyring.ErrNotOurs, keyring.ErrRequestReused, keyring.ErrRecordMismatch,
		keyring.ErrTooLarge,
		custody.ErrInvalid, custody.ErrConflict, custody.ErrStale, custody.ErrAhead, custody.ErrVanished, custody.ErrUnrecorded,
		cluster.ErrInvalid, cluster.ErrPGPKey, cluster.ErrNotInitialized, node.ErrConfig, node.ErrUninitialized,
	}},
	// What follows is nobody's mistake in this request, and no repeat mends it: an HSM lost its key, is locked, does not let
	// the configured user do what it did before, or something else answers in its place and understands no request; a node of a
	// cluster likewise. It is not 403, which says that Vault's own policy forbids the request.
	{http.StatusServiceUnavailable, []error{
		hsm.ErrLocked, hsm.ErrForbidden, device.ErrRequest, hsm.ErrNotFound, hsm.ErrAmbiguous, hsm.ErrKeyChanged, hsm.ErrUnsupported,
		store.ErrDenied, keyring.ErrNoDevice,
		node.ErrIdentity, node.ErrRedirect, node.ErrRefused, node.ErrStandby, node.ErrMalformed, node.ErrNotInProgress,
	}},
}

// fail turns an error into what Vault makes the right HTTP answer of. Errors cross to Vault's process by their type, and
// a wrapped sentinel arrives as a bare 500: what goes out is one of Vault's own values, unwrapped.
func (b *backend) fail(ctx context.Context, req *logical.Request, err error) (*logical.Response, error) {
	if errors.Is(err, logical.ErrReadOnly) {
		return nil, logical.ErrReadOnly // Vault forwards the request to a node that may write
	}
	code := status(err)
	if code != http.StatusBadRequest && code != http.StatusNotFound {
		b.logger.Warn("answering with an error", "path", req.Path, "operation", string(req.Operation), "status", code, "error", err)
	}
	switch code {
	case http.StatusBadRequest:
		return logical.ErrorResponse("%s", err.Error()), logical.ErrInvalidRequest
	case http.StatusServiceUnavailable:
		text := err.Error()
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			text = "the request was not done within the mount's request_timeout: " + text
		}
		if !passes(err) {
			return nil, logical.CodedError(code, text)
		}
		return &logical.Response{Headers: map[string][]string{
			"Retry-After": {strconv.Itoa(int(retryAfter / time.Second))},
		}}, logical.CodedError(code, text)
	case http.StatusInternalServerError:
		return nil, errors.New(err.Error()) // not wrapped, see above
	default:
		return nil, logical.CodedError(code, err.Error())
	}
}

// failures describes the errors that clients meet.
var failures = map[int]string{
	http.StatusBadRequest: "The request is wrong; the error says what to do.",
	http.StatusNotFound:   "There is nothing of that name, or nothing to list.",
	http.StatusConflict: "What is there contradicts itself, and wants a person: the store holds two values where one belongs, written by two machines at " +
		"once, or a cluster and what is kept of it do not fit; the error says which, and what to do.",
	http.StatusServiceUnavailable:  "An HSM, a store or a node did not answer in time, or cannot be used now. Repeating the request is harmless.",
	http.StatusInsufficientStorage: "The HSM or the store has no room.",
}

// describeFailures adds to an operation's documentation the errors that it may answer: a fault of the plugin itself, 500,
// apart.
func describeFailures(pattern string, captured []string, kind logical.Operation, operation *framework.PathOperation) {
	if operation.Responses == nil {
		operation.Responses = map[int][]framework.Response{}
	}
	for _, code := range mayAnswer(pattern, captured, kind) {
		if operation.Responses[code] == nil {
			operation.Responses[code] = []framework.Response{{Description: failures[code]}}
		}
	}
}

// mayAnswer lists the errors that an operation may answer.
func mayAnswer(pattern string, captured []string, kind logical.Operation) []int {
	codes := []int{http.StatusBadRequest, http.StatusServiceUnavailable}
	writes := kind == logical.CreateOperation || kind == logical.UpdateOperation
	material := strings.HasPrefix(pattern, "material/")
	one := strings.HasSuffix(pattern, framework.GenericNameRegex("name")) // and not an action on it
	// Devices, stores and clusters are made by the same write that changes them, and what is not there is deleted without a word.
	clusters := strings.HasPrefix(pattern, clustersPrefix)
	configures := one && (strings.HasPrefix(pattern, devicesPrefix) || strings.HasPrefix(pattern, storesPrefix) || clusters)
	named := len(captured) > 0 && kind != logical.DeleteOperation
	if kind == logical.ListOperation || named && (!writes || !configures) {
		codes = append(codes, http.StatusNotFound)
	}
	acts := clusters && !one && len(captured) > 0
	usesStore := material && len(captured) > 0 || writes && strings.HasPrefix(pattern, storesPrefix)
	if usesStore || acts {
		codes = append(codes, http.StatusConflict)
		if writes && (one || acts) {
			codes = append(codes, http.StatusInsufficientStorage)
		}
	}
	return codes
}
