// Package hsm is the contract between this project and a hardware security module.
//
// A [Device] is one HSM: a PKCS#11 token, or a NetHSM cluster behind its REST API. It finds and makes [Key] values;
// what a key can do is asked by type assertion: [Decrypter] for RSA, [Agreer] for elliptic curves. What else a device
// can do is asked the same way: [ObjectStore], [Randomer], [Unlocker], [PINChanger], [Clustered]. What older programs left is
// taken over through [LegacyDecrypter] and [ForeignObjects].
//
// Three rules hold for every provider, and package hsmtest checks them:
//
//   - A look-up never creates. Zero matches are [ErrNotFound], two are [ErrAmbiguous].
//   - Errors are values. Callers ask with errors.Is and errors.As; the text carries the provider's own code for people.
//   - Public-key work is done in software; only private-key operations reach the HSM, one for each call.
//
// The package has no cgo, no provider and no dependency outside the standard library.
package hsm

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"time"
)

// Device is one HSM. All methods are safe for concurrent use and return when ctx ends, whatever the HSM does.
type Device interface {
	// Info tells what the HSM is and how it fares. It performs no private-key operation and never logs in.
	Info(ctx context.Context) (Info, error)

	// FindKeys returns every key pair that matches the query, in the order of its id. An empty result is no error:
	// use [FindKey] where exactly one is wanted.
	FindKeys(ctx context.Context, query KeyQuery) ([]Key, error)

	// GenerateKey makes a key pair: sensitive, not extractable, and usable for one purpose only. It fails with
	// [ErrExists] where a key with the wanted ID is already there, so that a repeated request can be recognised.
	GenerateKey(ctx context.Context, spec KeySpec) (Key, error)

	// DeleteKey destroys the one key pair whose ID and fingerprint both equal those of ref. This cannot be undone.
	DeleteKey(ctx context.Context, ref KeyRef) error

	// Close gives the device back. Work in flight is finished or fails with ErrUnavailable.
	Close() error
}

// Key is a key pair whose private half never leaves the HSM.
type Key interface {
	// Ref names the key on its device.
	Ref() KeyRef
	// Public is the public key, read from the HSM when the key was found: *rsa.PublicKey or *ecdh.PublicKey.
	Public() crypto.PublicKey
	// Traits says how well the HSM guards the private half.
	Traits() Traits
}

// Decrypter is an RSA key.
type Decrypter interface {
	Key
	// OAEPHashes lists the hashes for which DecryptOAEP works, the best one first. MGF1 uses the same hash.
	OAEPHashes() []crypto.Hash
	// DecryptOAEP decrypts one RSAES-OAEP block (RFC 8017, 7.1) with an empty label. The ciphertext is as long as the
	// modulus. It costs exactly one private-key operation. A block that does not decrypt gives [ErrCiphertext].
	// The caller wipes the result.
	DecryptOAEP(ctx context.Context, hash crypto.Hash, ciphertext []byte) ([]byte, error)
}

