//go:build cgo

package bankvaults_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost/bankvaultstest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/bankvaults"
)

func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	os.Exit(m.Run())
}

// TestWhatBankVaultsLeftOnAToken reads what its own calls left on a SoftHSM token, in both of its formats.
func TestWhatBankVaultsLeftOnAToken(t *testing.T) {
	for name, test := range map[string]struct {
		format bankvaultstest.Format
		accept bool
	}{
		"since 1.33":  {bankvaultstest.OAEP, false},
		"before 1.33": {bankvaultstest.PKCS1v15, true},
	} {
		t.Run(name, func(t *testing.T) {
			token := pkcs11test.SoftHSM(t)
			s := bankvaultstest.Open(t, token.Module, token.Serial, token.PIN)
			s.GenerateKey(t, bankvaultstest.KeyLabel)
			for name, text := range kept() {
				block := s.Encrypt(t, test.format, text)
				switch name {
				case "vault-test": // written anew at each attempt to initialise
					s.Put(t, name, block)
					s.Put(t, name, s.Encrypt(t, test.format, text))
					s.Put(t, name, block, bankvaultstest.Private())
				case "vault-root":
					s.Put(t, name, block, bankvaultstest.Private())
				default:
					s.Put(t, name, block, bankvaultstest.LikeOpenSC(name)...)
				}
			}
			s.Put(t, "of another program", []byte("value"))
			s.Close(t)

			device := openToken(t, token)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			copies, err := bankvaults.Token(ctx, device)
			if err != nil || len(copies) != 9 {
				t.Fatalf("%d copies are read, want 9: %v", len(copies), err)
			}
			key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: bankvaults.DefaultKeyLabel})
			if err != nil {
				t.Fatal(err)
			}
			if !test.accept {
				wrong := append(copies[:len(copies):len(copies)], bankvaults.Copy{Name: copies[0].Name, Block: make([]byte, 256)})
				if _, err := bankvaults.Decrypt(ctx, key, wrong, false); !errors.Is(err, bankvaults.ErrDecrypt) {
					t.Errorf("with a wrong block: %v", err)
				}
			} else if _, err := bankvaults.Decrypt(ctx, key, copies, false); !errors.Is(err, bankvaults.ErrDecrypt) {
				t.Errorf("where the older format is not accepted: %v", err)
			}
			got, err := bankvaults.Decrypt(ctx, key, copies, test.accept)
			if err != nil {
				t.Fatal(err)
			}
			defer got.Wipe()
			if len(got.Shares) != 5 || string(got.RootToken) != rootToken {
				t.Errorf("%d shares, the token %q", len(got.Shares), got.RootToken)
			}
			if err := bankvaults.Delete(ctx, device, copies, func(bankvaults.Copy) {}); err != nil {
				t.Fatal(err)
			}
			if left := token.Tool(t, "--list-objects", "--type", "data"); strings.Contains(left, "vault-") || !strings.Contains(left, "of another program") {
				t.Errorf("left on the token:\n%s", left)
			}
		})
	}
}

// TestACardDecryptsWhatBankVaultsEncryptedOnTheComputer is OpenSC's case: encryption in software, no OAEP in the card.
func TestACardDecryptsWhatBankVaultsEncryptedOnTheComputer(t *testing.T) {
	for name, faults := range map[string][]pkcs11test.Fault{"with OAEP": nil, "with raw RSA only": {pkcs11test.RawOnly}} {
		t.Run(name, func(t *testing.T) {
			card := pkcs11test.Card(t, faults...)
			card.GenerateKey(t, "rsa:2048", bankvaults.DefaultKeyLabel, "01")
			device := openToken(t, &card.Token)
			key, err := hsm.FindKey(t.Context(), device, hsm.KeyQuery{Label: bankvaults.DefaultKeyLabel})
			if err != nil {
				t.Fatal(err)
			}
			public := key.Public().(*rsa.PublicKey)
			oaep, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, public, []byte(rootToken), nil)
			if err != nil {
				t.Fatal(err)
			}
			old, err := rsa.EncryptPKCS1v15(rand.Reader, public, []byte(rootToken)) //nolint:staticcheck // the old format
			if err != nil {
				t.Fatal(err)
			}
			root := bankvaults.Name{Kind: bankvaults.Root}
			got, err := bankvaults.Decrypt(t.Context(), key, []bankvaults.Copy{{Name: root, Block: oaep}, {Name: root, Block: old}}, true)
			if err != nil || string(got.RootToken) != rootToken || got.OldFormat != 1 {
				t.Errorf("it gives %+v, %v", got, err)
			}
			wrong := []bankvaults.Copy{{Name: root, Block: make([]byte, 256)}, {Name: root, Block: oaep}}
			if _, err := bankvaults.Decrypt(t.Context(), key, wrong, true); !errors.Is(err, bankvaults.ErrDecrypt) {
				t.Errorf("a wrong block gives %v", err)
			}
		})
	}
}

func openToken(t *testing.T, token *pkcs11test.Token) *pkcs11.Device {
	t.Helper()
	state := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	manager := pkcs11.New(pkcs11.Options{Modules: []string{token.Module}, StateDir: state, Env: token.Env})
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	device, err := manager.Open(t.Context(), pkcs11.Config{Module: token.Module, Serial: token.Serial, PIN: []byte(token.PIN), Owner: t.Name()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = device.Close() })
	return device
}
