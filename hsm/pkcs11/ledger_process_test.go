package pkcs11

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// The environment variables that make the test binary another program which uses the ledger.
const (
	otherProgramDir  = "NITROSEAL_TEST_LEDGER"      // the state directory
	otherProgramSent = "NITROSEAL_TEST_LEDGER_SENT" // a file that gets a line for each PIN sent; empty: hang instead
)

// TestOtherProgram is no test: it is what the tests below run as another process.
func TestOtherProgram(t *testing.T) {
	dir := os.Getenv(otherProgramDir)
	if dir == "" {
		t.Skip("run by other tests, as a process of its own")
	}
	a, err := openLedger(dir).attempt(t.Context(), serial, []byte("111111"), shows(allTries))
	if refused, ok := errors.AsType[*hsm.PINError](err); ok && refused.Barred {
		return
	}
	must(t, err)
	sent := os.Getenv(otherProgramSent)
	if sent == "" { // the module hangs, or works: nobody will know
		_, _ = os.Stdout.WriteString("\nsending\n")
		_, _ = io.Copy(io.Discard, os.Stdin) // until the parent is gone, should it not kill us
		return
	}
	file, err := os.OpenFile(sent, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(t, err)
	_, err = file.WriteString("111111\n")
	must(t, err)
	must(t, file.Close())
	must(t, a.wrong())
}

// otherProgram starts the test binary as another program.
func otherProgram(t *testing.T, dir, sent string) (cmd *exec.Cmd, out io.Reader) {
	t.Helper()
	cmd = exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestOtherProgram$", "-test.v")
	cmd.Env = append(os.Environ(), otherProgramDir+"="+dir, otherProgramSent+"="+sent)
	out, err := cmd.StdoutPipe()
	must(t, err)
	if sent == "" {
		in, err := cmd.StdinPipe()
		must(t, err)
		t.Cleanup(func() { _ = in.Close() })
	}
	must(t, cmd.Start())
	return cmd, out
}

func TestAProgramKilledDuringTheLogIn(t *testing.T) {
	for name, c := range map[string]struct {
		flags  hsm.PINState
		barred bool
	}{
		"the token shows a wrong PIN":   {countLow, true},
		"the token is on its last try":  {finalTry, true},
		"the token shows all its tries": {allTries, false},
	} {
		t.Run(name, func(t *testing.T) {
			l := openLedger(t.TempDir())
			cmd, out := otherProgram(t, l.files.dir, "")
			reader := bufio.NewReader(out)
			for {
				line, err := reader.ReadString('\n')
				if err != nil {
					t.Fatalf("the other program ended early: %v", err)
				}
				if strings.TrimSpace(line) == "sending" {
					break
				}
			}
			must(t, cmd.Process.Kill())
			_ = cmd.Wait() // its status is that it was killed

			if c.barred {
				refuses(t, l, "111111", c.flags)
				return
			}
			must(t, begins(t, l, "111111", c.flags).succeeded()) // the lock died with its process
		})
	}
}

func TestProgramsThatStartTogetherSendAWrongPINOnce(t *testing.T) {
	dir := t.TempDir()
	sent := filepath.Join(t.TempDir(), "sent")
	var wg sync.WaitGroup
	for range 4 {
		cmd, out := otherProgram(t, dir, sent)
		wg.Go(func() {
			shown, _ := io.ReadAll(out)
			if err := cmd.Wait(); err != nil {
				t.Errorf("the other program: %v\n%s", err, shown)
			}
		})
	}
	wg.Wait()
	content, err := os.ReadFile(sent)
	must(t, err)
	if n := strings.Count(string(content), "\n"); n != 1 {
		t.Errorf("the wrong PIN was sent %d times by four programs, want once", n)
	}
}
