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

// verdict is how an error is answered.
type verdict struct {
	code  int
	after time.Duration // the pause that a 503 asks for, 0 for none
	text  string        // for the client
}

// judge decides how an error is answered. An error that joins several, as one of a key with two HSMs does, gets the first code
// that fits: "one HSM is away" wins over "and the other cannot open it", because a repeat may succeed.
//
// What a client did wrong is said to it in full. What is wrong here is said in one word, and the rest is for our own log: devices,
// addresses and files are nothing that other people's Vaults write to their logs.
func judge(err error) verdict {
	var chosen *statusError
	var busy *BusyError
	var pin *hsm.PINError
	first := func(sentinels []error) error {
		at := slices.IndexFunc(sentinels, func(sentinel error) bool { return errors.Is(err, sentinel) })
		if at < 0 {
			return nil
		}
		return sentinels[at]
	}
	switch {
	case errors.As(err, &chosen):
		return verdict{chosen.code, 0, err.Error()}
	case errors.As(err, &busy):
		return verdict{http.StatusServiceUnavailable, busy.After, busy.Error()}
	case errors.Is(err, token.ErrDenied):
		return verdict{http.StatusForbidden, 0, token.ErrDenied.Error()}
	}
	if audit := first([]error{audit.ErrNoSink, audit.ErrClosed}); audit != nil {
		return verdict{http.StatusServiceUnavailable, retryAfter, "the seal server's audit log takes no line" + more}
	}
	if passes := first(passing); passes != nil {
		return verdict{http.StatusServiceUnavailable, retryAfter, passes.Error() + more}
	}
	if errors.Is(err, keyring.ErrRecordMalformed) { // its parts have mistakes of their own, which are none of the request's
		return verdict{http.StatusServiceUnavailable, 0, keyring.ErrRecordMalformed.Error() + more}
	}
	if first(mistaken) != nil {
		return verdict{http.StatusBadRequest, 0, err.Error()}
	}
	if stays := first(stuck); stays != nil {
		return verdict{http.StatusServiceUnavailable, 0, stays.Error() + more}
	}
	if errors.As(err, &pin) {
		return verdict{http.StatusServiceUnavailable, 0, "the HSM does not take the PIN" + more}
	}
	return verdict{http.StatusInternalServerError, 0, "internal error" + more}
}

// more says where there is more.
const more = "; the seal server's log says more"

// inVaultsWords answers mistakes as Vault's transit does where clients and scripts may look for its words.
func inVaultsWords(err error) error {
	switch {
	case judge(err).code != http.StatusBadRequest: // a damaged record, or an HSM that is away beside one that knows nothing of it
		return err
	case errors.Is(err, keyring.ErrKeyNotFound):
		return mistake("encryption key not found: %w", err)
	case errors.Is(err, envelope.ErrMalformed), errors.Is(err, envelope.ErrContext):
		return mistake("%w: %w", ErrMalformed, err)
	}
	return err
}
