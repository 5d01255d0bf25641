package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
)

// TestMain makes the test binary a module host where it is started as one, and the command where a script calls it.
func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	_ = os.Setenv("GORACE", quickEnd)
	testscript.Main(m, map[string]func(){"nitroseal": main})
}

// quickEnd is $GORACE for the command: the race detector would wait a second at each end of a process.
const quickEnd = "atexit_sleep_ms=20"
