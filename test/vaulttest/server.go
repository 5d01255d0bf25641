package vaulttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"text/template"
	"time"

	"github.com/hashicorp/vault/api"
)

// Options of a server. The zero value fits most tests.
type Options struct {
	// MLock lets Vault and the plugin lock their memory, as in production. It needs root or CAP_IPC_LOCK.
	MLock bool
	// Join names a server whose raft cluster this one joins.
	Join *Server
	// Seals make another server unseal this one.
	Seals []Seal
	// Nobody runs Vault, and with it the plugin, as an ordinary user whose one capability is CAP_IPC_LOCK, which their
	// files have. It needs root.
	Nobody bool
	// Bare leaves Vault as its first start leaves it: not initialised, sealed, no plugin. Its RootToken and UnsealKey are
	// the test's to set, where it has them.
	Bare bool
	// Storage is "raft", which is the default, or "inmem", which starts quickest and forgets all with its process.
	Storage Storage
	// RetryJoin names nodes whose cluster a new node of raft joins by itself, as soon as one of them is unsealed.
	RetryJoin []string
	// Authority signs the server's certificate; nil for one of its own.
	Authority *Authority
}

// Storage is the storage of a server.
type Storage string

// The storages.
const (
	Raft  Storage = "raft"
	InMem Storage = "inmem"
)

// Server is a running Vault.
type Server struct {
	// Address is its API: https://127.0.0.1:PORT.
	Address string
	// CAFile holds the CA of its certificate.
	CAFile string
	// RootToken may do everything.
	RootToken string
	// UnsealKey is the one share of its seal, base64. A server that unseals itself has a RecoveryKey instead.
	UnsealKey, RecoveryKey string
	// Dir is the server's own folder. PluginDir lies in it.
	Dir, PluginDir string

	options Options
	certs   certificates
	cluster string // host:port of its cluster listener
	process *process
	started []Process // every process seen below it: none may outlive it
}

// Start runs a Vault that is initialised, unsealed and active, unless it is to be bare. It ends with the test.
func Start(t testing.TB, options Options) *Server {
	t.Helper()
	s := prepare(t, options)
	s.run(t)
	switch {
	case options.Bare:
	case options.Join == nil:
		s.initialize(t)
	default:
		s.join(t)
	}
	return s
}

// prepare makes all that a server needs, and starts nothing.
func prepare(t testing.TB, options Options) *Server {
	t.Helper()
	if options.Storage == "" {
		options.Storage = Raft
	}
	dir, err := os.MkdirTemp("", "ns-") //nolint:usetesting // sockets lie below it: 107 characters, and t.TempDir is long
	must(t, err)
	s := &Server{Dir: dir, PluginDir: filepath.Join(dir, "plugins"), options: options}
	t.Cleanup(func() {
		if s.process == nil {
			must(t, os.RemoveAll(dir))
			return
		}
		s.stop(t, syscall.SIGKILL) // Vault takes two seconds to end in good order, which tests of that show
		if strings.Contains(s.Log(t), "WARNING: DATA RACE") {
			t.Error("the race detector spoke up in the plugin, see the log of Vault")
		}
		if t.Failed() {
			s.printLog(t)
		}
		must(t, os.RemoveAll(dir))
	})
	for _, folder := range []string{s.PluginDir, filepath.Join(dir, "data"), filepath.Join(dir, "tmp")} {
		must(t, os.Mkdir(folder, 0o700))
	}
	switch {
	case options.Join != nil:
		s.certs = options.Join.certs
	case options.Authority != nil:
		s.certs = options.Authority.write(t, dir)
	default:
		s.certs = NewAuthority(t).write(t, dir)
	}
	s.CAFile = s.certs.ca
	return s
}

// configuration of the server. Debug logs go to a file that only a failed test prints.
var configuration = template.Must(template.New("vault.hcl").Parse(`
disable_mlock    = {{.DisableMLock}}
plugin_directory = "{{.PluginDir}}"
plugin_tmpdir    = "{{.Dir}}/tmp"
api_addr         = "{{.Address}}"
cluster_addr     = "https://{{.Cluster}}"
log_level        = "debug"

{{if eq .Storage "raft"}}storage "raft" {
  path                   = "{{.Dir}}/data"
  node_id                = "{{.Node}}"
  performance_multiplier = 1
{{range .RetryJoin}}
  retry_join {
    leader_api_addr     = "{{.}}"
    leader_ca_cert_file = "{{$.CA}}"
  }
{{end}}}
{{else}}storage "inmem" {}
{{end}}
listener "tcp" {
  address         = "{{.Listen}}"
  cluster_address = "{{.Cluster}}"
  tls_cert_file   = "{{.Cert}}"
  tls_key_file    = "{{.Key}}"
}
` + sealStanzas))

