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
	b64 := base64.RawURLEncoding.AppendEncode
	var jwk []byte // RFC 7638, 3.2: the required members only, in lexical order, without white space
	switch key := public.(type) {
	case *rsa.PublicKey:
		jwk = append(make([]byte, 0, 1<<10), `{"e":"`...)
		jwk = append(b64(jwk, big.NewInt(int64(key.E)).Bytes()), `","kty":"RSA","n":"`...)
		jwk = append(b64(jwk, key.N.Bytes()), `"}`...)
	case *ecdh.PublicKey:
		name, size, err := curve(key.Curve())
		if err != nil {
			return "", err
		}
		point := key.Bytes() // SEC 1, 2.3.3: 4 ‖ x ‖ y
		jwk = append(make([]byte, 0, 256), `{"crv":"`+name+`","kty":"EC","x":"`...)
		jwk = append(b64(jwk, point[1:1+size]), `","y":"`...)
		jwk = append(b64(jwk, point[1+size:]), `"}`...)
	default:
		return "", fmt.Errorf("public key of type %T: %w", public, ErrUnsupported)
	}
	sum := sha256.Sum256(jwk)
	return base64.RawURLEncoding.EncodeToString(sum[:]), nil
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
