package pkcs11

import (
	"crypto"
	"crypto/subtle"
	"encoding/binary"

	"vault-plugin-secrets-nitrokey/hsm"
)

// unpadOAEP takes the message out of an RSAES-OAEP block with an empty label (RFC 8017, 7.1.2, step 3): the block is as
// long as the modulus, as a raw RSA decryption gives it. MGF1 uses the same hash. It overwrites the block. All wrong
// blocks of a size take the same time and give the same error, or their maker could learn about the plaintext from
// either (Manger's attack); only the length of a right message shows.
func unpadOAEP(hash crypto.Hash, block []byte) ([]byte, error) {
	size := hash.Size()
	if len(block) < 2*size+2 {
		return nil, hsm.ErrCiphertext
	}
	seed, db := block[1:1+size], block[1+size:]
	maskMGF1(hash, db, seed)
	maskMGF1(hash, seed, db)

	labelHash := hash.New().Sum(nil) // of the empty label
	good := subtle.ConstantTimeByteEq(block[0], 0) & subtle.ConstantTimeCompare(db[:size], labelHash)

	// Behind the label's hash lie zeros, a one, and the message. Look for the one without stopping at it.
	rest := db[size:]
	looking, index := 1, 0
	for i, b := range rest {
		one := subtle.ConstantTimeByteEq(b, 1)
		zero := subtle.ConstantTimeByteEq(b, 0)
		index = subtle.ConstantTimeSelect(looking&one, i, index)
		looking &= 1 ^ one
		good &= 1 ^ (looking & (1 ^ zero)) // before the one, only zeros
	}
	good &= 1 ^ looking
	if good != 1 {
		return nil, hsm.ErrCiphertext
	}
	return append([]byte(nil), rest[index+1:]...), nil
}

// maskMGF1 xors MGF1(seed) into out (RFC 8017, B.2.1).
func maskMGF1(hash crypto.Hash, seed, out []byte) {
	h := hash.New()
	var counter [4]byte
	digest := make([]byte, 0, hash.Size())
	for i := uint32(0); len(out) > 0; i++ {
		binary.BigEndian.PutUint32(counter[:], i)
		h.Reset()
		h.Write(seed)
		h.Write(counter[:])
		digest = h.Sum(digest[:0])
		n := subtle.XORBytes(out, out, digest)
		out = out[n:]
	}
	clear(digest[:cap(digest)])
	h.Reset()
}
