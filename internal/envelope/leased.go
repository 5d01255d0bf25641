package envelope

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"strconv"

	josecipher "github.com/go-jose/go-jose/v4/cipher"
)

// A leased envelope is sealed to a key encryption key (KEK), a symmetric key, instead of HSM keys. It carries that key,
// sealed to HSM keys in an envelope of use "kek", in its protected header: whoever has the HSM opens both and needs
// nothing else. Whoever holds the opened key opens all of its envelopes without an HSM.

// A256KW is how a leased envelope gets its content key: AES key wrap (RFC 3394) with a KEK. It is no recipient's.
const A256KW Algorithm = "A256KW"

// Limits of leased envelopes.
const (
	// KEKSize is the size of a KEK in bytes.
	KEKSize = 32
	// MaxLeasedPayload is the largest payload of a leased envelope in bytes.
	MaxLeasedPayload = 16 << 10
	// MaxKEK is the largest KEK envelope in bytes: 16 recipients with the longest RSA keys fit.
	MaxKEK = 28 << 10
)

// maxLeasedProtected is more than the protected header of a leased envelope with all fields full.
var maxLeasedProtected = maxProtected + base64url.EncodedLen(MaxKEK)

// KEK is a KEK as it is carried: sealed, in an envelope of use "kek" whose caller's context is the KEK's id. It does not
// change, and may be used by several goroutines.
type KEK struct {
	sealed  *Envelope
	id      string
	encoded string // the envelope's text in base64url, as headers hold it
}

// NewKEK makes a random key. The caller wipes it.
func NewKEK() []byte {
	key := make([]byte, KEKSize)
	_, _ = rand.Read(key) // never fails: crypto/rand ends the process instead
	return key
}

// KEKID is the name of a KEK, by which envelopes call it: the RFC 7638 thumbprint (SHA-256) of the symmetric key as a JWK,
// in base64url. It tells nothing about a random key.
func KEKID(key []byte) string {
	jwk := append(make([]byte, 0, 128), `{"k":"`...)
	jwk = base64url.AppendEncode(jwk, key)
	jwk = append(jwk, `","kty":"oct"}`...)
	defer clear(jwk)
	sum := sha256.Sum256(jwk)
	return base64url.EncodeToString(sum[:])
}

// SealKEK seals a KEK to the recipients of a wrapping key's version. It works in software.
func SealKEK(name string, version int, recipients []Recipient, auth *AuthKey, key []byte) (*KEK, error) {
	if len(key) != KEKSize {
		return nil, fmt.Errorf("sealing a key encryption key of %d bytes: it has %d: %w", len(key), KEKSize, ErrInvalid)
	}
	raw, err := Seal(kekContext(name, version, KEKID(key)), recipients, auth, key)
	if err != nil {
		return nil, fmt.Errorf("a key encryption key: %w", err)
	}
	return ParseKEK(raw)
}

// kekContext is the context of a KEK's envelope. An id that is none makes one that no envelope has.
func kekContext(name string, version int, id string) Context {
	caller, _ := base64url.DecodeString(id)
	return Context{Use: UseKEK, Key: name, Version: version, Caller: caller}
}

// ParseKEK reads a KEK's envelope: [ErrMalformed] for any other.
func ParseKEK(raw []byte) (*KEK, error) {
	if len(raw) > MaxKEK {
		return nil, fmt.Errorf("the envelope of a key encryption key of %d bytes exceeds the limit of %d: %w", len(raw), MaxKEK, ErrMalformed)
	}
	sealed, err := Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("the envelope of a key encryption key: %w", err)
	}
	if c := sealed.context; c.Use != UseKEK || len(c.Caller) != kidSize {
		return nil, fmt.Errorf("an envelope of use %q with a context of %d bytes holds no key encryption key: %w", c.Use, len(c.Caller),
			ErrMalformed)
	}
	return &KEK{
		sealed:  sealed,
		id:      base64url.EncodeToString(sealed.context.Caller),
		encoded: base64url.EncodeToString(raw),
	}, nil
}

// ID is the KEK's name, see [KEKID]. Trust it after [KEK.Check].
func (k *KEK) ID() string { return k.id }

