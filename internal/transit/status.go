package transit

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// retryAfter is the pause that a 503 asks for where nobody knows better. Vault's client tries twice more by itself.
const retryAfter = 2 * time.Second

// statusError is an error whose HTTP code was chosen where it was found.
type statusError struct {
	code int
	err  error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

// mistake is an error of whoever asks: 400.
func mistake(format string, args ...any) error {
	return &statusError{http.StatusBadRequest, fmt.Errorf(format, args...)}
}

// passing are the states that pass by themselves, or by a hand that plugs something in.
var passing = []error{
	context.DeadlineExceeded, context.Canceled,
	hsm.ErrUnavailable, hsm.ErrMayHaveHappened, store.ErrUnavailable, keyring.ErrGenerating,
	keyring.ErrVersionUnknown, // of several servers, one has the newer record already, and the client's next try may reach it
	audit.ErrNoSink, audit.ErrClosed,
}

// mistaken is what the request is to blame for.
var mistaken = []error{
	ErrMalformed, envelope.ErrMalformed, envelope.ErrContext, envelope.ErrNotAuthentic, envelope.ErrDecrypt, envelope.ErrNotRecipient,
	envelope.ErrTooLarge, envelope.ErrInvalid, hsm.ErrCiphertext,
	keyring.ErrInvalid, keyring.ErrKeyNotFound, keyring.ErrVersionTooOld, keyring.ErrNotReady, keyring.ErrDeleting,
}

// stuck is nobody's mistake in the request, and no repeat mends it: an HSM lost its key, is locked or refuses us; a record is
// damaged.
var stuck = []error{
	keyring.ErrRecordMalformed, keyring.ErrNoDevice, store.ErrCorrupt, store.ErrDenied, store.ErrConflict, store.ErrFull,
	hsm.ErrLocked, hsm.ErrForbidden, hsm.ErrNotFound, hsm.ErrAmbiguous, hsm.ErrKeyChanged, hsm.ErrUnsupported,
}

// status returns the HTTP code of an error, and the pause that a 503 asks for, 0 for none. An error that joins several, as one
// of a key with two HSMs does, gets the first code that fits: "one HSM is away" wins over "and the other cannot open it",
// because a repeat may succeed.
func status(err error) (code int, after time.Duration) {
	var chosen *statusError
	var busy *BusyError
	var pin *hsm.PINError
	among := func(sentinel error) bool { return errors.Is(err, sentinel) }
	switch {
	case errors.As(err, &chosen):
		return chosen.code, 0
	case errors.As(err, &busy):
		return http.StatusServiceUnavailable, busy.After
	case errors.Is(err, token.ErrDenied):
		return http.StatusForbidden, 0
	case slices.ContainsFunc(passing, among):
		return http.StatusServiceUnavailable, retryAfter
	case errors.Is(err, keyring.ErrRecordMalformed): // its parts have mistakes of their own, which are none of the request's
		return http.StatusServiceUnavailable, 0
	case slices.ContainsFunc(mistaken, among):
		return http.StatusBadRequest, 0
	case slices.ContainsFunc(stuck, among), errors.As(err, &pin):
		return http.StatusServiceUnavailable, 0
	}
	return http.StatusInternalServerError, 0
}

// inVaultsWords answers as Vault's transit does where clients and scripts may look for its words.
func inVaultsWords(err error) error {
	switch {
	case errors.Is(err, keyring.ErrKeyNotFound):
		return mistake("encryption key not found: %w", err)
	case errors.Is(err, envelope.ErrMalformed), errors.Is(err, envelope.ErrContext):
		return mistake("%w: %w", ErrMalformed, err)
	}
	return err
}
