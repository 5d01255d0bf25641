package vaulttest

import (
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// portsVariable makes this test binary another process that takes ports.
const portsVariable = "NITROSEAL_TEST_PORTS"

// Two that take 200 of 5,000 ports each would have eight in common by chance.
func TestNoPortIsGivenByTwoProcesses(t *testing.T) {
	const many = 200
	if os.Getenv(portsVariable) != "" {
		_, err := os.Stdout.WriteString(strings.Join(FreePorts(t, many), " ") + "\n")
		must(t, err)
		_, _ = io.ReadAll(os.Stdin) // until the other one has its own
		return
	}
	program, err := os.Executable()
	must(t, err)
	other := exec.CommandContext(t.Context(), program, "-test.run=^TestNoPortIsGivenByTwoProcesses$")
	other.Env = append(os.Environ(), portsVariable+"=yes")
	hold, err := other.StdinPipe()
	must(t, err)
	said, err := other.StdoutPipe()
	must(t, err)
	must(t, other.Start())
	buffer := make([]byte, 0, 32*many)
	for !slices.Contains(buffer, '\n') {
		n, err := said.Read(buffer[len(buffer):cap(buffer)])
		must(t, err)
		buffer = buffer[:len(buffer)+n]
	}
	given := strings.Fields(string(buffer))
	for _, address := range FreePorts(t, many) {
		if slices.Contains(given, address) {
			t.Errorf("%s was given twice", address)
		}
	}
	must(t, hold.Close())
	_, _ = io.ReadAll(said)
	must(t, other.Wait())
}
