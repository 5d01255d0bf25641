package pkcs11_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
)

// TestMain makes the test binary a module host where it is started as one.
func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	// With the race detector a process ends a second late otherwise, and one that takes two is killed.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=20"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}
