package pkcs11test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// Plug is a SoftHSM token behind p11-kit's server, whose module is the p11-kit-client: a token that can be pulled out.
// RSA, OAEP with SHA-1, data objects and key generation work through it, ECDH does not.
type Plug struct {
	Token
	socket string

	mu     sync.Mutex
	server *exec.Cmd
}

// Unpluggable makes a token that can be pulled out, and plugs it in.
func Unpluggable(t testing.TB) *Plug {
	t.Helper()
	token := SoftHSM(t)
	// A socket's path has at most 107 bytes; a test's own directory is longer with some names.
	dir, err := os.MkdirTemp("", "plug") //nolint:usetesting // for its length
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	plug := &Plug{Token: *token, socket: filepath.Join(dir, "socket")}
	plug.Module = firstFile(t, "p11-kit's client module (apt-get install p11-kit-modules)", libraryDirs("p11-kit-client.so"))
	plug.Env = append(slices.Clone(token.Env), "P11_KIT_SERVER_ADDRESS")
	t.Setenv("P11_KIT_SERVER_ADDRESS", "unix:path="+plug.socket)
	t.Cleanup(func() { plug.Unplug(t) })
	plug.Replug(t)
	return plug
}

// Replug starts the server on the same socket. It does nothing where one runs.
func (p *Plug) Replug(t testing.TB) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		return
	}
	path, err := exec.LookPath("p11-kit")
	if err != nil {
		t.Fatalf("this test needs p11-kit: apt-get install p11-kit p11-kit-modules: %v", err)
	}
	_ = os.Remove(p.socket) // of the server before, which was killed
	// Not of the test's context, which ends before its clean-up does.
	server := exec.CommandContext(context.Background(), path, "server", "--foreground", "--name", p.socket, "--provider", p.lib, "pkcs11:")
	server.Env = p.environment()
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	p.server = server
	// The socket is there a moment before the server listens.
	Until(t, "p11-kit server takes connections", func() bool {
		connection, err := (&net.Dialer{}).DialContext(t.Context(), "unix", p.socket)
		return err == nil && connection.Close() == nil
	})
}

// Unplug kills the server and its children, one for each connection: killing the server alone leaves them at work.
func (p *Plug) Unplug(t testing.TB) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.server != nil {
		p.stop(t)
	}
}

// stop ends the server that runs. The caller holds mu.
func (p *Plug) stop(t testing.TB) {
	t.Helper()
	// Nobody connects from here on, so the children are all there will be but for one that is being made.
	_ = os.Remove(p.socket)
	server := p.server.Process
	Until(t, "the children of p11-kit server end", func() bool {
		children := childrenOf(server.Pid)
		for _, pid := range children {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(children) == 0
	})
	// Last, because it waits for its children, and nobody else might.
	_ = server.Kill()
	_ = p.server.Wait() // its status is that it was killed
	p.server = nil
}

// childrenOf returns the processes whose parent is pid.
func childrenOf(pid int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var children []int
	for _, entry := range entries {
		child, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if parentOf(child) == pid {
			children = append(children, child)
		}
	}
	return children
}

// parentOf returns a process's parent, from /proc/<pid>/stat: "pid (name) state parent …"; 0 where it is gone.
func parentOf(pid int) int {
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(content), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		return 0
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return 0
	}
	return parent
}
