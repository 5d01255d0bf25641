package keyring

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"errors"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// lyingAgreer derives something else than its public key promises.
type lyingAgreer struct{ hsm.Agreer }

func (k lyingAgreer) Agree(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	z, err := k.Agreer.Agree(ctx, peer)
	if err == nil {
		z[0] ^= 1
	}
	return z, err
}

// lyingDecrypter announces every hash and decrypts with one; the others give nonsense or an error.
type lyingDecrypter struct {
	hsm.Decrypter
	works crypto.Hash
	fault error
}

func (k lyingDecrypter) OAEPHashes() []crypto.Hash { return []crypto.Hash{crypto.SHA256, crypto.SHA1} }

func (k lyingDecrypter) DecryptOAEP(ctx context.Context, hash crypto.Hash, ciphertext []byte) ([]byte, error) {
	if hash == k.works {
		return k.Decrypter.DecryptOAEP(ctx, hash, ciphertext)
	}
	if k.fault != nil {
		return nil, k.fault
	}
	return make([]byte, 32), nil
}

// selfProving is a key whose provider makes the round trip.
type selfProving struct {
	hsm.Decrypter
	err error
}

func (k selfProving) Prove(context.Context) error { return k.err }

// selfProvingAgreer is the same on a curve.
type selfProvingAgreer struct{ hsm.Agreer }

func (selfProvingAgreer) Prove(context.Context) error { return nil }

// idleKey can do nothing.
type idleKey struct{ hsm.Key }

func TestAKeyProvesWhatItCanDo(t *testing.T) {
	token := hsmtest.NewMemory()
	ec, _ := token.AddEC(t, "ec", "01", ecdh.P256()).(hsm.Agreer)
	rsaKey, _ := token.AddRSA(t, "rsa", "02", 2048).(hsm.Decrypter)
	for _, test := range []struct {
		name string
		key  hsm.Key
		want envelope.Algorithm
		err  error
	}{
		{"a curve", ec, envelope.ECDHESA256KW, nil},
		{"a curve that lies", lyingAgreer{ec}, "", ErrUnusableKey},
		{"RSA", rsaKey, envelope.RSAOAEP256, nil},
		{"RSA whose SHA-256 gives nonsense", lyingDecrypter{rsaKey, crypto.SHA1, nil}, envelope.RSAOAEP, nil},
		{"RSA whose SHA-256 is not supported", lyingDecrypter{rsaKey, crypto.SHA1, hsm.ErrUnsupported}, envelope.RSAOAEP, nil},
		{"RSA that decrypts nothing", lyingDecrypter{rsaKey, 0, hsm.ErrCiphertext}, "", ErrUnusableKey},
		{"RSA on an HSM that goes away", lyingDecrypter{rsaKey, crypto.SHA1, hsm.ErrUnavailable}, "", hsm.ErrUnavailable},
		{"RSA that proves itself", selfProving{rsaKey, nil}, envelope.RSAOAEP256, nil},
		{"RSA that fails its own proof", selfProving{rsaKey, hsm.ErrCiphertext}, "", ErrUnusableKey},
		{"RSA that proves itself on an HSM that is away", selfProving{rsaKey, hsm.ErrUnavailable}, "", hsm.ErrUnavailable},
		{"RSA whose tags the user lacks", lyingDecrypter{rsaKey, 0, hsm.ErrForbidden}, "", hsm.ErrForbidden},
		{"RSA that proves itself to others", selfProving{rsaKey, hsm.ErrForbidden}, "", hsm.ErrForbidden},
		{"a curve that proves itself", selfProvingAgreer{ec}, envelope.ECDHESA256KW, nil},
		{"a key that does neither", idleKey{ec}, "", ErrUnusableKey},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := prove(t.Context(), test.key)
			if !errors.Is(err, test.err) || (err == nil && got != test.want) {
				t.Errorf("got %q and %v, want %q and %v", got, err, test.want, test.err)
			}
			if !errors.Is(test.err, ErrUnusableKey) && errors.Is(err, ErrUnusableKey) {
				t.Errorf("an HSM that is away, or forbids its use, says nothing about the key: %v", err)
			}
		})
	}
	before := token.Operations()
	if _, err := prove(t.Context(), selfProving{rsaKey, nil}); err != nil || token.Operations() != before {
		t.Errorf("a key that proved itself was asked again: %v", err)
	}
}
