package nethsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"

	"vault-plugin-secrets-nitrokey/hsm"
)

// publicKey is a public key as JSON: modulus and exponent of an RSA key, big-endian, or the encoded point of another.
type publicKey struct {
	Modulus  []byte `json:"modulus"`
	Exponent []byte `json:"publicExponent"`
	Data     []byte `json:"data"`
}

// parse returns the key; nil, without an error, where there is none or Go does not know its type.
func (p *publicKey) parse(kind KeyType) (crypto.PublicKey, error) {
	curves := map[KeyType]elliptic.Curve{
		TypeECP256: elliptic.P256(), TypeECP384: elliptic.P384(), TypeECP521: elliptic.P521(),
	}
	switch curve, known := curves[kind]; {
	case kind != TypeRSA && kind != TypeCurve25519 && !known:
		return nil, nil //nolint:nilnil // says the doc comment: no key that Go knows
	case p == nil:
		return nil, errors.New("the member public is missing")
	case kind == TypeRSA:
		return p.rsa()
	case known:
		point, err := ecdsa.ParseUncompressedPublicKey(curve, p.Data)
		if err != nil {
			return nil, fmt.Errorf("the public key is not on %s: %w", kind, err)
		}
		return point, nil
	case len(p.Data) != ed25519.PublicKeySize:
		return nil, fmt.Errorf("the public key has %d bytes; one of %s has %d", len(p.Data), kind, ed25519.PublicKeySize)
	default:
		return ed25519.PublicKey(p.Data), nil
	}
}

// An RSA key may be as weak and as large as a NetHSM makes them.
const (
	minModulus = 1024 // bits
	maxModulus = 8192
)

func (p *publicKey) rsa() (*rsa.PublicKey, error) {
	n, e := new(big.Int).SetBytes(p.Modulus), new(big.Int).SetBytes(p.Exponent)
	switch {
	case n.BitLen() < minModulus || n.BitLen() > maxModulus:
		return nil, fmt.Errorf("the modulus has %d bits; it should have %d to %d", n.BitLen(), minModulus, maxModulus)
	case n.Bit(0) == 0:
		return nil, errors.New("the modulus is even, so that it cannot be one")
	case e.BitLen() > 31 || e.BitLen() < 2 || e.Bit(0) == 0: // crypto/rsa takes no more than 31 bits
		return nil, errors.New("the public exponent should be odd, at least 3 and below 2^31")
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

// The kinds of PEM that a NetHSM gives and takes.
const (
	pemPublicKey   = "PUBLIC KEY"
	pemCertificate = "CERTIFICATE"
	pemRequest     = "CERTIFICATE REQUEST"

	pemContentType = "application/x-pem-file"
)

// pem sends a call whose answer is PEM and returns it when it is of this kind.
func (c *Client) pem(ctx context.Context, kind string, in call) ([]byte, error) {
	got, err := c.do(ctx, in)
	if err != nil {
		return nil, err
	}
	if err := checkPEM(kind, got.body); err != nil {
		return nil, fmt.Errorf("%s at %s: %w: %w: %w", in.op, got.node, err, ErrAnswer, hsm.ErrUnavailable)
	}
	return got.body, nil
}

// csr sends the call for a certificate signing request.
func (c *Client) csr(ctx context.Context, subject DistinguishedName, in call) ([]byte, error) {
	if subject.CommonName == "" {
		return nil, fmt.Errorf("%s: %w: the subject has no common name", in.op, ErrRequest)
	}
	in.method, in.body = http.MethodPost, subject
	return c.pem(ctx, pemRequest, in)
}

// checkPEM says whether a text is PEM of one kind and nothing else.
func checkPEM(kind string, text []byte) error {
	blocks := 0
	for rest := bytes.TrimSpace(text); len(rest) > 0; blocks++ {
		block, after := pem.Decode(rest)
		if block == nil {
			return fmt.Errorf("it is not PEM with a %s", kind)
		}
		if block.Type != kind {
			return fmt.Errorf("it is PEM with a %.40q instead of a %s", block.Type, kind)
		}
		rest = bytes.TrimSpace(after)
	}
	if blocks == 0 {
		return fmt.Errorf("it is empty instead of PEM with a %s", kind)
	}
	return nil
}
