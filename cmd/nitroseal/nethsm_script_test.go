package main

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/pflag"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// TestNetHSMStories runs the command as an operator would, against doubles of a NetHSM:
// testdata/script/nethsm_*.txtar. The commands of those scripts besides testscript's own are in netHSMCommands.
func TestNetHSMStories(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("testdata", "script", "nethsm_*.txtar"))
	if err != nil || files == nil {
		t.Fatalf("no stories: %v", err)
	}
	testscript.Run(t, testscript.Params{
		Files: files,
		Setup: func(env *testscript.Env) error {
			env.Values[doublesKey{}] = &doubles{byName: map[string]*nethsmtest.HSM{}}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"nethsm": netHSMCommands,
			"fault":  faultCommand,
			"mode":   modeCommand,
			"nopart": noPartCommand,
			"expand": expandCommand,
			"run":    runCommand,

			"arguments": argumentsCommand,
		},
		RequireExplicitExec: true,
	})
}

// doubles are the NetHSMs of one script.
type doubles struct {
	mu     sync.Mutex
	byName map[string]*nethsmtest.HSM
}

type doublesKey struct{}

func (d *doubles) get(ts *testscript.TestScript, name string) *nethsmtest.HSM {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := d.byName[name]
	if h == nil {
		ts.Fatalf("there is no NetHSM %q; start one", name)
	}
	return h
}

// netHSMCommands are
//
//	nethsm start NAME [provisioned] [selfsigned] [nodes=N] [unattended]   sets $NAME_url, $NAME_url2 …, $NAME_pin, $NAME_ca (a file)
//	nethsm lock NAME [NODE]           somebody locks it
//	nethsm state NAME NODE STATE
//	nethsm stop NAME NODE
//	nethsm only-get NAME              fails where it was sent anything but GET
//	nethsm sent NAME METHOD PATH N    fails where it was not sent exactly N such requests; PATH is a prefix
//	nethsm await NAME METHOD PATH     waits until it was sent such a request
//	nethsm calm NAME                  ends all its faults
//	nethsm forget NAME                forgets what it was sent
func netHSMCommands(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: nethsm VERB NAME …")
	}
	all := ts.Value(doublesKey{}).(*doubles)
	verb, name, rest := args[0], args[1], args[2:]
	if verb == "start" {
		startDouble(ts, all, name, rest)
		return
	}
	h := all.get(ts, name)
	node := func(i int) *nethsmtest.Node {
		if len(rest) <= i {
			return h.Node(0)
		}
		n, err := strconv.Atoi(rest[i])
		ts.Check(err)
		return h.Node(n)
	}
	switch verb {
	case "lock":
		node(0).SetState(nethsmtest.Locked)
	case "state":
		node(0).SetState(nethsmtest.State(rest[1]))
	case "stop":
		node(0).Stop()
	case "calm":
		for _, n := range h.Nodes() {
			n.ClearFaults()
		}
	case "forget":
		for _, n := range h.Nodes() {
			n.ResetCounters()
		}
	case "only-get":
		if sent := requests(h, func(r nethsmtest.Request) bool { return r.Method != http.MethodGet }); len(sent) > 0 {
			ts.Fatalf("%s was sent %v", name, sent)
		}
	case "sent":
		want, err := strconv.Atoi(rest[2])
		ts.Check(err)
		sent := requests(h, like(rest[0], rest[1]))
		if len(sent) != want {
			ts.Fatalf("%s was sent %d of these: %v", name, len(sent), sent)
		}
	case "await":
		awaitRequest(ts, h, rest[0], rest[1])
	default:
		ts.Fatalf("nethsm %s is not known", verb)
	}
}

func like(method, path string) func(nethsmtest.Request) bool {
	return func(r nethsmtest.Request) bool {
		return r.Method == method && strings.HasPrefix(strings.TrimPrefix(r.Path, "/api/v1"), path)
	}
}

func awaitRequest(ts *testscript.TestScript, h *nethsmtest.HSM, method, path string) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for len(requests(h, like(method, path))) == 0 {
		select {
		case <-tick.C:
		case <-deadline:
			ts.Fatalf("no %s %s came", method, path)
		}
	}
}

// argumentsCommand looks at the arguments of all processes, as everybody on a machine can: arguments PRESENT SECRET…
// fails where there is no process with the first text among its arguments, or any with one of the others.
func argumentsCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: arguments PRESENT SECRET…")
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	ts.Check(err)
	found := false
	for _, line := range lines {
		content, _ := os.ReadFile(line) // a process that ended meanwhile has none
		found = found || strings.Contains(string(content), args[0])
		for _, secret := range args[1:] {
			if strings.Contains(string(content), secret) {
				ts.Fatalf("%s holds %s", line, secret)
			}
		}
	}
	if !found {
		ts.Fatalf("no process has %s among its arguments", args[0])
	}
}

func requests(h *nethsmtest.HSM, wanted func(nethsmtest.Request) bool) []string {
	var out []string
	for _, n := range h.Nodes() {
		for _, r := range n.Requests() {
			if wanted(r) {
				out = append(out, fmt.Sprintf("%s %s (%d)", r.Method, r.Path, r.Status))
			}
		}
	}
	return out
}

