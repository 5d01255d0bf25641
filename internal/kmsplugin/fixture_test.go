package kmsplugin

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a server whose devices of type "nethsm" are a token in memory, which holds the wrapping key "prod".
type fixture struct {
	*Server
	t     testing.TB
	token *hsmtest.Memory  // "rack"
	other *hsmtest.Memory  // "vault", which no stanza describes
	keys  *keyring.Keyring // as an operator's machine has it

	mu     sync.Mutex
	opened []*hsmtest.Memory // what wrappers have opened
	dir    string
	log    *log
}

// log is a log that is read while it is written.
type log struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// tokens are the devices of a keyring.
type tokens map[string]*hsmtest.Memory

func (d tokens) Device(_ context.Context, name string) (hsm.Device, error) { return d[name], nil }

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{t: t, token: hsmtest.NewMemory(), other: hsmtest.NewMemory(), dir: t.TempDir(), log: &log{}}
	f.token.AddEC(t, "seal", "01", ecdh.P256())
	f.token.AddEC(t, "seal-2", "02", ecdh.P384())
	f.keys = keyring.New(keyring.Config{Records: newRecords(), Devices: tokens{"rack": f.token, "vault": f.other}})
	if _, err := f.keys.Adopt(t.Context(), "prod", keyring.AdoptRequest{Device: "rack", Label: "seal", By: "test"}); err != nil {
		t.Fatal(err)
	}
	f.put("password", "a password")
	f.Server = New(Options{
		Devices: device.New(device.Options{
			Openers: map[string]device.Opener{
				device.TypeNetHSM: func(context.Context, string, device.Config, device.Secrets) (hsm.Device, error) {
					f.mu.Lock()
					defer f.mu.Unlock()
					f.opened = append(f.opened, f.token.Attach())
					return f.opened[len(f.opened)-1], nil
				},
			},
			Secrets: device.SecretFiles{Dir: f.dir},
		}),
		SecretsDir: f.dir, StateDir: f.dir, Logger: slog.New(slog.NewTextHandler(f.log, nil)),
	})
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if t.Failed() {
			t.Logf("log:\n%s", f.log)
		}
	})
	return f
}

// held is how many devices are open.
func (f *fixture) held() (open int) {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, device := range f.opened {
		if _, err := device.Info(context.WithoutCancel(f.t.Context())); err == nil {
			open++
		}
	}
	return open
}

// put writes a file and returns its path.
func (f *fixture) put(name, content string) string {
	f.t.Helper()
	path := filepath.Join(f.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		f.t.Fatal(err)
	}
	return path
}

// settings are a stanza for the key as its record is now, with changes; an empty value leaves a setting out.
func (f *fixture) settings(changes ...string) map[string]string {
	f.t.Helper()
	backup, err := f.keys.Backup(context.WithoutCancel(f.t.Context()), "prod", "test")
	if err != nil {
		f.t.Fatal(err)
	}
	settings := map[string]string{
		"key": "prod", "key_record_file": f.put(backup.SHA256[:8]+".record", string(backup.Record)), "key_record_sha256": backup.SHA256,
		"accept_single_hsm": "true",
		"type":              "nethsm", "urls": "https://nethsm.example", "username": "operator", "password_file": "password",
	}
	for i := 0; i < len(changes); i += 2 {
		settings[changes[i]] = changes[i+1]
		if changes[i+1] == "" {
			delete(settings, changes[i])
		}
	}
	return settings
}

// configure makes a wrapper.
func (f *fixture) configure(settings map[string]string) (*pb.SetConfigResponse, error) {
	return f.SetConfig(f.t.Context(), &pb.SetConfigRequest{Options: &pb.Options{ConfigMap: settings}})
}

// wrapper makes one and returns its id once its background has opened the authentication key.
func (f *fixture) wrapper(changes ...string) string {
	f.t.Helper()
	made, err := f.configure(f.settings(changes...))
	if err != nil {
		f.t.Fatalf("SetConfig: %v", err)
	}
	w, err := f.find(made.GetWrapperId())
	if err != nil {
		f.t.Fatal(err)
	}
	w.running.Wait() // nothing else runs
	return made.GetWrapperId()
}

func (f *fixture) encrypt(id, plaintext, aad string) (*pb.BlobInfo, error) {
	answer, err := f.Encrypt(f.t.Context(), &pb.EncryptRequest{
		WrapperId: id, Plaintext: []byte(plaintext), Options: &pb.Options{Aad: []byte(aad)},
	})
	return answer.GetCiphertext(), err
}

func (f *fixture) decrypt(id string, blob *pb.BlobInfo, aad string) (string, error) {
	answer, err := f.Decrypt(f.t.Context(), &pb.DecryptRequest{WrapperId: id, Ciphertext: blob, Options: &pb.Options{Aad: []byte(aad)}})
	return string(answer.GetPlaintext()), err
}

// sealedFor is an envelope of the key that was made for another use.
func (f *fixture) sealedFor(use envelope.Use) *pb.BlobInfo {
	f.t.Helper()
	yes := true
	if _, err := f.keys.Configure(f.t.Context(), "prod", keyring.Settings{AcceptSingleHSM: &yes, By: "test"}); err != nil {
		f.t.Fatal(err)
	}
	sealed, err := f.keys.Wrap(f.t.Context(), "prod", use, []byte("a value"), []byte("aad"))
	if err != nil {
		f.t.Fatal(err)
	}
	return &pb.BlobInfo{Ciphertext: sealed.Envelope}
}

// wantCode checks the code of an error and a word of it.
func wantCode(t testing.TB, err error, code codes.Code, says string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), says) {
		t.Errorf("error %v; want %s and %q", err, code, says)
	}
}
