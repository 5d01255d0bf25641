package bankvaults_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/bankvaults"
)

// format encrypts as a version of Bank-Vaults does.
type format func(t *testing.T, key hsm.Key, text string) []byte

// now is Bank-Vaults since 1.33.
func now(t *testing.T, key hsm.Key, text string) []byte {
	t.Helper()
	block, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, key.Public().(*rsa.PublicKey), []byte(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	return block
}

// before is Bank-Vaults before 1.33.
func before(t *testing.T, key hsm.Key, text string) []byte {
	t.Helper()
	block, err := rsa.EncryptPKCS1v15(rand.Reader, key.Public().(*rsa.PublicKey), []byte(text)) //nolint:staticcheck // the old format
	if err != nil {
		t.Fatal(err)
	}
	return block
}

const rootToken = "hvs.CAESIJ1f2e3d4c5b6a"

// share is the text of a share as Vault prints it.
func share(kind string, i int) string {
	raw := fmt.Appendf(nil, "%-32s%c", fmt.Sprintf("%s share number %d", kind, i), rune(i+1))
	return hex.EncodeToString(raw)
}

// kept is what Bank-Vaults keeps of a Vault with five shares.
func kept() map[string]string {
	all := map[string]string{"vault-root": rootToken, "vault-test": "vault-test"}
	for i := range 5 {
		all[fmt.Sprintf("vault-unseal-%d", i)] = share("unseal", i)
	}
	return all
}

// token is a token as Bank-Vaults leaves it.
type token struct {
	*hsmtest.Memory
	key hsm.Key
}

func newToken(t *testing.T, f format) *token {
	t.Helper()
	k := &token{Memory: hsmtest.NewMemory()}
	k.key = k.AddRSA(t, bankvaults.DefaultKeyLabel, "", 2048)
	for name, text := range kept() {
		k.put(name, f(t, k.key, text))
	}
	return k
}

// put adds a data object as Bank-Vaults does: the label may be taken.
func (k *token) put(name string, block []byte) { k.AddObject(hsm.ObjectRef{Label: name}, block) }

func (k *token) read(t *testing.T) []bankvaults.Copy {
	t.Helper()
	copies, err := bankvaults.Token(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	return copies
}
