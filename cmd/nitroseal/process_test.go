package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// configured returns a configuration for a token, the device "one".
func configured(t *testing.T, token *pkcs11test.Token) (path string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	source := fmt.Sprintf("state_dir = \"state\"\npkcs11 {\n  modules = [%q]\n  env = [%s]\n}\n"+
		"device \"one\" {\n  type = \"pkcs11\"\n  serial = %q\n  pin_file = \"pin\"\n}\n", token.Module, quoted(token.Env), token.Serial)
	for name, content := range map[string]string{"nitroseal.hcl": source, "pin": token.PIN} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "nitroseal.hcl")
}

// quoted are the elements of a list, as HCL has them.
func quoted(names []string) string { return `"` + strings.Join(names, `", "`) + `"` }

// command is a run of nitroseal.
func command(t *testing.T, configuration string, args ...string) *exec.Cmd {
	t.Helper()
	// Killed with the test, if it is still there.
	cmd := exec.CommandContext(t.Context(), "nitroseal", args...)
	cmd.Env = append(os.Environ(), "NITROSEAL_CONFIG="+configuration)
	return cmd
}

func must(t *testing.T, configuration string, args ...string) string {
	t.Helper()
	out, err := command(t, configuration, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nitroseal %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestASignalEndsACommandInAnOrderlyManner(t *testing.T) {
	for name, signal := range map[string]os.Signal{"Ctrl-C": os.Interrupt, "SIGTERM": syscall.SIGTERM} {
		t.Run(name, func(t *testing.T) {
			card := pkcs11test.Card(t)
			card.GenerateKey(t, "rsa:2048", "unseal", "01")
			configuration := configured(t, &card.Token)
			must(t, configuration, "key", "adopt", "prod", "--device", "one", "--id", "01")
			card.Fault(t, pkcs11test.Freezes("card"))

			var stderr bytes.Buffer
			cmd := command(t, configuration, "wrap", "prod", "--out", filepath.Join(filepath.Dir(configuration), "out.jwe"))
			cmd.Stdin = strings.NewReader("value")
			cmd.Stderr = &stderr
			before := card.Calls(t, "C_Login") + card.Calls(t, "C_GetTokenInfo")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, "the card is asked", func() bool {
				return card.Calls(t, "C_Login")+card.Calls(t, "C_GetTokenInfo") > before || hosts(cmd.Process.Pid) > 0
			})
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			err := cmd.Wait()
			if failed := (*exec.ExitError)(nil); !errors.As(err, &failed) || failed.ExitCode() != exitInterrupted {
				t.Errorf("it ended with %v, want exit code %d", err, exitInterrupted)
			}
			if !strings.Contains(stderr.String(), "nitroseal: interrupted") {
				t.Errorf("it said %q", stderr.String())
			}
			if waited := time.Since(begun); waited > 15*time.Second {
				t.Errorf("it took %v", waited)
			}
			left, _ := os.ReadDir(filepath.Dir(configuration))
			for _, file := range left {
				if strings.Contains(file.Name(), "out.jwe") {
					t.Errorf("%s was left", file.Name())
				}
			}
		})
	}
}

// hosts counts the module hosts that a process has started.
func hosts(pid int) int {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0
	}
	return len(strings.Fields(string(children)))
}

func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	pkcs11test.Until(t, what, so)
}

// repeated runs a command with that input until it ends with another exit code than 3, as a script may: a SoftHSM, unlike a
// card, is not to be seen for a moment while another process logs in to it.
func repeated(t *testing.T, configuration, stdin string, args ...string) string {
	t.Helper()
	for {
		cmd := command(t, configuration, args...)
		var stdout, stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
		err := cmd.Run()
		if failed := (*exec.ExitError)(nil); errors.As(err, &failed) && failed.ExitCode() == exitUnavailable && t.Context().Err() == nil {
			continue
		}
		if err != nil {
			t.Errorf("nitroseal %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
		}
		return stdout.String()
	}
}

func TestCommandsThatRunAtOnceMakeOneHSMKey(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	configuration := configured(t, token)
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			repeated(t, configuration, "", "key", "generate", "prod", "--device", "one", "--algorithm", "ecdh-p256")
		})
	}
	all.Wait()
	if listed := must(t, configuration, "device", "keys", "one", "-o", "json"); strings.Count(listed, "nitroseal-prod-v1") != 1 {
		t.Errorf("the token has other than one HSM key:\n%s", listed)
	}
	// And they wrap, rotate and unwrap at a time, with one state directory and one PIN ledger.
	for i := range 6 {
		all.Go(func() {
			value := fmt.Sprintf("value %d", i)
			sealed := repeated(t, configuration, value, "wrap", "prod")
			if i == 0 {
				repeated(t, configuration, "", "key", "rotate", "prod", "--device", "one", "--generate", "--algorithm", "ecdh-p384")
			}
			if got := repeated(t, configuration, sealed, "unwrap", "prod"); got != value {
				t.Errorf("unwrapped %q, want %q", got, value)
			}
		})
	}
	all.Wait()
}

