package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" //nolint:gosec // OAEP with SHA-1 is what some tokens do; its security does not rest on collisions
	_ "crypto/sha256"
	"errors"
	"fmt"
	"math/big"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// way is how a token decrypts.
type way int

const (
	wayNone way = iota
	wayOAEP     // CKM_RSA_PKCS_OAEP
	wayRaw      // CKM_RSA_X_509, and un-padding of our own
)

func wayToDecrypt(known map[uint]wire.Mechanism) way {
	switch {
	case known[ckmRSAPKCSOAEP].Flags&ckfDecrypt != 0:
		return wayOAEP
	case known[ckmRSAX509].Flags&ckfDecrypt != 0:
		return wayRaw
	default:
		return wayNone
	}
}

// oaepHashes are the hashes that are tried, the better one first, with their numbers.
var oaepHashes = []struct {
	hash      crypto.Hash
	mechanism uint
}{{crypto.SHA256, ckmSHA256}, {crypto.SHA1, ckmSHA1}}

// proofs says of a key's hashes what a round trip showed: absent where none was made.
type proofs map[crypto.Hash]bool

// rsaKey is an RSA key.
type rsaKey struct {
	keyBase
	public *rsa.PublicKey
	token  *token
	way    way
	raw    bool // the token does the bare RSA operation
}

var (
	_ hsm.Decrypter = (*rsaKey)(nil)
	_ hsm.Prover    = (*rsaKey)(nil)
)

// Public implements [hsm.Key].
func (k *rsaKey) Public() crypto.PublicKey { return k.public }

// OAEPHashes implements [hsm.Decrypter]. Before Prove it lists what the token announces, which may be too much: PKCS#11
// has no way to announce hashes.
func (k *rsaKey) OAEPHashes() []crypto.Hash {
	if k.way == wayNone {
		return nil
	}
	shown := k.proofs()
	var hashes []crypto.Hash
	for _, o := range oaepHashes {
		if works, tried := shown[o.hash]; works || !tried && len(shown) == 0 {
			hashes = append(hashes, o.hash)
		}
	}
	return hashes
}

// proofs returns what was shown for this key; nobody changes it.
func (k *rsaKey) proofs() proofs {
	k.token.mu.Lock()
	defer k.token.mu.Unlock()
	return k.token.proved[k.ref.Fingerprint]
}

// Prove implements [hsm.Prover].
func (k *rsaKey) Prove(ctx context.Context) error {
	if k.way == wayNone {
		return fmt.Errorf("proving %s: %w: the token has neither CKM_RSA_PKCS_OAEP nor CKM_RSA_X_509", k.describe(), hsm.ErrUnsupported)
	}
	shown := make(proofs)
	for hash, works := range k.proofs() {
		shown[hash] = works
	}
	for i, o := range oaepHashes {
		if works, tried := shown[o.hash]; tried && !works {
			continue
		}
		var next crypto.Hash
		if i+1 < len(oaepHashes) {
			next = oaepHashes[i+1].hash
		}
		nextWorks := false
		err := k.roundTrip(ctx, o.hash, func(ctx context.Context, a *attachment, failed error) error {
			// Is it the hash, or the token? Where the next hash works, it is the hash.
			nextWorks = next != 0 && k.probe(ctx, a, next) == nil
			if nextWorks {
				return fmt.Errorf("%w: %w", hsm.ErrUnsupported, bare(failed))
			}
			return nil
		})
		if err == nil {
			shown[o.hash] = true
			k.record(shown)
			return nil
		}
		if !errors.Is(err, hsm.ErrUnsupported) || next == 0 {
			return fmt.Errorf("proving: %w", err)
		}
		shown[o.hash] = false
		if nextWorks {
			shown[next] = true
			k.record(shown)
			return nil
		}
	}
	return fmt.Errorf("proving %s: %w: no OAEP hash works", k.describe(), hsm.ErrUnsupported)
}

func (k *rsaKey) record(shown proofs) {
	k.token.mu.Lock()
	defer k.token.mu.Unlock()
	k.token.proved[k.ref.Fingerprint] = shown
}

// roundTrip encrypts in software, decrypts on the token, and compares.
func (k *rsaKey) roundTrip(ctx context.Context, hash crypto.Hash, doubt func(context.Context, *attachment, error) error) error {
	want, ciphertext, err := k.sample(hash)
	if err != nil {
		return err
	}
	got, err := k.decrypt(ctx, "proving "+k.describe(), hash, ciphertext, doubt)
	if err != nil {
		return err
	}
	defer clear(got)
	if !bytes.Equal(got, want) {
		return fmt.Errorf("proving %s: %w: it does not decrypt what its public key encrypts", k.describe(), hsm.ErrUnsupported)
	}
	return nil
}

// sample makes a random message and its ciphertext.
func (k *rsaKey) sample(hash crypto.Hash) (message, ciphertext []byte, err error) {
	message = make([]byte, 32)
	_, _ = rand.Read(message) // never fails (crypto/rand)
	ciphertext, err = rsa.EncryptOAEP(hash.New(), rand.Reader, k.public, message, nil)
	return message, ciphertext, err
}

