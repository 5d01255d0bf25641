package hsm

import (
	"errors"
	"fmt"
	"strings"
)

// The errors of every provider. They are wrapped: ask with errors.Is.
var (
	// ErrNotFound: no key, object or token answers to that name.
	ErrNotFound = errors.New("not found on the HSM")
	// ErrAmbiguous: more than one key, object or token answers to that name.
	ErrAmbiguous = errors.New("more than one match on the HSM")
	// ErrExists: the name is taken.
	ErrExists = errors.New("already exists on the HSM")
	// ErrLocked: the HSM wants its passphrase, or its PIN is locked. Trying again does not help; a person does.
	ErrLocked = errors.New("the HSM is locked")
	// ErrUnavailable: the HSM did not answer. Try again, or elsewhere.
	ErrUnavailable = errors.New("the HSM is unavailable")
	// ErrForbidden: the HSM knows the user and does not let it do that: its role or its tags are not enough. Trying again
	// does not help; an administrator of the HSM does.
	ErrForbidden = errors.New("the HSM does not allow this user to do that")
	// ErrUnsupported: this HSM or key cannot do that.
	ErrUnsupported = errors.New("not supported by the HSM")
	// ErrFull: no room for another key or object.
	ErrFull = errors.New("no room on the HSM")
	// ErrMayHaveHappened: the answer was lost, so that nobody knows whether the HSM did what it was asked to. A change that
	// fails without it surely did not happen.
	ErrMayHaveHappened = errors.New("it may or may not have happened")
	// ErrCiphertext: the HSM works, and the block given to it does not decrypt under this key.
	ErrCiphertext = errors.New("the ciphertext does not decrypt under this key")
	// ErrKeyChanged: the key found under a recorded name is not the key that was recorded.
	ErrKeyChanged = errors.New("the key on the HSM is not the key that was recorded")
)

// PINError says that a log-in failed or was not even tried because of the PIN. It is never worth a retry with the same
// PIN.
type PINError struct {
	// TriesLeft is how many tries the token leaves, 0 where it is locked, -1 where it does not tell.
	TriesLeft int
	// Barred is true where nothing was sent to the token, to save its remaining tries.
	Barred bool
	// Wrong is true where the token said that this is not its PIN. It is false for one that expired, or that a locked token
	// did not even look at.
	Wrong bool
	// Detail says what happened, to which token, and what to do next. It never holds a PIN.
	Detail string
}

func (e *PINError) Error() string { return e.Detail }

// Is makes a PINError with no tries left answer to [ErrLocked].
func (e *PINError) Is(target error) bool { return target == ErrLocked && e.TriesLeft == 0 }

// lookupError says which look-up failed.
type lookupError struct {
	query KeyQuery
	count int
	err   error
}

func (e *lookupError) Error() string {
	if e.count > 1 {
		return fmt.Sprintf("looking up the key with %s: %v: %d keys have it; name one by its id as well", e.query, e.err, e.count)
	}
	return fmt.Sprintf("looking up the key with %s: %v", e.query, e.err)
}

func (e *lookupError) Unwrap() error { return e.err }

// String describes the query for people.
func (q KeyQuery) String() string {
	var parts []string
	if q.Label != "" {
		parts = append(parts, fmt.Sprintf("label %q", q.Label))
	}
	if q.ID != "" {
		parts = append(parts, fmt.Sprintf("id %q", q.ID))
	}
	if q.Fingerprint != "" {
		parts = append(parts, fmt.Sprintf("fingerprint %q", q.Fingerprint))
	}
	if parts == nil {
		return "any name"
	}
	return strings.Join(parts, " and ")
}
