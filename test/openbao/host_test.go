package openbao_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog" //nolint:depguard // go-plugin logs by it, here to nobody
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// openBao plays what an OpenBao server does with a seal plugin: it starts the one that its configuration declares, with its
// SHA-256, a handshake and mutual TLS; where it ended, it starts it anew and sends again what it had been told.
type openBao struct {
	binary vaulttest.Binary
	args   []string // of the plugin stanza
	env    []string
	log    *lines // what the plugin writes to stderr

	mu     sync.Mutex
	client *plugin.Client  // nil before the first start
	done   <-chan struct{} // closed when the client has ended: calls that fail are sent again from then on
}

// The handshake and the names are OpenBao's (plugin v2.3.0), written out here: a plugin that changed its own would not be
// found any more.
var handshake = plugin.HandshakeConfig{
	MagicCookieKey: "OPENBAO_KMS_PLUGIN", MagicCookieValue: "39704a18-7da7-4bda-9a2d-f7c488d70328",
}

const (
	protocol      = 1
	dispensedName = "wrapper"
)

// startLimit is how long the plugin may take to start: less than go-plugin's default, because OpenBao waits with it.
const startLimit = 30 * time.Second

// newOpenBao returns a server whose plugin gets these arguments. It ends with the test.
func newOpenBao(t *testing.T, binary vaulttest.Binary, args []string, env ...string) *openBao {
	t.Helper()
	bao := &openBao{binary: binary, args: args, env: append(env, "GORACE=atexit_sleep_ms=20", "TMPDIR="+forSockets(t)), log: &lines{}}
	t.Cleanup(func() {
		bao.stop()
		if strings.Contains(bao.log.String(), "WARNING: DATA RACE") {
			t.Error("the race detector spoke up in the plugin")
		}
		if t.Failed() {
			t.Logf("log of the plugin:\n%s", bao.log)
		}
	})
	return bao
}