// terminal is a pseudo terminal: what is written to ours is typed there.
func terminal(t *testing.T) (ours, theirs *os.File) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	fd := int(ours.Fd())
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	return ours, theirs
}

// screen collects what a terminal shows.
type screen struct {
	mu    sync.Mutex
	shown bytes.Buffer
}

func (s *screen) watch(terminal *os.File) {
	buffer := make([]byte, 1024)
	for {
		n, err := terminal.Read(buffer)
		s.mu.Lock()
		s.shown.Write(buffer[:n])
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shown.String()
}

func echoes(t *testing.T, terminal *os.File) bool {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(terminal.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return state.Lflag&unix.ECHO != 0
}

func TestASecretIsTypedWithoutEcho(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	configuration := configured(t, token)
	ours, theirs := terminal(t)
	var seen screen
	go seen.watch(ours) // ends with the terminal
	cmd := command(t, configuration, "device", "pin", "change", "one")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, prompt := range []string{"New PIN of the token: ", "New PIN of the token, once more: "} {
		until(t, prompt, func() bool { return strings.HasSuffix(seen.text(), prompt) && !echoes(t, theirs) })
		if _, err := ours.WriteString("27182818\n"); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, seen.text())
	}
	if strings.Contains(seen.text(), "2718") || !echoes(t, theirs) {
		t.Errorf("the terminal shows the secret, or has no echo afterwards:\n%s", seen.text())
	}
	if pin, err := os.ReadFile(filepath.Join(filepath.Dir(configuration), "pin")); err != nil || string(pin) != "27182818\n" {
		t.Errorf("the PIN file holds %q, %v", pin, err)
	}
}

func TestCtrlCAtAPromptGivesTheTerminalItsEchoBack(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	configuration := configured(t, token)
	ours, theirs := terminal(t)
	var seen screen
	go seen.watch(ours)
	cmd := command(t, configuration, "device", "pin", "change", "one")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true} // so that the key reaches it as a signal
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the prompt", func() bool { return strings.Contains(seen.text(), "New PIN") && !echoes(t, theirs) })
	if _, err := ours.Write([]byte{3}); err != nil { // Ctrl-C
		t.Fatal(err)
	}
	err := cmd.Wait()
	if failed := (*exec.ExitError)(nil); !errors.As(err, &failed) || failed.ExitCode() != exitInterrupted {
		t.Errorf("it ended with %v, want exit code %d", err, exitInterrupted)
	}
	if !echoes(t, theirs) {
		t.Error("the terminal has no echo afterwards")
	}
	must(t, configuration, "device", "keys", "one") // nothing was changed
}

