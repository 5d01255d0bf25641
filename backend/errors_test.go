package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin/pb"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

func TestErrorsHaveTheirStatus(t *testing.T) {
	for want, errs := range map[int][]error{
		http.StatusBadRequest: {
			device.ErrConfig, transit.ErrMalformed,
			envelope.ErrMalformed, envelope.ErrContext, &envelope.ContextError{Field: "use"}, envelope.ErrNotRecipient, envelope.ErrDecrypt,
			envelope.ErrNotAuthentic, envelope.ErrTooLarge, envelope.ErrInvalid,
			hsm.ErrCiphertext, store.ErrConflict, store.ErrInvalidName, store.ErrTooLarge,
			keyring.ErrInvalid, keyring.ErrKeyExists, keyring.ErrVersionTooOld, keyring.ErrVersionUnknown, keyring.ErrNotReady,
			keyring.ErrDeleting, keyring.ErrWeakKey, keyring.ErrUnusableKey, keyring.ErrSameKey, keyring.ErrInUse,
			keyring.ErrDeletionNotAllowed, keyring.ErrNotOurs, keyring.ErrRequestReused, keyring.ErrRecordMismatch, keyring.ErrTooLarge,
			custody.ErrInvalid, custody.ErrConflict, custody.ErrStale, custody.ErrAhead, custody.ErrVanished, custody.ErrUnrecorded,
			errNoStore, mistake("x"),
		},
		http.StatusNotFound: {keyring.ErrKeyNotFound, custody.ErrNotFound, store.ErrNotFound, absent("x")},
		http.StatusServiceUnavailable: {
			hsm.ErrUnavailable, hsm.ErrMayHaveHappened, hsm.ErrLocked, hsm.ErrForbidden, device.ErrRequest, hsm.ErrNotFound, hsm.ErrAmbiguous, hsm.ErrKeyChanged, hsm.ErrUnsupported,
			store.ErrUnavailable, store.ErrDenied, device.ErrClosed, keyring.ErrGenerating, keyring.ErrNoDevice,
			context.DeadlineExceeded, context.Canceled,
			&hsm.PINError{TriesLeft: 2}, &hsm.PINError{TriesLeft: 0}, &hsm.PINError{TriesLeft: -1, Barred: true},
			keyring.ErrRecordMalformed, custody.ErrRecordMalformed, store.ErrCorrupt,
			fmt.Errorf("%w: %w", keyring.ErrRecordMalformed, envelope.ErrMalformed),
			// One HSM is away and the other cannot: a repeat may succeed.
			errors.Join(hsm.ErrNotFound, hsm.ErrUnavailable), errors.Join(envelope.ErrDecrypt, hsm.ErrUnavailable),
		},
		http.StatusInsufficientStorage: {hsm.ErrFull, store.ErrFull},
		http.StatusConflict:            {store.ErrAmbiguous},
		http.StatusInternalServerError: {errStorage},
	} {
		for _, err := range errs {
			if got := status(fmt.Errorf("doing something: %w", err)); got != want {
				t.Errorf("status of %q = %d, want %d", err, got, want)
			}
		}
	}
}

func TestErrorsSurviveTheWayToVault(t *testing.T) {
	m := newMount(t)
	request := &logical.Request{Operation: logical.UpdateOperation, Path: "wrap/prod"}
	for name, test := range map[string]struct {
		err    error
		status int
	}{
		"a mistake":      {fmt.Errorf("wrapping: %w", envelope.ErrTooLarge), 400},
		"an absence":     {fmt.Errorf("wrapping: %w", keyring.ErrKeyNotFound), 404},
		"an HSM away":    {fmt.Errorf("opening: %w", hsm.ErrUnavailable), 503},
		"a bad PIN":      {&hsm.PINError{TriesLeft: 2, Detail: "the PIN is wrong"}, 503},
		"a full HSM":     {fmt.Errorf("writing: %w", hsm.ErrFull), 507},
		"anything else":  {errStorage, 500},
		"a write twice":  {store.ErrAmbiguous, 409},
		"a chosen state": {&statusError{http.StatusBadRequest, hsm.ErrNotFound}, 400},
	} {
		t.Run(name, func(t *testing.T) {
			response, err := m.fail(context.Background(), request, test.err)
			m.receive(request, response, err).want(t, test.status).says(t, test.err.Error())
		})
	}
	_, err := m.fail(context.Background(), request, fmt.Errorf("writing: %w", logical.ErrReadOnly))
	if pb.ErrToProtoErr(err) == nil || err != logical.ErrReadOnly { //nolint:errorlint // Vault compares with ==
		t.Errorf("a read-only storage gives %v, want the bare sentinel, by which Vault forwards the request", err)
	}
}