func startDouble(ts *testscript.TestScript, all *doubles, name string, words []string) {
	options := nethsmtest.Options{
		Provisioned:    slices.Contains(words, "provisioned"),
		SelfSigned:     slices.Contains(words, "selfsigned"),
		UnattendedBoot: slices.Contains(words, "unattended"),
	}
	for _, word := range words {
		if count, is := strings.CutPrefix(word, "nodes="); is {
			n, err := strconv.Atoi(count)
			ts.Check(err)
			options.Nodes = n
		}
	}
	h, err := nethsmtest.Serve(options)
	ts.Check(err)
	ts.Defer(h.Close)
	all.mu.Lock()
	all.byName[name] = h
	all.mu.Unlock()
	for i, url := range h.URLs() {
		number := ""
		if i > 0 {
			number = strconv.Itoa(i + 1)
		}
		ts.Setenv(name+"_url"+number, url)
	}
	ts.Setenv(name+"_pin", h.Node(0).Pin())
	ca := ts.MkAbs(name + "-ca.pem")
	ts.Check(os.WriteFile(ca, h.CA(), 0o600))
	ts.Setenv(name+"_ca", ca)
}

// faultCommand lets requests go wrong: fault NAME METHOD PATH lost|cut|hang|STATUS [TIMES]. PATH is a prefix.
func faultCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 4 {
		ts.Fatalf("usage: fault NAME METHOD PATH lost|cut|hang|STATUS [TIMES]")
	}
	fault := nethsmtest.Fault{Method: args[1], Path: args[2]}
	switch args[3] {
	case "lost":
		fault.Drop = true
	case "cut":
		fault.Cut, fault.After = true, -1
	case "half":
		fault.Cut, fault.After = true, 200
	case "hang":
		fault.Hang = true
	default:
		status, err := strconv.Atoi(args[3])
		ts.Check(err)
		fault.Status = status
	}
	if len(args) > 4 {
		times, err := strconv.Atoi(args[4])
		ts.Check(err)
		fault.Times = times
	}
	ts.Value(doublesKey{}).(*doubles).get(ts, args[0]).Node(0).Inject(fault)
}

// modeCommand checks the permissions of a file: mode 600 FILE.
func modeCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mode OCTAL FILE")
	}
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%o", info.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s", args[1], got)
	}
}

// noPartCommand fails where a folder holds what an unfinished backup would leave: nopart FOLDER.
func noPartCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: nopart FOLDER")
	}
	files, err := os.ReadDir(ts.MkAbs(args[0]))
	ts.Check(err)
	for _, file := range files {
		if strings.Contains(file.Name(), ".partial-") {
			ts.Fatalf("%s was left behind", file.Name())
		}
	}
}

// expandCommand writes a file with the script's variables put in: expand FROM TO.
func expandCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: expand FROM TO")
	}
	content := os.Expand(ts.ReadFile(args[0]), ts.Getenv)
	ts.Check(os.WriteFile(ts.MkAbs(args[1]), []byte(content), 0o600))
}

// runCommand runs nitroseal, which must end with that exit code and show no secret: run CODE ARG …. Secrets are what
// lies in the files that its flags name, whether they were there before or not, and the passphrases that every double
// has.
func runCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: run CODE ARG …")
	}
	got := "0"
	if err := ts.Exec("nitroseal", args[1:]...); err != nil {
		exit, is := errors.AsType[*exec.ExitError](err)
		if !is {
			ts.Fatalf("%v", err)
		}
		got = strconv.Itoa(exit.ExitCode())
	}
	if got != args[0] {
		ts.Fatalf("exit code %s", got)
	}
	secrets := []string{
		nethsmtest.OperatorPassphrase, nethsmtest.BackupPassphrase, nethsmtest.BackupFilePassphrase, nethsmtest.UnlockPassphrase, ts.Getenv("OPERATOR"),
	}
	for i, arg := range args[1:] {
		if strings.HasSuffix(arg, "-file") && len(args) > i+2 {
			content, _ := os.ReadFile(ts.MkAbs(args[i+2])) // it may be missing: that is for the command to say
			secrets = append(secrets, strings.TrimSpace(string(content)))
		}
	}
	for _, secret := range secrets {
		// The double's administrator has the name of a role as a password.
		if secret != "" && secret != nethsmtest.AdminPassphrase && strings.Contains(ts.ReadFile("stdout")+ts.ReadFile("stderr"), secret) {
			ts.Fatalf("the secret %q was shown", secret)
		}
	}
}

// TestNoFlagTakesASecret: arguments are seen by every user of the machine.
func TestNoFlagTakesASecret(t *testing.T) {
	for _, verb := range newNetHSMCommand(newApp(os.Stdin, os.Stdout, os.Stderr)).Commands() {
		verb.Flags().VisitAll(func(flag *pflag.Flag) {
			secret := strings.Contains(flag.Name, "password") || strings.Contains(flag.Name, "passphrase")
			if secret && !strings.HasSuffix(flag.Name, "-file") && !strings.HasSuffix(flag.Name, "-env") {
				t.Errorf("%s has the flag --%s", verb.CommandPath(), flag.Name)
			}
		})
	}
}
