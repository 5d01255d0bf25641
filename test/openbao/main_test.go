// Package openbao_test proves the seal plugin of OpenBao end to end: the real program, started by a host that does what an
// OpenBao server does, with SoftHSM, with a module that plays a smart card and with a NetHSM double.
package openbao_test

import (
	"os"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestMain(m *testing.M) {
	if os.Getenv(hostVariable) != "" {
		os.Exit(runHost())
	}
	os.Exit(vaulttest.Main(m))
}
