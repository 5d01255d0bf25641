package test

import (
	"fmt"
	"os"
	"strings"
	"testing"

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
	if kib := hosts[0].ResidentKiB(t); kib > hostLimit {
		t.Errorf("the module host has %d KiB in memory, more than %d", kib, hostLimit)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", hosts[0].PID))
	must(t, err)
	if strings.Contains(string(status), "VmLck:\t       0 kB") {
		t.Errorf("the module host has locked nothing:\n%s", status)
	}
}
