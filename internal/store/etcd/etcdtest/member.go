package etcdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// errExited: the process ended by itself, because somebody else took its port for example.
var errExited = errors.New("etcd exited")

// member is one etcd process.
type member struct {
	binary    string
	arguments []string
	log       string

	command *exec.Cmd
	exited  chan struct{} // closed when the process has ended and was waited for
}

func (m *member) start() error {
	log, err := os.OpenFile(m.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own

	// Its end is stop's work. No ETCD_ variable of the machine reaches it, and a test that panics cleans nothing up.
	m.command = exec.CommandContext(context.Background(), m.binary, m.arguments...)
	m.command.Stdout, m.command.Stderr = log, log
	m.command.Env = []string{}
	m.command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := m.command.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	m.exited = exited
	command := m.command
	go func() { // ends with the process, which stop kills
		defer close(exited)
		_ = command.Wait() // its code tells nothing: members are killed
	}()
	return nil
}

func (m *member) running() bool {
	select {
	case <-m.exited:
		return false
	default:
		return true
	}
}

// wait pauses, and returns an error when the process ends or ctx does.
func (m *member) wait(ctx context.Context, pause time.Duration) error {
	select {
	case <-m.exited:
		return errExited
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pause):
		return nil
	}
}

func (m *member) signal(t testing.TB, signal syscall.Signal) {
	t.Helper()
	if err := m.command.Process.Signal(signal); err != nil {
		t.Fatalf("sending %v to etcd: %v", signal, err)
	}
}

// stopped tells whether SIGSTOP has reached every thread: they stop one by one, and one that has not may still answer.
func (m *member) stopped() bool {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", m.command.Process.Pid))
	if err != nil || len(threads) == 0 {
		return false
	}
	for _, thread := range threads {
		stat, err := os.ReadFile(thread)
		if err != nil {
			return false
		}
		// proc(5): pid (name) state …; the name may hold anything
		if _, rest, _ := bytes.Cut(stat, []byte(") ")); !bytes.HasPrefix(rest, []byte("T")) {
			return false
		}
	}
	return true
}

// lastWords returns the end of the log.
func (m *member) lastWords() []byte {
	log, err := os.ReadFile(m.log)
	if err != nil {
		return []byte(err.Error())
	}
	lines := bytes.Split(bytes.TrimSpace(log), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-5):], []byte("\n"))
}
