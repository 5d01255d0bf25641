package monitor

import (
	"errors"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Results of operations and reloads, values of a label of metrics.
const (
	ResultOK          = "ok"
	ResultUnavailable = "unavailable"
	ResultLocked      = "locked" // a PIN or a passphrase is missing, wrong or barred
	ResultError       = "error"
)

// DeviceResult is what an operation on an HSM came to. answered tells whether the HSM can be worked with, whatever it said to this
// operation.
func DeviceResult(err error) (result string, answered bool) {
	var pin *hsm.PINError
	switch {
	case err == nil:
		return ResultOK, true
	case errors.As(err, &pin), errors.Is(err, hsm.ErrLocked):
		return ResultLocked, false
	case hsm.Away(err):
		return ResultUnavailable, false
	default:
		return ResultError, true
	}
}
