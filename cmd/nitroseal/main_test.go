package main

import (
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
)

// TestMain makes the test binary a module host where it is started as one, and the command where a script calls it.
func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	if strings.HasSuffix(os.Args[0], ".test") && signal.Ignored(syscall.SIGHUP) {
		// Started under nohup, whose word the command takes: the tests want the signal to arrive, here and in what they start.
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	_ = os.Setenv("GORACE", quickEnd)
	testscript.Main(m, map[string]func(){"nitroseal": main})
}

// quickEnd is $GORACE for the command: the race detector would wait a second at each end of a process.
const quickEnd = "atexit_sleep_ms=20"
