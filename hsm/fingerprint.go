package hsm

import (
	"crypto"
	"crypto/ecdh"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"math/big"
)

// Fingerprint returns the RFC 7638 thumbprint of a public key: SHA-256 over its canonical JWK, base64url without
// padding, 43 characters. It is the `kid` of an envelope's recipient. An unknown kind of key is [ErrUnsupported].
func Fingerprint(public crypto.PublicKey) (string, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	var jwk string // RFC 7638, 3.2: the required members only, in lexical order, without white space
	switch key := public.(type) {
	case *rsa.PublicKey:
		jwk = fmt.Sprintf(`{"e":%q,"kty":"RSA","n":%q}`, b64(big.NewInt(int64(key.E)).Bytes()), b64(key.N.Bytes()))
	case *ecdh.PublicKey:
		name, size, err := curve(key.Curve())
		if err != nil {
			return "", err
		}
		point := key.Bytes() // SEC 1, 2.3.3: 4 ‖ x ‖ y
		jwk = fmt.Sprintf(`{"crv":%q,"kty":"EC","x":%q,"y":%q}`, name, b64(point[1:1+size]), b64(point[1+size:]))
	default:
		return "", fmt.Errorf("public key of type %T: %w", public, ErrUnsupported)
	}
	sum := sha256.Sum256([]byte(jwk))
	return b64(sum[:]), nil
}

// curve returns the JWK name of a curve (RFC 7518, 6.2.1.1) and the size of its field elements in bytes.
func curve(c ecdh.Curve) (name string, size int, err error) {
	switch c {
	case ecdh.P256():
		return "P-256", 32, nil
	case ecdh.P384():
		return "P-384", 48, nil
	default:
		return "", 0, fmt.Errorf("curve %v: %w", c, ErrUnsupported)
	}
}
