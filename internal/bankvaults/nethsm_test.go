package bankvaults_test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"errors"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/bankvaults"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// TestASecretThatWasEncryptedToANetHSM is told apart from one that does not decrypt: such a key is not supported.
func TestASecretThatWasEncryptedToANetHSM(t *testing.T) {
	double := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() { _ = manager.Close() })
	device, err := manager.Open(nethsm.DeviceConfig{
		Options:  nethsm.Options{URLs: double.URLs(), TLS: nethsm.TLS{CA: double.CA()}},
		Operator: nethsm.Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)}, Owner: t.Name(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = device.Close() })
	root := bankvaults.Name{Kind: bankvaults.Root}
	for _, mechanism := range []string{"RSA_Decryption_OAEP_SHA1", "RSA_Decryption_OAEP_SHA256"} {
		id, public, err := double.AddKey(nethsmtest.Key{Mechanisms: []string{mechanism}})
		if err != nil {
			t.Fatal(err)
		}
		block, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, public.(*rsa.PublicKey), []byte(rootToken), nil)
		if err != nil {
			t.Fatal(err)
		}
		key, err := hsm.FindKey(t.Context(), device, hsm.KeyQuery{ID: id})
		if err != nil {
			t.Fatal(err)
		}
		for _, accept := range []bool{false, true} {
			if got, err := bankvaults.Decrypt(t.Context(), key, []bankvaults.Copy{{Name: root, Block: block}}, accept); !errors.Is(err, hsm.ErrUnsupported) {
				t.Errorf("with %s: %v, %v; want ErrUnsupported", mechanism, got, err)
			}
		}
	}
}
