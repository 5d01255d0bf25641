package openbao_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// stat reads a process: its parent and its state, which is a letter. ok is false where there is none.
func stat(pid int) (parent int, state string, ok bool) {
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, "", false
	}
	fields := strings.Fields(string(content[bytes.LastIndexByte(content, ')')+1:])) // the name may hold blanks and brackets
	if len(fields) < 2 {
		return 0, "", false
	}
	parent, err = strconv.Atoi(fields[1])
	return parent, fields[0], err == nil
}

// childrenOf lists the processes that pid started: a plugin's are module hosts.
func childrenOf(t *testing.T, pid int) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var children []int
	for _, entry := range entries {
		child, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if parent, state, ok := stat(child); ok && parent == pid && state != "Z" {
			children = append(children, child)
		}
	}
	return children
}

// gone waits until none of the processes runs any more.
func gone(t *testing.T, pids ...int) {
	t.Helper()
	vaulttest.Eventually(t, vaulttest.Patience, "processes to end", func() error {
		for _, pid := range pids {
			if _, state, ok := stat(pid); ok && state != "Z" && state != "X" {
				command, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
				return fmt.Errorf("process %d still runs: %s", pid, bytes.ReplaceAll(command, []byte{0}, []byte(" ")))
			}
		}
		return nil
	})
}

// locked is the memory of a process that is locked, in KiB.
func locked(t *testing.T, pid int) int {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if value, found := strings.CutPrefix(line, "VmLck:"); found {
			kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")))
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatalf("process %d shows no VmLck", pid)
	return 0
}

// descriptors are what the open files of a process lead to, by their numbers.
func descriptors(t *testing.T, pid int) map[string]string {
	t.Helper()
	dir := filepath.Join("/proc", strconv.Itoa(pid), "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]string{}
	for _, entry := range entries {
		if target, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil {
			open[entry.Name()] = target
		}
	}
	return open
}
