package nethsmtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// The key types that the double makes, and those that it only knows by name.
const (
	typeRSA     = "RSA"
	typeEd25519 = "Curve25519"
	typeP256    = "EC_P256"
	typeP384    = "EC_P384"
	typeP521    = "EC_P521"
	typeGeneric = "Generic"
)

// keyTypes are the names that requests may use.
var keyTypes = []string{
	typeRSA, typeEd25519, "EC_P224", typeP256, typeP384, typeP521, "EC_P256K1", "BrainpoolP256", "BrainpoolP384",
	"BrainpoolP512", typeGeneric,
}

// mechanismNames are all mechanisms in the order in which the original lists them.
var mechanismNames = []string{
	"RSA_Decryption_RAW", "RSA_Decryption_PKCS1", "RSA_Decryption_OAEP_MD5", "RSA_Decryption_OAEP_SHA1",
	"RSA_Decryption_OAEP_SHA224", "RSA_Decryption_OAEP_SHA256", "RSA_Decryption_OAEP_SHA384",
	"RSA_Decryption_OAEP_SHA512", "RSA_Signature_PKCS1", "RSA_Signature_PSS_MD5", "RSA_Signature_PSS_SHA1",
	"RSA_Signature_PSS_SHA224", "RSA_Signature_PSS_SHA256", "RSA_Signature_PSS_SHA384", "RSA_Signature_PSS_SHA512",
	"EdDSA_Signature", "ECDSA_Signature", "BIP340_Signature", "AES_Encryption_CBC", "AES_Decryption_CBC",
}

// mechanismsOf are the mechanisms that a type can have.
func mechanismsOf(kind string) []string {
	switch kind {
	case typeRSA:
		return mechanismNames[:15]
	case typeEd25519:
		return []string{"EdDSA_Signature"}
	case typeGeneric:
		return []string{"AES_Encryption_CBC", "AES_Decryption_CBC"}
	case "EC_P256K1":
		return []string{"ECDSA_Signature", "BIP340_Signature"}
	default:
		return []string{"ECDSA_Signature"}
	}
}

var (
	errExists = errors.New("already exists")
	errGone   = errors.New("does not exist")
)

var curves = map[string]elliptic.Curve{typeP256: elliptic.P256(), typeP384: elliptic.P384(), typeP521: elliptic.P521()}

// generate makes a key of a type; length is in bits and counts for RSA and Generic. Its error is what the API answers.
func (h *HSM) generate(kind string, length int) (*keyRecord, error) {
	switch {
	case kind == typeGeneric:
		return &keyRecord{Type: kind, Private: random((length + 7) / 8)}, nil
	case kind == typeRSA:
		key, err := h.lent.take(length)
		if err != nil {
			return nil, err
		}
		return keyOf(key)
	case kind == typeEd25519:
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		return keyOf(key)
	case curves[kind] != nil:
		key, err := ecdsa.GenerateKey(curves[kind], rand.Reader)
		if err != nil {
			return nil, err
		}
		return keyOf(key)
	case kind == "EC_P224":
		return nil, errors.New("P224 is unsupported")
	default:
		return nil, fmt.Errorf("this NetHSM double has no keys of type %s", kind)
	}
}

// keyOf is the record of a private key.
func keyOf(key any) (*keyRecord, error) {
	k := &keyRecord{}
	switch key := key.(type) {
	case *rsa.PrivateKey:
		k.Type, k.signer = typeRSA, key
	case ed25519.PrivateKey:
		k.Type, k.signer = typeEd25519, key
	case *ecdsa.PrivateKey:
		for name, curve := range curves {
			if key.Curve == curve {
				k.Type, k.signer = name, key
			}
		}
	}
	if k.signer == nil {
		return nil, fmt.Errorf("this NetHSM double has no keys of type %T", key)
	}
	var err error
	k.Private, err = x509.MarshalPKCS8PrivateKey(key)
	return k, err
}

