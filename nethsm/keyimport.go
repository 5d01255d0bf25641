package nethsm

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"fmt"
	"math/big"
	"net/http"
)

// ImportedKey is a key that was made elsewhere. Whoever made it may have kept a copy, which is why a key that guards
// something is better generated.
type ImportedKey struct {
	ID         string // empty: the NetHSM chooses
	Label      string // up to 32 bytes of UTF-8, since 5.0; empty: none
	Mechanisms []Mechanism
	Tags       []string
	// Private is an *rsa.PrivateKey of two primes, an *ecdsa.PrivateKey on P-256, P-384 or P-521, an ed25519.PrivateKey, or
	// a [Secret] for a Generic key.
	Private any
}

// ImportKey gives the NetHSM a key, as an Administrator, and returns its id. An id that exists is [hsm.ErrExists]. A NetHSM
// does not check the mechanisms against the type.
func (c *Client) ImportKey(ctx context.Context, key ImportedKey) (string, error) {
	op := "importing a key"
	if key.ID != "" {
		op = fmt.Sprintf("importing key %q", key.ID)
	}
	if err := checkNewKey(op, key.ID, key.Label, key.Mechanisms, key.Tags); err != nil {
		return "", err
	}
	kind, private, err := privateParts(key.Private)
	if err != nil {
		return "", fmt.Errorf("%s: %w: %w", op, ErrRequest, err)
	}
	defer private.wipe()
	in := call{
		op: op, method: http.MethodPost, path: "/keys", creates: true,
		body: struct {
			Mechanisms   []Mechanism   `json:"mechanisms"`
			Type         KeyType       `json:"type"`
			Private      *privateKey   `json:"private"`
			Restrictions *restrictions `json:"restrictions,omitempty"`
			Label        string        `json:"label,omitempty"`
		}{key.Mechanisms, kind, private, restrictedTo(key.Tags), key.Label},
	}
	if key.ID == "" {
		return c.create(ctx, in)
	}
	in.method, in.path = http.MethodPut, path("keys", key.ID)
	_, err = c.do(ctx, in)
	return key.ID, err
}

// privateKey is a private key as JSON: primes and exponent of an RSA key, big-endian, or the octets of another.
type privateKey struct {
	PrimeP   []byte `json:"primeP,omitempty"`
	PrimeQ   []byte `json:"primeQ,omitempty"`
	Exponent []byte `json:"publicExponent,omitempty"`
	Data     []byte `json:"data,omitempty"`
}

// wipe clears what was copied out of the caller's key.
func (p *privateKey) wipe() {
	clear(p.PrimeP)
	clear(p.PrimeQ)
	clear(p.Data)
}

// privateParts takes a private key apart into copies.
func privateParts(private any) (KeyType, *privateKey, error) {
	switch key := private.(type) {
	case *rsa.PrivateKey:
		if len(key.Primes) != 2 {
			return "", nil, fmt.Errorf("the RSA key has %d primes; a NetHSM takes two", len(key.Primes))
		}
		return TypeRSA, &privateKey{
			PrimeP: key.Primes[0].Bytes(), PrimeQ: key.Primes[1].Bytes(), Exponent: big.NewInt(int64(key.E)).Bytes(),
		}, nil
	case *ecdsa.PrivateKey:
		octets, err := key.Bytes()
		if err != nil {
			return "", nil, err
		}
		kinds := map[string]KeyType{"P-256": TypeECP256, "P-384": TypeECP384, "P-521": TypeECP521}
		kind, known := kinds[key.Params().Name]
		if !known {
			return "", nil, fmt.Errorf("the curve %s is not one of P-256, P-384 and P-521", key.Params().Name)
		}
		return kind, &privateKey{Data: octets}, nil
	case ed25519.PrivateKey:
		if len(key) != ed25519.PrivateKeySize {
			return "", nil, fmt.Errorf("the Ed25519 key has %d bytes instead of %d", len(key), ed25519.PrivateKeySize)
		}
		return TypeCurve25519, &privateKey{Data: key.Seed()}, nil
	case Secret:
		if len(key) == 0 {
			return "", nil, fmt.Errorf("the secret key is empty")
		}
		return TypeGeneric, &privateKey{Data: append([]byte(nil), key...)}, nil
	default:
		return "", nil, fmt.Errorf("a private key of type %T cannot be imported", private)
	}
}