// DecryptOAEP implements [hsm.Decrypter].
func (k *rsaKey) DecryptOAEP(ctx context.Context, hash crypto.Hash, ciphertext []byte) ([]byte, error) {
	during := "decrypting with " + k.describe()
	if works, tried := k.proofs()[hash]; k.way == wayNone || mechanismOf(hash) == 0 || tried && !works {
		return nil, fmt.Errorf("%s: %w: OAEP with %v", during, hsm.ErrUnsupported, hash)
	}
	// What is no number below the modulus cannot have been encrypted; asking would cost an operation, and an answer that
	// has to be told from a broken token.
	if len(ciphertext) != k.public.Size() || new(big.Int).SetBytes(ciphertext).Cmp(k.public.N) >= 0 {
		return nil, fmt.Errorf("%s: %w: %d bytes are no block of this key", during, hsm.ErrCiphertext, len(ciphertext))
	}
	return k.decrypt(ctx, during, hash, ciphertext, func(ctx context.Context, a *attachment, failed error) error {
		// CKR_GENERAL_ERROR is what a token says to a wrong ciphertext, and what it says when it is gone. A ciphertext that
		// is surely right tells which.
		probed := k.probe(ctx, a, hash)
		refused, answered := errors.AsType[*wire.Error](probed)
		_, died := errors.AsType[*hostDiedError](probed)
		switch {
		case probed == nil:
			return fmt.Errorf("%w: %w", hsm.ErrCiphertext, bare(failed))
		case answered && judge(refused.Code) == verdictFinal:
			// Not even its own good ciphertext: SoftHSM says CKR_ARGUMENTS_BAD to OAEP with SHA-256.
			return fmt.Errorf("%w: OAEP with %v: %w", hsm.ErrUnsupported, hash, bare(failed))
		case answered || died || errors.Is(probed, errRetired): // the last: another caller found the host broken first
			return nil
		default: // the probe did not get there: the caller's deadline, or a full queue
			return fmt.Errorf("after %w: %w", bare(failed), probed)
		}
	})
}

// bare drops the place in the contract that an error has by its number alone, where more is known.
func bare(err error) error {
	if f, ok := errors.AsType[*failure](err); ok {
		return errors.New(f.text())
	}
	return err
}

// decrypt runs the one private-key operation.
func (k *rsaKey) decrypt(ctx context.Context, during string, hash crypto.Hash, ciphertext []byte,
	doubt func(context.Context, *attachment, error) error,
) ([]byte, error) {
	frame, err := k.device.run(ctx, operation{
		during: during, op: k.op(), private: true, idempotent: true, doubt: doubt,
		build: func(ctx context.Context, a *attachment) (any, []byte, error) {
			r, err := k.request(ctx, a, hash)
			return r, ciphertext, err
		},
	})
	if err != nil {
		return nil, err
	}
	message, err := k.unpad(hash, frame.Data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	return message, nil
}

// probe decrypts a sample on one host, whatever state it is in.
func (k *rsaKey) probe(ctx context.Context, a *attachment, hash crypto.Hash) error {
	want, ciphertext, err := k.sample(hash)
	if err != nil {
		return err
	}
	r, err := k.request(ctx, a, hash)
	if err != nil {
		return err
	}
	frame, err := k.device.exchange(ctx, a, k.op(), r, ciphertext)
	if err != nil {
		return err
	}
	got, err := k.unpad(hash, frame.Data)
	defer clear(got)
	if err == nil && !bytes.Equal(got, want) {
		err = hsm.ErrCiphertext
	}
	return err
}

func (k *rsaKey) op() wire.Op {
	if k.way == wayRaw {
		return wire.OpDecryptRaw
	}
	return wire.OpDecryptOAEP
}

func (k *rsaKey) request(ctx context.Context, a *attachment, hash crypto.Hash) (wire.DecryptRequest, error) {
	handle, err := k.handle(ctx, a)
	r := wire.DecryptRequest{Slot: a.slot, Handle: handle, Size: k.public.Size()}
	if k.way == wayOAEP {
		r.Hash = mechanismOf(hash)
	}
	return r, err
}

// unpad makes the message of what the token gave.
func (k *rsaKey) unpad(hash crypto.Hash, plaintext []byte) ([]byte, error) {
	if k.way == wayOAEP {
		return plaintext, nil
	}
	defer clear(plaintext)
	if len(plaintext) != k.public.Size() {
		return nil, fmt.Errorf("%w: the token gave %d bytes, not %d", hsm.ErrUnavailable, len(plaintext), k.public.Size())
	}
	return unpadOAEP(hash, plaintext)
}

// mechanismOf is the CKM_ number of a hash, 0 for one that is not used.
func mechanismOf(hash crypto.Hash) uint {
	for _, o := range oaepHashes {
		if o.hash == hash {
			return o.mechanism
		}
	}
	return 0
}
