package pkcs11

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// raw is what CKM_RSA_X_509 gives for a ciphertext.
func raw(key *rsa.PrivateKey, ciphertext []byte) []byte {
	return new(big.Int).Exp(new(big.Int).SetBytes(ciphertext), key.D, key.N).FillBytes(make([]byte, key.Size()))
}

func TestUnpaddingAgreesWithCryptoRSA(t *testing.T) {
	key := sharedKey()
	for _, hash := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		longest := key.Size() - 2*hash.Size() - 2
		for _, size := range []int{0, 1, 31, 32, longest - 1, longest} {
			message := bytes.Repeat([]byte{1}, size) // ones, and zeros below: what the search looks for
			for i := range message {
				message[i] &= byte(i)
			}
			ciphertext, err := rsa.EncryptOAEP(hash.New(), rand.Reader, &key.PublicKey, message, nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := unpadOAEP(hash, raw(key, ciphertext))
			if err != nil || !bytes.Equal(got, message) {
				t.Errorf("%v, %d bytes: got %d bytes, %v", hash, size, len(got), err)
			}
		}
	}
}

// pad makes a block with a data block of the caller's choosing.
func pad(hash crypto.Hash, first byte, db []byte) []byte {
	seed := make([]byte, hash.Size())
	_, _ = rand.Read(seed)
	block := append(append([]byte{first}, seed...), db...)
	maskMGF1(hash, block[1:1+hash.Size()], block[1+hash.Size():])
	maskMGF1(hash, block[1+hash.Size():], block[1:1+hash.Size()])
	return block
}

func TestUnpaddingRefusesEveryWrongBlock(t *testing.T) {
	const size = 256
	for _, hash := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		empty := hash.New().Sum(nil)
		db := func(change func(db []byte)) []byte {
			block := make([]byte, size-hash.Size()-1)
			copy(block, empty)
			block[len(block)-8] = 1
			copy(block[len(block)-7:], "message")
			change(block)
			return block
		}
		same := func([]byte) {}
		if got, err := unpadOAEP(hash, pad(hash, 0, db(same))); err != nil || string(got) != "message" {
			t.Fatalf("%v: a right block gives %q, %v", hash, got, err)
		}
		labelled := hash.New()
		labelled.Write([]byte("a label"))
		for name, block := range map[string][]byte{
			"a first byte that is not zero":    pad(hash, 1, db(same)),
			"a first byte of 0x80":             pad(hash, 0x80, db(same)),
			"another label":                    pad(hash, 0, db(func(b []byte) { copy(b, labelled.Sum(nil)) })),
			"one bit of the label's hash":      pad(hash, 0, db(func(b []byte) { b[0] ^= 1 })),
			"the last bit of the label's hash": pad(hash, 0, db(func(b []byte) { b[hash.Size()-1] ^= 0x80 })),
			"no one at all":                    pad(hash, 0, db(func(b []byte) { clear(b[hash.Size():]) })),
			"a two instead of the one":         pad(hash, 0, db(func(b []byte) { b[len(b)-8] = 2 })),
			"a stray byte before the one":      pad(hash, 0, db(func(b []byte) { b[hash.Size()] = 0xff })),
			"a stray byte just before the one": pad(hash, 0, db(func(b []byte) { b[len(b)-9] = 2 })),
			"zeros":                            make([]byte, size),
			"ones":                             bytes.Repeat([]byte{1}, size),
			"a block that is too short":        make([]byte, 2*hash.Size()+1),
			"no block":                         nil,
		} {
			if got, err := unpadOAEP(hash, block); !errors.Is(err, hsm.ErrCiphertext) || got != nil {
				t.Errorf("%v, %s: got %d bytes, %v, want ErrCiphertext", hash, name, len(got), err)
			}
		}
		// The shortest message and the longest padding, and the other way round.
		if got, err := unpadOAEP(hash, pad(hash, 0, db(func(b []byte) { clear(b[hash.Size():]); b[len(b)-1] = 1 }))); err != nil || len(got) != 0 {
			t.Errorf("%v: an empty message gives %q, %v", hash, got, err)
		}
		if got, err := unpadOAEP(hash, pad(hash, 0, db(func(b []byte) { b[hash.Size()] = 1 }))); err != nil || len(got) != size-2*hash.Size()-2 {
			t.Errorf("%v: the longest message gives %d bytes, %v", hash, len(got), err)
		}
	}
}

// FuzzUnpadOAEP compares with crypto/rsa: whatever the block, either both give the same message or both refuse.
func FuzzUnpadOAEP(f *testing.F) {
	key := sharedKey()
	good, err := rsa.EncryptOAEP(crypto.SHA256.New(), rand.Reader, &key.PublicKey, []byte("message"), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw(key, good))
	f.Add(make([]byte, 256))
	f.Fuzz(func(t *testing.T, block []byte) {
		if len(block) != key.Size() {
			_, _ = unpadOAEP(crypto.SHA256, block)
			return
		}
		number := new(big.Int).SetBytes(block)
		if number.Cmp(key.N) >= 0 {
			return
		}
		ciphertext := new(big.Int).Exp(number, big.NewInt(int64(key.E)), key.N).FillBytes(make([]byte, key.Size()))
		want, wantErr := rsa.DecryptOAEP(crypto.SHA256.New(), nil, key, ciphertext, nil)
		got, err := unpadOAEP(crypto.SHA256, bytes.Clone(block))
		if (err == nil) != (wantErr == nil) || !bytes.Equal(got, want) {
			t.Errorf("got %x, %v; crypto/rsa gives %x, %v", got, err, want, wantErr)
		}
	})
}