// run starts the process and waits until its API answers. A port that somebody took in between is no failure at the
// first start: there are others. Later starts keep theirs, as raft remembers the address.
func (s *Server) run(t testing.TB) {
	t.Helper()
	const tries = 5
	for try := 1; ; try++ {
		if s.cluster == "" || try > 1 && s.RootToken == "" && !s.options.Bare {
			ports := FreePorts(t, 2)
			s.Address, s.cluster = "https://"+ports[0], ports[1]
		}
		s.launch(t)
		var taken error
		Eventually(t, time.Minute, "Vault's API", func() error {
			if s.process.ended() {
				taken = fmt.Errorf("vault ended at once, see its log")
				return nil
			}
			_, err := s.client(t, "").Sys().SealStatus() // our own CA: no other server can answer this
			return err
		})
		if taken == nil {
			return
		}
		if content, _ := os.ReadFile(s.process.log); try == tries || !bytes.Contains(content, []byte("address already in use")) {
			t.Fatalf("starting vault: %v\n%s", taken, content)
		}
	}
}

// launch writes the configuration and starts the process.
func (s *Server) launch(t testing.TB) {
	t.Helper()
	vault := s.program(t)
	var config bytes.Buffer
	must(t, configuration.Execute(&config, map[string]any{
		"DisableMLock": !s.options.MLock, "Dir": s.Dir, "PluginDir": s.PluginDir, "Node": filepath.Base(s.Dir),
		"Address": s.Address, "Listen": strings.TrimPrefix(s.Address, "https://"), "Cluster": s.cluster,
		"Cert": s.certs.cert, "Key": s.certs.key, "Seals": s.options.Seals,
		"Storage": string(s.options.Storage), "RetryJoin": s.options.RetryJoin, "CA": s.certs.ca,
	}))
	must(t, os.WriteFile(s.ConfigFile(), config.Bytes(), 0o600))
	env := []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + s.Dir, "TMPDIR=" + filepath.Join(s.Dir, "tmp"),
		"GORACE=atexit_sleep_ms=50", // of the plugin's: it would wait a second at each end
	}
	s.process = startProcess(t, filepath.Join(s.Dir, "vault.log"), env, s.give(t, s.Dir), vault, "server", "-config="+s.ConfigFile())
}

// program is the Vault to run.
func (s *Server) program(t testing.TB) string {
	t.Helper()
	vault := Tool(t, "vault")
	if !s.options.Nobody {
		return vault
	}
	own := filepath.Join(s.Dir, "vault")
	if _, err := os.Stat(own); err != nil {
		copyFile(t, vault, own)
	}
	s.give(t, s.Dir)
	s.mayLock(t, own) // after its owner changed, which takes capabilities away
	return own
}

// nobody is the ordinary user.
const nobody = 65534

// give makes the ordinary user own a folder and what is in it, and returns whom to run Vault as: nil for ourselves.
func (s *Server) give(t testing.TB, dir string) *syscall.Credential {
	t.Helper()
	if !s.options.Nobody {
		return nil
	}
	must(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if info, err := entry.Info(); err != nil || info.Sys().(*syscall.Stat_t).Uid == nobody {
			return err
		}
		return os.Lchown(path, nobody, nobody)
	}))
	return &syscall.Credential{Uid: nobody, Gid: nobody}
}

// mayLock lets a program lock memory, whoever runs it.
func (s *Server) mayLock(t testing.TB, program string) {
	t.Helper()
	must(t, os.Chown(program, nobody, nobody))
	_, err := run(context.Background(), s.Dir, nil, "setcap", "cap_ipc_lock=+ep", program)
	must(t, err)
}