func TestAStateDirectoryOfAnotherUserIsRefused(t *testing.T) {
	state := "/" // root's
	if os.Geteuid() == 0 {
		state = t.TempDir()
		if err := os.Chown(state, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	configuration := filepath.Join(t.TempDir(), "nitroseal.hcl")
	if err := os.WriteFile(configuration, fmt.Appendf(nil, "state_dir = %q\n", state), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := command(t, configuration, "key", "list").CombinedOutput()
	if failed := (*exec.ExitError)(nil); !errors.As(err, &failed) || failed.ExitCode() != exitUsage || !strings.Contains(string(out), "sudo -u '") {
		t.Errorf("it ended with %v\n%s", err, out)
	}
	if _, err := os.Stat(filepath.Join(state, keyringDir)); err == nil {
		t.Error("something was left in it")
	}
}

func TestAStateDirectoryThatIsNotThereOrOpenToOthersIsRefused(t *testing.T) {
	configuration := configured(t, pkcs11test.SoftHSM(t))
	state := filepath.Join(filepath.Dir(configuration), "state")
	refused := func(says string) {
		t.Helper()
		for _, verb := range [][]string{{"key", "list"}, {"device", "keys", "one"}, {"device", "pin", "try", "one"}} {
			out, err := command(t, configuration, verb...).CombinedOutput()
			if failed := (*exec.ExitError)(nil); !errors.As(err, &failed) || failed.ExitCode() != exitUsage || !strings.Contains(string(out), says) {
				t.Errorf("%v ended with %v\n%s", verb, err, out)
			}
		}
		// The doctor looks at all the rest, too.
		out, err := command(t, configuration, "doctor").CombinedOutput()
		if failed := (*exec.ExitError)(nil); !errors.As(err, &failed) || failed.ExitCode() != exitFailed ||
			!strings.Contains(string(out), says) || !strings.Contains(string(out), "no vault block") {
			t.Errorf("the doctor ended with %v\n%s", err, out)
		}
	}
	if err := os.Chmod(state, 0o777); err != nil {
		t.Fatal(err)
	}
	refused("may be written by others")
	if err := os.Remove(state); err != nil {
		t.Fatal(err)
	}
	refused("install -d -m 700")
	if _, err := os.Stat(state); err == nil {
		t.Error("it was made: where it is a mount point, keys and PIN bars would seem lost")
	}
}

func TestADoctorWhoIsCutShortTellsWhatHeFound(t *testing.T) {
	card := pkcs11test.Card(t)
	card.Fault(t, pkcs11test.Freezes("card"))
	out, err := command(t, configured(t, &card.Token), "doctor", "--timeout", "500ms").Output()
	if failed := (*exec.ExitError)(nil); !errors.As(err, &failed) || failed.ExitCode() != exitUnavailable || !strings.Contains(string(out), "state directory") {
		t.Errorf("it ended with %v\n%s", err, out)
	}
}

func TestCtrlCEndsACommandThatWaitsForItsInput(t *testing.T) {
	configuration := configured(t, pkcs11test.SoftHSM(t))
	must(t, configuration, "key", "generate", "prod", "--device", "one", "--algorithm", "ecdh-p256")
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args  []string
		waits func(shown string) bool // whether it is seen to wait
	}{
		"the value to be sealed": {[]string{"wrap", "prod"}, func(shown string) bool { return strings.Contains(shown, "type the value") }},
		"an envelope":            {[]string{"unwrap", "prod"}, func(shown string) bool { return strings.Contains(shown, "type the envelope") }},
		"a secret from a pipe": {[]string{"device", "pin", "try", "one", "--pin-file", pipe}, func(string) bool {
			writer, err := os.OpenFile(pipe, os.O_WRONLY|unix.O_NONBLOCK, 0) // fails before somebody reads
			if err == nil {
				t.Cleanup(func() { writer.Close() })
			}
			return err == nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := terminal(t)
			var seen screen
			go seen.watch(ours)
			cmd := command(t, configuration, test.args...)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
			cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, "it waits for its input", func() bool { return test.waits(seen.text()) })
			limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", cmd.Process.Pid))
			if err != nil || !regexp.MustCompile(`Max core file size +0 +0 `).Match(limits) {
				t.Errorf("it could leave a core dump, with the secret in it: %v\n%s", err, limits)
			}
			if _, err := ours.Write([]byte{3}); err != nil {
				t.Fatal(err)
			}
			err = cmd.Wait()
			if failed := (*exec.ExitError)(nil); !errors.As(err, &failed) || failed.ExitCode() != exitInterrupted {
				t.Errorf("it ended with %v, want exit code %d\n%s", err, exitInterrupted, seen.text())
			}
		})
	}
}

func TestAWrongPINIsSentOnceHoweverManyCommandsRun(t *testing.T) {
	card := pkcs11test.Card(t)
	card.GenerateKey(t, "EC:prime256v1", "curve", "02")
	configuration := configured(t, &card.Token)
	must(t, configuration, "key", "adopt", "prod", "--device", "one", "--id", "02")
	sealed := must(t, configuration, "wrap", "prod", "--in", configuration)
	if err := os.WriteFile(filepath.Join(filepath.Dir(configuration), "pin"), []byte("999999"), 0o600); err != nil {
		t.Fatal(err)
	}
	another := filepath.Join(t.TempDir(), "new-pin")
	if err := os.WriteFile(another, []byte("271828"), 0o600); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for _, args := range [][]string{
		{"doctor"},
		{"device", "status"},
		{"unwrap", "prod"},
		{"device", "keys", "one"},
		{"device", "pin", "change", "one", "--new-pin-file", another},
		{"device", "pin", "try", "one"},
		{"key", "rotate", "prod", "--device", "one", "--generate", "--algorithm", "ecdh-p256"},
	} {
		all.Go(func() {
			for range 2 {
				cmd := command(t, configuration, args...)
				cmd.Stdin = strings.NewReader(sealed)
				if out, err := cmd.CombinedOutput(); err == nil {
					t.Errorf("nitroseal %s succeeds with a wrong PIN\n%s", strings.Join(args, " "), out)
				}
			}
		})
	}
	all.Wait()
	if sent := card.WrongPINs(t); sent != 1 {
		t.Errorf("the wrong PIN was sent %d times, want once", sent)
	}
}
