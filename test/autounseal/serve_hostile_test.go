package autounseal

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestServeAndThoseWhoMeanHarm asks one server everything that somebody asks who has a token, or none, and means harm. The
// server is the same process in the end, and has said nothing that it must not.
func TestServeAndThoseWhoMeanHarm(t *testing.T) {
	host := vaulttest.NewHost(t)
	host.WithToken(t, pkcs11test.SoftHSM(t))
	s := serveOn(t, host, "")
	host.Must(t, "key", "generate", "ours", "--device", "hsm", "--algorithm", "rsa-2048", "--label", "shared")
	host.Must(t, "key", "adopt", "theirs", "--device", "hsm", "--label", "shared", "--accept-weak-key")
	for _, key := range []string{"ours", "theirs"} {
		s.keepRecord(t, key)
	}
	ours, theirs := s.key(t, "ours"), s.key(t, "theirs")
	s.run(t)
	s.served(t, ours)
	s.served(t, theirs)
	process := s.Running.Process(t)

	// Each is named, sent, and answered with a code and words.
	mine := encrypts(t, ours, "the root key")
	refused := func(name string, seal vaulttest.Seal, path string, fields vaulttest.Fields, code int, words ...string) {
		t.Run(name, func(t *testing.T) {
			got := call(t, seal, http.MethodPut, path, fields)
			if got.Code != code || len(got.Errors) == 0 || got.Data != nil {
				t.Errorf("it is answered with %d %s, not refused with %d", got.Code, got.Raw, code)
			}
			for _, word := range words {
				if !strings.Contains(strings.Join(got.Errors, "\n"), word) {
					t.Errorf("%q is missing in %s", word, got.Raw)
				}
			}
			silent(t, string(got.Raw), ours.Token, theirs.Token)
		})
	}
	ciphertext := func(text string) vaulttest.Fields { return vaulttest.Fields{"ciphertext": text} }
	const invalid = "invalid ciphertext"
	refused("a ciphertext of Vault's own transit", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(noise(60))), http.StatusBadRequest, invalid)
	refused("another cluster's ciphertext, of the same HSM key", ours, "transit/decrypt/ours",
		ciphertext(encrypts(t, theirs, "their root key")), http.StatusBadRequest, invalid)
	refused("the same, asked for by its own name with a token that is not for it", ours, "transit/decrypt/theirs",
		ciphertext(encrypts(t, theirs, "their root key")), http.StatusForbidden, "permission denied")
	refused("a ciphertext whose version was changed", ours, "transit/decrypt/ours",
		ciphertext(strings.Replace(mine, ":v1:", ":v2:", 1)), http.StatusBadRequest, invalid)
	s.Set(t, `store "files"`, "type = \"file\"\n dir = \"files\"")
	s.Put(t, "secret", []byte("an unseal key"))
	refused("an envelope that the same key made for material", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(materialOf(t, s, "ours"))), http.StatusBadRequest, invalid)
	refused("an envelope that the same key made for people", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(wrapOf(t, s, "ours"))), http.StatusBadRequest, invalid)
	refused("the authentication key of the key record", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(authKeyOf(t, s, "ours"))), http.StatusBadRequest, invalid)
	refused("no token", s.with("", "ours"), "transit/encrypt/ours", vaulttest.Fields{"plaintext": "YQ=="}, http.StatusForbidden, "permission denied")
	refused("a token that is nobody's", s.with(tampered(ours.Token), "ours"), "transit/encrypt/ours", vaulttest.Fields{"plaintext": "YQ=="},
		http.StatusForbidden, "permission denied")
	refused("a key that there is not", ours, "transit/encrypt/other", vaulttest.Fields{"plaintext": "YQ=="}, http.StatusForbidden, "permission denied")
	refused("another mount", ours, "transit2/encrypt/ours", vaulttest.Fields{"plaintext": "YQ=="}, http.StatusNotFound)
	refused("a batch", ours, "transit/encrypt/ours", vaulttest.Fields{"batch_input": []any{vaulttest.Fields{"plaintext": "YQ=="}}},
		http.StatusBadRequest, "batch_input")
	refused("a context, which would have to be bound", ours, "transit/encrypt/ours", vaulttest.Fields{"plaintext": "YQ==", "context": "YQ=="},
		http.StatusBadRequest, "context")
	refused("a value larger than an envelope holds", ours, "transit/encrypt/ours", vaulttest.Fields{"plaintext": noise(65 << 10)},
		http.StatusBadRequest)
	refused("a body larger than any request", ours, "transit/encrypt/ours", vaulttest.Fields{"plaintext": noise(2 << 20)},
		http.StatusRequestEntityTooLarge)

	t.Run("10,000 random and mutated requests", func(t *testing.T) { mutants(t, s, ours, theirs, mine) })
	t.Run("what is no HTTP", func(t *testing.T) { noHTTP(t, s, ours) })
	t.Run("clients that take their time", func(t *testing.T) { dawdlers(t, s, ours) })

	// It has survived, and serves.
	must(t, opens(t, ours, mine, "the root key"))
	s.healthy(t)
	if now := s.Running.Process(t); now != process || !now.Alive() {
		t.Errorf("the process was %v and is %v", process, now)
	}
	log := s.Running.Log.String()
	for _, word := range []string{"panic", "goroutine ", "runtime error", "nil pointer"} {
		if strings.Contains(log, word) {
			t.Errorf("its log says %q", word)
		}
	}
	silent(t, log, ours.Token, theirs.Token, "the root key", vaulttest.Base64("the root key"))
}

// silent fails the test where a text holds what nobody may read.
func silent(t testing.TB, text string, secrets ...string) {
	t.Helper()
	for _, secret := range secrets {
		if strings.Contains(text, secret) {
			t.Error("it holds a secret")
		}
		if i := strings.LastIndex(secret, "."); i >= 0 && strings.Contains(text, secret[i+1:]) {
			t.Error("it holds the secret part of a token")
		}
	}
}

func noise(size int) []byte {
	made := make([]byte, size)
	_, _ = rand.Read(made) // never fails
	return made
}

// tampered is a token with the id of another and another secret.
func tampered(token string) string {
	last := byte('A')
	if token[len(token)-2] == last {
		last = 'B'
	}
	return token[:len(token)-2] + string(last) + token[len(token)-1:]
}

// materialOf seals a file as material and returns the envelope.
func materialOf(t testing.TB, s *serve, key string) []byte {
	t.Helper()
	s.Must(t, "material", "put", "eu", "unseal", "--key", key, "--store", "files", "--field", "share="+s.File("secret"))
	return envelopeUnder(t, s.File("files"))
}

// wrapOf seals the same file for people.
func wrapOf(t testing.TB, s *serve, key string) []byte {
	t.Helper()
	return []byte(s.Must(t, "wrap", key, "--in", s.File("secret")))
}

// authKeyOf is the envelope of the version's authentication key, as the key record shows it to everybody.
func authKeyOf(t testing.TB, s *serve, key string) []byte {
	t.Helper()
	record := s.Must(t, "key", "backup", key)
	return findEnvelope(t, []byte(record))
}
