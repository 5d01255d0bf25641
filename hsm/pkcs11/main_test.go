package pkcs11_test

import (
	"testing"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
)

// TestMain makes the test binary a module host where it is started as one.
func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	goleak.VerifyTestMain(m)
}
