package test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// With memory locked, whatever a process maps is resident: a plugin that carries cgo would take hundreds of megabytes.
// The build without cgo stays small, and its module host is a program of its own.
func TestLockedMemoryStaysSmall(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("locking memory needs root or CAP_IPC_LOCK; everything else is tested without")
	}
	host := vaulttest.Build{NoRace: true}.Binary(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{
		Options: vaulttest.Options{MLock: true},
		Build:   vaulttest.Build{NoCGO: true},
		Args:    []string{"-module-host=" + host.Path, "-module-host-sha256=" + host.SHA256},
	})
	for range 300 {
		site.MustUnwrap(t, "prod", wrapped, secret)
	}
	// Somewhat above what docs/benchmarks.md shows: this is to notice that something big came in.
	const pluginLimit, hostLimit = 140_000_000 / 1024, 50_000_000 / 1024 // KiB
	for _, plugin := range site.Plugins() {
		if kib := plugin.ResidentKiB(t); kib > pluginLimit {
			t.Errorf("the plugin has %d KiB in memory, more than %d", kib, pluginLimit)
		}
	}
	hosts := site.Hosts()
	if len(hosts) != 1 {
		t.Fatalf("the module hosts are %v", hosts)
	}
	mustHaveLocked(t, hosts[0])
	if kib := hosts[0].ResidentKiB(t); kib > hostLimit {
		t.Errorf("the module host has %d KiB in memory, more than %d", kib, hostLimit)
	}
}

// As it runs in production: an ordinary user, and files that may lock memory.
func TestAnOrdinaryUserWithCapIPCLockIsEnough(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("giving a file the capability needs root")
	}
	token := pkcs11test.SoftHSM(t)
	folder := filepath.Dir(os.Getenv("SOFTHSM2_CONF"))
	must(t, os.Chmod(filepath.Dir(folder), 0o755)) // all of the test's temporary folders lie in it
	must(t, filepath.WalkDir(folder, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, 65534, 65534)
	}))
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: token, Options: vaulttest.Options{MLock: true, Nobody: true}})
	site.Restart(t)
	site.MustUnwrap(t, "prod", wrapped, secret)
	plugins, hosts := site.Plugins(), site.Hosts()
	if len(plugins) != 1 || len(hosts) != 1 {
		t.Fatalf("the plugins are %v, the module hosts %v", plugins, hosts)
	}
	if log := site.Log(t); !strings.Contains(log, "memory_locked=true") || strings.Contains(log, "memory_locked=false") {
		t.Error("Vault's log does not say memory_locked=true of every module host")
	}
	for _, process := range append(plugins, hosts...) {
		status := mustHaveLocked(t, process)
		if !strings.Contains(status, "Uid:\t65534\t65534") {
			t.Errorf("%s runs as another user:\n%s", process.Command, status)
		}
	}
}

// mustHaveLocked checks that a process has locked memory, and returns what /proc tells of it.
func mustHaveLocked(t *testing.T, process vaulttest.Process) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", process.PID))
	must(t, err)
	if strings.Contains(string(status), "VmLck:\t       0 kB") {
		t.Errorf("%s has locked nothing:\n%s", process.Command, status)
	}
	return string(status)
}
