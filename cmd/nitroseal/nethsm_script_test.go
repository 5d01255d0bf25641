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

	"github.com/rogpeppe/go-internal/testscript"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// init makes the test's own binary the command where it is called by that name.
func init() {
	if filepath.Base(os.Args[0]) == "nitroseal" {
		os.Exit(run(os.Args[1:]))
	}
}

// TestNetHSMStories runs the command as an operator would, against doubles of a NetHSM: testdata/script/nethsm_*.txtar. The commands
// of those scripts besides testscript's own are in netHSMCommands.
func TestNetHSMStories(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	commands := t.TempDir()
	if err := os.Symlink(self, filepath.Join(commands, "nitroseal")); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join("testdata", "script", "nethsm_*.txtar"))
	if err != nil || files == nil {
		t.Fatalf("no stories: %v", err)
	}
	testscript.Run(t, testscript.Params{
		Files: files,
		Setup: func(env *testscript.Env) error {
			env.Values[doublesKey{}] = &doubles{byName: map[string]*nethsmtest.HSM{}}
			env.Setenv("PATH", commands+string(os.PathListSeparator)+env.Getenv("PATH"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"nethsm": netHSMCommands,
			"fault":  faultCommand,
			"mode":   modeCommand,
			"nopart": noPartCommand,
			"expand": expandCommand,
			"code":   codeCommand,
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
		sent := requests(h, func(r nethsmtest.Request) bool {
			return r.Method == rest[0] && strings.HasPrefix(strings.TrimPrefix(r.Path, "/api/v1"), rest[1])
		})
		if len(sent) != want {
			ts.Fatalf("%s was sent %d of these: %v", name, len(sent), sent)
		}
	default:
		ts.Fatalf("nethsm %s is not known", verb)
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

// codeCommand runs a command and checks its exit code: code N COMMAND ….
func codeCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: code N COMMAND …")
	}
	got := "0"
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit, is := errors.AsType[*exec.ExitError](err)
		if !is {
			ts.Fatalf("%v", err)
		}
		got = strconv.Itoa(exit.ExitCode())
	}
	if got != args[0] {
		ts.Fatalf("exit code %s", got)
	}
}
