//go:build cgo

package modhost

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"math/big"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func rsaPublic(key wire.Key) *rsa.PublicKey {
	return &rsa.PublicKey{N: new(big.Int).SetBytes(key.Modulus), E: int(new(big.Int).SetBytes(key.Exponent).Int64())}
}

// rawEncrypt is the bare RSA operation with a public key.
func rawEncrypt(public *rsa.PublicKey, block []byte) []byte {
	raised := new(big.Int).Exp(new(big.Int).SetBytes(block), big.NewInt(int64(public.E)), public.N)
	return raised.FillBytes(make([]byte, public.Size()))
}

func TestRSAKeys(t *testing.T) {
	h, k, slot := openToken(t)
	for _, bits := range []int{2048, 3072, 4096} {
		algorithm := map[int]string{2048: "rsa-2048", 3072: "rsa-3072", 4096: "rsa-4096"}[bits]
		t.Run(algorithm, func(t *testing.T) {
			id := randomID()
			var key wire.Key
			h.must(wire.OpGenerateKey, wire.GenerateRequest{Slot: slot, Algorithm: algorithm, Label: algorithm, ID: id}, nil, &key)
			if key.Unusable != "" || key.ID != id || key.Label != algorithm || !key.Sensitive || key.Extractable || key.PublicHandle == 0 {
				t.Errorf("generated %+v", key)
			}
			if diff := cmp.Diff([]string{"decrypt"}, key.Uses); diff != "" {
				t.Errorf("usable for (-want +got):\n%s", diff)
			}
			public := rsaPublic(key)
			if public.N.BitLen() != bits || public.E != 65537 {
				t.Errorf("a modulus of %d bits and the exponent %d", public.N.BitLen(), public.E)
			}
			var keys wire.Keys
			h.must(wire.OpFindKeys, wire.FindKeysRequest{Slot: slot, Label: algorithm}, nil, &keys)
			if diff := cmp.Diff([]wire.Key{key}, keys.Keys); diff != "" {
				t.Errorf("found again (-generated +found):\n%s", diff)
			}

			secret := []byte("a content encryption key")
			request := wire.DecryptRequest{Slot: slot, Handle: key.Handle, Hash: pkcs11.CKM_SHA_1, Size: public.Size()}
			ciphertext, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, public, secret, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := h.must(wire.OpDecryptOAEP, request, ciphertext, nil); !bytes.Equal(got, secret) {
				t.Errorf("OAEP: got %x, want %x", got, secret)
			}

			// A block that begins with zeros, as padded ones do.
			block := make([]byte, public.Size())
			copy(block[3:], secret)
			request.Hash = 0
			if got := h.must(wire.OpDecryptRaw, request, rawEncrypt(public, block), nil); !bytes.Equal(got, block) {
				t.Errorf("raw: got  %x\nwant %x", got, block)
			}
		})
	}
	list := k.Tool(t, "--list-objects")
	for _, want := range []string{"sensitive, always sensitive, never extractable, local", "Usage:      decrypt\n", "Usage:      encrypt\n"} {
		if strings.Count(list, want) != 3 {
			t.Errorf("pkcs11-tool does not show %q three times:\n%s", want, list)
		}
	}
}

func TestECKeys(t *testing.T) {
	h, k, slot := openToken(t)
	for _, c := range []struct {
		algorithm, name string
		curve           ecdh.Curve
		size            int
	}{{"ecdh-p256", "P-256", ecdh.P256(), 32}, {"ecdh-p384", "P-384", ecdh.P384(), 48}} {
		t.Run(c.algorithm, func(t *testing.T) {
			var key wire.Key
			h.must(wire.OpGenerateKey, wire.GenerateRequest{Slot: slot, Algorithm: c.algorithm, Label: c.name}, nil, &key)
			if key.Unusable != "" || len(key.ID) != 32 || !key.Sensitive || key.Extractable || key.Curve != c.name {
				t.Errorf("generated %+v", key)
			}
			if diff := cmp.Diff([]string{"derive"}, key.Uses); diff != "" {
				t.Errorf("usable for (-want +got):\n%s", diff)
			}
			public, err := c.curve.NewPublicKey(key.Point)
			if err != nil {
				t.Fatal(err)
			}
			request := wire.DeriveRequest{Slot: slot, Handle: key.Handle, Size: c.size}
			// One in 256 shared secrets begins with a zero byte, which must stay.
			for try, zeros := 0, 0; try < 8 || zeros == 0; try++ {
				peer, err := c.curve.GenerateKey(rand.Reader)
				if err != nil {
					t.Fatal(err)
				}
				want, err := peer.ECDH(public)
				if err != nil {
					t.Fatal(err)
				}
				if want[0] == 0 {
					zeros++
				} else if try >= 8 {
					continue
				}
				if got := h.must(wire.OpDerive, request, peer.PublicKey().Bytes(), nil); !bytes.Equal(got, want) {
					t.Fatalf("got  %x\nwant %x", got, want)
				}
			}
		})
	}
	list := k.Tool(t, "--list-objects")
	if strings.Count(list, "sensitive, always sensitive, never extractable, local") != 2 || strings.Count(list, "Usage:      derive\n") != 2 {
		t.Errorf("pkcs11-tool shows other keys than wanted:\n%s", list)
	}
}

func TestAFailedDecryptHarmsNoOther(t *testing.T) {
	h, _, slot := openToken(t)
	var key wire.Key
	h.must(wire.OpGenerateKey, wire.GenerateRequest{Slot: slot, Algorithm: "rsa-2048", Label: "k"}, nil, &key)
	good, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, rsaPublic(key), []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	request := wire.DecryptRequest{Slot: slot, Handle: key.Handle, Hash: pkcs11.CKM_SHA_1, Size: 256}
	for range 20 { // more than there are sessions
		bad := bytes.Clone(good)
		bad[100] ^= 1
		if _, err := h.call(wire.OpDecryptOAEP, request, bad, nil); err == nil || !strings.HasPrefix(err.Error(), "C_Decrypt:") {
			t.Fatalf("a broken block: %v", err)
		}
		if got := h.must(wire.OpDecryptOAEP, request, good, nil); string(got) != "secret" {
			t.Fatalf("got %q", got)
		}
	}
	// SoftHSM knows SHA-1 only, and says so before it begins.
	request.Hash = pkcs11.CKM_SHA256
	block, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, rsaPublic(key), []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.call(wire.OpDecryptOAEP, request, block, nil)
	if failure := asFailure(t, err); failure.Code != pkcs11.CKR_ARGUMENTS_BAD || failure.Function != "C_DecryptInit" {
		t.Errorf("got %v, want it of C_DecryptInit", failure)
	}
}
