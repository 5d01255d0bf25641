package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func unit(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(vaulttest.Root(), "deploy", "systemd", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// settings are the lines of a unit that say something.
func settings(text string) []string {
	var all []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			all = append(all, line)
		}
	}
	return all
}

func TestTheUnitOfTheSealServerTakesAwayWhatTheOtherUnitDoes(t *testing.T) {
	ours, other := settings(unit(t, "nitroseal-serve.service")), settings(unit(t, "nitroseal.service"))
	differs := []string{"Description=", "Documentation=", "ExecStart=", "TimeoutStartSec=", "TimeoutStopSec=", "RestartSec="}
	for _, line := range other {
		if !slices.Contains(ours, line) && !slices.ContainsFunc(differs, func(name string) bool { return strings.HasPrefix(line, name) }) {
			t.Errorf("%s is missing", line)
		}
	}
	for _, want := range []string{"Before=vault.service openbao.service", "ExecStart=/usr/bin/nitroseal serve --config /etc/nitroseal/nitroseal.hcl", "TimeoutStartSec=infinity"} {
		if !slices.Contains(ours, want) {
			t.Errorf("%s is missing", want)
		}
	}
	for _, vault := range []string{"vault", "openbao"} {
		for _, want := range []string{"After=nitroseal-serve.service", "Wants=nitroseal-serve.service", "StartLimitIntervalSec=0", "Restart=on-failure", "RestartSec=5"} {
			if !slices.Contains(settings(unit(t, vault+".service.d/nitroseal.conf")), want) {
				t.Errorf("the drop-in for %s lacks %s", vault, want)
			}
		}
	}
}

// The units together, as on one machine: systemd must take each, and find no circle in their order.
func TestSystemdTakesTheUnitsOfTheSealServer(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed: the units were compared only")
	}
	told, err := exec.CommandContext(t.Context(), analyze, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	version := 0
	if _, err := fmt.Sscanf(string(told), "systemd %d", &version); err != nil {
		t.Fatalf("which version is %q?", told)
	}
	dir := t.TempDir()
	self, err := os.Executable() // systemd wants the program to be there
	if err != nil {
		t.Fatal(err)
	}
	put := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("nitroseal-serve.service", strings.ReplaceAll(unit(t, "nitroseal-serve.service"), "/usr/bin/nitroseal", self))
	if version < 253 {
		put("nitroseal-serve.service.d/before-253.conf", unit(t, "nitroseal-serve.service.d/before-253.conf"))
	}
	verify := []string{"verify", "--man=no", "--recursive-errors=no", filepath.Join(dir, "nitroseal-serve.service")}
	for _, vault := range []string{"vault", "openbao"} {
		// What both packages have in theirs, and the drop-in must win over.
		put(vault+".service", "[Unit]\nDescription=nitroseal's test\nStartLimitIntervalSec=60\nStartLimitBurst=3\n[Service]\nType=simple\nExecStart="+self+"\n")
		put(vault+".service.d/nitroseal.conf", unit(t, vault+".service.d/nitroseal.conf"))
		verify = append(verify, filepath.Join(dir, vault+".service"))
	}
	cmd := exec.CommandContext(t.Context(), analyze, verify...)
	cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":", "SYSTEMD_LOG_COLOR=0")
	said, err := cmd.CombinedOutput()
	var complaints []string
	for line := range strings.Lines(string(said)) {
		line = strings.TrimSpace(line)
		foreign := !strings.Contains(line, "nitroseal") && !strings.Contains(line, "vault.service") && !strings.Contains(line, "openbao.service")
		known := version < 253 && strings.Contains(line, "notify-reload")
		if line != "" && !foreign && !known {
			complaints = append(complaints, line)
		}
	}
	if complaints != nil {
		t.Errorf("systemd %d says:\n%s\n(%v)", version, strings.Join(complaints, "\n"), err)
	}
}
