package test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// house is a machine as docs/auto-unseal.md assumes it: an HSM, Vault, `nitroseal serve`, and a systemctl that starts and ends
// them. The page's own commands run in it, with its files and ports in the place of the page's.
type house struct {
	*desk
	plug  *pkcs11test.Plug
	units map[string]*unit
	vault string // host:port of Vault
	seal  string // host:port of the server
	sum   string // of the key record that was kept last

	metrics string // host:port of the server's metrics
}

// newHouse makes one in which nothing runs.
func newHouse(t *testing.T) *house {
	t.Helper()
	h := &house{desk: &desk{dir: t.TempDir(), page: readPage(t, "auto-unseal.md")}, plug: pkcs11test.Unpluggable(t), units: map[string]*unit{}}
	for _, dir := range []string{"etc", "vault.d", "raft", "bin", "home", "state"} {
		must(t, os.Mkdir(filepath.Join(h.dir, dir), 0o700))
	}
	ports := vaulttest.FreePorts(t, 4)
	h.seal, h.vault, h.metrics = ports[0], ports[1], ports[3]
	h.certify(t)
	write(t, h.dir, "etc/pin", h.plug.PIN)
	must(t, os.Symlink(vaulttest.Build{Command: "nitroseal"}.Binary(t).Path, h.file("bin/nitroseal")))
	must(t, os.Symlink(vaulttest.Tool(t, "vault"), h.file("bin/vault")))
	h.env = append(os.Environ(), "PATH="+h.file("bin")+":"+os.Getenv("PATH"), "HOME="+h.file("home"),
		"NITROSEAL_CONFIG="+h.file("etc/nitroseal.hcl"))
	h.addUnit(t, "nitroseal-serve", "nitroseal", "serve")
	h.addUnit(t, "vault", "vault", "server", "-config="+h.file("vault.d/vault.hcl"))
	h.env = append(h.env, "VAULT_ADDR=https://"+h.vault, "VAULT_CACERT="+h.file("vault.d/ca.pem"))
	h.installSystemctl(t)
	h.change("/etc/nitroseal/", h.file("etc")+"/", "/etc/vault.d/", h.file("vault.d")+"/", "/var/lib/nitroseal", h.file("state"),
		`modules = ["/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"]`,
		fmt.Sprintf("modules = [%q]\n  env     = [\"%s\"]", h.plug.Module, strings.Join(h.plug.Env, `", "`)),
		"DENK0100001", h.plug.Serial, "0.0.0.0:8210\"", h.seal+"\"\n  metrics_listen = \""+h.metrics+"\"", "seal.example.org:8210", h.seal,
		// A person looks again where Vault needs another moment.
		"vault status\n", "timeout 60 sh -c 'until vault status; do sleep 0.1; done'\n")
	write(t, h.dir, "vault.d/base", fmt.Sprintf(`
disable_mlock = true
api_addr      = "https://%[2]s"
cluster_addr  = "https://%[3]s"
storage "raft" {
  path                   = "%[1]s/raft"
  node_id                = "node"
  performance_multiplier = 1
}
listener "tcp" {
  address         = %[2]q
  cluster_address = %[3]q
  tls_cert_file   = "%[1]s/vault.d/vault.pem"
  tls_key_file    = "%[1]s/vault.d/vault.key"
}
`, h.dir, h.vault, ports[2]))
	return h
}

func (h *house) file(name string) string { return filepath.Join(h.dir, name) }

// change writes words of the page differently, given in pairs.
func (h *house) change(pairs ...string) {
	words := strings.NewReplacer(pairs...)
	for name, block := range h.page {
		h.page[name] = words.Replace(block)
	}
}

// certify makes the certificates of Vault and of the server, of one authority.
func (h *house) certify(t *testing.T) {
	t.Helper()
	authority := vaulttest.NewAuthority(t)
	for _, ca := range []string{"seal-ca.pem", "vault.d/seal-ca.pem", "vault.d/ca.pem"} {
		write(t, h.dir, ca, string(authority.PEM))
	}
	for _, server := range []string{"etc/serve", "vault.d/vault"} {
		certificate, key := authority.Issue(t)
		write(t, h.dir, server+".pem", string(certificate))
		write(t, h.dir, server+".key", string(key))
	}
}

// stanzas gives Vault seals of the page, by the names of their blocks, from its next start on.
func (h *house) stanzas(t *testing.T, blocks ...string) {
	t.Helper()
	config := read(t, h.dir, "vault.d/base")
	for _, block := range blocks {
		config += h.page["hcl "+block]
	}
	write(t, h.dir, "vault.d/vault.hcl", config)
}

// keys takes what an initialisation printed, as $KEY_1 and so on, and its root token.
func (h *house) keys(t *testing.T, file string) {
	t.Helper()
	var made struct {
		Unseal   []string `json:"unseal_keys_b64"`
		Recovery []string `json:"recovery_keys_b64"`
		Root     string   `json:"root_token"`
	}
	must(t, json.Unmarshal([]byte(read(t, h.dir, file)), &made))
	for i, key := range slices.Concat(made.Unseal, made.Recovery) {
		h.env = append(h.env, fmt.Sprintf("KEY_%d=%s", i+1, key))
	}
	h.env = append(h.env, "VAULT_TOKEN="+made.Root)
}

// shell runs commands that are none of the page.
func (h *house) shell(t *testing.T, script string) string {
	t.Helper()
	h.page["sh of the test"] = script
	return h.must(t, "of the test")
}

// fill writes something into a new Vault, and holds looks whether it is there.
func (h *house) fill(t *testing.T) {
	t.Helper()
	h.shell(t, "timeout 60 sh -c 'until vault secrets enable -version=1 kv; do sleep 0.1; done'\nvault kv put kv/a a=b\n")
}

