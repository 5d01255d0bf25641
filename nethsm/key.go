package nethsm

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Sizes of RSA keys that are used, in bits.
const minRSA, maxRSA = 2048, 4096

// rsaKey is an RSA key that was found on a NetHSM.
type rsaKey struct {
	device     *Device
	ref        hsm.KeyRef
	public     *rsa.PublicKey
	mechanisms []Mechanism
	tags       []string
}

var (
	_ hsm.Decrypter = (*rsaKey)(nil)
	_ hsm.Prover    = (*rsaKey)(nil)
)

// newKey makes a key of what the NetHSM tells about one. The error says why it cannot be one of ours.
func (d *Device) newKey(k *described) (*rsaKey, error) {
	public, err := usableKey(k)
	if err != nil {
		return nil, err
	}
	fingerprint, err := hsm.Fingerprint(public)
	if err != nil {
		return nil, err
	}
	label := k.Label
	if label == "" {
		label = k.ID
	}
	return &rsaKey{
		device: d, ref: hsm.KeyRef{Label: label, ID: k.ID, Fingerprint: fingerprint}, public: public,
		mechanisms: k.Mechanisms, tags: k.Tags,
	}, nil
}

// usableKey is the public half of a key that can be one of ours.
func usableKey(k *described) (*rsa.PublicKey, error) {
	if k.odd != nil {
		return nil, k.odd
	}
	public, ok := k.Public.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("a key of type %s: RSA keys are used", k.Type)
	}
	if bits := public.N.BitLen(); bits < minRSA || bits > maxRSA {
		return nil, fmt.Errorf("an RSA key of %d bits: %d to %d are used", bits, minRSA, maxRSA)
	}
	return public, nil
}

// Ref implements [hsm.Key]. A key without a label is called by its id.
func (k *rsaKey) Ref() hsm.KeyRef { return k.ref }

// Public implements [hsm.Key].
func (k *rsaKey) Public() crypto.PublicKey { return k.public }

// Traits implements [hsm.Key]. No key ever leaves a NetHSM but in its backup, sealed; and it enforces a key's list of
// mechanisms, which cannot be changed.
func (k *rsaKey) Traits() hsm.Traits {
	traits := hsm.Traits{Sensitive: true, ForeignUsesRefused: true}
	for _, mechanism := range k.mechanisms {
		if mechanism != ourMechanism {
			traits.AlsoUsableFor = append(traits.AlsoUsableFor, string(mechanism))
		}
	}
	return traits
}

// OAEPHashes implements [hsm.Decrypter]. It is empty for a key of other mechanisms.
func (k *rsaKey) OAEPHashes() []crypto.Hash {
	if !slices.Contains(k.mechanisms, ourMechanism) {
		return nil
	}
	return []crypto.Hash{crypto.SHA256}
}

// Prove implements [hsm.Prover].
func (k *rsaKey) Prove(ctx context.Context) error {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails: crypto/rand
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, k.public, secret, nil)
	if err != nil {
		return fmt.Errorf("proving %s: %w", k.describe(), err)
	}
	plaintext, err := k.DecryptOAEP(ctx, crypto.SHA256, ciphertext)
	if err != nil {
		return fmt.Errorf("proving: %w", err)
	}
	defer clear(plaintext)
	if subtle.ConstantTimeCompare(plaintext, secret) != 1 {
		return fmt.Errorf("proving %s: %w: it does not decrypt what its public key encrypts", k.describe(), hsm.ErrKeyChanged)
	}
	return nil
}

// DecryptOAEP implements [hsm.Decrypter]. A key that was deleted meanwhile is hsm.ErrNotFound, one that was replaced under
// its id hsm.ErrKeyChanged, one whose tags the operator lacks hsm.ErrForbidden.
func (k *rsaKey) DecryptOAEP(ctx context.Context, hash crypto.Hash, ciphertext []byte) ([]byte, error) {
	during := "decrypting with " + k.describe()
	if err := k.device.begin(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	if hash != crypto.SHA256 {
		return nil, fmt.Errorf("%s: %w: OAEP with %v; SHA-256 is used", during, hsm.ErrUnsupported, hash)
	}
	if !slices.Contains(k.mechanisms, ourMechanism) {
		return nil, fmt.Errorf("%s: %w: the key has not the mechanism %s, only %s, and none can be added; use a key that has it, and no other",
			during, hsm.ErrUnsupported, ourMechanism, listMechanisms(k.mechanisms))
	}
	// What is no number below the modulus cannot have been encrypted, and zero makes the server stumble (503).
	number := new(big.Int).SetBytes(ciphertext)
	if len(ciphertext) != k.public.Size() || number.Sign() == 0 || number.Cmp(k.public.N) >= 0 {
		return nil, fmt.Errorf("%s: %w: %d bytes are no block of this key", during, hsm.ErrCiphertext, len(ciphertext))
	}
	plaintext, err := k.device.shared.operator.Decrypt(ctx, k.ref.ID, ModeOAEPSHA256, ciphertext, nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, k.doubt(ctx, err))
	}
	return plaintext, nil
}

// doubt finds out whether a key that refuses is still the one that was found.
func (k *rsaKey) doubt(ctx context.Context, refused error) error {
	if errors.Is(refused, hsm.ErrForbidden) && len(k.tags) > 0 {
		return fmt.Errorf("%w; the key is for operators with one of the tags %s, and the user is %q",
			refused, quoted(k.tags), k.device.shared.operatorName)
	}
	if !errors.Is(refused, hsm.ErrCiphertext) && !errors.Is(refused, hsm.ErrUnsupported) {
		return refused
	}
	there, err := k.device.shared.operator.described(ctx, k.ref.ID)
	switch {
	case errors.Is(err, hsm.ErrNotFound):
		return fmt.Errorf("%w: it was deleted meanwhile", hsm.ErrNotFound)
	case err != nil: // nothing more is known than before
		return refused
	}
	if public, err := usableKey(there); err != nil || !public.Equal(k.public) {
		return fmt.Errorf("%w: the id now belongs to another one", hsm.ErrKeyChanged)
	}
	return refused
}

// describe names the key for people.
func (k *rsaKey) describe() string {
	return fmt.Sprintf("key %q (id %s)", k.ref.Label, k.ref.ID)
}

func listMechanisms(mechanisms []Mechanism) string {
	if len(mechanisms) == 0 {
		return "none"
	}
	var names []string
	for _, mechanism := range mechanisms {
		names = append(names, string(mechanism))
	}
	return strings.Join(names, ", ")
}

func quoted(names []string) string {
	var all []string
	for _, name := range names {
		all = append(all, fmt.Sprintf("%q", name))
	}
	return strings.Join(all, ", ")
}
