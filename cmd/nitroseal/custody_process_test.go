package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// inCustody is the configuration of a token with a wrapping key that is ready, and of the cluster "prod" of one node.
func inCustody(t *testing.T, token *pkcs11test.Token, n *nodetest.Node) (configuration string) {
	t.Helper()
	configuration = configured(t, token)
	dir := filepath.Dir(configuration)
	if err := os.Mkdir(filepath.Join(dir, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	appendTo(t, configuration, fmt.Sprintf("store \"here\" {\n  type = \"file\"\n  dir = \"store\"\n}\n"+
		"cluster \"prod\" {\n  nodes = [%q]\n  ca_cert_file = \"ca.pem\"\n  key = \"prod\"\n  store = \"here\"\n}\nrun {\n  listen = \"\"\n  interval = \"1s\"\n}\n", n.Address()))
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), n.Authority().PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, configuration, "key", "adopt", "prod", "--device", "one", "--id", "01")
	must(t, configuration, "key", "backup", "prod")
	must(t, configuration, "key", "configure", "prod", "--backup-confirmed")
	return configuration
}

func appendTo(t *testing.T, path, text string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(content, text...), 0o600); err != nil {
		t.Fatal(err)
	}
}

// rsaToken is a SoftHSM with one key.
func rsaToken(t *testing.T) *pkcs11test.Token {
	t.Helper()
	token := pkcs11test.SoftHSM(t)
	token.GenerateKey(t, "rsa:2048", "unseal", "01")
	return token
}

// transcript is what a process says, readable while it runs.
type transcript struct {
	mu   sync.Mutex
	said bytes.Buffer
}

func (w *transcript) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.said.Write(p)
}

func (w *transcript) text() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.said.String()
}

// code is the exit code that a process ended with.
func code(t *testing.T, err error) int {
	t.Helper()
	failed := (*exec.ExitError)(nil)
	switch {
	case err == nil:
		return 0
	case errors.As(err, &failed):
		return failed.ExitCode()
	}
	t.Fatal(err)
	return -1
}

func TestAnInitialisationThatBeganIsNotInterrupted(t *testing.T) {
	for name, signal := range map[string]os.Signal{"Ctrl-C": os.Interrupt, "SIGTERM": syscall.SIGTERM, "SIGHUP": syscall.SIGHUP} {
		t.Run(name, func(t *testing.T) {
			n := nodetest.Start(t, nodetest.Options{})
			configuration := inCustody(t, rsaToken(t), n)
			r, goOn := initBegun(t, configuration, n)
			for i := range 3 {
				r.signal(t, signal)
				until(t, "an answer to the signal", func() bool { return strings.Count(r.said.text(), name+" came") == i+1 })
			}
			goOn()
			r.ends(t, exitInterrupted)
			// The keys are safe, and the next run finishes what is left.
			must(t, configuration, "init", "prod")
			if n.Sealed() || n.Count(http.MethodPut, "sys/init")+n.Count(http.MethodPost, "sys/init") != 1 {
				t.Errorf("sealed: %t; requests %v", n.Sealed(), n.Requests())
			}
			must(t, configuration, "status", "prod")
		})
	}
}

func TestHostsThatInitialiseAtOnceMakeOneCluster(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	token := rsaToken(t)
	configuration := inCustody(t, token, n)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() { repeated(t, configuration, "", "init", "prod") })
	}
	all.Wait()
	if n.Sealed() || n.Tokens() != 0 {
		t.Errorf("sealed: %t; %d root tokens live", n.Sealed(), n.Tokens())
	}
	must(t, configuration, "status")
}

