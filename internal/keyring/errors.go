package keyring

import (
	"errors"
	"strings"
)

// The errors of this package. They are wrapped in a sentence that names the key and says what to do: ask with
// errors.Is. Errors of the store, the device and the envelope come through beside them.
var (
	// ErrInvalid: the request itself is wrong: a bad name, a missing field, a value out of bounds.
	ErrInvalid = errors.New("invalid request")
	// ErrKeyNotFound: there is no wrapping key of that name.
	ErrKeyNotFound = errors.New("no such wrapping key")
	// ErrKeyExists: the name is taken.
	ErrKeyExists = errors.New("the wrapping key exists already")
	// ErrVersionTooOld: the envelope's version is below min_decryption_version.
	ErrVersionTooOld = errors.New("the version is too old to be opened")
	// ErrVersionUnknown: the envelope was made by a version that the record does not know.
	ErrVersionUnknown = errors.New("the version is not known")
	// ErrNotReady: the key must not be used for that purpose yet.
	ErrNotReady = errors.New("the wrapping key is not ready for that")
	// ErrGenerating: an HSM key is being made or undone.
	ErrGenerating = errors.New("an HSM key is being made")
	// ErrDeleting: the wrapping key is half deleted; only Delete works.
	ErrDeleting = errors.New("the wrapping key is being deleted")
	// ErrWeakKey: the HSM does not guard the key well enough.
	ErrWeakKey = errors.New("the HSM key is weak")
	// ErrUnusableKey: the HSM key is of a kind that cannot open envelopes, or failed to prove that it can.
	ErrUnusableKey = errors.New("the HSM key cannot be used")
	// ErrSameKey: the HSM key is a recipient already.
	ErrSameKey = errors.New("the HSM key is in use here already")
	// ErrInUse: something still depends on it.
	ErrInUse = errors.New("still in use")
	// ErrNotOurs: the HSM key was adopted or restored; this wrapping key did not make it.
	ErrNotOurs = errors.New("the HSM key was not made for this wrapping key")
	// ErrDeletionNotAllowed: deletion_allowed is not set.
	ErrDeletionNotAllowed = errors.New("deletion is not allowed")
	// ErrRequestReused: a request id came again with another request.
	ErrRequestReused = errors.New("the request id was used for another request")
	// ErrNoDevice: no device of that name is configured. Implementations of [Devices] return it.
	ErrNoDevice = errors.New("no device of that name is configured")
	// ErrRecordMalformed: the record is not one of ours, or damaged.
	ErrRecordMalformed = errors.New("malformed key record")
	// ErrRecordMismatch: the key record is not the one whose SHA-256 was confirmed.
	ErrRecordMismatch = errors.New("the key record is not the confirmed one")
	// ErrTooLarge: the record has no room for another version or recipient.
	ErrTooLarge = errors.New("the wrapping key has too many versions and recipients")
)

// failures are several errors in one line: errors.Join takes one line for each, which reads badly in an answer.
type failures []error

func (f failures) Error() string {
	texts := make([]string, len(f))
	for i, err := range f {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (f failures) Unwrap() []error { return f }
