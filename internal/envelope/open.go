package envelope

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Open returns the payload of an envelope that was made for want and authenticated with auth. It spends one HSM
// operation at most, and none where the envelope shows that it cannot be opened. The recipient r is the recorded one
// whose kid the envelope names, key is that key on its HSM: an hsm.Decrypter for RSA, an hsm.Agreer for EC. The caller
// wipes the payload.
//
// For [UseAuth] auth may be nil: the payload authenticates itself, which proves only that the envelope is whole.
//
// Errors: [ErrContext], [ErrNotRecipient], [ErrInvalid], hsm.ErrKeyChanged and hsm.ErrUnsupported before the HSM is
// used; then the HSM's own error or that of ctx, [ErrDecrypt], [ErrNotAuthentic].
func (e *Envelope) Open(ctx context.Context, want Context, r Recipient, key hsm.Key, auth *AuthKey) ([]byte, error) {
	if e.context.Use != UseAuth || auth != nil {
		if err := auth.check(); err != nil {
			return nil, fmt.Errorf("opening: %w", err)
		}
	}
	plaintext, err := e.decrypt(ctx, want, r, key)
	if err != nil {
		return nil, fmt.Errorf("opening: %w", err)
	}
	if err := authenticate(e.context, auth, plaintext[:macSize], plaintext[macSize:]); err != nil {
		clear(plaintext)
		return nil, fmt.Errorf("opening: %w", err)
	}
	clear(plaintext[:macSize])
	return plaintext[macSize:], nil
}

// OpenUnauthenticated is Open for a recovery without the authentication key: anybody who knows the public key may have
// made what it returns. Say so to whoever reads it.
func (e *Envelope) OpenUnauthenticated(ctx context.Context, want Context, r Recipient, key hsm.Key) ([]byte, error) {
	plaintext, err := e.decrypt(ctx, want, r, key)
	if err != nil {
		return nil, fmt.Errorf("opening without authentication: %w", err)
	}
	clear(plaintext[:macSize])
	return plaintext[macSize:], nil
}

// authenticate compares the HMAC that the plaintext begins with.
func authenticate(c Context, auth *AuthKey, mac, payload []byte) error {
	key, err := macKey(c.Use, auth, payload)
	if err != nil {
		return ErrNotAuthentic // an auth envelope that holds another key, or none
	}
	expected := c.mac(key, payload)
	defer clear(expected)
	if !hmac.Equal(mac, expected) {
		return ErrNotAuthentic
	}
	return nil
}

// decrypt returns HMAC and payload. The caller wipes them.
func (e *Envelope) decrypt(ctx context.Context, want Context, r Recipient, key hsm.Key) ([]byte, error) {
	if err := e.context.Differs(want); err != nil {
		return nil, err
	}
	unwrap, err := e.unwrapper(ctx, r, key)
	if err != nil {
		return nil, err
	}
	defer unwrap.wipe()

	jwe, err := e.jwe()
	if err != nil {
		return nil, fmt.Errorf("reading the JWE: %w: %w", err, ErrMalformed)
	}
	_, _, plaintext, err := jwe.DecryptMulti(unwrap)
	switch {
	case unwrap.err != nil: // go-jose replaces every error by its own: this one came from the HSM
		return nil, fmt.Errorf("recovering the content key with the HSM key %s: %w", r.KID, unwrap.err)
	case err != nil:
		return nil, ErrDecrypt
	case len(plaintext) < macSize:
		clear(plaintext)
		return nil, ErrDecrypt
	}
	return plaintext, nil
}

// jwe gives the envelope to go-jose. What it needs of one with a single recipient it reads faster in the compact
// serialisation, in which JSON is left to the protected header.
func (e *Envelope) jwe() (*jose.JSONWebEncryption, error) {
	algorithms := []jose.KeyAlgorithm{jose.RSA_OAEP_256, jose.RSA_OAEP, jose.ECDH_ES_A256KW}
	contents := []jose.ContentEncryption{jose.A256GCM}
	if len(e.recipients) > 1 {
		return jose.ParseEncryptedJSON(e.raw, algorithms, contents)
	}
	compact := make([]byte, 0, len(e.raw))
	rest := e.raw
	for range 5 { // protected, encrypted_key, iv, ciphertext, tag: Parse has seen that they come in this order and have no quotes
		_, after, _ := strings.Cut(rest, `":"`)
		value, next, _ := strings.Cut(after, `"`)
		compact, rest = append(append(compact, value...), '.'), next
	}
	return jose.ParseEncryptedCompact(string(compact[:len(compact)-1]), algorithms, contents)
}