func TestNothingIsCreatedWhereItCouldNotBeKept(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(t *testing.T, configuration string, n *nodetest.Node)
		code  int
		says  string
	}{
		"another authority": {func(t *testing.T, configuration string, _ *nodetest.Node) {
			t.Helper()
			ca := filepath.Join(filepath.Dir(configuration), "ca.pem")
			if err := os.WriteFile(ca, nodetest.NewAuthority(t).PEM, 0o600); err != nil {
				t.Fatal(err)
			}
		}, exitRefused, "its certificate is not signed by the CA of this cluster"},
		"the node away": {func(_ *testing.T, _ string, n *nodetest.Node) { n.Down() }, exitUnavailable, "check that the node runs"},
		"a balancer that redirects": {func(_ *testing.T, _ string, n *nodetest.Node) {
			n.Break("", -1, nodetest.Redirect("https://127.0.0.1:1"))
		}, exitRefused, "redirect"},
		"the store away": {func(t *testing.T, configuration string, _ *nodetest.Node) {
			t.Helper()
			if err := os.Remove(filepath.Join(filepath.Dir(configuration), "store")); err != nil {
				t.Fatal(err)
			}
		}, exitUsage, "is not there"},
		"the HSM away": {func(t *testing.T, configuration string, _ *nodetest.Node) {
			t.Helper()
			content, err := os.ReadFile(configuration)
			if err != nil {
				t.Fatal(err)
			}
			away := strings.Replace(string(content), "serial = \"", "serial = \"0", 1)
			if err := os.WriteFile(configuration, []byte(away), 0o600); err != nil {
				t.Fatal(err)
			}
		}, exitUnavailable, "is not there"},
		"an audit log on no disk": {func(t *testing.T, configuration string, _ *nodetest.Node) {
			t.Helper()
			appendTo(t, configuration, "audit \"file\" {\n  path = \"nowhere/audit.log\"\n}\n")
		}, exitFailed, "no audit sink took the intent"},
	} {
		t.Run(name, func(t *testing.T) {
			n := nodetest.Start(t, nodetest.Options{})
			configuration := inCustody(t, rsaToken(t), n)
			test.spoil(t, configuration, n)
			out, err := command(t, configuration, "init", "prod", "--timeout", "30s").CombinedOutput()
			if got := code(t, err); got != test.code || !strings.Contains(string(out), test.says) {
				t.Errorf("it ended with %d, want %d and %q\n%s", got, test.code, test.says, out)
			}
			if n.Count(http.MethodPut, "sys/init")+n.Count(http.MethodPost, "sys/init") != 0 {
				t.Errorf("the node was asked to initialise: %v", n.Requests())
			}
		})
	}
}

func TestAPersonSeesTheStepsOfAnInitialisation(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	configuration := inCustody(t, rsaToken(t), n)
	ours, theirs := terminal(t)
	var seen screen
	go seen.watch(ours) // ends with the terminal
	cmd := command(t, configuration, "init", "prod")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, seen.text())
	}
	steps := []string{
		"first a value goes to the store and back", "initialising a cluster (cluster prod", "a node was unsealed (cluster prod", "root token",
	}
	until(t, "the last step", func() bool { return strings.Contains(seen.text(), steps[len(steps)-1]) })
	last := 0
	for _, step := range steps {
		at := strings.Index(seen.text(), step)
		if at < last {
			t.Errorf("%q is not shown, or too early:\n%s", step, seen.text())
		}
		last = at
	}
}

func TestANodeOfAnotherClusterGetsNoMoreSharesUntilAPersonSaysSo(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	configuration := inCustody(t, rsaToken(t), n)
	must(t, configuration, "init", "prod")
	own := n.ClusterID()
	n.SetClusterID("0000-another")
	n.Restart()
	run := func(want int, says string, args ...string) {
		t.Helper()
		out, err := command(t, configuration, args...).CombinedOutput()
		if got := code(t, err); got != want || !strings.Contains(string(out), says) {
			t.Errorf("nitroseal %s ended with %d, want %d and %q\n%s", strings.Join(args, " "), got, want, says, out)
		}
	}
	run(exitRefused, "the shares were given to another cluster", "unseal", "--timeout", "30s")
	run(exitFailed, "--clear-alarm "+n.Address(), "status")
	n.Restart()
	sent := n.Count(http.MethodPut, "sys/unseal") + n.Count(http.MethodPost, "sys/unseal")
	run(exitRefused, "rekey the cluster", "unseal", "--timeout", "30s")
	if n.Count(http.MethodPut, "sys/unseal")+n.Count(http.MethodPost, "sys/unseal") != sent {
		t.Error("the node got another share")
	}
	run(exitUsage, "name that cluster", "unseal", "--clear-alarm", n.Address())
	run(exitUsage, "is none of the nodes", "unseal", "prod", "--clear-alarm", "https://127.0.0.1:1")
	n.SetClusterID(own)
	run(exitOK, "unsealed now", "unseal", "prod", "--clear-alarm", n.Address())
	run(exitOK, "", "status")
}
