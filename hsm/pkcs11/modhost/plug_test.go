//go:build cgo

package modhost

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"testing"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// p11-kit's client gives everybody who asks for its functions an instance of their own: what one logs in, the other is
// not.
func TestAModuleOfManyInstancesIsUsedAsOne(t *testing.T) {
	plug := pkcs11test.Unpluggable(t)
	plug.GenerateKey(t, "rsa:2048", "k", "01")
	h := startHost(t, environment(&plug.Token)...)
	if _, err := h.hello(plug.Module); err != nil {
		t.Fatal(err)
	}
	slot := slotOf(h, &plug.Token)
	h.must(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte(plug.PIN), nil)
	var keys wire.Keys
	h.must(wire.OpFindKeys, wire.FindKeysRequest{Slot: slot, Label: "k"}, nil, &keys)
	if len(keys.Keys) != 1 || keys.Keys[0].Unusable != "" {
		t.Fatalf("keys: %+v", keys)
	}
	key := keys.Keys[0]
	ciphertext, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, rsaPublic(key), []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	request := wire.DecryptRequest{Slot: slot, Handle: key.Handle, Hash: pkcs11.CKM_SHA_1, Size: 256}
	if got := h.must(wire.OpDecryptOAEP, request, ciphertext, nil); string(got) != "secret" {
		t.Errorf("got %q", got)
	}
	plug.Unplug(t)
	_, err = h.call(wire.OpDecryptOAEP, request, ciphertext, nil)
	wantCode(t, err, pkcs11.CKR_DEVICE_ERROR)
}