func (s *Server) initialize(t testing.TB) {
	t.Helper()
	shares := &api.InitRequest{SecretShares: 1, SecretThreshold: 1}
	if s.unsealsItself() {
		shares = &api.InitRequest{RecoveryShares: 1, RecoveryThreshold: 1}
	}
	answer, err := s.client(t, "").Sys().Init(shares)
	must(t, err)
	if s.unsealsItself() {
		s.RootToken, s.RecoveryKey = answer.RootToken, answer.RecoveryKeysB64[0]
		s.WaitActive(t)
		return
	}
	s.RootToken, s.UnsealKey = answer.RootToken, answer.KeysB64[0]
	s.Unseal(t)
}

// join makes the server a standby of the cluster that it was told to join.
func (s *Server) join(t testing.TB) {
	t.Helper()
	ca, err := os.ReadFile(s.CAFile)
	must(t, err)
	leader := s.options.Join
	// It shall have a vote after a second, not after ten.
	_, err = leader.Client(t).Logical().Write("sys/storage/raft/autopilot/configuration", map[string]any{"server_stabilization_time": "1s"})
	must(t, err)
	_, err = s.client(t, "").Sys().RaftJoin(&api.RaftJoinRequest{LeaderAPIAddr: leader.Address, LeaderCACert: string(ca)})
	must(t, err)
	s.RootToken, s.UnsealKey, s.RecoveryKey = leader.RootToken, leader.UnsealKey, leader.RecoveryKey
	if !s.unsealsItself() {
		s.post(t)
	}
	Eventually(t, time.Minute, "the second node to be a standby", func() error {
		health, err := s.client(t, "").Sys().Health()
		if err == nil && (health.Sealed || !health.Standby) {
			err = errors.New("it is sealed or not a standby yet")
		}
		return err
	})
}

// WaitVoter waits until the server, a standby, could become the active node.
func (s *Server) WaitVoter(t testing.TB) {
	t.Helper()
	Eventually(t, time.Minute, "the node to have a vote", func() error {
		state, err := s.options.Join.Client(t).Sys().RaftAutopilotState()
		if err != nil {
			return err
		}
		if node, ok := state.Servers[filepath.Base(s.Dir)]; !ok || node.Status != "voter" {
			return fmt.Errorf("autopilot tells %+v", state.Servers)
		}
		return nil
	})
}

// Unseal gives the server its share and waits until it is active. One with a seal of its own unseals itself.
func (s *Server) Unseal(t testing.TB) {
	t.Helper()
	if !s.unsealsItself() {
		s.post(t)
	}
	s.WaitActive(t)
}

// post gives the share. A node that has just joined answers "not initialized" until raft told it otherwise.
func (s *Server) post(t testing.TB) {
	t.Helper()
	Eventually(t, time.Minute, "the share to be taken", func() error {
		status, err := s.client(t, "").Sys().Unseal(s.UnsealKey)
		if err == nil && status.Sealed && s.options.Join == nil {
			err = errors.New("still sealed")
		}
		return err
	})
}

// WaitActive waits until the server is unsealed and serves requests itself.
func (s *Server) WaitActive(t testing.TB) {
	t.Helper()
	Eventually(t, time.Minute, "Vault to be active", func() error {
		health, err := s.client(t, "").Sys().Health()
		switch {
		case err != nil:
			return err
		case health.Sealed || health.Standby || !health.Initialized:
			return fmt.Errorf("sealed %t, standby %t, initialized %t", health.Sealed, health.Standby, health.Initialized)
		}
		return nil
	})
}

// Seal seals the server: its mounts are gone until Unseal.
func (s *Server) Seal(t testing.TB) {
	t.Helper()
	s.remember()
	must(t, s.Client(t).Sys().Seal())
}

// Restart stops the process in good order and starts it anew, unsealed and active.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.Stop(t)
	s.run(t)
	s.Unseal(t)
}

// Kill ends Vault with SIGKILL, as a power cut would. What it leaves behind is the caller's to look at: Processes
// shows nothing any more, so ask before.
func (s *Server) Kill(t testing.TB) {
	t.Helper()
	s.remember()
	s.process.end(syscall.SIGKILL)
}

// Resume starts a server that Stop or Kill ended, unsealed and active.
func (s *Server) Resume(t testing.TB) {
	t.Helper()
	s.run(t)
	s.Unseal(t)
}

// Stop ends Vault in good order. Processes that it started must end as well: what remains fails the test, and is killed.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	s.stop(t, syscall.SIGTERM)
}

