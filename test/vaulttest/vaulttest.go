// Package vaulttest runs a real Vault with this project's plugin for tests and benchmarks.
//
// [Start] gives a server of one's own: raft storage in a temporary folder, TLS from a CA made for it, free loopback
// ports, the plugin in its plugin directory. It is initialised, unsealed and active when Start returns. [Build]
// compiles the plugin, once for each version and set of tags, and [Server.Register] puts it into the catalog.
//
// Everything ends with the test: processes are known by the ids they were started with, and a process that outlives
// its Vault fails the test. The logs of a server are printed where its test fails.
//
// A package that uses this one has `func TestMain(m *testing.M) { os.Exit(vaulttest.Main(m)) }`.
package vaulttest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// scratch holds what tests of one run share: the builds of the plugin. Main makes and removes it.
var scratch string

// Main runs the tests of a package with what they share, and returns the exit code.
func Main(m *testing.M) int {
	// A developer's own Vault must not reach into tests, nor the tests into it.
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		if strings.HasPrefix(name, "VAULT_") && name != "VAULT_BIN" {
			if err := os.Unsetenv(name); err != nil {
				panic(err)
			}
		}
	}
	var err error
	if scratch, err = os.MkdirTemp("", "nitroseal-test-"); err != nil {
		panic(err)
	}
	defer os.RemoveAll(scratch) //nolint:errcheck // a temporary folder
	return m.Run()
}

// Root is the folder of go.mod.
var Root = sync.OnceValue(func() string {
	dir, err := os.Getwd()
	for ; err == nil && dir != "/"; dir = filepath.Dir(dir) {
		if _, missing := os.Stat(filepath.Join(dir, "LICENSE")); missing == nil {
			return dir
		}
	}
	panic(fmt.Sprintf("tests run inside the repository, this is %s (%v)", dir, err))
})

// Eventually asks until the answer is nil, and fails the test with the last error after the limit.
func Eventually(t testing.TB, limit time.Duration, what string, ask func() error) {
	t.Helper()
	deadline := time.After(limit)
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("waited %s for %s: %v", limit, what, err)
		case <-again.C:
		}
	}
}
