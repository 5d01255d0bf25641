// Package etcdtest runs real etcd clusters for tests: processes of their own on loopback ports, TLS with client
// certificates on all connections, certificates made for the occasion.
//
// [Start] gives a test a cluster of its own, whose members it may kill, freeze and start again. [Shared] gives all
// tests of a package the same one, which is quicker; a package that uses it calls [Main] from its TestMain.
//
// The etcd program is the one that scripts/tool prints, built on first use. A test that cannot have it fails.
package etcdtest

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	buildLimit = 10 * time.Minute // for etcd itself, once a machine
	readyLimit = time.Minute      // a cluster on a busy machine takes seconds
	poll       = 50 * time.Millisecond
	attempts   = 5 // at ports that nobody else takes in between
)

// Cluster is a running etcd cluster.
type Cluster struct {
	Endpoints []string // https://127.0.0.1:port, one for each member, in the order of the members

	CACert, ClientCert, ClientKey []byte // PEM: what a client needs
	// ForeignCACert did not sign the members' certificates; ForeignCert and ForeignKey are a client's certificate that
	// it did sign, so the members refuse it.
	ForeignCACert, ForeignCert, ForeignKey []byte
	// CAFile, CertFile and KeyFile hold CACert, ClientCert and ClientKey.
	CAFile, CertFile, KeyFile string

	dir      string
	members  []*member
	client   *clientv3.Client
	reserved []int // sockets that keep the ports of the members
}

// Option changes how a cluster runs.
type Option func(*options)

type options struct {
	fsync bool
	quota int64
}

// WithFsync makes the members sync every write to disk, as in production. Without it they only survive their own death,
// not the machine's, and are faster.
func WithFsync() Option { return func(o *options) { o.fsync = true } }

// WithQuota limits the size of the members' database, in bytes.
func WithQuota(size int64) Option { return func(o *options) { o.quota = size } }

// Start runs a cluster until the test ends.
func Start(t testing.TB, members int, opts ...Option) *Cluster {
	t.Helper()
	c, err := start(t.TempDir(), members, opts)
	if err != nil {
		t.Fatalf("starting etcd: %v", err)
	}
	t.Cleanup(c.stop)
	return c
}

var shared struct {
	mu      sync.Mutex
	cluster *Cluster
	dir     string
	err     error
}

// Shared returns the cluster of one member that all tests of the package share. Tests keep apart by prefix.
func Shared(t testing.TB) *Cluster {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.dir == "" {
		if shared.dir, shared.err = os.MkdirTemp("", "etcdtest"); shared.err == nil { //nolint:usetesting // it outlives the test
			shared.cluster, shared.err = start(shared.dir, 1, nil)
		}
	}
	if shared.err != nil {
		t.Fatalf("starting etcd: %v", shared.err)
	}
	return shared.cluster
}

// Main runs a package's tests and ends what [Shared] started. It returns the exit code.
func Main(m *testing.M) int {
	defer func() {
		shared.mu.Lock()
		defer shared.mu.Unlock()
		if shared.cluster != nil {
			shared.cluster.stop()
		}
		if shared.dir != "" {
			_ = os.RemoveAll(shared.dir) // the system tidies its temporary directory as well
		}
	}()
	return m.Run()
}

func start(dir string, members int, opts []Option) (*Cluster, error) {
	var chosen options
	for _, opt := range opts {
		opt(&chosen)
	}
	ctx, cancel := context.WithTimeout(context.Background(), buildLimit)
	defer cancel()
	binary, err := program(ctx)
	if err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		c := &Cluster{dir: filepath.Join(dir, fmt.Sprint(attempt))}
		err := c.start(binary, members, chosen)
		if err == nil {
			return c, nil
		}
		c.stop()
		if attempt == attempts || !errors.Is(err, errExited) {
			return nil, err
		}
	}
}

// program builds or finds etcd.
func program(ctx context.Context) (string, error) {
	root, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			break
		}
		if root == filepath.Dir(root) {
			return "", errors.New("no go.mod in this folder or above it")
		}
		root = filepath.Dir(root)
	}
	var stderr bytes.Buffer
	command := exec.CommandContext(ctx, filepath.Join(root, "scripts", "tool"), "etcd")
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("scripts/tool etcd: %w: %s", err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}

