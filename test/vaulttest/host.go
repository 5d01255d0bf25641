package vaulttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// Host is a machine of an operator: a configuration, a state directory, secrets, and the command. Several hosts of a test
// stand for several machines.
type Host struct {
	// Dir is the folder of nitroseal.hcl.
	Dir string
	// Env is the environment of its commands.
	Env []string

	program string
	blocks  map[string]string // of nitroseal.hcl, by their heads
	listen  string            // host:port of the daemon
	prefix  string            // in etcd
}

// Set gives the configuration a block, `cluster "eu"` for example, in place of the one it had with that head.
func (h *Host) Set(t testing.TB, head, content string, values ...any) {
	t.Helper()
	h.blocks[head] = fmt.Sprintf(content, values...)
	h.write(t)
}

func (h *Host) write(t testing.TB) {
	t.Helper()
	var text strings.Builder
	text.WriteString("state_dir = \"state\"\n")
	for head, content := range h.blocks {
		fmt.Fprintf(&text, "%s {\n%s\n}\n", head, content)
	}
	must(t, os.WriteFile(h.File("nitroseal.hcl"), []byte(text.String()), 0o600))
}

// File is a path in the folder of the configuration.
func (h *Host) File(name string) string { return filepath.Join(h.Dir, name) }

// Put writes a file there.
func (h *Host) Put(t testing.TB, name string, content []byte) {
	t.Helper()
	must(t, os.WriteFile(h.File(name), content, 0o600))
}

// NewHost makes a machine without HSM, stores and clusters.
func NewHost(t testing.TB) *Host {
	t.Helper()
	return NewHostOf(t, Build{Command: "nitroseal"})
}

// NewHostOf is [NewHost] with that build of the command.
func NewHostOf(t testing.TB, build Build) *Host {
	t.Helper()
	h := &Host{
		Dir: t.TempDir(), program: build.Binary(t).Path, blocks: map[string]string{},
		Env: []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir(), "TMPDIR=" + t.TempDir(), "GORACE=atexit_sleep_ms=20"},
	}
	must(t, os.Mkdir(h.File("state"), 0o700))
	h.listen = FreePorts(t, 1)[0]
	h.Interval(t, "1s")
	return h
}

// Interval is how often its daemon looks at a node that is well: every second unless the test says otherwise.
func (h *Host) Interval(t testing.TB, interval string) {
	t.Helper()
	h.Set(t, "run", "listen = %q\n interval = %q", h.listen, interval)
}

// WithToken gives it a PKCS#11 token as the device "hsm".
func (h *Host) WithToken(t testing.TB, token *pkcs11test.Token) {
	t.Helper()
	var names []string
	for _, name := range token.Env {
		h.Env = append(h.Env, name+"="+os.Getenv(name))
		names = append(names, strconv.Quote(name))
	}
	h.Put(t, "pin", []byte(token.PIN))
	h.Set(t, "pkcs11", "modules = [%q]\n env = [%s]", token.Module, strings.Join(names, ", "))
	h.Set(t, `device "hsm"`, "type = \"pkcs11\"\n serial = %q\n pin_file = \"pin\"\n parallel = 4", token.Serial)
}

// WithNetHSM gives it a NetHSM as the device "hsm", with the names and passwords of an Operator and an Administrator.
func (h *Host) WithNetHSM(t testing.TB, netHSM *nethsmtest.HSM, operator, password, admin, adminPassword string) {
	t.Helper()
	h.Put(t, "password", []byte(password))
	h.Put(t, "admin-password", []byte(adminPassword))
	h.Put(t, "nethsm-ca.pem", netHSM.CA())
	h.Set(t, `device "hsm"`, "type = \"nethsm\"\n urls = [%s]\n username = %q\n password_file = \"password\"\n admin_username = %q\n"+
		" admin_password_file = \"admin-password\"\n ca_cert_file = \"nethsm-ca.pem\"\n object_store = true",
		quoted(netHSM.URLs()), operator, admin)
}

// EtcdPrefix is the prefix of a host's store in etcd.
const EtcdPrefix = "nitroseal/test"

// WithEtcd gives it an etcd as the store "etcd".
func (h *Host) WithEtcd(t testing.TB, cluster *etcdtest.Cluster) {
	t.Helper()
	h.WithEtcdAt(t, cluster, EtcdPrefix)
}

// WithEtcdAt is [Host.WithEtcd] with another prefix.
func (h *Host) WithEtcdAt(t testing.TB, cluster *etcdtest.Cluster, prefix string) {
	t.Helper()
	h.prefix = prefix
	h.Put(t, "etcd-ca.pem", cluster.CACert)
	h.Put(t, "etcd.pem", cluster.ClientCert)
	h.Put(t, "etcd.key", cluster.ClientKey)
	h.Set(t, `store "etcd"`, "type = \"etcd\"\n endpoints = [%s]\n prefix = %q\n ca_cert_file = \"etcd-ca.pem\"\n"+
		" client_cert_file = \"etcd.pem\"\n client_key_file = \"etcd.key\"\n request_timeout = \"3s\"", quoted(cluster.Endpoints), prefix)
}

