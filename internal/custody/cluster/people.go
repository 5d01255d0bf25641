package cluster

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

var (
	// ErrPGPKey: what was given as a person's OpenPGP key is none, or nothing must be encrypted to it.
	ErrPGPKey = errors.New("unusable OpenPGP key")
	// errTooLong: Vault encrypted something else than a share or a token to us.
	errTooLong = errors.New("it is too long for a share or a token")
)

// Limits of what is read of OpenPGP, in bytes: a key with all that others signed on it, and a message that holds one share.
const (
	maxPGPKey     = 1 << 20
	maxPGPMessage = 16 << 10
)

// PGPKey is a person's public key.
type PGPKey struct {
	Fingerprint string // of the primary key, lower-case hexadecimal
	Identity    string // "Alice <alice@example.org>", printable; the first one in order where there are several

	entity *openpgp.Entity
}

// ReadPGPKey reads one public key: armored, binary, or the base64 of the binary form. Whether it may be used today is asked where it is used, so that a key
// that expires keeps nobody from unsealing.
func ReadPGPKey(raw []byte) (*PGPKey, error) {
	if len(raw) > maxPGPKey {
		return nil, fmt.Errorf("%w: it has more than %d KiB; export that one key only", ErrPGPKey, maxPGPKey>>10)
	}
	binary, err := unarmor(raw)
	if err != nil {
		return nil, err
	}
	packets := packet.NewReader(bytes.NewReader(binary))
	entity, err := openpgp.ReadEntity(packets)
	if err != nil {
		return nil, fmt.Errorf("%w: it cannot be read (%w); export it with gpg --armor --export", ErrPGPKey, err)
	}
	if entity.PrivateKey != nil || slices.ContainsFunc(entity.Subkeys, func(s openpgp.Subkey) bool { return s.PrivateKey != nil }) {
		return nil, fmt.Errorf("%w: it is a PRIVATE key, which nobody but its owner should have; give the public one, as gpg --armor --export writes it",
			ErrPGPKey)
	}
	if _, err := packets.Next(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: there is more than one key in it; export that of one person", ErrPGPKey)
	}
	key := &PGPKey{Fingerprint: hex.EncodeToString(entity.PrimaryKey.Fingerprint), entity: entity}
	for _, name := range slices.Sorted(maps.Keys(entity.Identities)) {
		key.Identity = printable(name, 120)
		break
	}
	return key, nil
}

// publicKeyHeader begins an armored public key.
const publicKeyHeader = "-----BEGIN PGP PUBLIC KEY BLOCK-----"

// unarmor returns the binary form of a key.
func unarmor(raw []byte) ([]byte, error) {
	if !bytes.Contains(raw, []byte("-----BEGIN PGP ")) {
		if binary, err := base64.StdEncoding.DecodeString(string(raw)); err == nil { // it passes over line ends
			return binary, nil
		}
		return raw, nil // its first byte is none of base64
	}
	if bytes.Count(raw, []byte(publicKeyHeader)) > 1 {
		return nil, fmt.Errorf("%w: there is more than one key in it; export that of one person", ErrPGPKey)
	}
	block, err := armor.Decode(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%w: its armor cannot be read (%w); export it with gpg --armor --export", ErrPGPKey, err)
	}
	binary, err := io.ReadAll(io.LimitReader(block.Body, maxPGPKey))
	if err != nil {
		return nil, fmt.Errorf("%w: its armor is damaged (%w); export it with gpg --armor --export", ErrPGPKey, err)
	}
	return binary, nil // a private one is refused by its packets
}

// recipient is the key with nothing but the subkey to encrypt to: whoever encrypts to it, Vault or we, can choose no other.
// It is [ErrPGPKey] where the key must not be used now.
func (k *PGPKey) recipient(now time.Time) (*openpgp.Entity, error) {
	chosen, err := k.entity.EncryptionKeyWithError(now, nil)
	switch {
	case err == nil:
	case k.entity.Revoked(now) || errors.Is(err, pgperrors.ErrKeyRevoked):
		return nil, fmt.Errorf("%w: %s was revoked; its owner has a new one", ErrPGPKey, k)
	case k.expired(now):
		return nil, fmt.Errorf("%w: %s has expired; ask its owner for it as it is today, or for a new one", ErrPGPKey, k)
	default:
		return nil, fmt.Errorf("%w: %s has no subkey to encrypt to that is valid today (%w); ask its owner for it as it is today, or for a new one",
			ErrPGPKey, k, err)
	}
	only := *k.entity
	only.Subkeys = nil
	for _, subkey := range k.entity.Subkeys {
		if subkey.PublicKey.KeyId == chosen.PublicKey.KeyId {
			only.Subkeys = append(only.Subkeys, subkey)
		}
	}
	if _, primary := k.entity.PrimaryIdentity(now, nil); primary != nil {
		only.Identities = map[string]*openpgp.Identity{primary.Name: primary}
	}
	return &only, nil
}

// expired tells whether the whole key has ended.
func (k *PGPKey) expired(now time.Time) bool {
	_, err := k.entity.VerifyPrimaryKey(now, nil)
	return errors.Is(err, pgperrors.ErrKeyExpired)
}

// String names a key in errors and tables.
func (k *PGPKey) String() string {
	if k.Identity == "" {
		return k.Fingerprint
	}
	return fmt.Sprintf("%s (%s)", k.Fingerprint, k.Identity)
}

// forVault is the key as Vault wants it: base64 of its binary form.
func (k *PGPKey) forVault(now time.Time) (string, error) {
	entity, err := k.recipient(now)
	if err != nil {
		return "", err
	}
	return encodePublic(entity)
}

