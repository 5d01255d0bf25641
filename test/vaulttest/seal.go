package vaulttest

import (
	"bytes"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
)

// Seal is a stanza seal "transit" of a server: who unseals it.
type Seal struct {
	// Address and CAFile are those of whoever answers: another Vault, `nitroseal serve`, or a [Gate] before one.
	Address, CAFile string
	// Mount is its mount_path, Key its key_name.
	Mount, Key, Token string
	// ClientCert and ClientKey are files of a client certificate, where one is shown.
	ClientCert, ClientKey string
	// Disabled is what the old seal is during a migration away from it.
	Disabled bool
	// Name tells two stanzas apart that are of one kind; "" leaves it to Vault.
	Name string
}

// sealStanzas are the stanzas as configuration.
const sealStanzas = `{{range .Seals}}
seal "transit" {
  address     = "{{.Address}}"
  mount_path  = "{{.Mount}}"
  key_name    = "{{.Key}}"
  token       = "{{.Token}}"
  tls_ca_cert = "{{.CAFile}}"
{{- if .ClientCert}}
  tls_client_cert = "{{.ClientCert}}"
  tls_client_key  = "{{.ClientKey}}"
{{- end}}
{{- if .Name}}
  name        = "{{.Name}}"
{{- end}}
{{- if .Disabled}}
  disabled    = "true"
{{- end}}
}
{{end}}`

// SetSeals gives the server other stanzas, from its next start on.
func (s *Server) SetSeals(seals ...Seal) { s.options.Seals = slices.Clone(seals) }

// unsealsItself tells whether one of the stanzas is enabled.
func (s *Server) unsealsItself() bool {
	return slices.ContainsFunc(s.options.Seals, func(seal Seal) bool { return !seal.Disabled })
}

// ConfigFile is the configuration that the server was started with.
func (s *Server) ConfigFile() string { return s.Dir + "/vault.hcl" }

// Init initialises a bare server, with one share, and waits until it is active.
func (s *Server) Init(t testing.TB) {
	t.Helper()
	s.initialize(t)
}

// Migrate starts a server that Stop or Kill ended with other seals, and does what `vault operator unseal -migrate` does with
// the one key that it has: its share where its seal was Shamir's, else its recovery key. One turns into the other. It is unsealed
// then, and need not be active.
func (s *Server) Migrate(t testing.TB, seals ...Seal) {
	t.Helper()
	s.SetSeals(seals...)
	s.Up(t)
	key := s.UnsealKey
	if key == "" {
		key = s.RecoveryKey
	}
	Eventually(t, Patience, "the seal to be migrated", func() error {
		status, err := s.Anonymous(t).Sys().UnsealWithOptions(&api.UnsealOpts{Key: key, Migrate: true})
		if err == nil && status.Sealed {
			err = fmt.Errorf("still sealed, migration %t, progress %d of %d", status.Migration, status.Progress, status.T)
		}
		return err
	})
	s.UnsealKey, s.RecoveryKey = "", ""
	if s.unsealsItself() {
		s.RecoveryKey = key
	} else {
		s.UnsealKey = key
	}
}

// UnsealStandby gives a node of a cluster its share. It may become a standby.
func (s *Server) UnsealStandby(t testing.TB) {
	t.Helper()
	s.post(t)
	s.WaitUnsealed(t, Patience)
}

// StartTransit runs a Vault whose own transit engine is the seal of others.
func StartTransit(t testing.TB) Seal {
	t.Helper()
	server := Start(t, Options{Storage: InMem})
	client := server.Client(t)
	must(t, client.Sys().MountWithContext(t.Context(), "transit", &api.MountInput{Type: "transit"}))
	_, err := client.Logical().WriteWithContext(t.Context(), "transit/keys/seal", map[string]any{})
	must(t, err)
	return Seal{Address: server.Address, CAFile: server.CAFile, Mount: "transit/", Key: "seal", Token: server.RootToken}
}

// MustNotStart starts a server that Stop or Kill ended, which must end by itself and say each of the words: Vault does where its
// seal does not answer.
func (s *Server) MustNotStart(t testing.TB, words ...string) {
	t.Helper()
	before := len(s.Log(t))
	s.launch(t)
	Eventually(t, Patience, "Vault to give up", func() error {
		if !s.process.ended() {
			return errors.New("it still runs")
		}
		return nil
	})
	for said, i := s.Log(t)[before:], 0; i < len(words); i++ {
		if !strings.Contains(said, words[i]) {
			t.Errorf("Vault gave up and said nothing of %q:\n%s", words[i], said)
		}
	}
}

// SealHealthy asks the server, which is unsealed, what its last look at its seal has shown: sys/seal-backend-status.
func (s *Server) SealHealthy(t testing.TB) error {
	t.Helper()
	answer, err := s.Client(t).Logical().ReadWithContext(t.Context(), "sys/seal-backend-status")
	switch {
	case err != nil:
		return err
	case answer == nil || answer.Data["healthy"] != true:
		return fmt.Errorf("its seal is not healthy: %+v", answer)
	}
	return nil
}

// SaveSnapshot is `vault operator raft snapshot save`. The seal signs it, in its way, and Vault checks that by itself.
func (s *Server) SaveSnapshot(t testing.TB) []byte {
	t.Helper()
	var snapshot bytes.Buffer
	must(t, s.Client(t).Sys().RaftSnapshotWithContext(t.Context(), &snapshot))
	if snapshot.Len() == 0 {
		must(t, errors.New("the snapshot is empty"))
	}
	return snapshot.Bytes()
}

// RestoreSnapshot is `vault operator raft snapshot restore`, with -force where the snapshot is another cluster's.
func (s *Server) RestoreSnapshot(t testing.TB, snapshot []byte, force bool) {
	t.Helper()
	must(t, s.Client(t).Sys().RaftSnapshotRestoreWithContext(t.Context(), bytes.NewReader(snapshot), force))
}

// RecoversARootToken makes a root token of the recovery key, as `vault operator generate-root` does, and fails the test where it
// is none.
func (s *Server) RecoversARootToken(t testing.TB) {
	t.Helper()
	ctx, sys := t.Context(), s.Anonymous(t).Sys()
	begun, err := sys.GenerateRootInitWithContext(ctx, "", "")
	must(t, err)
	done, err := sys.GenerateRootUpdateWithContext(ctx, s.RecoveryKey, begun.Nonce)
	must(t, err)
	encoded, err := base64.RawStdEncoding.DecodeString(done.EncodedToken)
	must(t, err)
	if len(encoded) != len(begun.OTP) {
		t.Fatalf("the token has %d bytes, what hides it %d", len(encoded), len(begun.OTP))
	}
	subtle.XORBytes(encoded, encoded, []byte(begun.OTP))
	must(t, s.ClientWithToken(t, string(encoded)).Auth().Token().RevokeSelfWithContext(ctx, ""))
}
