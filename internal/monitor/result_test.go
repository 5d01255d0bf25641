package monitor

import (
	"errors"
	"fmt"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestADeviceResultTellsWhetherTheHSMAnswers(t *testing.T) {
	for _, test := range []struct {
		err      error
		result   string
		answered bool
	}{
		{nil, "ok", true},
		{hsm.ErrUnavailable, "unavailable", false},
		{hsm.ErrLocked, "locked", false},
		{&hsm.PINError{TriesLeft: 2, Detail: "wrong PIN"}, "locked", false},
		{hsm.ErrNotFound, "error", true},
		{errors.New("the key does not like it"), "error", true},
	} {
		err := test.err
		if err != nil {
			err = fmt.Errorf("device one: %w", err)
		}
		if result, answered := DeviceResult(err); result != test.result || answered != test.answered {
			t.Errorf("%v is %q, %t; want %q, %t", err, result, answered, test.result, test.answered)
		}
	}
}