// importParts makes a key of what an import in JSON brings.
func importParts(kind string, parts privateParts) (*keyRecord, error) {
	if kind == typeRSA {
		return importPrimes(parts)
	}
	data, err := base64.StdEncoding.DecodeString(parts.data)
	if err != nil {
		return nil, fmt.Errorf("Invalid base64 encoded value (error: Wrong padding) in \"data\": %s", parts.data) //nolint:staticcheck // the original's words
	}
	switch {
	case kind == typeGeneric:
		return &keyRecord{Type: kind, Private: data}, nil
	case kind == typeEd25519:
		if len(data) != ed25519.SeedSize {
			return nil, errors.New("Ed25519 private key of wrong length")
		}
		return keyOf(ed25519.NewKeyFromSeed(data))
	case curves[kind] != nil:
		key, err := ecdsa.ParseRawPrivateKey(curves[kind], data)
		if err != nil {
			return nil, err
		}
		return keyOf(key)
	case kind == "EC_P224":
		return nil, errors.New("P224 is unsupported")
	default:
		return nil, fmt.Errorf("this NetHSM double has no keys of type %s", kind)
	}
}

func importPrimes(parts privateParts) (*keyRecord, error) {
	var numbers []*big.Int
	for _, one := range []struct{ name, value string }{
		{"primeP", parts.primeP}, {"primeQ", parts.primeQ}, {"publicExponent", parts.exponent},
	} {
		raw, err := base64.StdEncoding.DecodeString(one.value)
		if err != nil {
			return nil, fmt.Errorf("Invalid base64 encoded value (error: Wrong padding) in %q: %s", one.name, one.value) //nolint:staticcheck // the original's words
		}
		numbers = append(numbers, new(big.Int).SetBytes(raw))
	}
	p, q, e := numbers[0], numbers[1], numbers[2]
	one := big.NewInt(1)
	if p.Cmp(one) <= 0 || q.Cmp(one) <= 0 || e.Cmp(one) <= 0 || !e.IsInt64() {
		return nil, errors.New("invalid RSA key")
	}
	phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
	d := new(big.Int).ModInverse(e, phi)
	if d == nil {
		return nil, errors.New("invalid RSA key")
	}
	key := &rsa.PrivateKey{
		PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: int(e.Int64())}, D: d, Primes: []*big.Int{p, q},
	}
	if err := key.Validate(); err != nil {
		return nil, err
	}
	key.Precompute()
	return keyOf(key)
}

// importPEM makes a key of a PEM file.
func importPEM(data []byte) (*keyRecord, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("PEM: no private key found")
	}
	for _, parse := range []func([]byte) (any, error){
		x509.ParsePKCS8PrivateKey,
		func(der []byte) (any, error) { return x509.ParsePKCS1PrivateKey(der) },
		func(der []byte) (any, error) { return x509.ParseECPrivateKey(der) },
	} {
		if key, err := parse(block.Bytes); err == nil {
			return keyOf(key)
		}
	}
	return nil, errors.New("PEM: no private key found")
}

// rawDecrypt is textbook RSA: as many bytes as the modulus has.
func rawDecrypt(key *rsa.PrivateKey, c *big.Int) []byte {
	// The Chinese remainder theorem, three times as fast as one exponentiation.
	p, q := key.Primes[0], key.Primes[1]
	m1 := new(big.Int).Exp(c, key.Precomputed.Dp, p)
	m2 := new(big.Int).Exp(c, key.Precomputed.Dq, q)
	m1.Sub(m1, m2).Mul(m1, key.Precomputed.Qinv).Mod(m1, p)
	return m1.Mul(m1, q).Add(m1, m2).FillBytes(make([]byte, key.Size()))
}

// hashes are those of OAEP and PSS by the end of the mode's name.
var hashes = map[string]crypto.Hash{
	"MD5": crypto.MD5, "SHA1": crypto.SHA1, "SHA224": crypto.SHA224, "SHA256": crypto.SHA256, "SHA384": crypto.SHA384,
	"SHA512": crypto.SHA512,
}

// decryptModes and signModes are the names that requests may use, with the mechanism that each needs.
var (
	decryptModes = map[string]string{"AES_CBC": "AES_Decryption_CBC"}
	signModes    = map[string]string{
		"EdDSA": "EdDSA_Signature", "ECDSA": "ECDSA_Signature", "BIP340": "BIP340_Signature",
	}
)

func init() {
	for _, m := range mechanismNames {
		const decryption, signature = "RSA_Decryption_", "RSA_Signature_"
		switch {
		case len(m) > len(decryption) && m[:len(decryption)] == decryption:
			decryptModes[m[len(decryption):]] = m
		case len(m) > len(signature) && m[:len(signature)] == signature:
			signModes[m[len(signature):]] = m
		}
	}
}

// names are the keys of a table, sorted.
func names(table map[string]string) []string {
	var all []string
	for name := range table {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}