// forSockets is a folder for the socket of a plugin, which stays there when it is killed. A socket's path has at most 107
// bytes, and a test's own folder is longer.
func forSockets(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bao") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// command is what the plugin is started with.
func (b *openBao) command() *exec.Cmd {
	//nolint:noctx // it outlives any one call: stop ends it
	cmd := exec.Command(b.binary.Path, b.args...)
	cmd.Env = slices.Clone(b.env)
	return cmd
}

// config is what go-plugin is asked with, as OpenBao asks it.
func (b *openBao) config() *plugin.ClientConfig {
	checksum, _ := hex.DecodeString(b.binary.SHA256)
	return &plugin.ClientConfig{
		Cmd:              b.command(),
		HandshakeConfig:  handshake,
		VersionedPlugins: map[int]plugin.PluginSet{protocol: {dispensedName: hostSide{}}},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		AutoMTLS:         true,
		SecureConfig:     &plugin.SecureConfig{Checksum: checksum, Hash: sha256.New()},
		StartTimeout:     startLimit,
		Logger:           hclog.NewNullLogger(),
		Stderr:           b.log,
	}
}

// running returns the running plugin, started anew where the given one has ended.
func (b *openBao) running(ended *plugin.Client) (*plugin.Client, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.client != nil && b.client != ended {
		return b.client, nil
	}
	if b.client != nil {
		b.client.Kill()
	}
	b.client = plugin.NewClient(b.config())
	connection, err := dispense(b.client)
	if err != nil {
		b.client.Kill()
		return nil, fmt.Errorf("start plugin client: %w", err)
	}
	b.done = connection.ended.Done()
	return b.client, nil
}

// pid is the plugin's process.
func (b *openBao) pid(t *testing.T) int {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.client == nil {
		t.Fatal("no plugin runs")
	}
	pid, err := strconv.Atoi(b.client.ID())
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// kill ends the plugin as a lack of memory does, waits until the server knows, and returns the processes that have to vanish
// with it.
func (b *openBao) kill(t *testing.T) []int {
	t.Helper()
	pid := b.pid(t)
	all := append(childrenOf(t, pid), pid)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.ended(t)
	return all
}

// ended waits until the server knows that its plugin has ended: go-plugin says so by Exited a moment before.
func (b *openBao) ended(t *testing.T) {
	t.Helper()
	b.mu.Lock()
	done := b.done
	b.mu.Unlock()
	select {
	case <-done:
	case <-time.After(vaulttest.Patience):
		t.Fatal("the server does not know that its plugin ended")
	}
}

// stop ends the plugin as OpenBao does at its own end.
func (b *openBao) stop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.client != nil {
		b.client.Kill()
		b.client = nil
	}
}

// hostSide is how go-plugin makes the connection of a wrapper.
type hostSide struct{ plugin.NetRPCUnsupportedPlugin }

func (hostSide) GRPCServer(*plugin.GRPCBroker, *grpc.Server) error {
	return errors.New("this is the host")
}

func (hostSide) GRPCClient(ctx context.Context, _ *plugin.GRPCBroker, connection *grpc.ClientConn) (any, error) {
	return dispensed{ended: ctx, WrapperClient: pb.NewWrapperClient(connection)}, nil
}

// dispensed is a connection to a plugin; ended is done when its process has ended.
type dispensed struct {
	pb.WrapperClient

	ended context.Context
}

// dispense gives another connection to a plugin that runs.
func dispense(client *plugin.Client) (dispensed, error) {
	protocol, err := client.Client()
	if err != nil {
		return dispensed{}, err
	}
	raw, err := protocol.Dispense(dispensedName)
	if err != nil {
		return dispensed{}, err
	}
	return raw.(dispensed), nil
}

// wrapper is a seal of OpenBao. A call that fails because the plugin ended is sent again to a new one, once, after what the
// wrapper had been told: that is what OpenBao does.
type wrapper struct {
	bao *openBao

	mu          sync.Mutex
	client      *plugin.Client
	connection  dispensed
	id          string
	settings    map[string]string
	initialised bool
}

// errShutdown says that the plugin ended during a call.
var errShutdown = errors.New("the plugin was shut down")

// configured is a wrapper after SetConfig.
func (b *openBao) configured(t *testing.T, settings map[string]string) *wrapper {
	t.Helper()
	w, err := b.configure(t.Context(), settings)
	if err != nil {
		t.Fatalf("SetConfig: %v", err)
	}
	return w
}

func (b *openBao) configure(ctx context.Context, settings map[string]string) (*wrapper, error) {
	w := &wrapper{bao: b, settings: settings}
	return w, w.begin(ctx, nil)
}

// begin connects to a plugin, another one than that, and tells it what the wrapper had been told.
func (w *wrapper) begin(ctx context.Context, ended *plugin.Client) error {
	client, err := w.bao.running(ended)
	if err != nil {
		return err
	}
	connection, err := dispense(client)
	if err != nil {
		return err
	}
	made, err := connection.SetConfig(ctx, &pb.SetConfigRequest{Options: &pb.Options{ConfigMap: w.settings}})
	if err != nil {
		return err
	}
	if w.initialised {
		if _, err := connection.Init(ctx, &pb.InitRequest{WrapperId: made.GetWrapperId()}); err != nil {
			return err
		}
	}
	w.client, w.connection, w.id = client, connection, made.GetWrapperId()
	return nil
}

// current is the connection that calls go to.
func (w *wrapper) current() (*plugin.Client, dispensed, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.client, w.connection, w.id
}

// call makes a call, and again where the plugin ended during it.
func (w *wrapper) call(ctx context.Context, do func(connection dispensed, id string) error) error {
	client, connection, id := w.current()
	err := do(connection, id)
	if err == nil || status.Code(err) == codes.NotFound || connection.ended.Err() == nil {
		return err
	}
	w.mu.Lock()
	if w.client == client { // nobody else has started it anew meanwhile
		if err := w.begin(ctx, client); err != nil {
			w.mu.Unlock()
			return err
		}
	}
	w.mu.Unlock()
	_, connection, id = w.current()
	if err = do(connection, id); err != nil && connection.ended.Err() != nil {
		return errShutdown
	}
	return err
}

func (w *wrapper) encrypt(ctx context.Context, plaintext, aad []byte) (blob *pb.BlobInfo, err error) {
	err = w.call(ctx, func(connection dispensed, id string) error {
		answer, err := connection.Encrypt(ctx, &pb.EncryptRequest{
			WrapperId: id, Plaintext: slices.Clone(plaintext), Options: &pb.Options{Aad: aad},
		})
		blob = answer.GetCiphertext()
		return err
	})
	return blob, err
}

func (w *wrapper) decrypt(ctx context.Context, blob *pb.BlobInfo, aad []byte) (plaintext []byte, err error) {
	err = w.call(ctx, func(connection dispensed, id string) error {
		answer, err := connection.Decrypt(ctx, &pb.DecryptRequest{WrapperId: id, Ciphertext: blob, Options: &pb.Options{Aad: aad}})
		plaintext = answer.GetPlaintext()
		return err
	})
	return plaintext, err
}

func (w *wrapper) init(ctx context.Context) error {
	err := w.call(ctx, func(connection dispensed, id string) error {
		_, err := connection.Init(ctx, &pb.InitRequest{WrapperId: id})
		return err
	})
	if err == nil {
		w.mu.Lock()
		w.initialised = true
		w.mu.Unlock()
	}
	return err
}

func (w *wrapper) keyID(ctx context.Context) (id string, err error) {
	err = w.call(ctx, func(connection dispensed, name string) error {
		answer, err := connection.KeyId(ctx, &pb.KeyIdRequest{WrapperId: name})
		id = answer.GetKeyId()
		return err
	})
	return id, err
}

func (w *wrapper) finalize(ctx context.Context) error {
	_, connection, id := w.current()
	_, err := connection.Finalize(ctx, &pb.FinalizeRequest{WrapperId: id})
	return err
}

// mustEncrypt seals a value.
func (w *wrapper) mustEncrypt(t *testing.T, plaintext, aad string) *pb.BlobInfo {
	t.Helper()
	blob, err := w.encrypt(t.Context(), []byte(plaintext), []byte(aad))
	if err != nil {
		t.Fatalf("Encrypt: %v", err)
	}
	return blob
}

// opens checks that a ciphertext holds what was sealed.
func (w *wrapper) opens(t *testing.T, blob *pb.BlobInfo, aad, want string) {
	t.Helper()
	if err := w.tryOpen(t.Context(), blob, aad, want); err != nil {
		t.Fatalf("Decrypt: %v", err)
	}
}

func (w *wrapper) tryOpen(ctx context.Context, blob *pb.BlobInfo, aad, want string) error {
	got, err := w.decrypt(ctx, blob, []byte(aad))
	if err == nil && !bytes.Equal(got, []byte(want)) {
		err = errors.New("it holds another value")
	}
	return err
}

// refused checks the code and the words of an error.
func refused(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("error %v, want code %s", err, code)
		return
	}
	for _, word := range words {
		if !strings.Contains(status.Convert(err).Message(), word) {
			t.Errorf("the error says nothing of %q: %v", word, err)
		}
	}
}

// lines is a log that is read while it is written.
type lines struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}
