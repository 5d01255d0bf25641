// Package keyring keeps named wrapping keys: their versions, the HSM keys that can open what they seal, and the rules
// of their use.
//
// A wrapping key is a record in a store, "keys/<name>". A version of it has recipients (HSM key pairs, possibly on
// several devices) and one random authentication key, without which nobody can make an envelope that opens. Sealing
// needs the record only and no HSM; opening costs one private-key operation in one HSM, the first that answers.
//
// Everything that touches an HSM and the record is done in an order that a crash cannot hurt. An HSM key is made by
// intent: the record first names the id that the key will have, then the HSM makes it, then one compare-and-swap write
// turns the intent into a version. Whoever comes next finds the intent and finishes it, or undoes it: one intent makes
// one HSM key, however often it is tried. Deleting works the same way.
//
// The record holds the authentication keys in the clear and belongs in a store that is itself protected, such as a
// Vault mount's storage; where the store is plain files, they lie in their envelopes only ([Config.SealAuthKeys]), and the
// HSM opens each at its first use. The key record ([Keyring.Backup]) holds no secret and brings a key back in a new store
// while one of its HSMs exists ([Keyring.Restore]).
//
// A key with a lease ([Settings].Lease) gives its versions a key encryption key (KEK), sealed to the version's HSM keys.
// Envelopes of use transit are then sealed to the KEK, which the HSM opens once for all of them and which is held in
// locked memory until the lease is over. Each such envelope carries its KEK, so that it opens with the HSM alone.
package keyring

