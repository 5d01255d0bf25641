package nethsmtest

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"

	"golang.org/x/crypto/scrypt"
)

// The costs of scrypt: the original's, and a small one for tests.
const (
	scryptN, scryptR, scryptP = 16384, 8, 16
	quickN                    = 256
)

// The lengths that a passphrase may have, in bytes.
const (
	minPassphrase = 10
	maxPassphrase = 200
)

// errWrongPassphrase: the passphrase does not open the lock.
var errWrongPassphrase = errors.New("wrong passphrase")

// lockRecord is the domain key sealed under an unlock passphrase: AES-256-GCM(scrypt(passphrase, Salt), domain key).
type lockRecord struct {
	N      int    `json:"n"`
	Salt   []byte `json:"salt"`
	Sealed []byte `json:"sealed"`
}

// sealDomainKey makes the lock of one node.
func sealDomainKey(domain, passphrase []byte, realCosts bool) (*lockRecord, error) {
	l := &lockRecord{N: quickN, Salt: random(16)}
	if realCosts {
		l.N = scryptN
	}
	key, err := l.key(passphrase)
	if err != nil {
		return nil, err
	}
	l.Sealed, err = seal(key, []byte("domain-key"), domain)
	return l, err
}

// open returns the domain key, or errWrongPassphrase.
func (l *lockRecord) open(passphrase []byte) ([]byte, error) {
	key, err := l.key(passphrase)
	if err != nil {
		return nil, err
	}
	domain, err := open(key, []byte("domain-key"), l.Sealed)
	if err != nil {
		return nil, errWrongPassphrase
	}
	return domain, nil
}

func (l *lockRecord) key(passphrase []byte) ([]byte, error) {
	p := scryptP
	if l.N == quickN {
		p = 1
	}
	return scrypt.Key(passphrase, l.Salt, l.N, scryptR, p, 32)
}

// digest is how a user's passphrase is kept: cheap, as in the original.
func digest(salt, passphrase []byte) []byte {
	mac := hmac.New(sha256.New, salt)
	mac.Write(passphrase)
	return mac.Sum(nil)
}

// seal encrypts with AES-256-GCM: nonce (12 bytes), ciphertext, tag.
func seal(key, additional, plaintext []byte) ([]byte, error) {
	gcm, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	nonce := random(gcm.NonceSize())
	return gcm.Seal(nonce, nonce, plaintext, additional), nil
}

// open is the reverse of seal.
func open(key, additional, sealed []byte) ([]byte, error) {
	gcm, err := newGCM(key)
	if err != nil {
		return nil, err
	}
	if len(sealed) < gcm.NonceSize() {
		return nil, fmt.Errorf("opening a sealed value: %d bytes are too few", len(sealed))
	}
	return gcm.Open(nil, sealed[:gcm.NonceSize()], sealed[gcm.NonceSize():], additional)
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// random returns n random bytes.
func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: it would end the process
	return b
}
