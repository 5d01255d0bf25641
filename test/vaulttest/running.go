package vaulttest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Patience is how long a test waits for what should take seconds, on a busy machine.
const Patience = time.Minute

// Running is a command that runs in the background: `nitroseal run`.
type Running struct {
	// Log is what it has written so far, to stdout and stderr.
	Log fmt.Stringer
	// Done is closed when it has ended.
	Done <-chan struct{}

	host *Host
	cmd  *exec.Cmd
	err  error // once Done is closed
}

// growing is a log that is read while it is written.
type growing struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (g *growing) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all.Write(p)
}

func (g *growing) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.all.String()
}

// Start runs a command in the background, until it ends or the test does.
func (h *Host) Start(t testing.TB, args ...string) *Running {
	t.Helper()
	log, done := &growing{}, make(chan struct{})
	d := &Running{host: h, Log: log, Done: done, cmd: h.command(context.Background(), args...)}
	d.cmd.Stdout, d.cmd.Stderr = log, log
	must(t, d.cmd.Start())
	go func() { // ends with the process
		defer close(done)
		d.err = d.cmd.Wait()
	}()
	t.Cleanup(func() {
		d.End(syscall.SIGKILL)
		if strings.Contains(d.Log.String(), "WARNING: DATA RACE") {
			t.Error("the race detector spoke up")
		}
		if t.Failed() {
			t.Logf("log of nitroseal %s:\n%s", strings.Join(args, " "), d.Log)
		}
	})
	return d
}

// Daemon starts `nitroseal run`.
func (h *Host) Daemon(t testing.TB) *Running {
	t.Helper()
	return h.Start(t, "run")
}

// Signal sends it a signal.
func (d *Running) Signal(t testing.TB, signal syscall.Signal) {
	t.Helper()
	must(t, d.cmd.Process.Signal(signal))
}

// Process is its process.
func (d *Running) Process(t testing.TB) Process {
	t.Helper()
	p, _, err := readProcess(d.cmd.Process.Pid)
	must(t, err)
	return p
}

// Children are the processes that it has started: module hosts.
func (d *Running) Children() []Process { return descendants(d.cmd.Process.Pid) }

// End sends a signal and waits for the end.
func (d *Running) End(signal syscall.Signal) {
	_ = d.cmd.Process.Signal(signal) // it may have ended already
	select {
	case <-d.Done:
	case <-time.After(time.Minute):
		_ = d.cmd.Process.Kill()
		<-d.Done
	}
}

// Stop ends it in good order, with exit code 0.
func (d *Running) Stop(t testing.TB) {
	t.Helper()
	d.End(syscall.SIGTERM)
	if d.err != nil {
		t.Errorf("it ended with %v", d.err)
	}
}

// Says waits until the log has each of the words after the mark, and returns where the log ends then.
func (d *Running) Says(t testing.TB, mark int, words ...string) int {
	t.Helper()
	Eventually(t, Patience, "the log to say it", func() error {
		text := d.Log.String()[mark:]
		for _, word := range words {
			if !strings.Contains(text, word) {
				return fmt.Errorf("it says nothing of %q", word)
			}
		}
		return nil
	})
	return d.Mark()
}

// Mark is where the log ends now.
func (d *Running) Mark() int { return len(d.Log.String()) }

// Get asks the daemon over HTTP.
func (d *Running) Get(t testing.TB, path string) (status int, body string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.host.listen+path, nil)
	must(t, err)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	return response.StatusCode, string(content), err
}

// Ready waits until the daemon answers that it is ready.
func (d *Running) Ready(t testing.TB) {
	t.Helper()
	Eventually(t, Patience, "the daemon to be ready", func() error {
		status, body, err := d.Get(t, "/readyz")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("%d %s", status, body)
		}
		return err
	})
}

// Decode reads the JSON of a command.
func Decode[T any](t testing.TB, text string) (value T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		t.Fatalf("reading %q: %v", text, err)
	}
	return value
}
