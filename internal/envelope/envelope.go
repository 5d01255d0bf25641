// Package envelope seals a payload to keys in HSMs and opens it again with one private-key operation.
//
// An envelope is a JWE (RFC 7516) in JSON: a random content key encrypts with A256GCM, and each recipient, an HSM key
// named by its RFC 7638 thumbprint, gets the content key by RSA-OAEP or ECDH-ES. go-jose does the JOSE part. Three
// things are ours:
//
//   - [Context] says what an envelope was made for. It lies in the protected header, and [Envelope.Open] compares it
//     with what the caller wants before the HSM is touched.
//   - Public keys are public, so anybody could make an envelope. The plaintext therefore begins with an HMAC under the
//     wrapping key version's [AuthKey] over context and payload.
//   - [Parse] knows one grammar without choices, not JSON: an envelope is exactly the bytes that [Seal] writes. What
//     lenient JSON readers disagree about (duplicates, case, headers that nobody protected) cannot be written in it.
//
// A leased envelope ([SealLeased]) is sealed to a key encryption key instead, which it carries, itself sealed to HSM keys
// ([KEK]): while somebody holds that key in memory, it opens without an HSM.
//
// The package is pure: bytes and keys in, bytes out. docs/envelope.md specifies the format.
package envelope

import (
	"crypto"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
)

// Limits of an envelope. The largest one, 16 recipients and all fields full, stays below MaxSize.
const (
	// MaxPayload is the largest payload in bytes.
	MaxPayload = 64 << 10
	// MaxRecipients is the largest number of recipients.
	MaxRecipients = 16
	// MaxSize is the largest envelope in bytes.
	MaxSize = 128 << 10
	// MaxName is the longest key, cluster or item name in bytes.
	MaxName = 200
	// MaxCaller is the longest caller's context in bytes.
	MaxCaller = 4 << 10
	// MinRSABits and MaxRSABits bound the modulus of a recipient's RSA key.
	MinRSABits = 2048
	MaxRSABits = 8192
)

// The errors of this package. They are wrapped: ask with errors.Is. Errors of the HSM (hsm.ErrUnavailable,
// *hsm.PINError, …) and of ctx come through Open unchanged in the same way.
var (
	// ErrMalformed: the bytes are no envelope.
	ErrMalformed = errors.New("malformed envelope")
	// ErrContext: the envelope was made for something else. It is a [*ContextError].
	ErrContext = errors.New("the envelope was made for something else")
	// ErrNotRecipient: the envelope is not sealed to this HSM key, or not with the algorithm recorded for it.
	ErrNotRecipient = errors.New("the envelope is not sealed to this key")
	// ErrDecrypt: the envelope does not decrypt: it was damaged, changed, or made for another key.
	ErrDecrypt = errors.New("the envelope does not decrypt")
	// ErrNotAuthentic: the envelope decrypts, but whoever made it did not have the authentication key.
	ErrNotAuthentic = errors.New("the envelope is not authentic: it was not made with this wrapping key's authentication key")
	// ErrTooLarge: the payload or the caller's context exceeds its limit.
	ErrTooLarge = errors.New("too large for an envelope")
	// ErrInvalid: what Seal or Open was asked with breaks a rule: a name, a recipient, an authentication key.
	ErrInvalid = errors.New("invalid request to the envelope")
)

// Algorithm is how a recipient gets the content key: a JWE `alg`.
type Algorithm string

// The algorithms of recipients.
const (
	RSAOAEP256   Algorithm = "RSA-OAEP-256"   // RSAES-OAEP with SHA-256 and MGF1 with SHA-256
	RSAOAEP      Algorithm = "RSA-OAEP"       // RSAES-OAEP with SHA-1, where a token does nothing better
	ECDHESA256KW Algorithm = "ECDH-ES+A256KW" // ephemeral ECDH, Concat KDF, AES key wrap; P-256 or P-384
)

// Recipient is an HSM key as it was recorded when it was adopted.
type Recipient struct {
	// KID is hsm.Fingerprint of Public.
	KID       string
	Algorithm Algorithm
	// Public is an *rsa.PublicKey or an *ecdh.PublicKey on P-256 or P-384.
	Public crypto.PublicKey
}

// RecipientID is what an envelope tells about a recipient.
type RecipientID struct {
	KID       string
	Algorithm Algorithm
}

// AuthKey is the authentication key of one wrapping key version.
type AuthKey [32]byte

// NewAuthKey makes a random one. The caller wipes it.
func NewAuthKey() *AuthKey {
	var key AuthKey
	_, _ = rand.Read(key[:]) // never fails: crypto/rand ends the process instead
	return &key
}

// String keeps the key out of messages.
func (AuthKey) String() string { return "[authentication key]" }

// GoString keeps it out of %#v.
func (k AuthKey) GoString() string { return k.String() }

// LogValue keeps it out of logs, whatever their format.
func (k AuthKey) LogValue() slog.Value { return slog.StringValue(k.String()) }

// check refuses a key that nobody set: with it, everybody could make envelopes.
func (k *AuthKey) check() error {
	if k == nil || *k == (AuthKey{}) {
		return fmt.Errorf("the authentication key is missing: %w", ErrInvalid)
	}
	return nil
}
