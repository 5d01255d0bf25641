package modhost

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func TestMain(m *testing.M) {
	RunIfStarted()
	if play != nil {
		play()
	}
	os.Exit(m.Run())
}

// play does not return if this binary was started to be something else than a test.
var play func()

// patience is how long a test waits for what happens at once.
const patience = 20 * time.Second

// host is a module host, and its client.
type host struct {
	t       testing.TB
	command *exec.Cmd
	stderr  bytes.Buffer
	write   *os.File
	read    *os.File
	exited  chan struct{}
	exit    error // after exited

	mu      sync.Mutex
	lastID  uint64
	pending map[uint64]chan wire.Frame
}

// startHost starts this test binary as a module host. It ends with the test.
func startHost(t testing.TB, env ...string) *host {
	t.Helper()
	return startHostAs(t, []string{wire.HostArgv0}, env...)
}

// ofTests is the environment of a process of this test binary: without it one that is built with coverage or with the
// race detector writes to the folder that it runs in, or ends a second late.
func ofTests(t testing.TB) []string {
	t.Helper()
	return []string{"GOCOVERDIR=" + t.TempDir(), "GORACE=atexit_sleep_ms=0"}
}

// startHostAs is startHost with other arguments. Where they are not simply a host's, it runs without privileges.
func startHostAs(t testing.TB, args []string, env ...string) *host {
	t.Helper()
	requests, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	read, answers, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, write: write, read: read, exited: make(chan struct{}), pending: make(map[uint64]chan wire.Frame)}
	h.command = &exec.Cmd{
		Path: "/proc/self/exe", Args: args, Env: append(ofTests(t), env...),
		ExtraFiles: []*os.File{requests, answers}, Stderr: &h.stderr,
	}
	if args[0] != wire.HostArgv0 {
		unprivileged(h.command)
	}
	if err := h.command.Start(); err != nil {
		t.Fatal(err)
	}
	_ = requests.Close()
	_ = answers.Close()
	var reader sync.WaitGroup
	reader.Go(h.receive)
	go func() {
		defer close(h.exited)
		h.exit = h.command.Wait()
	}()
	t.Cleanup(func() {
		_ = h.write.Close()
		h.waitExit()
		reader.Wait()
		_ = h.read.Close()
		if strings.Contains(h.stderr.String(), "DATA RACE") {
			t.Error("a data race in the host")
		}
		if h.stderr.Len() > 0 {
			t.Logf("the host wrote: %s", h.stderr.String())
		}
	})
	return h
}

// waitExit waits until the process is gone.
func (h *host) waitExit() {
	h.t.Helper()
	select {
	case <-h.exited:
	case <-time.After(patience):
		_ = h.command.Process.Kill()
		<-h.exited
		h.t.Errorf("the host was still there after %v", patience)
	}
}

// receive hands answers to those who wait for them, until the host is gone.
func (h *host) receive() {
	for {
		frame, err := wire.ReadFrame(h.read)
		h.mu.Lock()
		if err != nil {
			for _, waiting := range h.pending {
				close(waiting)
			}
			h.pending = nil
			h.mu.Unlock()
			return
		}
		waiting := h.pending[frame.ID]
		delete(h.pending, frame.ID)
		h.mu.Unlock()
		if waiting == nil {
			h.t.Errorf("an answer to a call %d that nobody made", frame.ID)
			continue
		}
		waiting <- frame
	}
}

var errHostGone = errors.New("the host is gone")

// send sends a request and returns where the answer will come.
func (h *host) send(op wire.Op, meta any, data []byte) <-chan wire.Frame {
	h.t.Helper()
	answer := make(chan wire.Frame, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.pending == nil {
		close(answer)
		return answer
	}
	h.lastID++
	h.pending[h.lastID] = answer
	frame := wire.Frame{ID: h.lastID, Op: op, Data: data}
	if meta != nil {
		frame.Meta = wire.Encode(meta)
	}
	if err := wire.WriteFrame(h.write, frame); err != nil {
		h.t.Errorf("sending a request: %v", err)
	}
	return answer
}

// call makes a request and returns the data of the answer; its meta goes to answer. The error is a *wire.Error.
func (h *host) call(op wire.Op, meta any, data []byte, answer any) ([]byte, error) {
	h.t.Helper()
	var frame wire.Frame
	select {
	case received, alive := <-h.send(op, meta, data):
		if !alive {
			return nil, errHostGone
		}
		frame = received
	case <-time.After(patience):
		h.t.Fatalf("operation %d: no answer in %v", op, patience)
	}
	if frame.Op != op {
		h.t.Errorf("an answer to operation %d for operation %d", frame.Op, op)
	}
	if frame.Failed {
		var failure wire.Error
		if err := wire.Decode(frame.Meta, &failure); err != nil {
			h.t.Fatal(err)
		}
		return nil, &failure
	}
	if answer != nil {
		if err := wire.Decode(frame.Meta, answer); err != nil {
			h.t.Fatalf("operation %d: %v in %q", op, err, frame.Meta)
		}
	}
	return frame.Data, nil
}

// wantCode fails unless err is a *wire.Error with that code.
func wantCode(t testing.TB, err error, code uint) {
	t.Helper()
	if failure := asFailure(t, err); failure.Code != code {
		t.Errorf("got %v, want the code 0x%x", failure, code)
	}
}

// asFailure returns the *wire.Error that err must be.
func asFailure(t testing.TB, err error) *wire.Error {
	t.Helper()
	var failure *wire.Error
	if !errors.As(err, &failure) {
		t.Fatalf("got %v, want an error of the host", err)
	}
	return failure
}

// hello loads a module.
func (h *host) hello(module string) (reply wire.HelloReply, err error) {
	h.t.Helper()
	_, err = h.call(wire.OpHello, wire.Hello{Version: wire.Version, Module: module, MaxSessions: 8}, nil, &reply)
	return reply, err
}

const nobody = 65534

// unprivileged makes a command run without CAP_IPC_LOCK.
func unprivileged(command *exec.Cmd) {
	if os.Getuid() == 0 {
		command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
}
