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

// BenchmarkHop is a request to the host and back that the module never sees.
func BenchmarkHop(b *testing.B) {
	h, k, slot := openToken(b)
	pin := []byte(k.PIN)
	for b.Loop() {
		if _, err := h.call(wire.OpLogin, wire.SlotRequest{Slot: slot}, pin, nil); err == nil {
			b.Fatal("logged in twice")
		}
	}
}

// BenchmarkDecrypt is an RSA-2048 decryption through the host.
func BenchmarkDecrypt(b *testing.B) {
	h, _, slot := openToken(b)
	var key wire.Key
	h.must(wire.OpGenerateKey, wire.GenerateRequest{Slot: slot, Algorithm: "rsa-2048", Label: "k"}, nil, &key)
	ciphertext, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, rsaPublic(key), make([]byte, 32), nil)
	if err != nil {
		b.Fatal(err)
	}
	request := wire.DecryptRequest{Slot: slot, Handle: key.Handle, Hash: pkcs11.CKM_SHA_1, Size: 256}
	for b.Loop() {
		h.must(wire.OpDecryptOAEP, request, ciphertext, nil)
	}
	b.ReportMetric(float64(status(b, h.command.Process.Pid, "VmRSS")), "kB-resident")
}

// BenchmarkStart is the birth of a host until its module is loaded.
func BenchmarkStart(b *testing.B) {
	k := pkcs11test.SoftHSM(b)
	for b.Loop() {
		h := startHost(b, environment(k)...)
		if _, err := h.hello(k.Module); err != nil {
			b.Fatal(err)
		}
		_ = h.write.Close()
		h.waitExit()
	}
}
