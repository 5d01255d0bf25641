package envelope

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/rsa"
	_ "crypto/sha1" // OAEP with SHA-1
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// The test keys of testdata/keys. They are public and guard nothing.
const (
	rsa2048 = "test-key-rsa-2048"
	rsa3072 = "test-key-rsa-3072"
	ecP256  = "test-key-ec-p256"
	ecP384  = "test-key-ec-p384"
)

var testKeys = []string{rsa2048, rsa3072, ecP256, ecP384}

// testAuth authenticates the golden files and most envelopes of the tests.
var testAuth = &AuthKey{
	'a', ' ', 't', 'e', 's', 't', ' ', 'k', 'e', 'y', ' ', 't', 'h', 'a', 't', ' ',
	'g', 'u', 'a', 'r', 'd', 's', ' ', 'n', 'o', 't', 'h', 'i', 'n', 'g', '!', '!',
}

// operations counts what a software key did in place of an HSM.
type operations struct {
	count atomic.Int64
	err   error // every operation fails with it, where set
}

// softRSA is an hsm.Decrypter in software.
type softRSA struct {
	operations
	private *rsa.PrivateKey
	hashes  []crypto.Hash
}

func (k *softRSA) Ref() hsm.KeyRef           { return hsm.KeyRef{} }
func (k *softRSA) Public() crypto.PublicKey  { return &k.private.PublicKey }
func (k *softRSA) Traits() hsm.Traits        { return hsm.Traits{} }
func (k *softRSA) OAEPHashes() []crypto.Hash { return k.hashes }

func (k *softRSA) DecryptOAEP(ctx context.Context, hash crypto.Hash, block []byte) ([]byte, error) {
	k.count.Add(1)
	if k.err != nil {
		return nil, k.err
	}
	if !slices.Contains(k.hashes, hash) {
		return nil, hsm.ErrUnsupported
	}
	plaintext, err := rsa.DecryptOAEP(hash.New(), nil, k.private, block, nil)
	if err != nil {
		return nil, hsm.ErrCiphertext
	}
	return plaintext, ctx.Err()
}

// softEC is an hsm.Agreer in software.
type softEC struct {
	operations
	private *ecdh.PrivateKey
}

func (k *softEC) Ref() hsm.KeyRef          { return hsm.KeyRef{} }
func (k *softEC) Public() crypto.PublicKey { return k.private.PublicKey() }
func (k *softEC) Traits() hsm.Traits       { return hsm.Traits{} }

func (k *softEC) Agree(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	k.count.Add(1)
	if k.err != nil {
		return nil, k.err
	}
	z, err := k.private.ECDH(peer)
	if err != nil {
		return nil, err
	}
	return z, ctx.Err()
}

// party is a test key with all that seals to it and opens with it.
type party struct {
	Recipient
	key hsm.Key
	ops *operations
}

// load reads a test key. algorithm "" is the best one that it can do.
func load(t testing.TB, name string, algorithm Algorithm) party {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "keys", name+".pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	var p party
	switch private := private.(type) {
	case *rsa.PrivateKey:
		key := &softRSA{private: private, hashes: []crypto.Hash{crypto.SHA256, crypto.SHA1}}
		p = party{key: key, ops: &key.operations, Recipient: Recipient{Algorithm: RSAOAEP256, Public: &private.PublicKey}}
	case *ecdsa.PrivateKey:
		agree, err := private.ECDH()
		if err != nil {
			t.Fatal(err)
		}
		key := &softEC{private: agree}
		p = party{key: key, ops: &key.operations, Recipient: Recipient{Algorithm: ECDHESA256KW, Public: agree.PublicKey()}}
	}
	if algorithm != "" {
		p.Algorithm = algorithm
	}
	if p.KID, err = hsm.Fingerprint(p.Public); err != nil {
		t.Fatal(err)
	}
	return p
}

// mustSeal seals to the parties with the test's authentication key.
func mustSeal(t testing.TB, c Context, payload []byte, to ...party) []byte {
	t.Helper()
	raw, err := Seal(c, recipients(to), testAuth, payload)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func recipients(parties []party) []Recipient {
	var r []Recipient
	for _, p := range parties {
		r = append(r, p.Recipient)
	}
	return r
}

// open parses and opens for want with the test's authentication key.
func open(t testing.TB, raw []byte, want Context, with party) ([]byte, error) {
	t.Helper()
	e, err := Parse(raw)
	if err != nil {
		return nil, err
	}
	return e.Open(t.Context(), want, with.Recipient, with.key, testAuth)
}