func encodePublic(entity *openpgp.Entity) (string, error) {
	var binary bytes.Buffer
	if err := entity.Serialize(&binary); err != nil {
		return "", fmt.Errorf("%w: writing it for Vault: %w", ErrPGPKey, err)
	}
	return base64.StdEncoding.EncodeToString(binary.Bytes()), nil
}

// encryptTo encrypts to all these keys, and returns one armored message that any of them opens. The message says nothing of
// what it holds but its length.
func encryptTo(keys []*PGPKey, plaintext []byte, now time.Time) ([]byte, error) {
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: there is none to encrypt to", ErrPGPKey)
	}
	recipients := make([]*openpgp.Entity, len(keys))
	for i, key := range keys {
		var err error
		if recipients[i], err = key.recipient(now); err != nil {
			return nil, err
		}
	}
	var message bytes.Buffer
	lines, err := armor.Encode(&message, openpgp.MessageType, nil)
	if err != nil {
		return nil, fmt.Errorf("armoring a message: %w", err)
	}
	config := &packet.Config{DefaultCipher: packet.CipherAES256, Time: func() time.Time { return now }}
	body, err := openpgp.Encrypt(lines, recipients, nil, nil, nil, config)
	if err != nil {
		return nil, fmt.Errorf("encrypting to %s: %w", listKeys(keys), err)
	}
	if _, err := body.Write(plaintext); err != nil {
		return nil, fmt.Errorf("encrypting to %s: %w", listKeys(keys), err)
	}
	if err := errors.Join(body.Close(), lines.Close()); err != nil {
		return nil, fmt.Errorf("encrypting to %s: %w", listKeys(keys), err)
	}
	message.WriteByte('\n')
	return message.Bytes(), nil
}

// armorMessage turns a binary message, as Vault gives them out, into text that gpg takes.
func armorMessage(binary []byte) ([]byte, error) {
	var message bytes.Buffer
	lines, err := armor.Encode(&message, openpgp.MessageType, nil)
	if err != nil {
		return nil, fmt.Errorf("armoring a message: %w", err)
	}
	if _, err := lines.Write(binary); err != nil {
		return nil, fmt.Errorf("armoring a message: %w", err)
	}
	if err := lines.Close(); err != nil {
		return nil, fmt.Errorf("armoring a message: %w", err)
	}
	message.WriteByte('\n')
	return message.Bytes(), nil
}

func listKeys(keys []*PGPKey) string {
	names := make([]string, len(keys))
	for i, key := range keys {
		names[i] = key.String()
	}
	return strings.Join(names, ", ")
}

// printable keeps a foreign text from the terminal's control characters, and short.
func printable(text string, limit int) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\ufffd' {
			return '?'
		}
		return r
	}, text)
	if runes := []rune(text); len(runes) > limit {
		return string(runes[:limit]) + "…"
	}
	return text
}

// ownKey is an OpenPGP key of ours that lives in memory for one call of Vault. Vault encrypts all shares of a call or none,
// so where people take some of them, ours are asked for under this key. And by its fingerprint, which is noted beforehand, an
// attempt in Vault is known for ours even where the answer that began it was lost.
type ownKey struct {
	entity *openpgp.Entity
	public string // base64 of the binary form
}

// ownKeyKind is what every Vault takes, however old: the key guards one answer inside TLS. Tests take one that is made faster.
var ownKeyKind = packet.Config{Algorithm: packet.PubKeyAlgoRSA, RSABits: 2048}

// newOwnKey makes a key. It is dated back by a day, because Vault refuses a key from the future and its clock may be behind.
func newOwnKey(now time.Time) (*ownKey, error) {
	made := now.Add(-24 * time.Hour)
	config := ownKeyKind
	config.Time = func() time.Time { return made }
	entity, err := openpgp.NewEntity("nitroseal", "", "", &config)
	if err != nil {
		return nil, fmt.Errorf("making a key for the answer of Vault: %w", err)
	}
	public, err := encodePublic(entity)
	if err != nil {
		return nil, err
	}
	return &ownKey{entity: entity, public: public}, nil
}

// forVault is the public key as Vault wants it.
func (k *ownKey) forVault() string { return k.public }

// fingerprint is what Vault shows of the key, lower-case hexadecimal.
func (k *ownKey) fingerprint() string { return hex.EncodeToString(k.entity.PrimaryKey.Fingerprint) }

// open decrypts a binary message to this key. The caller wipes the result; copies in the buffers of the OpenPGP library are
// beyond reach, and so is the private key: both are left to the garbage collector.
func (k *ownKey) open(message []byte) ([]byte, error) {
	if len(message) > maxPGPMessage {
		return nil, fmt.Errorf("opening what Vault encrypted to us: it has %d bytes, which is no share", len(message))
	}
	read, err := openpgp.ReadMessage(bytes.NewReader(message), openpgp.EntityList{k.entity}, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("opening what Vault encrypted to us: %w", err)
	}
	plaintext := make([]byte, maxPGPMessage) // never grows, which would leave copies behind
	n, err := io.ReadFull(read.UnverifiedBody, plaintext)
	if err == nil || !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		clear(plaintext)
		return nil, fmt.Errorf("opening what Vault encrypted to us: %w", cmp.Or(err, errTooLong))
	}
	return plaintext[:n:n], nil
}

// openShare decrypts a message that holds a share, in which Vault writes it in hexadecimal.
func (k *ownKey) openShare(message []byte) ([]byte, error) {
	text, err := k.open(message)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	share := make([]byte, hex.DecodedLen(len(text)))
	if _, err := hex.Decode(share, text); err != nil || len(share) == 0 {
		clear(share)
		return nil, errors.New("opening what Vault encrypted to us: it is no share in hexadecimal")
	}
	return share, nil
}
