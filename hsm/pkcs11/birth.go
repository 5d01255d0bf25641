package pkcs11

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// process is a running module host as its parent sees it.
type process struct {
	// requests is the host's fd 3, answers its fd 4.
	requests io.WriteCloser
	answers  io.ReadCloser
	// kill ends the process at once; it may be called at any time and more than once.
	kill func()
	// ended is closed when the process has ended and was waited for; how, says status.
	ended  chan struct{}
	status string
}

// birth says how a module host comes into the world.
type birth struct {
	hostPath, hostSHA256 string
	env                  []string
}

// checkEnvironment refuses variables that would make the module leak.
func checkEnvironment(names []string) error {
	for _, name := range names {
		if name == "OPENSC_DEBUG" {
			return errors.New("the module host must not get OPENSC_DEBUG: OpenSC's debug log holds decrypted plaintext; " +
				"remove it from -module-env and debug with a throw-away token and pkcs11-tool instead")
		}
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return fmt.Errorf("%q is no name of an environment variable", name)
		}
	}
	return nil
}

// start runs a host. The goroutine that it leaves behind owns the process and ends with it.
func (b birth) start() (*process, error) {
	requestsOut, requests, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	answers, answersIn, err := os.Pipe()
	if err != nil {
		_ = requestsOut.Close()
		_ = requests.Close()
		return nil, err
	}
	p := &process{requests: requests, answers: answers, ended: make(chan struct{})}
	started := make(chan error, 1)
	go p.supervise(b, requestsOut, answersIn, started)
	if err := <-started; err != nil {
		_ = requests.Close()
		_ = answers.Close()
		return nil, fmt.Errorf("starting the module host: %w", err)
	}
	return p, nil
}

// supervise starts the process and waits for it, all on one OS thread: the kernel sends the parent-death signal when the
// thread that started the process ends, not when the program does.
func (p *process) supervise(b birth, requestsOut, answersIn *os.File, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(p.ended)
	child, err := b.exec(requestsOut, answersIn)
	// The child has its own copies. Ours must go, or its death would not end the pipes.
	_ = requestsOut.Close()
	_ = answersIn.Close()
	if err != nil {
		started <- err
		return
	}
	p.kill = func() { _ = child.Kill() }
	started <- nil
	state, err := child.Wait()
	if err != nil {
		p.status = err.Error()
	} else {
		p.status = state.String()
	}
	// The end of the pipe follows by itself, unless the module has left a process behind that holds it. What the host said
	// last has a moment to be read.
	time.AfterFunc(farewell/10, func() { _ = p.answers.Close() })
}

// exec starts the program with nothing of ours but the two pipes.
func (b birth) exec(requestsOut, answersIn *os.File) (*os.Process, error) {
	program := "/proc/self/exe" // the running file itself, even where its name now leads to a newer one
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = null.Close() }()
	// Not our stderr: Vault does not start the plugin anew while a child of it holds that open.
	files := []*os.File{null, null, null, requestsOut, answersIn}

	if b.hostPath != "" {
		var above uintptr
		for _, f := range files {
			above = max(above, f.Fd())
		}
		host, err := openVerified(b.hostPath, b.hostSHA256, int(above))
		if err != nil {
			return nil, err
		}
		defer func() { _ = unix.Close(host) }()
		program = fmt.Sprintf("/proc/self/fd/%d", host)
	}
	env := []string{} // not nil, which would mean ours
	for _, name := range b.env {
		if value, set := os.LookupEnv(name); set {
			env = append(env, name+"="+value)
		}
	}
	closeOnExec()
	return os.StartProcess(program, []string{wire.HostArgv0}, &os.ProcAttr{
		Dir: "/", Env: env, Files: files,
		// A session of its own keeps the terminal's Ctrl-C from killing the host under a command that is finishing.
		Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL},
	})
}

// closeOnExec keeps descriptors that this program itself was given from reaching the host. Go marks those that it opens.
func closeOnExec() {
	const first, last = 3, math.MaxInt32
	if unix.CloseRange(first, last, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return
	}
	// Linux before 5.11.
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, entry := range entries {
		var fd int
		if _, err := fmt.Sscan(entry.Name(), &fd); err == nil && fd >= first {
			unix.CloseOnExec(fd)
		}
	}
}

// openVerified opens a program once, hashes what it opened, and returns the descriptor to execute, so that what runs is
// what was hashed. Nobody but root and ourselves may be able to change it, or its owner could do so between the two. The descriptor lies well above `above`, because descriptors just above the highest one passed on are
// overwritten between fork and exec.
func openVerified(path, wantSHA256 string, above int) (int, error) {
	want, err := hex.DecodeString(wantSHA256)
	if err != nil || len(want) != sha256.Size {
		return -1, fmt.Errorf("the SHA-256 given for the module host %s is not 64 hexadecimal digits", path)
	}
	if !filepath.IsAbs(path) {
		return -1, fmt.Errorf("the path of the module host, %q, does not begin with /", path)
	}
	resolved, err := resolveSafely(path)
	if err != nil {
		return -1, fmt.Errorf("checking the module host %s: %w", path, err)
	}
	file, err := os.Open(resolved)
	if err != nil {
		return -1, err
	}
	defer func() { _ = file.Close() }()
	digest := sha256.New()
	if _, err := io.Copy(digest, file); err != nil {
		return -1, fmt.Errorf("reading the module host %s: %w", path, err)
	}
	if got := digest.Sum(nil); string(got) != string(want) {
		return -1, fmt.Errorf("the module host %s has SHA-256 %x, not %x as the plugin was told: it was replaced, or the "+
			"plugin's -module-host-sha256 has to be brought up to date in Vault's catalog", path, got, want)
	}
	fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, above+32)
	if err != nil {
		return -1, fmt.Errorf("duplicating the descriptor of the module host: %w", err)
	}
	return fd, nil
}
