package test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// The demos wait more than they work, so they run two at a time, but for this one, which builds in the repository.
func TestTheDemoRunsToItsEndAndCleansUp(t *testing.T) {
	d := startDemo(t, "demo", "run")
	if err := d.wait(t); err != nil {
		t.Fatalf("scripts/demo run: %v\n%s", err, d.out.String())
	}
	for _, step := range []string{"Register the plugin", "Rotate the key", "usable", "That was it"} {
		if !strings.Contains(d.out.String(), step) {
			t.Errorf("%q is missing in\n%s", step, d.out.String())
		}
	}
	d.leavesNothing(t)
}

func TestTwoNetHSMDemosAtATimeRunToTheirEndAndCleanUp(t *testing.T) {
	t.Parallel()
	first := startDemo(t, "demo-nethsm")
	vaulttest.Eventually(t, 5*time.Minute, "the first to have built what it needs", func() error {
		if !strings.Contains(first.out.String(), "Starting Vault") {
			return fmt.Errorf("it says\n%s", first.out.String())
		}
		return nil
	})
	for _, d := range []*demo{startDemo(t, "demo-nethsm"), first} {
		if err := d.wait(t); err != nil {
			t.Fatalf("scripts/demo-nethsm: %v\n%s", err, d.out.String())
		}
		for _, step := range []string{
			"no NetHSM", "handshake failure", "provisioned and Operational", "opened what was sealed to it", "1 of 2 nodes cannot serve",
			"the NetHSM is Locked", "unlocked", "That was it, with a double in place of a NetHSM",
		} {
			if !strings.Contains(d.out.String(), step) {
				t.Errorf("%q is missing in\n%s", step, d.out.String())
			}
		}
		if opened := strings.Count(d.out.String(), "key_1:"+base64.StdEncoding.EncodeToString([]byte("first share\n"))); opened != 3 {
			t.Errorf("the material was opened %d times, want it with both nodes, with one, and after the unlocking\n%s", opened, d.out.String())
		}
		d.leavesNothing(t)
	}
}

func TestCtrlCEndsTheDemoAndWhatItStarted(t *testing.T) {
	ctrlCEndsIt(t, startDemo(t, "demo", "run"), "A device: the HSM")
}

func TestCtrlCEndsTheNetHSMDemoAndWhatItStarted(t *testing.T) {
	t.Parallel()
	ctrlCEndsIt(t, startDemo(t, "demo-nethsm"), "A device: both nodes")
}

func ctrlCEndsIt(t *testing.T, d *demo, step string) {
	t.Helper()
	vaulttest.Eventually(t, 5*time.Minute, "the demo to use its Vault", func() error {
		select {
		case err := <-d.ended:
			t.Fatalf("%s: %v\n%s", d.command.Path, err, d.out.String())
		default:
		}
		if !strings.Contains(d.out.String(), step) {
			return fmt.Errorf("it says\n%s", d.out.String())
		}
		return nil
	})
	if running := d.processes(t); len(running) < 3 {
		t.Errorf("etcd, Vault and the plugin should run, not %v", running)
	}
	// A terminal sends it to the whole foreground group.
	must(t, syscall.Kill(-d.command.Process.Pid, syscall.SIGINT))
	var exit *exec.ExitError
	if err := d.wait(t); !errors.As(err, &exit) || exit.ExitCode() != 130 {
		t.Errorf("it ended with %v, want exit status 130\n%s", err, d.out.String())
	}
	d.leavesNothing(t)
}

// demo is a run of a script that demonstrates something.
type demo struct {
	tmp     string // its TMPDIR: in the arguments of all that it starts
	command *exec.Cmd
	out     output
	ended   chan error
}

func startDemo(t *testing.T, script string, arguments ...string) *demo {
	t.Helper()
	for _, tool := range []string{"vault", "etcd"} {
		vaulttest.Tool(t, tool) // builds what is missing, which the demo would do in more time than a test has
	}
	tmp, err := os.MkdirTemp("", "nd-") //nolint:usetesting // sockets lie below it: 107 characters, and t.TempDir is long
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(tmp)) })
	d := &demo{tmp: tmp, ended: make(chan error, 1)}
	d.command = exec.Command(filepath.Join(vaulttest.Root(), "scripts", script), arguments...) //nolint:noctx // killed below
	d.command.Env = append(os.Environ(), "TMPDIR="+tmp)
	d.command.Stdout, d.command.Stderr = &d.out, &d.out
	d.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	d.command.WaitDelay = time.Second
	must(t, d.command.Start())
	go func() { d.ended <- d.command.Wait() }() // ends with the process
	t.Cleanup(func() {
		for _, pid := range d.processes(t) { // only where the test failed
			t.Errorf("process %d is still there", pid)
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return d
}

func (d *demo) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-d.ended:
		return err
	case <-time.After(5 * time.Minute):
		_ = d.command.Process.Kill() // what it started is ended by the clean-up
		t.Fatalf("%s does not end; it says\n%s", d.command.Path, d.out.String())
		return nil
	}
}

// leavesNothing checks that neither files nor processes remain.
func (d *demo) leavesNothing(t *testing.T) {
	t.Helper()
	vaulttest.Eventually(t, limit, "the demo's processes to be gone", func() error {
		if running := d.processes(t); len(running) > 0 {
			return fmt.Errorf("%d are left", running)
		}
		return nil
	})
	left, err := filepath.Glob(filepath.Join(d.tmp, "nitroseal-demo.*"))
	if err != nil || len(left) > 0 {
		t.Errorf("the demo left %q, %v", left, err)
	}
}

// processes are those that have the demo's folder in their arguments or their environment.
func (d *demo) processes(t *testing.T) []int {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	var found []int
	for _, entry := range entries {
		arguments, _ := os.ReadFile(filepath.Join(entry, "cmdline")) // it may have ended since
		environment, _ := os.ReadFile(filepath.Join(entry, "environ"))
		if bytes.Contains(arguments, []byte(d.tmp)) || bytes.Contains(environment, []byte(d.tmp)) {
			var pid int
			_, err := fmt.Sscan(filepath.Base(entry), &pid)
			must(t, err)
			found = append(found, pid)
		}
	}
	return found
}

// output is what a process says, readable while it says more.
type output struct {
	mu   sync.Mutex
	said bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.said.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.said.String()
}
