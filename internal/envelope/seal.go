package envelope

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/subtle"
	"fmt"
	"strings"

	"github.com/go-jose/go-jose/v4"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Seal makes an envelope that each of the recipients can open. It works in software: no HSM is touched. The payload
// has up to [MaxPayload] bytes and stays the caller's; auth is the wrapping key version's authentication key.
//
// For [UseAuth] the payload is the 32 bytes of the authentication key itself, and auth is nil or the same key.
func Seal(c Context, recipients []Recipient, auth *AuthKey, payload []byte) ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("sealing: %w: %w", err, ErrInvalid)
	}
	if len(c.Caller) > MaxCaller {
		return nil, fmt.Errorf("sealing: a context of %d bytes exceeds the limit of %d: %w", len(c.Caller), MaxCaller, ErrTooLarge)
	}
	if len(payload) > MaxPayload {
		return nil, fmt.Errorf("sealing: a payload of %d bytes exceeds the limit of %d: %w", len(payload), MaxPayload, ErrTooLarge)
	}
	key, err := macKey(c.Use, auth, payload)
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	to, err := joseRecipients(recipients)
	if err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}

	options := &jose.EncrypterOptions{}
	c.headers(options)
	encrypter, err := jose.NewMultiEncrypter(jose.A256GCM, to, options)
	if err != nil {
		return nil, fmt.Errorf("sealing: preparing the JWE: %w", err)
	}
	plaintext := make([]byte, 0, macSize+len(payload))
	plaintext = append(plaintext, c.mac(key, payload)...)
	plaintext = append(plaintext, payload...)
	defer clear(plaintext)
	jwe, err := encrypter.Encrypt(plaintext)
	if err != nil {
		return nil, fmt.Errorf("sealing: making the JWE: %w", err)
	}
	raw := []byte(serialize(jwe))

	// An envelope that cannot be opened is found out at the latest when it is needed most. Look at it now.
	made, err := Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("sealing: reading back the JWE: %w", err)
	}
	if err := made.context.Differs(c); err != nil {
		return nil, fmt.Errorf("sealing: reading back the JWE: %w", err)
	}
	return raw, nil
}

// serialize writes the Flattened serialisation for one recipient and the General one for more. In the latter go-jose
// repeats the first recipient's encrypted_key at the top level, where RFC 7516 (7.2.1) has none: it is cut out.
func serialize(jwe *jose.JSONWebEncryption) string {
	const repeated = `],"encrypted_key":"`
	text := jwe.FullSerialize()
	before, after, found := strings.Cut(text, repeated)
	if !found {
		return text
	}
	_, after, _ = strings.Cut(after, `"`)
	return before + "]" + after
}

// macKey returns the key of the HMAC: auth, or the payload itself for UseAuth.
func macKey(use Use, auth *AuthKey, payload []byte) (*AuthKey, error) {
	if use != UseAuth {
		return auth, auth.check()
	}
	if len(payload) != len(AuthKey{}) {
		return nil, fmt.Errorf("a payload of %d bytes is no authentication key: %w", len(payload), ErrInvalid)
	}
	own := (*AuthKey)(payload)
	if auth != nil && subtle.ConstantTimeCompare(auth[:], own[:]) == 0 {
		return nil, fmt.Errorf("the payload is another authentication key than the one given: %w", ErrInvalid)
	}
	return own, own.check()
}

// joseRecipients checks the recipients and gives them to go-jose in its own types.
func joseRecipients(recipients []Recipient) ([]jose.Recipient, error) {
	if len(recipients) < 1 || len(recipients) > MaxRecipients {
		return nil, fmt.Errorf("%d recipients: an envelope has 1 to %d: %w", len(recipients), MaxRecipients, ErrInvalid)
	}
	seen := make(map[string]bool, len(recipients))
	to := make([]jose.Recipient, 0, len(recipients))
	for _, r := range recipients {
		if err := r.check(); err != nil {
			return nil, fmt.Errorf("recipient %s: %w: %w", r.KID, err, ErrInvalid)
		}
		if seen[r.KID] {
			return nil, fmt.Errorf("recipient %s is there twice: %w", r.KID, ErrInvalid)
		}
		seen[r.KID] = true
		public := r.Public
		if point, ok := r.Public.(*ecdh.PublicKey); ok {
			var err error
			if public, err = ecdsa.ParseUncompressedPublicKey(ellipticCurve(point.Curve()), point.Bytes()); err != nil {
				return nil, fmt.Errorf("recipient %s: %w: %w", r.KID, err, ErrInvalid)
			}
		}
		to = append(to, jose.Recipient{Algorithm: jose.KeyAlgorithm(r.Algorithm), Key: public, KeyID: r.KID})
	}
	return to, nil
}

// check tells why the recipient cannot be sealed to or opened with. The caller adds ErrInvalid.
func (r Recipient) check() error {
	kid, err := hsm.Fingerprint(r.Public)
	if err != nil {
		return err
	}
	if kid != r.KID {
		return fmt.Errorf("its public key has the fingerprint %s", kid)
	}
	switch public := r.Public.(type) {
	case *rsa.PublicKey:
		if r.Algorithm != RSAOAEP256 && r.Algorithm != RSAOAEP {
			return fmt.Errorf("algorithm %q does not fit an RSA key", r.Algorithm)
		}
		if bits := public.N.BitLen(); bits < MinRSABits || bits > MaxRSABits {
			return fmt.Errorf("an RSA key of %d bits: %d to %d are allowed", bits, MinRSABits, MaxRSABits)
		}
	default: // Fingerprint accepts nothing but P-256 and P-384 besides RSA
		if r.Algorithm != ECDHESA256KW {
			return fmt.Errorf("algorithm %q does not fit an EC key", r.Algorithm)
		}
	}
	return nil
}

func ellipticCurve(c ecdh.Curve) elliptic.Curve {
	if c == ecdh.P384() {
		return elliptic.P384()
	}
	return elliptic.P256()
}
