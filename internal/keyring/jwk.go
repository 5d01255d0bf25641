package keyring

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/rsa"
	"encoding/base64"
	"fmt"
	"math/big"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// jwk is a public key as a JSON Web Key (RFC 7517; parameters in RFC 7518, 6.2 and 6.3).
type jwk struct {
	KTY string `json:"kty"`
	CRV string `json:"crv,omitempty"`
	X   string `json:"x,omitempty"`
	Y   string `json:"y,omitempty"`
	N   string `json:"n,omitempty"`
	E   string `json:"e,omitempty"`
}

// newJWK returns the JWK of *rsa.PublicKey or *ecdh.PublicKey.
func newJWK(public crypto.PublicKey) (jwk, error) {
	b64 := base64.RawURLEncoding.EncodeToString
	switch key := public.(type) {
	case *rsa.PublicKey:
		return jwk{KTY: "RSA", N: b64(key.N.Bytes()), E: b64(big.NewInt(int64(key.E)).Bytes())}, nil
	case *ecdh.PublicKey:
		point := key.Bytes() // SEC 1, 2.3.3: 4 ‖ x ‖ y
		size := len(point) / 2
		name, known := map[ecdh.Curve]string{ecdh.P256(): "P-256", ecdh.P384(): "P-384"}[key.Curve()]
		if !known {
			return jwk{}, fmt.Errorf("%w: its curve is %v; take P-256 or P-384", ErrUnusableKey, key.Curve())
		}
		return jwk{KTY: "EC", CRV: name, X: b64(point[1 : 1+size]), Y: b64(point[1+size:])}, nil
	default:
		return jwk{}, fmt.Errorf("%w: a public key of type %T; take an RSA or elliptic-curve key", ErrUnusableKey, public)
	}
}

// public returns the key, checked: a modulus of a size that [kindOf] knows, a point on its curve, canonical encoding.
func (j jwk) public() (crypto.PublicKey, error) {
	var public crypto.PublicKey
	switch {
	case j.KTY == "RSA" && j.CRV == "" && j.X == "" && j.Y == "":
		n, err := unbase64(j.N)
		if err != nil {
			return nil, err
		}
		e, err := unbase64(j.E)
		if err != nil {
			return nil, err
		}
		// crypto/rsa takes odd exponents up to 2³¹-1.
		if exponent := new(big.Int).SetBytes(e); len(e) > 4 || exponent.Bit(0) == 0 || exponent.Int64() < 3 ||
			exponent.Int64() > 1<<31-1 {
			return nil, fmt.Errorf("public exponent out of bounds: %w", ErrRecordMalformed)
		}
		public = &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
	case j.KTY == "EC" && j.N == "" && j.E == "":
		x, err := unbase64(j.X)
		if err != nil {
			return nil, err
		}
		y, err := unbase64(j.Y)
		if err != nil {
			return nil, err
		}
		curve, known := map[string]ecdh.Curve{"P-256": ecdh.P256(), "P-384": ecdh.P384()}[j.CRV]
		if !known || len(x) != len(y) {
			return nil, fmt.Errorf("curve %q: %w", j.CRV, ErrRecordMalformed)
		}
		point, err := curve.NewPublicKey(bytes.Join([][]byte{{4}, x, y}, nil))
		if err != nil {
			return nil, fmt.Errorf("public key on %s: %w", j.CRV, ErrRecordMalformed)
		}
		public = point
	default:
		return nil, fmt.Errorf("public key of type %q: %w", j.KTY, ErrRecordMalformed)
	}
	if _, err := kindOf(public); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRecordMalformed, err)
	}
	if again, err := newJWK(public); err != nil || again != j {
		return nil, fmt.Errorf("public key in a form that is not canonical: %w", ErrRecordMalformed)
	}
	return public, nil
}

func unbase64(text string) ([]byte, error) {
	raw, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("base64url: %w", ErrRecordMalformed)
	}
	return raw, nil
}

// kindOf returns which of the algorithms that wrapping keys may have a public key belongs to.
func kindOf(public crypto.PublicKey) (hsm.Algorithm, error) {
	switch key := public.(type) {
	case *rsa.PublicKey:
		switch bits := key.N.BitLen(); bits {
		case 2048:
			return hsm.RSA2048, nil
		case 3072:
			return hsm.RSA3072, nil
		case 4096:
			return hsm.RSA4096, nil
		default:
			return "", fmt.Errorf("%w: it is an RSA key of %d bits; take one of 2048, 3072 or 4096", ErrUnusableKey, bits)
		}
	case *ecdh.PublicKey:
		switch key.Curve() {
		case ecdh.P256():
			return hsm.ECDHP256, nil
		case ecdh.P384():
			return hsm.ECDHP384, nil
		}
	}
	return "", fmt.Errorf("%w: it is of type %T; take an RSA key or one on P-256 or P-384", ErrUnusableKey, public)
}

// fits tells whether envelopes can be sealed to a key of that kind with that algorithm.
func fits(kind hsm.Algorithm, algorithm envelope.Algorithm) bool {
	switch kind {
	case hsm.ECDHP256, hsm.ECDHP384:
		return algorithm == envelope.ECDHESA256KW
	default:
		return algorithm == envelope.RSAOAEP256 || algorithm == envelope.RSAOAEP
	}
}
