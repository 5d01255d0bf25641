package kmsplugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

var (
	// errNoWrapper: the wrapper was never made here, or has ended. OpenBao knows it by its code.
	errNoWrapper = errors.New("there is no wrapper of that id in this process; it was never made, or was finalized")
	// errFinalized: the wrapper ends while it is used.
	errFinalized = errors.New("the seal is being finalized")
	// errStanza is wrapped by what is wrong with the settings of a stanza.
	errStanza = errors.New("the seal stanza is wrong")
	// errProof: what was sealed for a proof came back as something else.
	errProof = errors.New("the HSM opened another value than the one that was sealed")
)

// codeOf lists the codes of errors, read from the top: an error that joins several, as one of a key with two HSMs does, has the
// first that fits. "One HSM is away" wins over "the other cannot open it": a repeat may succeed.
//
// NotFound is for wrappers alone, and Unimplemented for nothing: OpenBao takes them for its own errors.
var codeOf = []struct {
	code   codes.Code
	errors []error
}{
	{codes.NotFound, []error{errNoWrapper}},
	{codes.InvalidArgument, []error{errStanza}},
	{codes.Unavailable, []error{
		errFinalized, hsm.ErrUnavailable, store.ErrUnavailable, device.ErrClosed, context.DeadlineExceeded, context.Canceled,
	}},
	// The key record and the stanza do not fit the key, or a rule of ours: a person mends it.
	{codes.FailedPrecondition, []error{
		keyring.ErrNotReady, keyring.ErrVersionUnknown, keyring.ErrVersionTooOld, keyring.ErrRecordMalformed,
	}},
	{codes.InvalidArgument, []error{
		envelope.ErrMalformed, envelope.ErrContext, envelope.ErrNotAuthentic, envelope.ErrDecrypt, envelope.ErrNotRecipient,
		envelope.ErrTooLarge, envelope.ErrInvalid, hsm.ErrCiphertext,
		keyring.ErrInvalid, keyring.ErrRecordMismatch, device.ErrConfig, config.ErrInvalid,
	}},
	// The HSM answers, and does not do it: another key, a locked token, a user without the role.
	{codes.FailedPrecondition, []error{
		hsm.ErrLocked, hsm.ErrForbidden, hsm.ErrNotFound, hsm.ErrAmbiguous, hsm.ErrKeyChanged, hsm.ErrUnsupported,
		device.ErrRequest, keyring.ErrNoDevice, errProof,
	}},
}

// code is the gRPC code of an error.
func code(err error) codes.Code {
	if pin := (*hsm.PINError)(nil); errors.As(err, &pin) && !errors.Is(err, hsm.ErrUnavailable) {
		return codes.FailedPrecondition
	}
	for _, group := range codeOf {
		if slices.ContainsFunc(group.errors, func(sentinel error) bool { return errors.Is(err, sentinel) }) {
			return group.code
		}
	}
	return codes.Internal
}

// fail logs the error of a call and turns it into what OpenBao gets. OpenBao asks every few seconds while it is sealed: what it
// heard before is a detail the second time.
func (s *Server) fail(ctx context.Context, call string, err error) error {
	answer := status.New(code(err), err.Error())
	if ctx.Err() != nil { // the caller's own impatience, whatever came of it
		answer = status.New(status.FromContextError(ctx.Err()).Code(), fmt.Sprintf("%v: %v", ctx.Err(), err))
	}
	level := slog.LevelWarn
	if !s.news(call, err.Error()) {
		level = slog.LevelDebug
	}
	s.options.Logger.Log(ctx, level, "a call failed", "call", call, "code", answer.Code().String(), "error", err)
	return answer.Err()
}

// news tells whether this is not what was said of that call before.
func (s *Server) news(call, text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.said[call]
	s.said[call] = text
	return text != before
}

// recovered lets the next error of a call be news, whatever it says.
func (s *Server) recovered(call string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.said, call)
}
