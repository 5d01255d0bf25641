package vaulttest

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// Site is a Vault with the plugin registered and enabled at nitrokey/, and a token that it may use.
type Site struct {
	*Server
	Token *pkcs11test.Token // nil where the site has none
	// StateDir and SecretsDir are the plugin's -state-dir and -secrets-dir; several sites may share the former.
	StateDir, SecretsDir string
	// Args and Env (NAME=VALUE) are what the plugin was registered with.
	Args, Env []string
}

// SiteOptions say how a site differs from the usual one.
type SiteOptions struct {
	Options
	Build Build
	// Token defaults to a new SoftHSM token. NoToken registers the plugin without any PKCS#11 module.
	Token   *pkcs11test.Token
	NoToken bool
	// StateDir defaults to a new folder.
	StateDir string
	// Args are added to the plugin's arguments.
	Args []string
}

// StartSite runs Vault with the plugin. No device is configured yet: see [Site.AddDevice].
func StartSite(t testing.TB, options SiteOptions) *Site {
	t.Helper()
	s := &Site{Token: options.Token, StateDir: options.StateDir, SecretsDir: filepath.Join(t.TempDir(), "secrets")}
	if s.Token == nil && !options.NoToken {
		s.Token = pkcs11test.SoftHSM(t)
	}
	if s.StateDir == "" {
		s.StateDir = filepath.Join(t.TempDir(), "state")
	}
	for _, dir := range []string{s.SecretsDir, s.StateDir} {
		must(t, os.MkdirAll(dir, 0o700))
	}
	s.Args = append([]string{"-secrets-dir=" + s.SecretsDir, "-state-dir=" + s.StateDir}, options.Args...)
	if s.Token != nil {
		s.allow(s.Token)
	}
	s.Server = Start(t, options.Options)
	s.give(t, s.StateDir)
	s.give(t, s.SecretsDir)
	s.Register(t, options.Build.Binary(t), s.Args, s.Env)
	s.Enable(t, "nitrokey", "")
	return s
}

// allow lets the plugin load the module of a token, and gives that its environment.
func (s *Site) allow(token *pkcs11test.Token) {
	s.Args = append(s.Args, "-pkcs11-module="+token.Module)
	for _, name := range token.Env {
		s.Args = append(s.Args, "-module-env="+name)
		s.Env = append(s.Env, name+"="+os.Getenv(name))
	}
}

// AddDevice configures the token as a device of the mount nitrokey/.
func (s *Site) AddDevice(t testing.TB, name string) {
	t.Helper()
	s.Write(t, "nitrokey/devices/"+name, Fields{
		"type": "pkcs11", "module": s.Token.Module, "token_label": s.Token.Label, "pin": s.Token.PIN,
	})
}

// AddKey makes a wrapping key in the HSM, waits until it can be used, and confirms that there is one HSM only.
func (s *Site) AddKey(t testing.TB, name, device, algorithm string) {
	t.Helper()
	s.Write(t, "nitrokey/keys/"+name, Fields{"device": device, "generate": true, "algorithm": algorithm})
	s.WaitKey(t, name, 1)
	s.Read(t, "nitrokey/keys/"+name+"/backup")
	s.Write(t, "nitrokey/keys/"+name, Fields{"accept_single_hsm": true})
}

// WaitKey waits until the HSM has made the given version of a wrapping key.
func (s *Site) WaitKey(t testing.TB, name string, version int) {
	t.Helper()
	Eventually(t, time.Minute, "the HSM key", func() error {
		key := s.Read(t, "nitrokey/keys/"+name)
		if key["state"] != "ready" || fmt.Sprint(key["latest_version"]) != fmt.Sprint(version) {
			return fmt.Errorf("state %v, version %v, pending %v", key["state"], key["latest_version"], key["pending"])
		}
		return nil
	})
}

// Fields are the data of a request or an answer.
type Fields map[string]any

// Write sends a write that must succeed, and returns the answer's data.
func (s *Site) Write(t testing.TB, path string, fields Fields) Fields {
	t.Helper()
	answer, err := s.Try(t, path, fields)
	if err != nil {
		t.Fatalf("vault write %s: %v", path, err)
	}
	return answer
}

// Try sends a write and returns the answer's data or its error.
func (s *Site) Try(t testing.TB, path string, fields Fields) (Fields, error) {
	t.Helper()
	secret, err := s.Client(t).Logical().WriteWithContext(context.Background(), path, fields)
	if err != nil || secret == nil {
		return nil, err
	}
	return secret.Data, nil
}

// Refused sends a write that must be answered with the HTTP code, by a sentence that holds each of the words.
func (s *Site) Refused(t testing.TB, path string, fields Fields, code int, words ...string) {
	t.Helper()
	answer, err := s.Try(t, path, fields)
	if err == nil {
		t.Fatalf("vault write %s was answered with %v, not refused", path, answer)
	}
	mustBe(t, "vault write "+path, err, code, words)
}

// Read reads what must exist.
func (s *Site) Read(t testing.TB, path string) Fields {
	t.Helper()
	secret, err := s.Client(t).Logical().ReadWithContext(context.Background(), path)
	switch {
	case err != nil:
		t.Fatalf("vault read %s: %v", path, err)
	case secret == nil:
		t.Fatalf("vault read %s: nothing there", path)
	}
	return secret.Data
}

// List returns the names under a path.
func (s *Site) List(t testing.TB, path string) []any {
	t.Helper()
	secret, err := s.Client(t).Logical().ListWithContext(context.Background(), path)
	if err != nil {
		t.Fatalf("vault list %s: %v", path, err)
	}
	if secret == nil {
		return nil
	}
	names, _ := secret.Data["keys"].([]any)
	return names
}

// Wrap seals a text with a wrapping key of nitrokey/.
func (s *Site) Wrap(t testing.TB, key, text string) string {
	t.Helper()
	answer := s.Write(t, "nitrokey/wrap/"+key, Fields{"plaintext": Base64(text)})
	return answer["ciphertext"].(string)
}

// MustUnwrap opens what Wrap made and compares it.
func (s *Site) MustUnwrap(t testing.TB, key, ciphertext, text string) {
	t.Helper()
	must(t, s.Unwraps(t, key, ciphertext, text))
}

// Unwraps is the same, for asking [Eventually].
func (s *Site) Unwraps(t testing.TB, key, ciphertext, text string) error {
	t.Helper()
	answer, err := s.Try(t, "nitrokey/unwrap/"+key, Fields{"ciphertext": ciphertext})
	if err != nil {
		return err
	}
	if answer["plaintext"] != Base64(text) {
		return fmt.Errorf("unwrapped %v, not %q", answer["plaintext"], Base64(text))
	}
	return nil
}

// Base64 is a text as Vault's fields want it.
func Base64(text string) string { return base64.StdEncoding.EncodeToString([]byte(text)) }

// mustBe checks the code and the sentence of an error of Vault's API.
func mustBe(t testing.TB, what string, err error, code int, words []string) {
	t.Helper()
	var answer *api.ResponseError
	if !errors.As(err, &answer) {
		t.Fatalf("%s: %v is no answer of Vault", what, err)
	}
	if answer.StatusCode != code {
		t.Errorf("%s: %d %s, want %d %s: %v", what, answer.StatusCode, http.StatusText(answer.StatusCode),
			code, http.StatusText(code), answer.Errors)
	}
	for _, word := range words {
		if !strings.Contains(strings.Join(answer.Errors, "\n"), word) {
			t.Errorf("%s: %q is missing in %q", what, word, answer.Errors)
		}
	}
}