// unwrapper recovers the content key of one envelope for one recipient: go-jose's OpaqueKeyDecrypter. go-jose asks it
// once for each recipient; it answers for its own alone, and only once.
type unwrapper struct {
	ctx        context.Context // go-jose's interface has none; it lives as long as one Open
	stanza     stanza
	operation  func(context.Context) ([]byte, error)
	spent      bool
	contentKey []byte
	err        error
}

// errNotAsked makes go-jose go on to the next recipient.
var errNotAsked = errors.New("not the chosen recipient")

// unwrapper checks in software all that can be checked before the HSM is used.
func (e *Envelope) unwrapper(ctx context.Context, r Recipient, key hsm.Key) (*unwrapper, error) {
	if err := r.check(); err != nil {
		return nil, fmt.Errorf("recipient %s: %w: %w", r.KID, err, ErrInvalid)
	}
	i := slices.IndexFunc(e.recipients, func(s stanza) bool { return s.KID == r.KID })
	if i < 0 {
		return nil, fmt.Errorf("key %s: %w", r.KID, ErrNotRecipient)
	}
	u := &unwrapper{ctx: ctx, stanza: e.recipients[i]}
	if u.stanza.Algorithm != r.Algorithm {
		return nil, fmt.Errorf("key %s is recorded with %s, the envelope says %s: %w",
			r.KID, r.Algorithm, u.stanza.Algorithm, ErrNotRecipient)
	}
	if public, ok := r.Public.(interface{ Equal(x crypto.PublicKey) bool }); !ok || !public.Equal(key.Public()) {
		return nil, fmt.Errorf("key %s: %w", r.KID, hsm.ErrKeyChanged)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}

	switch public := r.Public.(type) {
	case *rsa.PublicKey:
		decrypter, ok := key.(hsm.Decrypter)
		hash := oaepHash(r.Algorithm)
		if !ok || !slices.Contains(decrypter.OAEPHashes(), hash) {
			return nil, fmt.Errorf("key %s does not decrypt %s: %w", r.KID, r.Algorithm, hsm.ErrUnsupported)
		}
		if len(u.stanza.encryptedKey) != public.Size() {
			return nil, fmt.Errorf("encrypted_key is not as long as the modulus of key %s: %w", r.KID, ErrDecrypt)
		}
		u.operation = func(ctx context.Context) ([]byte, error) {
			return decrypter.DecryptOAEP(ctx, hash, u.stanza.encryptedKey)
		}
	case *ecdh.PublicKey:
		agreer, ok := key.(hsm.Agreer)
		if !ok {
			return nil, fmt.Errorf("key %s does not agree on keys: %w", r.KID, hsm.ErrUnsupported)
		}
		if u.stanza.ephemeral.Curve() != public.Curve() {
			return nil, fmt.Errorf("epk is on another curve than key %s: %w", r.KID, ErrDecrypt)
		}
		u.operation = func(ctx context.Context) ([]byte, error) {
			return agreeAndUnwrap(ctx, agreer, u.stanza.ephemeral, u.stanza.encryptedKey)
		}
	}
	return u, nil
}

// DecryptKey implements jose.OpaqueKeyDecrypter. A block that does not decrypt is answered with a random key (RFC 7516,
// 11.5), so that nobody can tell it from an envelope with a wrong tag.
func (u *unwrapper) DecryptKey(_ []byte, header jose.Header) ([]byte, error) {
	if u.spent || header.KeyID != u.stanza.KID || header.Algorithm != string(u.stanza.Algorithm) {
		return nil, errNotAsked
	}
	u.spent = true
	key, err := u.operation(u.ctx)
	u.contentKey = key
	if err != nil && !errors.Is(err, hsm.ErrCiphertext) {
		u.err = err
		if ctxErr := u.ctx.Err(); ctxErr != nil && !errors.Is(err, ctxErr) {
			u.err = fmt.Errorf("%w: %w", ctxErr, err)
		}
		return nil, u.err
	}
	if err != nil || len(key) != contentKeySize {
		clear(key)
		u.contentKey = make([]byte, contentKeySize)
		_, _ = rand.Read(u.contentKey) // never fails
	}
	return u.contentKey, nil
}

func (u *unwrapper) wipe() { clear(u.contentKey) }

func oaepHash(a Algorithm) crypto.Hash {
	if a == RSAOAEP {
		return crypto.SHA1
	}
	return crypto.SHA256
}