// Envelope is what the KEK is sealed in: open it for its own context.
func (k *KEK) Envelope() *Envelope { return k.sealed }

// Raw returns the text of that envelope.
func (k *KEK) Raw() []byte { return []byte(k.sealed.raw) }

// Equal tells whether both are the same key, sealed in the same text. Two texts that hold the same key may open with different HSM
// keys: for several recipients, nothing but opening tells whether each one's part is whole.
func (k *KEK) Equal(other *KEK) bool { return k.encoded == other.encoded }

// Check returns [ErrNotAuthentic] where what the envelope held is not the key that it names.
func (k *KEK) Check(key []byte) error {
	if len(key) != KEKSize || KEKID(key) != k.id {
		return fmt.Errorf("the key encryption key is not %s: %w", k.id, ErrNotAuthentic)
	}
	return nil
}

// KEKID returns the id of the KEK that the envelope is sealed to; leased is false where it is sealed to HSM keys.
func (e *Envelope) KEKID() (id string, leased bool) {
	if e.leased == nil {
		return "", false
	}
	return e.recipients[0].KID, true
}

// KEK returns the KEK that a leased envelope carries. It must be of the same wrapping key and version, and the one that the
// envelope is sealed to: a [*ContextError] where it is not.
func (e *Envelope) KEK() (*KEK, error) {
	if e.leased == nil {
		return nil, fmt.Errorf("the envelope is sealed to HSM keys and carries no key encryption key: %w", ErrInvalid)
	}
	kek, err := ParseKEK(e.leased.kek)
	if err != nil {
		return nil, err
	}
	if err := kek.sealed.context.Differs(kekContext(e.context.Key, e.context.Version, e.recipients[0].KID)); err != nil {
		return nil, fmt.Errorf("the key encryption key that the envelope carries: %w", err)
	}
	return kek, nil
}

// leasedParts are what opening a leased envelope needs besides its header.
type leasedParts struct {
	kek        []byte // the KEK's envelope
	protected  string // the protected header in base64url
	iv         []byte
	ciphertext []byte // with its tag
}

// SealLeased makes an envelope of use "transit" that opens with a KEK or with the HSM keys to which that is sealed. block is
// AES with the KEK. The KEK must be of c's key and version. The payload has up to [MaxLeasedPayload] bytes.
func SealLeased(c Context, kek *KEK, block cipher.Block, auth *AuthKey, payload []byte) ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("sealing: %w: %w", err, ErrInvalid)
	}
	if c.Use != UseTransit {
		return nil, fmt.Errorf("sealing: use %q is not sealed to a key encryption key: %w", c.Use, ErrInvalid)
	}
	if own := kek.sealed.context; own.Key != c.Key || own.Version != c.Version {
		return nil, fmt.Errorf("sealing for key %q, version %d with the key encryption key of key %q, version %d: %w", c.Key, c.Version, own.Key,
			own.Version, ErrInvalid)
	}
	if len(c.Caller) > MaxCaller {
		return nil, fmt.Errorf("sealing: a context of %d bytes exceeds the limit of %d: %w", len(c.Caller), MaxCaller, ErrTooLarge)
	}
	if len(payload) > MaxLeasedPayload {
		return nil, fmt.Errorf("sealing: a payload of %d bytes exceeds the limit of %d: %w", len(payload), MaxLeasedPayload, ErrTooLarge)
	}
	if err := auth.check(); err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}

	var secret [ivSize + contentKeySize]byte
	defer clear(secret[:])
	_, _ = rand.Read(secret[:]) // never fails
	iv, contentKey := secret[:ivSize], secret[ivSize:]
	aead, err := newGCM(contentKey)
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	wrapped, err := josecipher.KeyWrap(block, contentKey)
	if err != nil {
		return nil, fmt.Errorf("sealing: wrapping the content key: %w", err)
	}
	protected := kek.protect(c)
	text := make([]byte, macSize, macSize+len(payload)+tagSize)
	c.macInto(text[:0], auth, payload)
	text = append(text, payload...)
	plain := len(text)
	text = aead.Seal(text[:0], iv, text, protected)
	raw := make([]byte, 0, len(protected)+base64url.EncodedLen(len(text))+256)
	raw = append(append(raw, `{"protected":"`...), protected...)
	raw = base64url.AppendEncode(append(raw, `","encrypted_key":"`...), wrapped)
	raw = base64url.AppendEncode(append(raw, `","iv":"`...), iv)
	raw = base64url.AppendEncode(append(raw, `","ciphertext":"`...), text[:plain])
	raw = base64url.AppendEncode(append(raw, `","tag":"`...), text[plain:])
	raw = append(raw, `"}`...)

	// As with Seal: an envelope that cannot be opened is found out here.
	made, err := Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("sealing: reading back the envelope: %w", err)
	}
	if err := made.context.Differs(c); err != nil {
		return nil, fmt.Errorf("sealing: reading back the envelope: %w", err)
	}
	return raw, nil
}