func (h *house) holds(t *testing.T) {
	t.Helper()
	if got := h.shell(t, "timeout 60 sh -c 'until vault kv get -field=a kv/a 2>/dev/null; do sleep 0.1; done'\n"); got != "b" {
		t.Errorf("Vault holds %q", got)
	}
}

// installSystemctl makes a systemctl that knows start, stop, restart, kill and enable, and asks the test to do it.
func (h *house) installSystemctl(t *testing.T) {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		told, err := io.ReadAll(r.Body)
		if err == nil {
			err = h.systemctl(strings.Fields(string(told)))
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}))
	t.Cleanup(server.Close)
	script := "#!/bin/sh\nexec curl --silent --show-error --fail-with-body --data-binary \"$*\" " + server.URL + "\n"
	must(t, os.WriteFile(h.file("bin/systemctl"), []byte(script), 0o700))
}

// systemctl does what systemd would.
func (h *house) systemctl(words []string) error {
	signals := map[string]syscall.Signal{"KILL": syscall.SIGKILL, "USR1": syscall.SIGUSR1, "HUP": syscall.SIGHUP}
	if len(words) < 2 || h.units[words[len(words)-1]] == nil {
		return fmt.Errorf("systemctl %v: no such unit", words)
	}
	u := h.units[words[len(words)-1]]
	switch strings.Join(words[:len(words)-1], " ") {
	case "start", "enable --now":
		return u.start()
	case "stop":
		u.stop()
	case "restart":
		u.stop()
		return u.start()
	case "reload":
		return u.signal(syscall.SIGHUP)
	case "kill --signal KILL", "kill --signal USR1":
		return u.signal(signals[words[2]])
	default:
		return fmt.Errorf("systemctl %v: not known here", words)
	}
	return nil
}

// unit is a service of systemd's: one process, which is started again when it ends without being told to.
type unit struct {
	name    string
	command func(context.Context) *exec.Cmd

	mu      sync.Mutex
	end     context.CancelFunc // nil while it is stopped
	ended   chan struct{}
	process *os.Process // the one that runs, or ran last
}

// addUnit adds one that is stopped with the test.
func (h *house) addUnit(t *testing.T, name, program string, args ...string) {
	t.Helper()
	log, err := os.OpenFile(h.file(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	program, env := h.file("bin/"+program), slices.Clone(h.env)
	u := &unit{name: name, command: func(ctx context.Context) *exec.Cmd {
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = h.dir, env, log, log
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		cmd.WaitDelay = 20 * time.Second // then it is killed
		return cmd
	}}
	h.units[name] = u
	t.Cleanup(func() {
		u.stop()
		must(t, log.Close())
		if said := read(t, h.dir, name+".log"); t.Failed() {
			const enough = 12 << 10
			t.Logf("%s said\n%s", name, said[max(0, len(said)-enough):])
		}
	})
}

// start begins to keep the process running, and returns when it has said that it is ready, as systemd does for Type=notify.
func (u *unit) start() error {
	ready, err := u.begin()
	if err != nil {
		return err
	}
	select {
	case <-ready:
		return nil
	case <-time.After(time.Minute):
		return fmt.Errorf("%s was not ready after a minute", u.name)
	}
}

// begin is start without the wait: what it returns is closed when the process is ready, or was there before.
func (u *unit) begin() (ready <-chan struct{}, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	told := make(chan struct{})
	if u.end != nil {
		close(told)
		return told, nil
	}
	notify, err := listenNotify(told)
	if err != nil {
		return nil, err
	}
	ctx, end := context.WithCancel(context.Background())
	u.end, u.ended = end, make(chan struct{})
	go func(ended chan<- struct{}) { // ends when the unit is stopped
		defer close(ended)
		defer notify.Close() //nolint:errcheck // a socket of the test's
		for ctx.Err() == nil {
			u.run(ctx, notify.LocalAddr().String())
			select {
			case <-ctx.Done():
			case <-time.After(200 * time.Millisecond): // RestartSec
			}
		}
	}(u.ended)
	return told, nil
}

// run runs the process once.
func (u *unit) run(ctx context.Context, notify string) {
	cmd := u.command(ctx)
	cmd.Env = append(slices.Clone(cmd.Env), "NOTIFY_SOCKET="+notify)
	if cmd.Start() != nil {
		return
	}
	u.mu.Lock()
	u.process = cmd.Process
	u.mu.Unlock()
	_ = cmd.Wait() // it is started again, whatever it was
}

// listenNotify hears what systemd would: ready is closed when a process says so.
func listenNotify(ready chan<- struct{}) (*net.UnixConn, error) {
	address := &net.UnixAddr{Name: fmt.Sprintf("@nitroseal-test-%d-%p", os.Getpid(), ready), Net: "unixgram"}
	conn, err := net.ListenUnixgram("unixgram", address)
	if err != nil {
		return nil, err
	}
	go func() { // ends when the socket is closed
		said, once := make([]byte, 4096), sync.Once{}
		for {
			n, err := conn.Read(said)
			if err != nil {
				return
			}
			if slices.Contains(strings.Split(string(said[:n]), "\n"), "READY=1") {
				once.Do(func() { close(ready) })
			}
		}
	}()
	return conn, nil
}

// stop ends the process and lets it rest.
func (u *unit) stop() {
	u.mu.Lock()
	end, ended := u.end, u.ended
	u.end = nil
	u.mu.Unlock()
	if end != nil {
		end()
		<-ended
	}
}

// signal sends the process a signal, whatever comes of it.
func (u *unit) signal(signal syscall.Signal) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.process == nil {
		return fmt.Errorf("%s does not run", u.name)
	}
	return u.process.Signal(signal)
}