func (c *Cluster) start(binary string, members int, chosen options) error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	if err := c.certify(); err != nil {
		return fmt.Errorf("making certificates: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	ports, err := c.reservePorts(2 * members)
	if err != nil {
		return err
	}
	var peers []string
	for i := range members {
		peers = append(peers, fmt.Sprintf("m%d=https://127.0.0.1:%d", i, ports[2*i+1]))
		c.Endpoints = append(c.Endpoints, fmt.Sprintf("https://127.0.0.1:%d", ports[2*i]))
	}
	for i := range members {
		peer := fmt.Sprintf("https://127.0.0.1:%d", ports[2*i+1])
		m := &member{binary: binary, log: filepath.Join(c.dir, fmt.Sprintf("m%d.log", i)), arguments: []string{
			"--name", fmt.Sprintf("m%d", i), "--data-dir", filepath.Join(c.dir, fmt.Sprintf("m%d", i)),
			"--listen-client-urls", c.Endpoints[i], "--advertise-client-urls", c.Endpoints[i],
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
			"--initial-cluster", strings.Join(peers, ","), "--initial-cluster-state", "new",
			"--initial-cluster-token", filepath.Base(c.dir) + "-" + fmt.Sprint(ports[0]),
			"--client-cert-auth", "--trusted-ca-file", c.CAFile,
			"--cert-file", c.file("server.pem"), "--key-file", c.file("server-key.pem"),
			"--peer-client-cert-auth", "--peer-trusted-ca-file", c.CAFile,
			"--peer-cert-file", c.file("server.pem"), "--peer-key-file", c.file("server-key.pem"),
			"--log-level", "warn",
		}}
		if !chosen.fsync {
			m.arguments = append(m.arguments, "--unsafe-no-fsync")
		}
		if chosen.quota > 0 {
			m.arguments = append(m.arguments, "--quota-backend-bytes", fmt.Sprint(chosen.quota))
		}
		c.members = append(c.members, m)
		if err := m.start(); err != nil {
			return err
		}
	}
	if c.client, err = clientv3.New(c.ClientConfig()); err != nil {
		return err
	}
	return c.waitReady(ctx)
}

// reservePorts returns loopback ports that nobody else is given while the cluster runs, also while a member is down. A socket
// that is bound and does not listen keeps a port from all but those who ask for it by its number and, as every listener of Go's,
// let others reuse it; who connects to it is refused.
func (c *Cluster) reservePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		reserved, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("reserving a port: %w", err)
		}
		c.reserved = append(c.reserved, reserved)
		err = syscall.SetsockoptInt(reserved, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
		if err == nil {
			err = syscall.Bind(reserved, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		}
		if err != nil {
			return nil, fmt.Errorf("reserving a port: %w", err)
		}
		address, err := syscall.Getsockname(reserved)
		if err != nil {
			return nil, fmt.Errorf("reserving a port: %w", err)
		}
		inet, ok := address.(*syscall.SockaddrInet4)
		if !ok {
			return nil, fmt.Errorf("reserving a port: it is at %v", address)
		}
		ports = append(ports, inet.Port)
	}
	return ports, nil
}

func (c *Cluster) file(name string) string { return filepath.Join(c.dir, name) }

func (c *Cluster) certify() error {
	own, err := newAuthority("etcdtest")
	if err != nil {
		return err
	}
	foreign, err := newAuthority("somebody else")
	if err != nil {
		return err
	}
	serverCert, serverKey, err := own.issue("member")
	if err != nil {
		return err
	}
	if c.ClientCert, c.ClientKey, err = own.issue("client"); err != nil {
		return err
	}
	if c.ForeignCert, c.ForeignKey, err = foreign.issue("client"); err != nil {
		return err
	}
	c.CACert, c.ForeignCACert = own.pem, foreign.pem
	c.CAFile, c.CertFile, c.KeyFile = c.file("ca.pem"), c.file("client.pem"), c.file("client-key.pem")
	for name, content := range map[string][]byte{
		c.CAFile: c.CACert, c.CertFile: c.ClientCert, c.KeyFile: c.ClientKey,
		c.file("server.pem"): serverCert, c.file("server-key.pem"): serverKey,
	} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// ClientConfig is what a client of the cluster needs. It repeats no request by itself.
func (c *Cluster) ClientConfig() clientv3.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.CACert)
	pair, err := tls.X509KeyPair(c.ClientCert, c.ClientKey)
	if err != nil {
		panic(err) // made a moment ago
	}
	return clientv3.Config{
		Endpoints: c.Endpoints,
		TLS:       &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
		Logger:    zap.NewNop(),
	}
}