// protect returns the protected header of a leased envelope, in base64url.
func (k *KEK) protect(c Context) []byte {
	header := make([]byte, 0, len(k.encoded)+base64url.EncodedLen(len(c.Caller))+len(c.Key)+256)
	header = append(header, `{"alg":"`+string(A256KW)+`",`...)
	if len(c.Caller) > 0 {
		header = append(base64url.AppendEncode(append(header, `"ctx":"`...), c.Caller), `",`...)
	}
	header = append(append(header, `"enc":"A256GCM","kek":"`...), k.encoded...)
	header = append(append(header, `","key":"`...), c.Key...)
	header = append(append(header, `","kid":"`...), k.id...)
	header = strconv.AppendInt(append(header, `","kver":`...), int64(c.Version), 10)
	header = append(append(header, `,"typ":"`+typ+`","use":"`...), c.Use...)
	header = append(header, `","v":1}`...)
	return base64url.AppendEncode(make([]byte, 0, base64url.EncodedLen(len(header))), header)
}

// OpenLeased returns the payload of a leased envelope that was made for want and authenticated with auth. block is AES with
// the KEK that [Envelope.KEKID] names. No HSM is touched. The caller wipes the payload.
//
// Errors: [ErrContext], [ErrNotRecipient] where it is sealed to HSM keys, [ErrDecrypt], [ErrNotAuthentic].
func (e *Envelope) OpenLeased(want Context, block cipher.Block, auth *AuthKey) ([]byte, error) {
	if err := auth.check(); err != nil {
		return nil, fmt.Errorf("opening: %w", err)
	}
	plaintext, err := e.decryptLeased(want, block)
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

// OpenLeasedUnauthenticated is OpenLeased for a recovery, see [Envelope.OpenUnauthenticated].
func (e *Envelope) OpenLeasedUnauthenticated(want Context, block cipher.Block) ([]byte, error) {
	plaintext, err := e.decryptLeased(want, block)
	if err != nil {
		return nil, fmt.Errorf("opening without authentication: %w", err)
	}
	clear(plaintext[:macSize])
	return plaintext[macSize:], nil
}

// decryptLeased returns HMAC and payload. The caller wipes them. A content key that does not unwrap is replaced by a random
// one (RFC 7516, 11.5), as in the HSM's case.
func (e *Envelope) decryptLeased(want Context, block cipher.Block) ([]byte, error) {
	if err := e.context.Differs(want); err != nil {
		return nil, err
	}
	if e.leased == nil {
		return nil, fmt.Errorf("it is sealed to HSM keys: %w", ErrNotRecipient)
	}
	contentKey, err := josecipher.KeyUnwrap(block, e.recipients[0].encryptedKey)
	if err != nil {
		contentKey = make([]byte, contentKeySize)
		_, _ = rand.Read(contentKey) // never fails
	}
	defer clear(contentKey)
	aead, err := newGCM(contentKey)
	if err != nil {
		return nil, err
	}
	plaintext, err := aead.Open(nil, e.leased.iv, e.leased.ciphertext, []byte(e.leased.protected))
	if err != nil {
		return nil, ErrDecrypt
	}
	return plaintext, nil
}

func newGCM(contentKey []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(contentKey)
	if err != nil {
		return nil, fmt.Errorf("preparing A256GCM: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("preparing A256GCM: %w", err)
	}
	return aead, nil
}
