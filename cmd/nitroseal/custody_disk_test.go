package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// diskFull lets a process write to no file of a disk, and diskFree to all again.
func diskFull(t *testing.T, pid int) {
	t.Helper()
	limitFiles(t, pid, 0)
}

func diskFree(t *testing.T, pid int) {
	t.Helper()
	limitFiles(t, pid, unix.RLIM_INFINITY)
}

func limitFiles(t *testing.T, pid int, size uint64) {
	t.Helper()
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: size, Max: unix.RLIM_INFINITY}, nil); err != nil {
		t.Fatal(err)
	}
}

// initBegun starts nitroseal init, which waits in sys/init until goOn is called.
func initBegun(t *testing.T, configuration string, n *nodetest.Node, args ...string) (r *running, goOn func()) {
	t.Helper()
	asked, answer := make(chan struct{}), make(chan struct{})
	n.Break("sys/init", 1, func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		if r.Method != http.MethodGet {
			close(asked)
			<-answer
		}
		serve.ServeHTTP(w, r)
	})
	r = &running{cmd: command(t, configuration, append([]string{"init", "prod"}, args...)...), said: &transcript{}}
	r.cmd.Stderr = r.said
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the node to be asked", func() bool {
		select {
		case <-asked:
			return true
		default:
			return false
		}
	})
	return r, func() { close(answer) }
}

func TestADiskThatIsFullBeforeAnInitialisationLeavesNothingInitialised(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	configuration := inCustody(t, rsaToken(t), n)
	diskFull(t, os.Getpid()) // what is started from here has it, too
	out, err := command(t, configuration, "init", "prod").CombinedOutput()
	diskFree(t, os.Getpid())
	if got := code(t, err); got == exitOK || !strings.Contains(string(out), "file too large") {
		t.Errorf("it ended with %d\n%s", got, out)
	}
	if n.Count(http.MethodPut, "sys/init")+n.Count(http.MethodPost, "sys/init") != 0 {
		t.Errorf("the node was asked to initialise: %v", n.Requests())
	}
	must(t, configuration, "init", "prod") // once there is room
	must(t, configuration, "status", "prod")
}

func TestADiskThatFillsDuringAnInitialisationLosesNoKeys(t *testing.T) {
	const limit = 5 * time.Second // long enough to come as far as sys/init
	for name, test := range map[string]struct {
		args  []string
		leave func(t *testing.T, r *running)
		code  int
	}{
		"and a person waits":        {code: exitOK},
		"and a person is impatient": {leave: func(t *testing.T, r *running) { t.Helper(); r.signal(t, os.Interrupt); r.says(t, "Ctrl-C came") }, code: exitInterrupted},
		"and the time is up":        {args: []string{"--timeout", limit.String()}, leave: func(t *testing.T, _ *running) { t.Helper(); <-time.After(limit) }, code: exitUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			n := nodetest.Start(t, nodetest.Options{})
			configuration := inCustody(t, rsaToken(t), n)
			r, goOn := initBegun(t, configuration, n, test.args...)
			diskFull(t, r.cmd.Process.Pid)
			goOn()
			r.says(t, "file too large")
			if test.leave != nil {
				test.leave(t, r)
			}
			diskFree(t, r.cmd.Process.Pid)
			r.ends(t, test.code)
			must(t, configuration, "init", "prod")
			if n.Sealed() || n.Tokens() != 0 || n.Count(http.MethodPut, "sys/init")+n.Count(http.MethodPost, "sys/init") != 1 {
				t.Errorf("sealed: %t; %d root tokens live; requests %v", n.Sealed(), n.Tokens(), n.Requests())
			}
			must(t, configuration, "verify", "prod", "--prove")
			left, err := filepath.Glob(filepath.Join(filepath.Dir(configuration), "state", "custody", "held*"))
			if err != nil || len(left) != 0 {
				t.Errorf("held is still %q, %v", left, err)
			}
		})
	}
}
