package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// running is a daemon that a test started.
type running struct {
	cmd  *exec.Cmd
	said *transcript
}

func startRun(t *testing.T, configuration string, env []string, args ...string) *running {
	t.Helper()
	return startDaemon(t, configuration, env, append([]string{"run"}, args...)...)
}

// startDaemon starts a verb that stays.
func startDaemon(t *testing.T, configuration string, env []string, args ...string) *running {
	t.Helper()
	r := &running{cmd: command(t, configuration, args...), said: &transcript{}}
	r.cmd.Env = append(r.cmd.Env, env...)
	r.cmd.Stderr = r.said
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon said\n%s", r.said.text())
		}
	})
	return r
}

func (r *running) signal(t *testing.T, signal os.Signal) {
	t.Helper()
	if err := r.cmd.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
}

// says waits until the log has some text.
func (r *running) says(t *testing.T, text string) {
	t.Helper()
	until(t, text, func() bool { return strings.Contains(r.said.text(), text) })
}

// ends wants it to have ended with that code.
func (r *running) ends(t *testing.T, want int) {
	t.Helper()
	if got := code(t, r.cmd.Wait()); got != want {
		t.Errorf("the daemon ended with %d, want %d\n%s", got, want, r.said.text())
	}
}

func opened(t *testing.T, n *nodetest.Node) {
	t.Helper()
	until(t, "the node to be unsealed", func() bool { return !n.Sealed() })
}

