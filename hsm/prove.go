package hsm

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
)

// Prove finds out by a round trip, the public half in software and the private half in the HSM, what a key can do:
// lists of mechanisms are promises that tokens were seen to break. For a [Decrypter] it returns the best hash that
// works, SHA-256 or else SHA-1; for an [Agreer] zero. A [Prover] makes the round trip itself.
//
// An error that is [Away] says nothing about the key. Otherwise the key is of no use: [ErrUnsupported] where it offers
// nothing that we need, [ErrCiphertext] or [ErrKeyChanged] where it does not do what its public half promises.
func Prove(ctx context.Context, key Key) (crypto.Hash, error) {
	if own, ok := key.(Prover); ok {
		if err := own.Prove(ctx); err != nil {
			return 0, err
		}
		return announced(key)
	}
	switch key := key.(type) {
	case Decrypter:
		return proveDecrypter(ctx, key)
	case Agreer:
		return 0, proveAgreer(ctx, key)
	default:
		return 0, fmt.Errorf("the device offers neither decryption nor key agreement with this key: %w", ErrUnsupported)
	}
}

// Away tells whether an error is about the device, what it lets the user do, or the caller's patience, and not about the key
// or the ciphertext: another device may do better.
func Away(err error) bool {
	var pin *PINError
	return errors.Is(err, ErrUnavailable) || errors.Is(err, ErrLocked) || errors.Is(err, ErrForbidden) || errors.As(err, &pin) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// hashes are those that an envelope knows, the better one first.
var hashes = []crypto.Hash{crypto.SHA256, crypto.SHA1}

// announced returns what a key that proved itself announces from then on.
func announced(key Key) (crypto.Hash, error) {
	switch key := key.(type) {
	case Decrypter:
		for _, hash := range hashes {
			if slices.Contains(key.OAEPHashes(), hash) {
				return hash, nil
			}
		}
	case Agreer:
		return 0, nil
	}
	return 0, fmt.Errorf("the device offers neither RSA-OAEP with SHA-256 or SHA-1 nor key agreement with this key: %w", ErrUnsupported)
}

func proveDecrypter(ctx context.Context, key Decrypter) (crypto.Hash, error) {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return 0, fmt.Errorf("this key decrypts and is no RSA key: %w", ErrUnsupported)
	}
	var tried []error
	for _, hash := range hashes {
		if !slices.Contains(key.OAEPHashes(), hash) {
			continue
		}
		err := roundTrip(ctx, key, public, hash)
		if err == nil {
			return hash, nil
		}
		tried = append(tried, fmt.Errorf("decrypting RSA-OAEP with %v: %w", hash, err))
		if ctx.Err() != nil || Away(err) {
			break
		}
	}
	if tried == nil {
		return 0, fmt.Errorf("the device offers no RSA-OAEP with SHA-256 or SHA-1 for this key: %w", ErrUnsupported)
	}
	return 0, errors.Join(tried...)
}

func roundTrip(ctx context.Context, key Decrypter, public *rsa.PublicKey, hash crypto.Hash) error {
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
		return fmt.Errorf("the HSM decrypted to something else: %w", ErrCiphertext)
	}
	return nil
}

func proveAgreer(ctx context.Context, key Agreer) error {
	public, ok := key.Public().(*ecdh.PublicKey)
	if !ok {
		return fmt.Errorf("this key agrees and is no elliptic-curve key: %w", ErrUnsupported)
	}
	ephemeral, err := public.Curve().GenerateKey(rand.Reader)
	if err != nil {
		return fmt.Errorf("proving that the key agrees: %w", err)
	}
	ours, err := ephemeral.ECDH(public)
	if err != nil {
		return fmt.Errorf("proving that the key agrees: %w", err)
	}
	defer clear(ours)
	theirs, err := key.Agree(ctx, ephemeral.PublicKey())
	if err != nil {
		return err
	}
	defer clear(theirs)
	if subtle.ConstantTimeCompare(ours, theirs) != 1 {
		return fmt.Errorf("it derived something else than its public half promises: %w", ErrKeyChanged)
	}
	return nil
}
