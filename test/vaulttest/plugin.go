package vaulttest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Name is the plugin's name in the catalog.
const Name = "vault-plugin-secrets-nitrokey"

// Build describes a build of the plugin, or of another command of ours. The zero value is the one that users get, as version [DefaultVersion], with the
// race detector where the tests have it: a race that it finds fails the test, see [Start].
type Build struct {
	Command string // of the folder cmd; default: the plugin
	Version string // reported to Vault, "v1.2.3"
	Tags    string // build tags: "bench"
	NoCGO   bool   // CGO_ENABLED=0: no module host inside
	NoRace  bool   // without the race detector, even where the tests have it: to measure
}

// DefaultVersion is the version of builds that say nothing else.
const DefaultVersion = "v0.0.1-test"

// Binary is a built program.
type Binary struct {
	Path    string
	SHA256  string // hexadecimal
	Version string
}

var (
	buildsMu sync.Mutex
	builds   = map[Build]Binary{}
)

// Binary compiles the program, or returns what was compiled before.
func (b Build) Binary(t testing.TB) Binary {
	t.Helper()
	if b.Version == "" {
		b.Version = DefaultVersion
	}
	if b.Command == "" {
		b.Command = Name
	}
	buildsMu.Lock()
	defer buildsMu.Unlock()
	if made, ok := builds[b]; ok {
		return made
	}
	dir, err := os.MkdirTemp(scratch, "build-") //nolint:usetesting // later tests use it as well
	must(t, err)
	path := filepath.Join(dir, b.Command)
	args := []string{"build", "-trimpath", "-ldflags", "-X " + versionVariable + "=" + b.Version, "-o", path}
	if b.Tags != "" {
		args = append(args, "-tags", b.Tags)
	}
	var env []string
	switch {
	case b.NoCGO: // the race detector needs cgo
		env = []string{"CGO_ENABLED=0"}
	case raceDetector && !b.NoRace:
		args = append(args, "-race")
	}
	_, err = run(context.Background(), Root(), env, "go", append(args, "./cmd/"+b.Command)...)
	must(t, err)
	made := Binary{Path: path, SHA256: SHA256(t, path), Version: b.Version}
	builds[b] = made
	return made
}

// versionVariable is what -ldflags sets, as the Makefile does.
const versionVariable = "vault-plugin-secrets-nitrokey/backend.Version"

// SHA256 is a file's hash in hexadecimal.
func SHA256(t testing.TB, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	must(t, err)
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// Tool is the path of a tool of scripts/tool: "vault" or "etcd". It is built where it is missing, which takes
// minutes: `make test` does so beforehand.
func Tool(t testing.TB, name string) string {
	t.Helper()
	toolsMu.Lock()
	defer toolsMu.Unlock()
	if path, ok := tools[name]; ok {
		return path
	}
	path, err := run(context.Background(), Root(), nil, filepath.Join(Root(), "scripts", "tool"), name)
	must(t, err)
	if strings.ContainsRune(path, '\n') {
		must(t, fmt.Errorf("scripts/tool %s printed more than a path: %q", name, path))
	}
	tools[name] = path
	return path
}

var (
	toolsMu sync.Mutex
	tools   = map[string]string{}
)