// Agreer is an elliptic-curve key on P-256 or P-384.
type Agreer interface {
	Key
	// Agree returns the x coordinate of the shared point (SEC 1, 3.3.1), as long as a field element: 32 or 48 bytes.
	// The peer's point was already checked to lie on the curve: that is what *ecdh.PublicKey means. It costs exactly
	// one private-key operation. The caller wipes the result.
	Agree(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
}

// Prover is a key that can prove what it does.
type Prover interface {
	Key
	// Prove encrypts in software and decrypts in the HSM, or agrees with a fresh peer, and compares. It costs one
	// private-key operation, two at most where the better of two hashes turns out not to work. Afterwards the answer of
	// [Decrypter].OAEPHashes is proved and final; before, it is what the device announces.
	Prove(ctx context.Context) error
}

// KeyRef names a key on its device.
type KeyRef struct {
	Label string // CKA_LABEL, or a NetHSM label
	// ID is CKA_ID in lower-case hexadecimal, or a NetHSM key id.
	ID string
	// Fingerprint is the RFC 7638 thumbprint of the public key, see [Fingerprint].
	Fingerprint string
}

// KeyQuery selects keys. Every field that is set must match; a query with none matches all keys of the device.
type KeyQuery struct {
	Label string
	ID    string
	// Fingerprint matches keys by what they are instead of what they are called.
	Fingerprint string
}

// KeySpec describes a key to be made.
type KeySpec struct {
	Algorithm Algorithm
	Label     string
	// ID is lower-case hexadecimal for PKCS#11. Callers choose it beforehand, so that a request repeated after a
	// crash finds the key that the first one made. Empty lets the device choose.
	ID string
}

// Algorithm is a kind of key pair.
type Algorithm string

// The algorithms that wrapping keys may have.
const (
	RSA2048  Algorithm = "rsa-2048"
	RSA3072  Algorithm = "rsa-3072"
	RSA4096  Algorithm = "rsa-4096"
	ECDHP256 Algorithm = "ecdh-p256"
	ECDHP384 Algorithm = "ecdh-p384"
)

// Algorithms lists every [Algorithm].
func Algorithms() []Algorithm {
	return []Algorithm{RSA2048, RSA3072, RSA4096, ECDHP256, ECDHP384}
}

// Traits says how well an HSM guards a private key, as the HSM itself tells.
type Traits struct {
	// Extractable is true where the private key can leave the HSM in the clear or wrapped (CKA_EXTRACTABLE).
	Extractable bool
	// Sensitive is true where the private key cannot be read in the clear (CKA_SENSITIVE).
	Sensitive bool
	// AlsoUsableFor names uses besides the one that we need, "sign" or "decrypt v1.5" for example. Another use of the
	// same RSA key can become an oracle for ours.
	AlsoUsableFor []string
	// ForeignUsesRefused is true where the device itself enforces AlsoUsableFor, as a NetHSM's mechanism list does. On
	// a PKCS#11 token the PIN holder chooses the mechanism, and AlsoUsableFor is a warning only.
	ForeignUsesRefused bool
}

// Info describes an HSM.
type Info struct {
	Vendor   string
	Model    string
	Serial   string
	Firmware string
	// Label is the token label, trimmed; empty for a NetHSM.
	Label string
	State State
	PIN   PINState
	// Mechanisms names what the device can do, in the provider's own words (CKM_RSA_PKCS_OAEP, …).
	Mechanisms []string
	// Notes are sentences that an operator should read: memory that could not be locked, for example.
	Notes []string
}

// State is the state of an HSM.
type State string

// The states of an HSM. A PKCS#11 token is operational, locked (its PIN is) or absent.
const (
	StateOperational   State = "operational"
	StateLocked        State = "locked"
	StateUnprovisioned State = "unprovisioned"
	StateAbsent        State = "absent"
	StateFailed        State = "failed"
)

// PINState is what a token tells about its user PIN: the flags of C_GetTokenInfo (PKCS#11 2.40, 4.4). A token does not
// tell the number of tries left, only these.
type PINState struct {
	CountLow bool // a wrong PIN was sent since the last right one
	FinalTry bool // the next wrong PIN locks the token
	Locked   bool
}

// Randomer makes random bytes.
type Randomer interface {
	// Random returns n bytes from the HSM's generator, 1 ≤ n ≤ 1024.
	Random(ctx context.Context, n int) ([]byte, error)
}

// Unlocker is a device that starts locked and wants a passphrase, as a NetHSM does. On a device of several nodes both
// methods reach every node that answers; what fails on one does not keep the others from it.
type Unlocker interface {
	// Unlock opens every locked node; one that is open already is no error. A wrong passphrase is a [PINError].
	Unlock(ctx context.Context, passphrase []byte) error
	// Lock locks every node. It needs an administrator's rights: [ErrForbidden] where the device has none.
	Lock(ctx context.Context) error
}

// Clustered is a device of several nodes, any of which can serve a request.
type Clustered interface {
	// Nodes asks every node how it fares, all at one time, in the order of the configuration. A node that does not
	// answer is an entry with an error, not a missing one.
	Nodes(ctx context.Context) []Node
}

// Node is one node of a [Clustered] device.
type Node struct {
	URL string
	// State is StateAbsent where the node does not answer.
	State State
	// Serial and Firmware are empty where the device has not the rights to ask.
	Serial, Firmware string
	// RoundTrip is how long the node took to answer.
	RoundTrip time.Duration
	// CertificateEnds is when the TLS certificate that the node showed ends; zero where none was seen.
	CertificateEnds time.Time
	// Resting is true while requests avoid the node because it failed; it is probed in the background until it answers.
	Resting bool
	// Err is why the node cannot serve now; nil where it can.
	Err error
}

// PINChanger is a device with a PIN.
type PINChanger interface {
	// ChangePIN changes the user PIN on the token from the one that the device was opened with to pin. A wrong old
	// PIN costs a try like any other log-in and is subject to the same bar. The token still has the old PIN after any error
	// but [ErrMayHaveHappened].
	ChangePIN(ctx context.Context, pin []byte) error
	// AdoptPIN makes pin the one that the device logs in with, where the token has it already. A log-in of its own proves
	// it, beside the one that the device has: where the token refuses it, that one stays and nothing else is sent. Asking
	// for it is a person's word for this one log-in: it is sent although the token shows that a wrong PIN came before,
	// unless this very PIN is barred; but the last try is spent only where lastTry says so too. After [ErrMayHaveHappened] the device
	// may log in with it; ask again to know.
	AdoptPIN(ctx context.Context, pin []byte, lastTry bool) error
	// Unbar lifts the bar of the PIN that the device was opened with on this machine, so that the next operation logs in
	// with it once more. Bars of other PINs stay. While another mount uses the token with another PIN it is a *PINError, and
	// so it is where the token rejected this PIN and shows its last try.
	Unbar(ctx context.Context) error
}

// ObjectStore keeps small values on the HSM itself.
type ObjectStore interface {
	// Objects lists the objects of one application, in the order of their labels. Labels are not unique on PKCS#11
	// tokens: two objects with one label are two entries.
	Objects(ctx context.Context, application string) ([]ObjectRef, error)
	// ReadObject returns a value: ErrNotFound for none, ErrAmbiguous for two objects with that name.
	ReadObject(ctx context.Context, ref ObjectRef) ([]byte, error)
	// WriteObject creates an object and returns nil only when the value was read back independently of whatever
	// cache the write went through. It never replaces: an existing name is ErrExists. A token without room is ErrFull.
	WriteObject(ctx context.Context, ref ObjectRef, value []byte) error
	// DeleteObject removes the one object of that name; ErrNotFound and ErrAmbiguous as ReadObject.
	DeleteObject(ctx context.Context, ref ObjectRef) error
}

// ObjectRef names a data object: CKA_APPLICATION and CKA_LABEL.
type ObjectRef struct {
	Application string
	Label       string
}

// FindKey returns the one key that matches the query, [ErrNotFound] where there is none and [ErrAmbiguous] where there
// are more.
func FindKey(ctx context.Context, device Device, query KeyQuery) (Key, error) {
	keys, err := device.FindKeys(ctx, query)
	if err != nil {
		return nil, err
	}
	switch len(keys) {
	case 1:
		return keys[0], nil
	case 0:
		return nil, &lookupError{query: query, err: ErrNotFound}
	default:
		return nil, &lookupError{query: query, count: len(keys), err: ErrAmbiguous}
	}
}
