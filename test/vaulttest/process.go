package vaulttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// process is a server that a test started.
type process struct {
	cmd  *exec.Cmd
	log  string        // the file its stdout and stderr go to
	done chan struct{} // closed once it has ended and was waited for
}

// startProcess runs a program with nothing of our environment but the given one, as somebody else where a credential says
// so. It dies with the test binary, unless its file has capabilities.
func startProcess(t testing.TB, log string, env []string, as *syscall.Credential, program string, args ...string) *process {
	t.Helper()
	file, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	defer file.Close()
	//nolint:noctx // it outlives any one call: stop and kill end it
	cmd := exec.Command(program, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: as}
	must(t, cmd.Start())
	p := &process{cmd: cmd, log: log, done: make(chan struct{})}
	go func() { // owned by p: ends with the process
		defer close(p.done)
		_ = cmd.Wait() // how it ended is told by its log
	}()
	return p
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// end sends a signal and waits for the process. One that does not obey SIGTERM in time is killed.
func (p *process) end(signal syscall.Signal) {
	_ = p.cmd.Process.Signal(signal) // it may have ended already
	select {
	case <-p.done:
	case <-time.After(30 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// Process is one process of this machine. The start time tells it from a later one with the same id.
type Process struct {
	PID     int
	Parent  int
	Command string // argv, joined with spaces
	started string
}

// Alive is true while the process runs; a zombie has ended.
func (p Process) Alive() bool {
	now, state, err := readProcess(p.PID)
	return err == nil && now.started == p.started && state != "Z" && state != "X"
}

// Kill ends the process with SIGKILL and waits until it is gone.
func (p Process) Kill(t testing.TB) {
	t.Helper()
	if p.Alive() {
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatalf("killing %d: %v", p.PID, err)
		}
	}
	WaitGone(t, Patience, p)
}

// ResidentKiB is the memory that the process has in RAM, in KiB.
func (p Process) ResidentKiB(t testing.TB) int {
	t.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(p.PID), "status"))
	must(t, err)
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")))
			must(t, err)
			return kib
		}
	}
	t.Fatalf("process %d shows no VmRSS", p.PID)
	return 0
}

// WaitGone waits until none of the processes runs any more.
func WaitGone(t testing.TB, limit time.Duration, processes ...Process) {
	t.Helper()
	Eventually(t, limit, "processes to end", func() error {
		for _, p := range processes {
			if p.Alive() {
				return fmt.Errorf("process %d still runs: %s", p.PID, p.Command)
			}
		}
		return nil
	})
}

// descendants lists the processes that pid started, and those that these started.
func descendants(pid int) []Process {
	entries, _ := os.ReadDir("/proc") // an unreadable /proc shows as missing processes
	children := map[int][]Process{}
	for _, entry := range entries {
		id, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if p, state, err := readProcess(id); err == nil && state != "Z" {
			children[p.Parent] = append(children[p.Parent], p)
		}
	}
	var found []Process
	for queue := children[pid]; len(queue) > 0; queue = queue[1:] {
		found = append(found, queue[0])
		queue = append(queue, children[queue[0].PID]...)
	}
	return found
}

// readProcess reads /proc/PID/stat: "pid (name) state ppid … starttime". The name may hold blanks and brackets.
func readProcess(pid int) (p Process, state string, err error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return p, "", err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const stateField, parentField, startField = 0, 1, 19
	if len(fields) <= startField {
		return p, "", fmt.Errorf("reading the process %d: unexpected %q", pid, stat)
	}
	parent, err := strconv.Atoi(fields[parentField])
	if err != nil {
		return p, "", err
	}
	argv, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	command := strings.TrimSpace(strings.ReplaceAll(string(argv), "\x00", " "))
	return Process{PID: pid, Parent: parent, Command: command, started: fields[startField]}, fields[stateField], err
}

// run runs a program to its end and returns what it printed on stdout.
func run(ctx context.Context, dir string, env []string, program string, args ...string) (string, error) {
	var out, problems bytes.Buffer
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &problems
	if env != nil {
		cmd.Env = append(os.Environ(), env...)
	}
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", program, strings.Join(args, " "), err, problems.String())
	}
	return strings.TrimSpace(out.String()), nil
}
