package main

import (
	"encoding/base64"
	"errors"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestSecretsEngineInOpenBao goes through what OpenBao does with a secrets engine, from its registration to a reload, and offers
// it nothing that OpenBao does not have.
func TestSecretsEngineInOpenBao(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	binary := vaulttest.Build{}.Binary(t)
	stateDir := t.TempDir()
	if err := os.Chmod(stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	args := []string{"-pkcs11-module=" + token.Module, "-state-dir=" + stateDir}
	var env []string
	for _, name := range token.Env {
		args, env = append(args, "-module-env="+name), append(env, name+"="+os.Getenv(name))
	}

	t.Run("registering runs it without storage, and takes its version", func(t *testing.T) {
		e := startEngine(t, binary, 5, false, args, env)
		m := e.mounted(t, "registering", nil)
		kind, err := e.backend.Type(m.ctx, &pb.Empty{})
		if err != nil || logical.BackendType(kind.GetType()) != logical.TypeLogical {
			t.Errorf("it is of type %v, %v; want a secrets engine", kind, err)
		}
		version, err := logical.NewPluginVersionClient(e.conn).Version(m.ctx, &logical.Empty{})
		if err != nil || version.GetPluginVersion() != binary.Version {
			t.Errorf("it says to be of version %q, %v; want %q", version.GetPluginVersion(), err, binary.Version)
		}
	})

	t.Run("so does an older host, in metadata mode", func(t *testing.T) {
		e := startEngine(t, binary, 4, true, args, env)
		m := e.mounted(t, "registering", nil)
		paths, err := e.backend.SpecialPaths(m.ctx, &pb.Empty{})
		if err != nil || len(paths.GetPaths().GetSealWrapStorage()) == 0 {
			t.Errorf("special paths %v, %v", paths, err)
		}
		if _, err := m.request(logical.ReadOperation, "config", nil); err == nil {
			t.Error("it answers requests in metadata mode")
		}
	})

	storage, plaintext := &logical.InmemStorage{}, base64.StdEncoding.EncodeToString([]byte("a root key"))
	var transit, wrapped string
	t.Run("a mount works", func(t *testing.T) {
		e := startEngine(t, binary, 5, false, args, env)
		defer e.nothingUnknown(t)
		multiplexing, err := pluginutil.NewPluginMultiplexingClient(e.conn).
			MultiplexingSupport(t.Context(), &pluginutil.MultiplexingSupportRequest{})
		if err != nil || !multiplexing.GetSupported() {
			t.Errorf("one process for all mounts: %v, %v", multiplexing, err)
		}
		m := e.mounted(t, "one", storage)
		if answer, err := e.backend.Initialize(m.ctx, &pb.InitializeArgs{}); err != nil || pb.ProtoErrToErr(answer.GetErr()) != nil {
			t.Fatalf("Initialize: %v, %v", answer, err)
		}
		m.must(t, logical.UpdateOperation, "devices/hsm", map[string]any{
			"type": "pkcs11", "module": token.Module, "serial": token.Serial, "pin": token.PIN,
		})
		m.must(t, logical.UpdateOperation, "keys/prod", map[string]any{"device": "hsm", "generate": true, "algorithm": "rsa-2048"})
		vaulttest.Eventually(t, vaulttest.Patience, "the HSM key", func() error {
			if key := m.must(t, logical.ReadOperation, "keys/prod", nil); key["state"] != "ready" {
				return errors.New("it is still being made")
			}
			return nil
		})
		m.must(t, logical.ReadOperation, "keys/prod/backup", nil)
		m.must(t, logical.UpdateOperation, "keys/prod", map[string]any{"accept_single_hsm": true})
		sealed := m.must(t, logical.UpdateOperation, "encrypt/prod", map[string]any{"plaintext": plaintext})
		transit = sealed["ciphertext"].(string)
		sealed = m.must(t, logical.UpdateOperation, "wrap/prod", map[string]any{"plaintext": plaintext, "context": "eA=="})
		wrapped = sealed["ciphertext"].(string)
		m.opens(t, plaintext, transit, wrapped)
		if names := m.must(t, logical.ListOperation, "keys/", nil)["keys"]; len(names.([]any)) != 1 {
			t.Errorf("keys are %v", names)
		}
		m.must(t, logical.UpdateOperation, "stores/here", map[string]any{"type": "vault"})
		m.must(t, logical.UpdateOperation, "material/eu/unseal", map[string]any{
			"key": "prod", "store": "here", "fields": map[string]any{"key_1": plaintext},
		})
		fields := m.must(t, logical.UpdateOperation, "material/eu/unseal/open", nil)["fields"]
		if got := fields.(map[string]any)["key_1"]; got != plaintext {
			t.Errorf("the material opens as %v", got)
		}
		help := m.must(t, logical.HelpOperation, "encrypt/prod", nil)
		if !strings.Contains(help["help"].(string), "seal") {
			t.Errorf("path-help says %v", help["help"])
		}

		other := e.mounted(t, "two", &logical.InmemStorage{}) // in the same process
		if names, err := other.request(logical.ListOperation, "keys/", nil); err == nil && len(names.Data) > 0 {
			t.Errorf("another mount has the keys %v", names.Data)
		}
		if _, err := e.backend.Cleanup(other.ctx, &pb.Empty{}); err != nil {
			t.Errorf("Cleanup: %v", err)
		}
		m.opens(t, plaintext, transit, wrapped)
	})

	t.Run("after a reload a new process goes on with what was there", func(t *testing.T) {
		e := startEngine(t, binary, 5, false, args, env)
		defer e.nothingUnknown(t)
		m := e.mounted(t, "one", storage)
		if answer, err := e.backend.Initialize(m.ctx, &pb.InitializeArgs{}); err != nil || pb.ProtoErrToErr(answer.GetErr()) != nil {
			t.Fatalf("Initialize: %v, %v", answer, err)
		}
		m.opens(t, plaintext, transit, wrapped)
		if _, err := e.backend.InvalidateKey(m.ctx, &pb.InvalidateKeyArgs{Key: "keys/prod"}); err != nil {
			t.Errorf("InvalidateKey: %v", err)
		}

		response, err := m.request(logical.UpdateOperation, "decrypt/prod", map[string]any{"ciphertext": "vault:v1:AAAA"})
		if !errors.Is(err, logical.ErrInvalidRequest) || !strings.Contains(response.Error().Error(), "invalid ciphertext") {
			t.Errorf("a wrong ciphertext is answered with %v, %v; want 400", response, err)
		}
		if response, err := m.request(logical.ReadOperation, "keys/nobody", nil); response != nil || err != nil {
			t.Errorf("a key that is not there is answered with %v, %v; want 404", response, err)
		}
		m.must(t, logical.UpdateOperation, "devices/away", map[string]any{
			"type": "nethsm", "urls": "https://127.0.0.1:1", "username": "operator", "password": "password", "tls_insecure": true,
			"request_timeout": "1s",
		})
		_, err = m.request(logical.UpdateOperation, "keys/away", map[string]any{"device": "away", "key_label": "x"})
		if coded := logical.HTTPCodedError(nil); !errors.As(err, &coded) || coded.Code() != http.StatusServiceUnavailable {
			t.Errorf("an HSM that is away is answered with %v; want 503", err)
		}
		if _, err := e.backend.Cleanup(m.ctx, &pb.Empty{}); err != nil {
			t.Errorf("Cleanup: %v", err)
		}
	})

	t.Run("the other cookie of OpenBao makes the same file a seal", func(t *testing.T) {
		e := startEngine(t, binary, 5, false, args, env)
		_, err := e.backend.Setup(t.Context(), &pb.SetupArgs{}) // without the name of a mount
		if status.Code(err) == codes.Unimplemented || err == nil {
			t.Errorf("the secrets engine answers %v", err)
		}
		err = e.conn.Invoke(t.Context(), "/pb.Wrapper/Type", &pb.Empty{}, &pb.Empty{})
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("a process that was started as a secrets engine answers as a seal: %v", err)
		}
	})
}

// opens checks that what was sealed opens.
func (m *mount) opens(t *testing.T, plaintext, transit, wrapped string) {
	t.Helper()
	if got := m.must(t, logical.UpdateOperation, "decrypt/prod", map[string]any{"ciphertext": transit})["plaintext"]; got != plaintext {
		t.Errorf("decrypt/ answers %v", got)
	}
	got := m.must(t, logical.UpdateOperation, "unwrap/prod", map[string]any{"ciphertext": wrapped, "context": "eA=="})["plaintext"]
	if got != plaintext {
		t.Errorf("unwrap/ answers %v", got)
	}
}

// nothingUnknown checks that the plugin called nothing that OpenBao does not have.
func (e *engine) nothingUnknown(t *testing.T) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.unknown) > 0 {
		t.Errorf("it called what OpenBao does not have: %s", strings.Join(e.unknown, ", "))
	}
}
