package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
)

// TestMain makes the test binary a module host where it is started as one, and the command where a script calls it.
func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	testscript.Main(m, map[string]func(){"nitroseal": main})
}
