package pkcs11

import (
	"context"
	"crypto/subtle"
	"fmt"
	"math/big"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

var _ hsm.LegacyDecrypter = (*rsaKey)(nil)

// DecryptPKCS1v15 implements [hsm.LegacyDecrypter]. The token does the bare RSA operation (CKM_RSA_X_509, which SoftHSM and
// OpenSC's cards have) and the padding is taken off here, in constant time. Its own CKM_RSA_PKCS would not do: to a wrong
// block some modules answer CKR_GENERAL_ERROR, as to a token that is gone, and those over a new OpenSSL a made-up message.
func (k *rsaKey) DecryptPKCS1v15(ctx context.Context, ciphertext []byte) ([]byte, error) {
	during := "decrypting with " + k.describe()
	if !k.raw {
		return nil, fmt.Errorf("%s: %w: the token does not decrypt with CKM_RSA_X_509, which PKCS#1 v1.5 is done with", during, hsm.ErrUnsupported)
	}
	if len(ciphertext) != k.public.Size() || new(big.Int).SetBytes(ciphertext).Cmp(k.public.N) >= 0 {
		return nil, fmt.Errorf("%s: %w: %d bytes are no block of this key", during, hsm.ErrCiphertext, len(ciphertext))
	}
	frame, err := k.device.run(ctx, operation{
		during: during, op: wire.OpDecryptRaw, private: true, idempotent: true,
		build: func(ctx context.Context, a *attachment) (any, []byte, error) {
			handle, err := k.handle(ctx, a)
			return wire.DecryptRequest{Slot: a.slot, Handle: handle, Size: k.public.Size()}, ciphertext, err
		},
	})
	if err != nil {
		return nil, err
	}
	defer clear(frame.Data)
	if len(frame.Data) != k.public.Size() {
		return nil, fmt.Errorf("%s: %w: the token gave %d bytes, not %d", during, hsm.ErrUnavailable, len(frame.Data), k.public.Size())
	}
	message, err := unpadPKCS1v15(frame.Data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	return message, nil
}

// unpadPKCS1v15 takes the message out of an RSAES-PKCS1-v1_5 block (RFC 8017, 7.2.2, step 3): 0, 2, at least eight bytes
// that are not 0, a 0, and the message. All wrong blocks of a size take the same time and give the same error; only the
// length of a right message shows.
func unpadPKCS1v15(block []byte) ([]byte, error) {
	const begin, filling = 2, 8
	if len(block) < begin+filling+1 {
		return nil, hsm.ErrCiphertext
	}
	good := subtle.ConstantTimeByteEq(block[0], 0) & subtle.ConstantTimeByteEq(block[1], 2)
	looking, index := 1, 0
	for i, b := range block[begin:] {
		zero := subtle.ConstantTimeByteEq(b, 0)
		index = subtle.ConstantTimeSelect(looking&zero, i, index)
		looking &= 1 ^ zero
	}
	good &= 1 ^ looking
	good &= subtle.ConstantTimeLessOrEq(filling, index)
	if good != 1 {
		return nil, hsm.ErrCiphertext
	}
	return append([]byte(nil), block[begin+index+1:]...), nil
}
