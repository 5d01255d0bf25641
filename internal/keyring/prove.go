package keyring

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" //nolint:gosec // OAEP with SHA-1 is sound, and some tokens know no other
	_ "crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// weaknesses names what makes a key unfit unless somebody accepts it.
func weaknesses(traits hsm.Traits) []string {
	var weak []string
	if traits.Extractable {
		weak = append(weak, "extractable")
	}
	if !traits.Sensitive {
		weak = append(weak, "not sensitive")
	}
	// On a PKCS#11 token every RSA key signs as well, because the PIN holder chooses the mechanism: a warning. Where
	// the device itself keeps a list, the other use is somebody's decision, and an oracle for ours.
	if traits.ForeignUsesRefused && len(traits.AlsoUsableFor) > 0 {
		weak = append(weak, "also usable for "+strings.Join(traits.AlsoUsableFor, ", "))
	}
	return weak
}

// prove finds the best algorithm that the key can open, by a round trip: public half in software, private half in the
// HSM. Lists of mechanisms are promises that tokens were seen to break.
func prove(ctx context.Context, key hsm.Key) (envelope.Algorithm, error) {
	if own, ok := key.(hsm.Prover); ok {
		return proveByItself(ctx, own)
	}
	switch key := key.(type) {
	case hsm.Decrypter:
		return proveDecrypter(ctx, key)
	case hsm.Agreer:
		return envelope.ECDHESA256KW, proveAgreer(ctx, key)
	default:
		return "", fmt.Errorf("%w: the device offers neither decryption nor key agreement with it; choose another key", ErrUnusableKey)
	}
}

// proveByItself lets the provider make the round trip; what the key announces afterwards is proved.
func proveByItself(ctx context.Context, key hsm.Prover) (envelope.Algorithm, error) {
	if err := key.Prove(ctx); err != nil {
		return "", disproved(ctx, err)
	}
	switch key := key.(type) {
	case hsm.Decrypter:
		for _, hash := range key.OAEPHashes() {
			if algorithm, known := oaepAlgorithms[hash]; known {
				return algorithm, nil
			}
		}
	case hsm.Agreer:
		return envelope.ECDHESA256KW, nil
	}
	return "", fmt.Errorf("%w: the device offers neither RSA-OAEP with SHA-256 or SHA-1 nor key agreement with it; choose another key",
		ErrUnusableKey)
}

// oaepAlgorithms are the hashes that envelopes know.
var oaepAlgorithms = map[crypto.Hash]envelope.Algorithm{
	crypto.SHA256: envelope.RSAOAEP256,
	crypto.SHA1:   envelope.RSAOAEP,
}

// disproved tells a key that failed its proof from a device that is away.
func disproved(ctx context.Context, err error) error {
	if ctx.Err() != nil || isAway(err) {
		return fmt.Errorf("proving what the key can do: %w", err)
	}
	return fmt.Errorf("%w: it does not do what its public key promises; choose another key: %w", ErrUnusableKey, err)
}

func proveDecrypter(ctx context.Context, key hsm.Decrypter) (envelope.Algorithm, error) {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return "", fmt.Errorf("%w: it decrypts and is no RSA key; choose another key", ErrUnusableKey)
	}
	var tried failures
	for _, hash := range []crypto.Hash{crypto.SHA256, crypto.SHA1} { // the better one first
		if !slices.Contains(key.OAEPHashes(), hash) {
			continue
		}
		err := roundTripOAEP(ctx, key, public, hash)
		if err == nil {
			return oaepAlgorithms[hash], nil
		}
		tried = append(tried, fmt.Errorf("%s: %w", oaepAlgorithms[hash], err))
		if ctx.Err() != nil || isAway(err) {
			break
		}
	}
	if tried == nil {
		return "", fmt.Errorf("%w: the device offers no RSA-OAEP with SHA-256 or SHA-1 for it; choose another key", ErrUnusableKey)
	}
	return "", disproved(ctx, tried)
}

func roundTripOAEP(ctx context.Context, key hsm.Decrypter, public *rsa.PublicKey, hash crypto.Hash) error {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails: crypto/rand
	ciphertext, err := rsa.EncryptOAEP(hash.New(), rand.Reader, public, secret, nil)
	if err != nil {
		return err
	}
	plaintext, err := key.DecryptOAEP(ctx, hash, ciphertext)
	if err != nil {
		return err
	}
	defer clear(plaintext)
	if subtle.ConstantTimeCompare(plaintext, secret) != 1 {
		return fmt.Errorf("the HSM decrypted to something else: %w", hsm.ErrCiphertext)
	}
	return nil
}

func proveAgreer(ctx context.Context, key hsm.Agreer) error {
	public, ok := key.Public().(*ecdh.PublicKey)
	if !ok {
		return fmt.Errorf("%w: it agrees and is no elliptic-curve key; choose another key", ErrUnusableKey)
	}
	ephemeral, err := public.Curve().GenerateKey(rand.Reader)
	if err != nil {
		return fmt.Errorf("proving that it agrees: %w", err)
	}
	ours, err := ephemeral.ECDH(public)
	if err != nil {
		return fmt.Errorf("proving that it agrees: %w", err)
	}
	defer clear(ours)
	theirs, err := key.Agree(ctx, ephemeral.PublicKey())
	if err != nil {
		return disproved(ctx, err)
	}
	defer clear(theirs)
	if subtle.ConstantTimeCompare(ours, theirs) != 1 {
		return fmt.Errorf("%w: it derived something else than its public key promises; choose another key", ErrUnusableKey)
	}
	return nil
}

// isAway tells whether an error is about the device and not about the key.
func isAway(err error) bool {
	var pin *hsm.PINError
	return errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrLocked) || errors.As(err, &pin) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}
