package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/daemon"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/server"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// The exit codes. Scripts rely on them: they never change their meaning.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitUnavailable = 3
	exitNotFound    = 4
	exitRefused     = 5
	exitInterrupted = 130 // 128 + SIGINT, as shells count
)

const exitCodesHelp = `Exit codes:
  0    done
  1    failed, and the message says why
  2    wrong usage or configuration
  3    an HSM, a store or a node is unavailable, or busy: trying again may help
  4    there is no device, key, store, cluster, token or item of that name, or nothing is kept of the cluster
  5    refused: a PIN, a password, a role, a locked HSM, an unsafe key, or a node that is not what it should be; a person has to act
  130  interrupted`

// usageError is a mistake on the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usage says what is wrong on the command line, and what to write instead.
func usage(format string, args ...any) error { return &usageError{fmt.Errorf(format, args...)} }

// exitCodes is read from the top; the first code with an error that fits is the one. Who calls it again after 3 must
// not spend tries of a PIN, so what was refused comes before what is unavailable: of a key with two HSMs one may be
// both.
var exitCodes = []struct {
	code   int
	errors []error
}{
	{exitInterrupted, []error{context.Canceled}},
	{exitUsage, []error{config.ErrInvalid, device.ErrConfig, pkcs11.ErrConfig, audit.ErrUnsafe}},
	{exitRefused, []error{
		hsm.ErrLocked, hsm.ErrForbidden, store.ErrDenied,
		cluster.ErrForeignCluster, cluster.ErrMismatch, cluster.ErrWrongShares, node.ErrIdentity, node.ErrRedirect, node.ErrDenied,
		errLegacyKey,
	}},
	{exitUnavailable, []error{
		context.DeadlineExceeded, hsm.ErrUnavailable, store.ErrUnavailable,
		cluster.ErrHeld, cluster.ErrBusy, cluster.ErrIntentElsewhere, node.ErrUnavailable, node.ErrInProgress, errSilent,
	}},
	{exitNotFound, []error{
		keyring.ErrKeyNotFound, keyring.ErrNoDevice, hsm.ErrNotFound, store.ErrNotFound, errNotFound,
		cluster.ErrNoMaterial, cluster.ErrNotInitialized, custody.ErrNotFound, token.ErrUnknown,
	}},
	{exitUsage, []error{keyring.ErrInvalid, cluster.ErrInvalid, cluster.ErrPGPKey, custody.ErrInvalid, daemon.ErrConfig, server.ErrConfig, token.ErrInvalid}},
	{exitUnavailable, []error{daemon.ErrSealed}}, // and nothing is known to be wrong
}

// errNotFound is for names that the configuration lacks.
var errNotFound = errors.New("not in the configuration")

// exitCode is the exit code of an error.
func exitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if child := (*childError)(nil); errors.As(err, &child) {
		return child.code
	}
	if mistake := (*usageError)(nil); errors.As(err, &mistake) || unsent(err) {
		return exitUsage
	}
	if pin := (*hsm.PINError)(nil); errors.As(err, &pin) {
		return exitRefused
	}
	for _, group := range exitCodes {
		if slices.ContainsFunc(group.errors, func(sentinel error) bool { return errors.Is(err, sentinel) }) {
			return group.code
		}
	}
	return exitFailed
}

// unsent tells whether package nethsm refused to send something: a passphrase that is too short, a name that is none. Where a
// NetHSM answered, the mistake may be ours.
func unsent(err error) bool {
	_, answered := errors.AsType[*nethsm.Error](err)
	return !answered && (errors.Is(err, nethsm.ErrRequest) || errors.Is(err, nethsm.ErrConfig))
}