import (
	"context"
	"crypto"
	"log/slog"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Devices opens HSMs by the names that they were configured with.
type Devices interface {
	// Device returns an open device, the same instance while it is good. A name that is not configured is [ErrNoDevice].
	Device(ctx context.Context, name string) (hsm.Device, error)
}

// Config is what a [Keyring] is made of.
type Config struct {
	Records store.Store
	Devices Devices
	Logger  *slog.Logger     // nil for none
	Now     func() time.Time // nil for time.Now
	// InUse tells in a sentence who still needs a key to open what it sealed, "" for nobody. [Keyring.Delete] asks it;
	// where it cannot tell, its error refuses the deletion as well. Nil for a keyring whose users keep their envelopes.
	InUse func(ctx context.Context, name string) (string, error)
	// CacheRecords keeps parsed records in memory, so that sealing and opening do not read the store. Set it only where
	// nobody else writes the store, or where [Keyring.Invalidate] is called for every foreign write.
	CacheRecords bool
	// Lock lets the slow changes of one key take turns among processes that share the store: two that made the same HSM key
	// at once would make two. It waits until ctx ends. Nil where there is one process.
	Lock func(ctx context.Context, name string) (unlock func(), err error)
	// Words are those of the sentences in errors and warnings; nil for those of a mount of Vault.
	Words *Words
	// SealAuthKeys keeps authentication keys out of the records, for a store that a thief may read: they lie in their
	// envelopes only, and the first use of a version in a Keyring opens its own, at the cost of one private-key operation.
	// A record with one in the clear is refused: whoever put it there could make envelopes that open.
	SealAuthKeys bool
}

// Keyring keeps wrapping keys. Close it where wrapping keys have leases. Errors name the key and the device and say what to do; see the Err values. Its methods
// are safe for concurrent use. Use one Keyring for each store: mutations of one key take turns within a Keyring, and
// among several by compare-and-swap, and by [Config.Lock] where they make or delete HSM keys.
type Keyring struct {
	records store.Store
	devices Devices
	logger  *slog.Logger
	now     func() time.Time
	inUse   func(ctx context.Context, name string) (string, error)
	locks   nameLocks
	cache   recordCache
	found   foundKeys
	health  deviceHealth
	lock    func(ctx context.Context, name string) (unlock func(), err error) // Config.Lock; may be nil
	sealed  bool                                                              // Config.SealAuthKeys
	opened  openedAuthKeys
	opening nameLocks // of authentication keys
	leases  leases
	running context.Context // until Close: of work in the background
	stop    context.CancelFunc
	words   Words
}

// New returns a keyring. It does no I/O.
func New(config Config) *Keyring {
	k := &Keyring{
		records: config.Records,
		devices: config.Devices,
		logger:  config.Logger,
		now:     config.Now,
		inUse:   config.InUse,
		lock:    config.Lock,
		sealed:  config.SealAuthKeys,
	}
	k.running, k.stop = context.WithCancel(context.Background())
	if k.logger == nil {
		k.logger = slog.New(slog.DiscardHandler)
	}
	if k.now == nil {
		k.now = time.Now
	}
	k.words = vaultWords
	if config.Words != nil {
		k.words = *config.Words
	}
	k.cache.on = config.CacheRecords
	return k
}

// Key describes a wrapping key. It holds no secret.
type Key struct {
	Name      string
	State     State
	Created   time.Time
	CreatedBy string
	// Versions are in order, the oldest first. There is none while the first one is being made.
	Versions             []Version
	LatestVersion        int // 0 while there is no version
	MinDecryptionVersion int
	// EncryptVersion is the version that `encrypt/` seals with, 0 while none is ready for it: the newest one that
	// is, see [Keyring.Ready]. Everything else is sealed with the newest version.
	EncryptVersion  int
	DeletionAllowed bool
	// Lease is how long an opened key encryption key is held, 0 for strict mode: see [Keyring.OpenLease].
	Lease time.Duration
	// RecordSHA256 is the SHA-256 of the key record as [Keyring.Backup] returns it, in lower-case hexadecimal. Empty
	// while there is no version.
	RecordSHA256 string
	// Acknowledgements of the newest state of the key; nil where nobody gave them. Versions have their own.
	RecordRead, BackupConfirmed, AcceptSingleHSM, AcceptWeakKey *Acknowledgement
	// Pending is the HSM key that is being made, nil for none.
	Pending *Pending
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// State is the state of a wrapping key.
type State string

// The states of a key. A generating key that has versions already works with them.
const (
	StateReady      State = "ready"
	StateGenerating State = "generating" // an HSM key is to be made, see [Keyring.Finish]
	StateAbandoning State = "abandoning" // an HSM key is to be undone, see [Keyring.Abandon]
	StateDeleting   State = "deleting"   // see [Keyring.Delete]
)

// Version is one generation of a wrapping key.
type Version struct {
	Number     int
	Created    time.Time
	CreatedBy  string
	Recipients []Recipient
	// ServedEncrypt is true once `encrypt/` sealed with this version: snapshots and backups of other Vaults depend on
	// its HSM keys from then on.
	ServedEncrypt bool
	// RecordRead is when a key record with this version was read, BackupConfirmed when a backup of its HSM keys was
	// confirmed; nil where nobody did. A record that was read may lack recipients that were added later.
	RecordRead, BackupConfirmed *Acknowledgement
	// KEK is the id of the version's key encryption key, its RFC 7638 thumbprint; empty where it has none.
	KEK string
	// Locked is true where a restored version's authentication key has not been opened by an HSM yet, because none of
	// its devices answered; the first use does that, at the cost of one more operation.
	Locked bool
}

// Recipient is an HSM key that can open a version's envelopes.
type Recipient struct {
	Device    string // name of the configured device
	Serial    string // of the HSM at adoption; empty where it did not tell
	Label, ID string // name of the key on it
	KID       string // [hsm.Fingerprint]
	Algorithm envelope.Algorithm
	Kind      hsm.Algorithm
	Public    crypto.PublicKey // *rsa.PublicKey or *ecdh.PublicKey
	// WeaknessesAccepted names what adoption would have refused without accept_weak_key.
	WeaknessesAccepted []string
	// AlsoUsableFor is [hsm.Traits.AlsoUsableFor] at adoption.
	AlsoUsableFor []string
	// Generated is true where the HSM key was made for this wrapping key, false where it was adopted or restored.
	Generated bool
	Added     time.Time
	AddedBy   string
}

// Acknowledgement says who took note of something, and when.
type Acknowledgement struct {
	By string    `json:"by"`
	At time.Time `json:"at"`
}

// Pending describes an HSM key that is being made.
type Pending struct {
	Device    string
	Algorithm hsm.Algorithm
	Label     string
	ID        string // the CKA_ID chosen beforehand
	RequestID string
	Version   int // the version that it will become
	Since     time.Time
	By        string
	// LastError is why the last [Keyring.Finish] failed, empty where none did.
	LastError string
}

// AdoptRequest names an HSM key that exists already.
type AdoptRequest struct {
	Device    string
	Label, ID string // at least one; together they must match exactly one key
	// AcceptWeak adopts a key that is extractable, not sensitive, or that the device lets be used for something else.
	AcceptWeak bool
	RequestID  string // makes a repeated request recognisable; optional
	By         string // display name of the caller, for the record
}

// GenerateRequest describes an HSM key to be made.
type GenerateRequest struct {
	Device    string
	Algorithm hsm.Algorithm
	Label     string // on the HSM; empty for "nitroseal-<name>-v<version>"
	RequestID string
	By        string
}

// RotateRequest says where the new version's HSM key comes from: exactly one of the two is set.
type RotateRequest struct {
	Adopt    *AdoptRequest
	Generate *GenerateRequest
}

// Settings are what [Keyring.Configure] changes. A nil field stays as it is.
type Settings struct {
	MinDecryptionVersion *int
	DeletionAllowed      *bool
	BackupConfirmed      *bool
	AcceptSingleHSM      *bool
	// Lease is 0 for strict mode, or [MinLease] to [MaxLease] in whole seconds. The first one makes a key encryption key
	// for the newest version and for the one that seals; it costs an HSM operation only where an authentication key was
	// not opened yet.
	Lease *time.Duration
	By    string
}

// DeleteRequest says how much is deleted.
type DeleteRequest struct {
	// DeleteHSMKeys destroys the HSM keys as well, all of which must have been made for this wrapping key. Nothing they
	// sealed can be opened ever after.
	DeleteHSMKeys bool
	// Force deletes the key without asking [Config.InUse].
	Force bool
	By    string
}

// Sealed is a new envelope.
type Sealed struct {
	Envelope   []byte
	Version    int
	Recipients int
	// Leased is true where it was sealed to a key encryption key, which it carries, see [Keyring.OpenLease].
	Leased bool
}

// Opened is what an envelope held.
type Opened struct {
	Payload []byte // the caller wipes it
	Context envelope.Context
	Version int
	// LatestVersion is the key's newest version: a rewrap is due where Version is less.
	LatestVersion int
	Device        string // that opened it, or the key encryption key that it was sealed to; empty where a lease did
	KID           string // of the HSM key or, where a lease opened it, of the key encryption key
	Recipients    int    // of the envelope, or of its key encryption key
	// Leased is true where it was sealed to a key encryption key, whether or not a lease of that was open.
	Leased bool
}

// Rewrapped is the answer to a rewrap.
type Rewrapped struct {
	Sealed
	// Changed is false where the envelope is the old one, because it is of the version that seals now and every
	// recipient of that is in it.
	Changed     bool
	FromVersion int
	Device      string // that opened the old envelope; empty where nothing changed
}

// KeyRecord is a wrapping key without its secrets.
type KeyRecord struct {
	Record []byte // canonical JSON
	SHA256 string // of Record, lower-case hexadecimal
}

// RestoreRequest brings a key back from its key record.
type RestoreRequest struct {
	Record []byte // as Backup returned it; white space may differ
	SHA256 string // what the operator confirms the record's SHA-256 to be
	// Devices maps device names of the record to today's, where they differ.
	Devices map[string]string
	// AcceptRecipients lets the record change a key that is here. Without it that is [ErrKeyExists], which names the recipients
	// and KEKs it would have more: who gives both record and SHA-256 says what a key in use seals to.
	AcceptRecipients bool
	// Deferred writes a key that is not here yet without asking an HSM: its authentication keys are opened at their first
	// use. That is for a program that has to start while its HSM is away.
	Deferred bool
	By       string
}

// Lease is a key encryption key that is held in memory. It holds no secret.
type Lease struct {
	Key     string
	Version int
	KID     string    // of the key encryption key
	Until   time.Time // when it is wiped, unless it is used shortly before
	Locked  bool      // the memory that it lies in is never written to swap space
}

// Purpose is what a key is to be used for, see [Keyring.Ready].
type Purpose string

// The purposes.
const (
	PurposeWrap     Purpose = "wrap"
	PurposeMaterial Purpose = "material"
	PurposeEncrypt  Purpose = "encrypt"
	PurposeCluster  Purpose = "cluster"
)
