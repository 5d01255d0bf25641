package keyring

import (
	"testing"

	"go.uber.org/goleak"
)

// Whatever works in the background is waited for by Close.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
