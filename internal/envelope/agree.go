package envelope

import (
	"context"
	"crypto/aes"
	"crypto/ecdh"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	josecipher "github.com/go-jose/go-jose/v4/cipher"

	"vault-plugin-secrets-nitrokey/hsm"
)

// agreeAndUnwrap recovers the content key by ECDH-ES+A256KW (RFC 7518, 4.6) with one HSM operation. A block that does
// not unwrap is hsm.ErrCiphertext, as it is for RSA.
func agreeAndUnwrap(ctx context.Context, key hsm.Agreer, ephemeral *ecdh.PublicKey, wrapped []byte) ([]byte, error) {
	z, err := key.Agree(ctx, ephemeral)
	if err != nil {
		return nil, err
	}
	defer clear(z)
	if want := len(ephemeral.Bytes()) / 2; len(z) != want { // 4 ‖ x ‖ y
		return nil, fmt.Errorf("the HSM returned a shared secret of %d bytes instead of %d", len(z), want)
	}
	kek := concatKDF(z, string(ECDHESA256KW), "", "", contentKeySize)
	defer clear(kek)
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fmt.Errorf("preparing AES key unwrap: %w", err)
	}
	contentKey, err := josecipher.KeyUnwrap(block, wrapped)
	if err != nil {
		return nil, hsm.ErrCiphertext
	}
	return contentKey, nil
}

// concatKDF is the key derivation of RFC 7518, 4.6.2 with SHA-256, for keys of up to 32 bytes: one round. The caller
// wipes the result.
func concatKDF(z []byte, algorithm, partyU, partyV string, size int) []byte {
	const firstRound = 1
	input := binary.BigEndian.AppendUint32(nil, firstRound)
	input = append(input, z...)
	for _, info := range []string{algorithm, partyU, partyV} {
		input = append(appendLength(input, len(info)), info...)
	}
	input = appendLength(input, size*8) // SuppPubInfo: the key's length in bits
	defer clear(input)
	sum := sha256.Sum256(input)
	return sum[:size]
}