// WithCluster gives it a cluster "eu" of these nodes, whose keys lie in a store. more is more of its block.
func (h *Host) WithCluster(t testing.TB, ca []byte, addresses []string, store, more string) {
	t.Helper()
	h.Put(t, "ca.pem", ca)
	h.Set(t, `cluster "eu"`, "nodes = [%s]\n ca_cert_file = \"ca.pem\"\n key = \"prod\"\n store = %q\n %s", quoted(addresses), store, more)
}

// WithKey makes the wrapping key "prod" in the HSM.
func (h *Host) WithKey(t testing.TB) {
	t.Helper()
	h.Must(t, "key", "generate", "prod", "--device", "hsm", "--algorithm", "rsa-2048")
	h.Must(t, "key", "backup", "prod", "--out", h.File("prod.record"))
	h.Must(t, "key", "configure", "prod", "--accept-single-hsm")
}

// Another makes one more machine with the same HSM, stores, clusters and wrapping key, and a state directory of its own.
func (h *Host) Another(t testing.TB) *Host {
	t.Helper()
	other := NewHost(t)
	listen := other.blocks["run"]
	for head, content := range h.blocks {
		other.blocks[head] = content
	}
	other.blocks["run"] = listen
	other.Env = h.Env
	entries, err := os.ReadDir(h.Dir)
	must(t, err)
	for _, entry := range entries {
		if entry.Type().IsRegular() {
			content, err := os.ReadFile(h.File(entry.Name()))
			must(t, err)
			other.Put(t, entry.Name(), content)
		}
	}
	other.write(t)
	sum := regexp.MustCompile(`"record_sha256":\s*"([0-9a-f]{64})"`).FindStringSubmatch(h.Must(t, "key", "backup", "prod", "-o", "json"))
	if sum == nil {
		t.Fatal("the key record has no SHA-256")
	}
	other.Must(t, "key", "restore", "prod", "--in", other.File("prod.record"), "--sha256", sum[1])
	other.Must(t, "key", "backup", "prod", "--out", other.File("prod.record"))
	other.Must(t, "key", "configure", "prod", "--accept-single-hsm")
	return other
}

func quoted(all []string) string {
	quotes := make([]string, len(all))
	for i, one := range all {
		quotes[i] = strconv.Quote(one)
	}
	return strings.Join(quotes, ", ")
}

// The exit codes of the command.
const (
	ExitOK          = 0
	ExitUnavailable = 3
	ExitRefused     = 5
)

// Answer is how a command ended.
type Answer struct {
	Code           int
	Stdout, Stderr string
}

func (h *Host) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, h.program, append([]string{"--config", h.File("nitroseal.hcl")}, args...)...)
	cmd.Env = h.Env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Try runs a command to its end.
func (h *Host) Try(t testing.TB, args ...string) Answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := h.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		t.Fatalf("nitroseal %s: %v", strings.Join(args, " "), err)
	}
	if strings.Contains(stderr.String(), "WARNING: DATA RACE") {
		t.Errorf("the race detector spoke up in nitroseal %s:\n%s", strings.Join(args, " "), stderr.String())
	}
	return Answer{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// Must runs a command that must succeed, again and again where an HSM, a store or a Vault is unavailable: a SoftHSM is not to be seen
// for a moment while another process logs in to it, and a cluster that was just unsealed has no active node yet.
func (h *Host) Must(t testing.TB, args ...string) string {
	t.Helper()
	var last Answer
	for began := time.Now(); ; {
		if last = h.Try(t, args...); last.Code != ExitUnavailable || time.Since(began) > Patience {
			break
		}
	}
	if last.Code != ExitOK {
		t.Fatalf("nitroseal %s: exit code %d\n%s%s", strings.Join(args, " "), last.Code, last.Stdout, last.Stderr)
	}
	return last.Stdout
}

// Refused runs a command that must end with the exit code, and say each of the words.
func (h *Host) Refused(t testing.TB, code int, words []string, args ...string) {
	t.Helper()
	got := h.Try(t, args...)
	if got.Code != code {
		t.Errorf("nitroseal %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got.Code, code, got.Stdout, got.Stderr)
	}
	for _, word := range words {
		if !strings.Contains(got.Stdout+got.Stderr, word) {
			t.Errorf("nitroseal %s says nothing of %q:\n%s%s", strings.Join(args, " "), word, got.Stdout, got.Stderr)
		}
	}
}