func TestTheDaemonReadsItsConfigurationAnew(t *testing.T) {
	prod, test := nodetest.Start(t, nodetest.Options{}), nodetest.Start(t, nodetest.Options{})
	configuration := inCustody(t, rsaToken(t), prod)
	dir := filepath.Dir(configuration)
	if err := os.WriteFile(filepath.Join(dir, "test.pem"), test.Authority().PEM, 0o600); err != nil {
		t.Fatal(err)
	}
	listen := vaulttest.FreePorts(t, 1)[0]
	before, err := os.ReadFile(configuration)
	if err != nil {
		t.Fatal(err)
	}
	write := func(more string) {
		t.Helper()
		content := strings.Replace(string(before), `listen = ""`, fmt.Sprintf("listen = %q", listen), 1) + more
		// The PIN is one of systemd's.
		content = strings.Replace(content, `pin_file = "pin"`, `pin_file = "credential:pin"`, 1)
		if err := os.WriteFile(configuration, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	credentials := filepath.Join(dir, "credentials")
	if err := os.Mkdir(credentials, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "pin"), filepath.Join(credentials, "pin")); err != nil {
		t.Fatal(err)
	}
	handed := []string{"CREDENTIALS_DIRECTORY=" + credentials}
	another := fmt.Sprintf("cluster \"test\" {\n  nodes = [%q]\n  ca_cert_file = \"test.pem\"\n  key = \"prod\"\n  store = \"here\"\n}\n", test.Address())
	write(another)
	for _, name := range []string{"prod", "test"} {
		cmd := command(t, configuration, "init", name)
		cmd.Env = append(cmd.Env, handed...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	prod.Restart()
	test.Restart()

	write("")
	r := startRun(t, configuration, handed, "--log-format", "json")
	opened(t, prod)
	if !test.Sealed() {
		t.Fatal("a node that no configuration names was unsealed")
	}
	for path, want := range map[string]string{"/healthz": "", "/readyz": "", "/metrics": "nitroseal_"} {
		response, err := (&http.Client{}).Get("http://" + listen + path) //nolint:noctx // ends with the daemon
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if err != nil || response.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s answers %d, %v\n%s", path, response.StatusCode, err, body)
		}
	}

	write("cluster \"test\" {\n}\n")
	r.signal(t, syscall.SIGHUP)
	r.says(t, "Missing required argument")
	prod.Restart()
	opened(t, prod) // the configuration in use stays

	write(another)
	r.signal(t, syscall.SIGHUP)
	opened(t, test)
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
	for line := range strings.Lines(r.said.text()) {
		if !strings.HasPrefix(line, `{"time":`) {
			t.Errorf("a line of its log is no JSON: %q", line)
		}
	}
}

func TestTheDaemonOutlivesTheReaderOfItsLog(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	configuration := inCustody(t, rsaToken(t), n)
	must(t, configuration, "init", "prod")
	n.Restart()
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(t, configuration, "run")
	cmd.Stderr = writer
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	writer.Close()
	opened(t, n)
	reader.Close()
	for range 2 { // what it says of the first is in vain
		n.Restart()
		opened(t, n)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if got := code(t, cmd.Wait()); got != exitOK {
		t.Errorf("it ended with %d", got)
	}
}

func TestADaemonThatCannotWorkEndsAtOnce(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	configuration := inCustody(t, rsaToken(t), n)
	content, err := os.ReadFile(configuration)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(string) string
		args   []string
		code   int
		says   string
	}{
		"without a cluster": {func(c string) string {
			before, _, _ := strings.Cut(c, "cluster ")
			return before
		}, nil, exitUsage, "has no cluster"},
		"with a person's key that is none": {func(c string) string {
			return strings.Replace(c, "  key = \"prod\"\n", "  key = \"prod\"\n  person \"alice\" {\n    pgp_key_file = \"ca.pem\"\n  }\n", 1)
		}, nil, exitUsage, "the key of person"},
		"with a certificate that is none": {func(c string) string {
			return strings.Replace(c, "listen = \"\"", "listen = \"127.0.0.1:0\"\n  tls_cert_file = \"ca.pem\"\n  tls_key_file = \"pin\"", 1)
		}, nil, exitUsage, "tls_cert_file and tls_key_file"},
		"with an unknown form of log":   {func(c string) string { return c }, []string{"--log-format", "xml"}, exitUsage, "text or json"},
		"with an unknown level of logs": {func(c string) string { return c }, []string{"--log-level", "loud"}, exitUsage, "debug, info"},
		"with a PIN that systemd did not hand over": {func(c string) string {
			return strings.Replace(c, `pin_file = "pin"`, `pin_file = "credential:../pin"`, 1)
		}, nil, exitUsage, "credential:NAME"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(configuration, []byte(test.change(string(content))), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := command(t, configuration, append([]string{"run"}, test.args...)...).CombinedOutput()
			if got := code(t, err); got != test.code || !strings.Contains(string(out), test.says) {
				t.Errorf("it ended with %d, want %d and %q\n%s", got, test.code, test.says, out)
			}
		})
	}
}

// TestNeitherATakenPortNorAnUnsafeAuditFileKeepsAVaultSealed after a power cut: both are told, and mended at leisure.
func TestNeitherATakenPortNorAnUnsafeAuditFileKeepsAVaultSealed(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	configuration := inCustody(t, rsaToken(t), n)
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	content, err := os.ReadFile(configuration)
	if err != nil {
		t.Fatal(err)
	}
	appendTo(t, configuration, "audit \"file\" {\n  path = \"one.log\"\n}\naudit \"file\" {\n  path = \"two.log\"\n}\n")
	one := filepath.Join(filepath.Dir(configuration), "one.log")
	if err := os.WriteFile(one, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(one, 0o666); err != nil {
		t.Fatal(err)
	}
	out, err := command(t, configuration, "init", "prod").CombinedOutput()
	if code(t, err) != exitOK || !strings.Contains(string(out), "chmod go-w "+one) {
		t.Fatalf("init ended with %v\n%s", err, out)
	}
	n.Restart()
	with := strings.Replace(string(content), "listen = \"\"", fmt.Sprintf("listen = %q", taken.Addr()), 1)
	if err := os.WriteFile(configuration, []byte(with), 0o600); err != nil {
		t.Fatal(err)
	}
	appendTo(t, configuration, "audit \"file\" {\n  path = \"one.log\"\n}\naudit \"file\" {\n  path = \"two.log\"\n}\n")
	r := startRun(t, configuration, nil)
	opened(t, n)
	r.says(t, "address already in use")
	r.says(t, "chmod go-w "+one)
	r.signal(t, syscall.SIGTERM)
	r.ends(t, exitOK)
}