// waitReady returns when every running member answers and knows the leader. Who answers holds a certificate of this
// cluster's own authority, so it is ours, whoever else may listen on this machine.
func (c *Cluster) waitReady(ctx context.Context) error {
	for i, m := range c.members {
		for m.running() {
			status, err := c.status(ctx, i)
			if err == nil && status.Leader != 0 {
				break
			}
			if err := m.wait(ctx, poll); err != nil {
				return fmt.Errorf("member %d: %w; its log ends:\n%s", i, err, m.lastWords())
			}
		}
	}
	_, err := c.client.Get(ctx, "ready?") // linearizable: a majority answers
	return err
}

func (c *Cluster) status(ctx context.Context, member int) (*clientv3.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return c.client.Status(ctx, c.Endpoints[member])
}

// Leader returns the index of the member that leads, once the running members agree on one.
func (c *Cluster) Leader(t testing.TB) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	for ctx.Err() == nil {
		for i, m := range c.members {
			if !m.running() {
				continue
			}
			status, err := c.status(ctx, i)
			if err == nil && status.Leader != 0 && status.Leader == status.Header.MemberId {
				return i
			}
		}
		<-time.After(poll)
	}
	t.Fatal("no leader was elected")
	return -1
}

// Kill ends a member with SIGKILL and waits for its end.
func (c *Cluster) Kill(t testing.TB, member int) {
	t.Helper()
	c.members[member].signal(t, syscall.SIGKILL)
	<-c.members[member].exited
}

// Freeze stops a member with SIGSTOP: its connections stay open and nobody answers. Thaw lets it go on.
func (c *Cluster) Freeze(t testing.TB, member int) {
	t.Helper()
	m := c.members[member]
	m.signal(t, syscall.SIGSTOP)
	for deadline := time.Now().Add(readyLimit); !m.stopped(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("etcd does not stop")
		}
	}
}

// Thaw undoes Freeze.
func (c *Cluster) Thaw(t testing.TB, member int) {
	t.Helper()
	c.members[member].signal(t, syscall.SIGCONT)
}

// Restart starts a member that was killed, with its data and ports, and waits until the cluster answers.
func (c *Cluster) Restart(t testing.TB, member int) {
	t.Helper()
	c.RestartWithoutWaiting(t, member)
	c.WaitReady(t)
}

// RestartWithoutWaiting is Restart for a cluster that answers to users with a password only.
func (c *Cluster) RestartWithoutWaiting(t testing.TB, member int) {
	t.Helper()
	if err := c.members[member].start(); err != nil {
		t.Fatalf("starting etcd again: %v", err)
	}
}

// WaitReady waits until every running member knows a leader and a majority answers.
func (c *Cluster) WaitReady(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	for {
		err := c.waitReady(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil || errors.Is(err, errExited) {
			t.Fatalf("waiting for etcd: %v", err)
		}
		<-time.After(poll)
	}
}

// Client is a client of the cluster for a test's own questions. The cluster closes it.
func (c *Cluster) Client() *clientv3.Client { return c.client }

// stop ends all members.
func (c *Cluster) stop() {
	if c.client != nil {
		_ = c.client.Close() // its error is that it was closed
	}
	for _, m := range c.members {
		if m.exited != nil {
			_ = m.command.Process.Kill() // it may have ended before
			<-m.exited
		}
	}
	for _, socket := range c.reserved {
		_ = syscall.Close(socket)
	}
	c.reserved = nil
}