func (s *Server) stop(t testing.TB, signal syscall.Signal) {
	t.Helper()
	if s.process == nil {
		return
	}
	s.remember()
	s.process.end(signal)
	deadline := time.Now().Add(Patience)
	for _, p := range s.started {
		for p.Alive() && time.Now().Before(deadline) {
			<-time.After(20 * time.Millisecond)
		}
		if p.Alive() {
			t.Errorf("process %d outlived its Vault: %s", p.PID, p.Command)
			p.Kill(t)
		}
	}
	s.started = nil
}

// Processes lists what Vault runs at this moment: plugin processes and their module hosts.
func (s *Server) Processes() []Process {
	return descendants(s.process.cmd.Process.Pid)
}

// Plugins lists the plugin processes, Hosts their module hosts.
func (s *Server) Plugins() []Process { return s.kind(false) }

// Hosts lists the module hosts.
func (s *Server) Hosts() []Process { return s.kind(true) }

func (s *Server) kind(hosts bool) []Process {
	var found []Process
	for _, p := range s.Processes() {
		if strings.HasPrefix(p.Command, hostArgv0) == hosts {
			found = append(found, p)
		}
	}
	return found
}

// hostArgv0 is argv[0] of every module host.
const hostArgv0 = "nitroseal-module-host"

func (s *Server) remember() {
	for _, p := range s.Processes() {
		known := false
		for _, q := range s.started {
			known = known || p.PID == q.PID && p.started == q.started
		}
		if !known {
			s.started = append(s.started, p)
		}
	}
}

// Client talks to the server with the root token, and never repeats a request.
func (s *Server) Client(t testing.TB) *api.Client {
	t.Helper()
	return s.client(t, s.RootToken)
}

// ClientWithToken talks to the server with another token.
func (s *Server) ClientWithToken(t testing.TB, token string) *api.Client {
	t.Helper()
	return s.client(t, token)
}

func (s *Server) client(t testing.TB, token string) *api.Client {
	t.Helper()
	config := api.DefaultConfig()
	must(t, config.Error)
	config.Address = s.Address
	config.MaxRetries = 0
	config.Timeout = time.Minute // the CLI's
	must(t, config.ConfigureTLS(&api.TLSConfig{CACert: s.CAFile}))
	client, err := api.NewClient(config)
	must(t, err)
	client.SetToken(token)
	return client
}

// Register copies the binary into the plugin directory and puts it into the catalog with its hash and arguments.
// env holds NAME=VALUE for the plugin's process.
func (s *Server) Register(t testing.TB, binary Binary, args, env []string) {
	t.Helper()
	command := s.Install(t, binary)
	must(t, s.Client(t).Sys().RegisterPluginWithContext(context.Background(), &api.RegisterPluginInput{
		Name: Name, Type: api.PluginTypeSecrets, Version: binary.Version, Command: command,
		SHA256: binary.SHA256, Args: args, Env: env,
	}))
}

// Install copies the binary into the plugin directory and returns its name there.
func (s *Server) Install(t testing.TB, binary Binary) string {
	t.Helper()
	command := Name + "-" + binary.Version
	copyFile(t, binary.Path, filepath.Join(s.PluginDir, command))
	if s.options.Nobody {
		s.mayLock(t, filepath.Join(s.PluginDir, command))
	}
	return command
}

// Enable mounts the plugin.
func (s *Server) Enable(t testing.TB, mount, version string) {
	t.Helper()
	must(t, s.Client(t).Sys().Mount(mount, &api.MountInput{
		Type: Name, Config: api.MountConfigInput{PluginVersion: version},
	}))
}

// Log is everything that the server wrote so far.
func (s *Server) Log(t testing.TB) string {
	t.Helper()
	content, err := os.ReadFile(s.process.log)
	must(t, err)
	return string(content)
}

// printLog prints the end of the log.
func (s *Server) printLog(t testing.TB) {
	t.Helper()
	log := s.Log(t)
	const limit = 20_000
	if len(log) > limit {
		log = "…" + log[len(log)-limit:]
	}
	t.Logf("log of Vault at %s:\n%s", s.Address, log)
}

// copyFile writes a new file and renames it into place: an executable that runs cannot be written to.
func copyFile(t testing.TB, from, to string) {
	t.Helper()
	source, err := os.Open(from)
	must(t, err)
	defer source.Close()
	target, err := os.OpenFile(to+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o700)
	must(t, err)
	_, err = io.Copy(target, source)
	must(t, errors.Join(err, target.Close()))
	must(t, os.Rename(to+".new", to))
}
