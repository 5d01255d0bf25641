//go:build cgo

package modhost

import (
	"bytes"
	"crypto/ecdh"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"math/big"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// publicHalf is what an object tells of a public key, as the token has it. A private key object often tells a part only.
type publicHalf struct {
	modulus, exponent []byte // big-endian, without leading zeros
	params, point     []byte // CKA_EC_PARAMS, CKA_EC_POINT
}

// readPublic reads the public parts of a private or a public key.
func readPublic(object *reader, kind uint) publicHalf {
	if kind == pkcs11.CKK_RSA {
		return publicHalf{
			modulus:  bytes.TrimLeft(object.bytes(pkcs11.CKA_MODULUS), "\x00"),
			exponent: bytes.TrimLeft(object.bytes(pkcs11.CKA_PUBLIC_EXPONENT), "\x00"),
		}
	}
	return publicHalf{params: object.bytes(pkcs11.CKA_EC_PARAMS), point: object.bytes(pkcs11.CKA_EC_POINT)}
}

// complete is true where nothing is missing.
func (h publicHalf) complete(kind uint) bool {
	if kind == pkcs11.CKK_RSA {
		return len(h.modulus) > 0 && len(h.exponent) > 0
	}
	return len(h.params) > 0 && len(h.point) > 0
}

// agrees is true where both can be the same key: what both tell is equal.
func (h publicHalf) agrees(other publicHalf) bool {
	same := func(a, b []byte) bool { return len(a) == 0 || len(b) == 0 || bytes.Equal(a, b) }
	return same(h.modulus, other.modulus) && same(h.exponent, other.exponent) && same(h.params, other.params) &&
		same(unwrapPoint(h.point), unwrapPoint(other.point))
}

// complement takes from other what h lacks.
func (h *publicHalf) complement(other publicHalf) {
	take := func(mine *[]byte, others []byte) {
		if len(*mine) == 0 {
			*mine = others
		}
	}
	take(&h.modulus, other.modulus)
	take(&h.exponent, other.exponent)
	take(&h.params, other.params)
	take(&h.point, other.point)
}

// fill sets the public fields of key, or why it cannot be used.
func (h publicHalf) fill(kind uint, key *wire.Key) {
	if !h.complete(kind) {
		key.Unusable = "its public half cannot be read from the private key, and no public key has the same id"
		return
	}
	if kind == pkcs11.CKK_RSA {
		h.fillRSA(key)
	} else {
		h.fillEC(key)
	}
}

func (h publicHalf) fillRSA(key *wire.Key) {
	modulus, exponent := new(big.Int).SetBytes(h.modulus), new(big.Int).SetBytes(h.exponent)
	switch bits := modulus.BitLen(); bits {
	case 2048, 3072, 4096:
	default:
		key.Unusable = fmt.Sprintf("an RSA key of %d bits: 2048, 3072 and 4096 are used", bits)
		return
	}
	if exponent.BitLen() > 31 || exponent.Bit(0) == 0 || exponent.Cmp(big.NewInt(3)) < 0 {
		key.Unusable = fmt.Sprintf("an RSA key with the public exponent %s", exponent)
		return
	}
	key.Modulus, key.Exponent = h.modulus, h.exponent
}

// curve is an elliptic curve that we use.
type curve struct {
	name   string
	params []byte // DER of its object identifier, as CKA_EC_PARAMS has it
	ecdh   ecdh.Curve
}

// RFC 5480, 2.1.1.1.
var curves = []curve{
	{"P-256", []byte{0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07}, ecdh.P256()},
	{"P-384", []byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22}, ecdh.P384()},
}

func curveByName(name string) curve {
	for _, c := range curves {
		if c.name == name {
			return c
		}
	}
	panic("no curve " + name) // a bug in keyTemplates
}

func (h publicHalf) fillEC(key *wire.Key) {
	for _, c := range curves {
		if !bytes.Equal(c.params, h.params) {
			continue
		}
		point, err := c.ecdh.NewPublicKey(unwrapPoint(h.point)) // uncompressed and on the curve
		if err != nil {
			key.Unusable = fmt.Sprintf("its public key is no point on %s: %v", c.name, err)
			return
		}
		key.Curve, key.Point = c.name, point.Bytes()
		return
	}
	key.Unusable = fmt.Sprintf("an elliptic-curve key on %s: P-256 and P-384 are used", curveName(h.params))
}

// curveName describes CKA_EC_PARAMS for people.
func curveName(params []byte) string {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err == nil && len(rest) == 0 {
		return "the curve " + oid.String()
	}
	var name string
	if rest, err := asn1.Unmarshal(params, &name); err == nil && len(rest) == 0 {
		return fmt.Sprintf("the curve %q", name)
	}
	if len(params) > 64 {
		return "a curve of its own"
	}
	return "the curve " + hex.EncodeToString(params)
}

// unwrapPoint returns the bare point of a CKA_EC_POINT: the standard wants it in a DER OCTET STRING, some modules leave
// that out, some use a BIT STRING. A bare point begins with 4 as well, and is not mistaken: its next byte, the first of
// x, would have to tell the rest's length, and then what is left would have to begin with 4 and be a point again; lengths
// of the curves that we use exclude that.
func unwrapPoint(value []byte) []byte {
	for _, c := range []int{32, 48} {
		if len(value) == 1+2*c {
			return value
		}
	}
	var octets []byte
	if rest, err := asn1.Unmarshal(value, &octets); err == nil && len(rest) == 0 {
		return octets
	}
	var bits asn1.BitString
	if rest, err := asn1.Unmarshal(value, &bits); err == nil && len(rest) == 0 && bits.BitLength%8 == 0 {
		return bits.Bytes
	}
	return value
}
