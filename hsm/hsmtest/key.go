package hsmtest

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rsa"
	_ "crypto/sha1" // for OAEP with SHA-1: some tokens know no other
	_ "crypto/sha256"
	"fmt"
	"slices"

	"vault-plugin-secrets-nitrokey/hsm"
)

// memoryKey is a key pair on a token.
type memoryKey struct {
	ref     hsm.KeyRef
	traits  hsm.Traits
	public  crypto.PublicKey
	private crypto.PrivateKey
}

func (m *Memory) newKey(label, id string, private crypto.PrivateKey) (*memoryKey, error) {
	key := &memoryKey{traits: hsm.Traits{Sensitive: true}, private: private}
	switch private := private.(type) {
	case *rsa.PrivateKey:
		key.public = &private.PublicKey
	case *ecdh.PrivateKey:
		key.public = private.PublicKey()
	}
	fingerprint, err := hsm.Fingerprint(key.public)
	if err != nil {
		return nil, err
	}
	key.ref = hsm.KeyRef{Label: label, ID: id, Fingerprint: fingerprint}
	return key, nil
}

// boundKey is a key as one handle found it. Its traits are those of that moment.
type boundKey struct {
	*memoryKey
	device *Memory
	traits hsm.Traits
}

func (k boundKey) Ref() hsm.KeyRef          { return k.ref }
func (k boundKey) Public() crypto.PublicKey { return k.public }
func (k boundKey) Traits() hsm.Traits       { return k.traits }

// begin fails where the key is gone or the device is, and counts an operation otherwise.
func (k boundKey) begin(ctx context.Context) error {
	if err := k.device.work(ctx); err != nil {
		return err
	}
	k.device.token.mu.Lock()
	defer k.device.token.mu.Unlock()
	if !slices.Contains(k.device.token.keys, k.memoryKey) {
		return fmt.Errorf("using the key %q with id %q: %w", k.ref.Label, k.ref.ID, hsm.ErrNotFound)
	}
	k.device.token.operations.Add(1)
	return nil
}

// rsaKey adds what an RSA key can do.
type rsaKey struct{ boundKey }

var (
	_ hsm.Decrypter       = rsaKey{}
	_ hsm.LegacyDecrypter = rsaKey{}
)

// OAEPHashes implements [hsm.Decrypter].
func (k rsaKey) OAEPHashes() []crypto.Hash {
	k.device.token.mu.Lock()
	defer k.device.token.mu.Unlock()
	return slices.Clone(k.device.token.hashes)
}

// DecryptOAEP implements [hsm.Decrypter].
func (k rsaKey) DecryptOAEP(ctx context.Context, hash crypto.Hash, ciphertext []byte) ([]byte, error) {
	if !slices.Contains(k.OAEPHashes(), hash) {
		return nil, fmt.Errorf("decrypting with OAEP and %v: %w", hash, hsm.ErrUnsupported)
	}
	private := k.private.(*rsa.PrivateKey)
	if len(ciphertext) != private.Size() {
		return nil, fmt.Errorf("decrypting %d bytes with a key of %d: %w", len(ciphertext), private.Size(), hsm.ErrCiphertext)
	}
	if err := k.begin(ctx); err != nil {
		return nil, err
	}
	plaintext, err := rsa.DecryptOAEP(hash.New(), nil, private, ciphertext, nil)
	if err != nil {
		return nil, fmt.Errorf("decrypting: %w", hsm.ErrCiphertext)
	}
	return plaintext, nil
}

// ecKey adds what an elliptic-curve key can do.
type ecKey struct{ boundKey }

var _ hsm.Agreer = ecKey{}

// Agree implements [hsm.Agreer].
func (k ecKey) Agree(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	private := k.private.(*ecdh.PrivateKey)
	if peer.Curve() != private.Curve() {
		return nil, fmt.Errorf("agreeing with a key on another curve: %w", hsm.ErrUnsupported)
	}
	if err := k.begin(ctx); err != nil {
		return nil, err
	}
	return private.ECDH(peer)
}

// bind returns the key as this handle sees it. The caller holds the token's mu.
func (m *Memory) bind(key *memoryKey) hsm.Key {
	bound := boundKey{memoryKey: key, device: m, traits: key.traits}
	if _, ok := key.private.(*rsa.PrivateKey); ok {
		return rsaKey{bound}
	}
	return ecKey{bound}
}
