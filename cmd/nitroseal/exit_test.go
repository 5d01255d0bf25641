package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/bankvaults"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/daemon"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/server"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
	"vault-plugin-secrets-nitrokey/nethsm"
)

func TestErrorsHaveExitCodes(t *testing.T) {
	wrong := &hsm.PINError{TriesLeft: -1, Wrong: true, Detail: "wrong"}
	for name, test := range map[string]struct {
		err  error
		code int
	}{
		"no error":                                       {nil, 0},
		"an error of no kind":                            {errors.New("x"), 1},
		"a mistake on the command line":                  {usage("x"), 2},
		"a file that the command line names":             {usage("x: %w", fs.ErrNotExist), 2},
		"a configuration that is wrong":                  {&config.Error{Complaints: []config.Complaint{{Text: "x"}}}, 2},
		"a device that is configured wrong":              {device.ErrConfig, 2},
		"a request that the keyring refuses":             {keyring.ErrInvalid, 2},
		"an HSM key that the request names and is not":   {fmt.Errorf("%w: %w", keyring.ErrInvalid, hsm.ErrNotFound), 4},
		"an HSM that is away":                            {hsm.ErrUnavailable, 3},
		"a store that is away":                           {store.ErrUnavailable, 3},
		"a time that is up":                              {context.DeadlineExceeded, 3},
		"a key that is not there":                        {keyring.ErrKeyNotFound, 4},
		"a device that is not there":                     {errNotFound, 4},
		"a name that the store has not":                  {store.ErrNotFound, 4},
		"a wrong PIN":                                    {wrong, 5},
		"a locked HSM":                                   {hsm.ErrLocked, 5},
		"a role that is too weak":                        {hsm.ErrForbidden, 5},
		"a store that refuses":                           {store.ErrDenied, 5},
		"a NetHSM's refusal":                             {&nethsm.Error{Op: "x", Status: 403}, 5},
		"a NetHSM's absence":                             {&nethsm.Error{Op: "x", Status: 503}, 3},
		"one HSM away and the PIN of another one wrong":  {errors.Join(hsm.ErrUnavailable, wrong), 5},
		"one HSM away and another one without the key":   {errors.Join(hsm.ErrNotFound, hsm.ErrUnavailable), 3},
		"a request that no NetHSM can serve":             {nethsm.ErrRequest, 2},
		"a NetHSM that is described wrong":               {nethsm.ErrConfig, 2},
		"a NetHSM that calls our request wrong":          {&nethsm.Error{Op: "x", Status: 400}, 1},
		"a NetHSM in another state":                      {nethsm.ErrState, 1},
		"a NetHSM that is locked":                        {fmt.Errorf("%w: %w", nethsm.ErrState, hsm.ErrLocked), 5},
		"a NetHSM on which something differs":            {nethsm.ErrDiffers, 1},
		"a backup that was cut":                          {nethsm.ErrBackup, 1},
		"an envelope for something else":                 {envelope.ErrContext, 1},
		"a key that is there already":                    {keyring.ErrKeyExists, 1},
		"an interruption":                                {fmt.Errorf("waiting: %w", context.Canceled), 130},
		"an interruption of a request to an HSM":         {errors.Join(hsm.ErrUnavailable, context.Canceled), 130},
		"no room on the HSM":                             {hsm.ErrFull, 1},
		"an HSM that cannot do that":                     {hsm.ErrUnsupported, 1},
		"a change of which nobody knows whether it came": {hsm.ErrMayHaveHappened, 1},
		"a cluster that is described wrong":              {cluster.ErrInvalid, 2},
		"an audit log that others may write":             {audit.ErrUnsafe, 2},
		"an audit log that nothing takes":                {audit.ErrNoSink, 1},
		"a node that is away":                            {node.ErrUnavailable, 3},
		"a node that somebody else is at":                {cluster.ErrBusy, 3},
		"another host that initialises":                  {cluster.ErrIntentElsewhere, 3},
		"keys that the store did not take yet":           {cluster.ErrHeld, 3},
		"a cluster without keys in custody":              {cluster.ErrNoMaterial, 4},
		"a cluster that is not initialised":              {cluster.ErrNotInitialized, 4},
		"an item that is not there":                      {custody.ErrNotFound, 4},
		"shares that went to another cluster":            {cluster.ErrForeignCluster, 5},
		"a node that is not as recorded":                 {cluster.ErrMismatch, 5},
		"a node that TLS does not know":                  {node.ErrIdentity, 5},
		"a wrapping key that is Bank-Vaults' own":        {fmt.Errorf("x: %w", errLegacyKey), 5},
		"values that do not decrypt":                     {bankvaults.ErrDecrypt, 1},
		"shares that do not fit":                         {cluster.ErrWrongShares, 5},
		"a cluster whose keys nobody has":                {cluster.ErrEmpty, 1},
		"an envelope that is older than expected":        {custody.ErrStale, 1},
		"a daemon that is configured wrong":              {daemon.ErrConfig, 2},
		"a seal server that is configured wrong":         {server.ErrConfig, 2},
		"a token that cannot be":                         {token.ErrInvalid, 2},
		"a token that is not there":                      {token.ErrUnknown, 4},
		"a token in a store that is away":                {fmt.Errorf("storing the token: %w", store.ErrUnavailable), 3},
		"nodes that are sealed when the time is up":      {daemon.ErrSealed, 3},
		"a sealed node whose keys are not here":          {errors.Join(daemon.ErrSealed, cluster.ErrNoMaterial), 4},
		"a sealed node that the shares do not open":      {errors.Join(daemon.ErrSealed, cluster.ErrWrongShares), 5},
		"nothing but silence":                            {errSilent, 3},
		"one node away and another one foreign":          {errors.Join(node.ErrUnavailable, node.ErrIdentity), 5},
	} {
		t.Run(name, func(t *testing.T) {
			if got := exitCode(test.err); got != test.code {
				t.Errorf("exit code %d, want %d", got, test.code)
			}
			if wrapped := fmt.Errorf("doing it: %w", test.err); test.err != nil && exitCode(wrapped) != test.code {
				t.Errorf("wrapped, its exit code is %d, want %d", exitCode(wrapped), test.code)
			}
		})
	}
}

func TestTheHelpListsEveryExitCode(t *testing.T) {
	codes := map[int]bool{exitOK: true, exitFailed: true, exitRefused: true}
	for _, group := range exitCodes {
		codes[group.code] = true
	}
	for code := range codes {
		if !strings.Contains(exitCodesHelp, fmt.Sprintf("\n  %d ", code)) {
			t.Errorf("the help does not explain exit code %d", code)
		}
	}
}
