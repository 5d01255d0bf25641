package envelope

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// instant stands for an HSM that answers at once: it gives the content key that it learnt in the first operation, so
// that BenchmarkOpen measures what the software around the HSM costs.
type instant struct {
	hsm.Decrypter
	contentKey []byte
}

func (k *instant) DecryptOAEP(ctx context.Context, hash crypto.Hash, block []byte) ([]byte, error) {
	if k.contentKey == nil {
		var err error
		if k.contentKey, err = k.Decrypter.DecryptOAEP(ctx, hash, block); err != nil {
			return nil, err
		}
	}
	return append([]byte(nil), k.contentKey...), nil
}

// instantAgreer is instant for an elliptic-curve key.
type instantAgreer struct {
	hsm.Agreer
	secret []byte
}

func (k *instantAgreer) Agree(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	if k.secret == nil {
		var err error
		if k.secret, err = k.Agreer.Agree(ctx, peer); err != nil {
			return nil, err
		}
	}
	return append([]byte(nil), k.secret...), nil
}

var benchmarks = []struct {
	name    string
	to      []string
	payload int
}{
	{"rsa-2048", []string{rsa2048}, 32},
	{"rsa-3072", []string{rsa3072}, 32},
	{"ec-p256", []string{ecP256}, 32},
	{"ec-p384", []string{ecP384}, 32},
	{"four recipients", testKeys, 32},
	{"rsa-2048 64KiB", []string{rsa2048}, MaxPayload},
}

func BenchmarkSeal(b *testing.B) {
	for _, bm := range benchmarks {
		b.Run(bm.name, func(b *testing.B) {
			var to []Recipient
			for _, name := range bm.to {
				to = append(to, load(b, name, "").Recipient)
			}
			payload := make([]byte, bm.payload)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Seal(wrapContext(), to, testAuth, payload); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkOpen parses and opens; the HSM's own time is left out.
func BenchmarkOpen(b *testing.B) {
	for _, bm := range benchmarks {
		b.Run(bm.name, func(b *testing.B) {
			var to []party
			for _, name := range bm.to {
				to = append(to, load(b, name, ""))
			}
			raw := mustSeal(b, wrapContext(), make([]byte, bm.payload), to...)
			var key hsm.Key
			switch k := to[0].key.(type) {
			case hsm.Decrypter:
				key = &instant{Decrypter: k}
			case hsm.Agreer:
				key = &instantAgreer{Agreer: k}
			}
			b.ReportAllocs()
			for b.Loop() {
				e, err := Parse(raw)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := e.Open(b.Context(), wrapContext(), to[0].Recipient, key, testAuth); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSealLeased and BenchmarkOpenLeased are with a KEK at hand, as while a lease is open.
func BenchmarkSealLeased(b *testing.B) {
	kek, block := sealKEK(b, load(b, rsa2048, "")), kekBlock(b, testKEK)
	payload := make([]byte, 32)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := SealLeased(leasedContext(), kek, block, testAuth, payload); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkOpenLeased(b *testing.B) {
	raw, block := sealLeased(b, leasedContext(), make([]byte, 32), load(b, rsa2048, "")), kekBlock(b, testKEK)
	b.ReportAllocs()
	for b.Loop() {
		e, err := Parse(raw)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := e.OpenLeased(leasedContext(), block, testAuth); err != nil {
			b.Fatal(err)
		}
	}
}
