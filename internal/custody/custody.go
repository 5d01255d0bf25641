// Package custody keeps the material of clusters: unseal keys, recovery keys, tokens, any named secret of one or more
// fields. An item is one envelope in a store, so that opening it costs one operation in one HSM.
//
// A store sees, keeps and may lose envelopes, and whoever can write it may put an older one back. What protects against
// that is the generation in the envelope's context and, outside the store, a record of the one that is expected
// ([Config.Records], the mount's own storage). Generations of an item count up and are never given twice, not even
// after the item was deleted. A write goes through these states, each step one compare-and-swap:
//
//	record             store    what it means
//	g                  g        at rest
//	g, pending n       g        1. the record foresees n: a crash here leaves g, which opens
//	g, pending n       n        2. the envelope is replaced: both g and n are foreseen, so n opens
//	n                  n        3. confirmed: g does not open any more
//
// Where a write ended unclear, pending keeps all generations that it may have left. Whoever opens the item next sees
// which one it is and confirms it. A delete goes the same way: the intention is recorded, the envelope is deleted, the
// record becomes a gravestone that remembers the last generation.
//
// An envelope older than the record does not open ([ErrStale]), nor does one that is newer than anything foreseen
// ([ErrAhead]: the record was restored from a backup, or another mount writes the store), until an operator accepts it.
// Where there is no record at all, as after the loss of the mount, the first open says so and begins one.
//
// Where several keepers with records of their own write one store ([Config.Shared]), nobody foresees what the others write.
// What a keeper has seen counts up all the same: an envelope that is newer than its record is opened, which proves that it was
// made by one who has the wrapping key, and the record catches up; an older one stays ErrStale.
package custody

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Keys seals and opens envelopes with named wrapping keys. *keyring.Keyring does.
type Keys interface {
	Seal(ctx context.Context, name string, c envelope.Context, payload []byte) (keyring.Sealed, error)
	Open(ctx context.Context, name string, raw []byte, want envelope.Context) (keyring.Opened, error)
	Get(ctx context.Context, name string) (*keyring.Key, error)
	// Lives returns keyring.ErrKeyNotFound or keyring.ErrDeleting where the key is gone or going, and asks no cache.
	Lives(ctx context.Context, name string) error
}

// Stores opens stores by the names that they were configured with.
type Stores interface {
	// Store returns an open store, which stays the callee's to close.
	Store(ctx context.Context, name string) (store.Store, error)
}

// Config is what a [Keeper] is made of.
type Config struct {
	Keys   Keys
	Stores Stores
	// Records keeps what is expected of the stores, "material/<cluster>/<name>". It must not be one of the stores.
	Records store.Store
	// Shared is set where other keepers, with records of their own, write the same stores: hosts that share an etcd.
	Shared bool
	// DefaultStore names the store of items that name none and have no record; nil or "" for none.
	DefaultStore func(ctx context.Context) (string, error)
	Logger       *slog.Logger     // nil for none
	Now          func() time.Time // nil for time.Now
}

// Keeper keeps material. Its methods are safe for concurrent use, and so are several keepers over the same records.
type Keeper struct {
	keys         Keys
	stores       Stores
	records      store.Store
	shared       bool
	defaultStore func(ctx context.Context) (string, error)
	logger       *slog.Logger
	now          func() time.Time
}

// New returns a keeper. It does no I/O.
func New(config Config) *Keeper {
	k := &Keeper{
		keys:         config.Keys,
		stores:       config.Stores,
		records:      config.Records,
		shared:       config.Shared,
		defaultStore: config.DefaultStore,
		logger:       config.Logger,
		now:          config.Now,
	}
	if k.defaultStore == nil {
		k.defaultStore = func(context.Context) (string, error) { return "", nil }
	}
	if k.logger == nil {
		k.logger = slog.New(slog.DiscardHandler)
	}
	if k.now == nil {
		k.now = time.Now
	}
	return k
}

// The errors of this package. They are wrapped in a sentence that names the item and says what to do: ask with
// errors.Is. Errors of the store, the keyring, the HSM and the envelope come through beside them.
var (
	// ErrInvalid: the request itself is wrong.
	ErrInvalid = errors.New("invalid request")
	// ErrNotFound: there is no such item.
	ErrNotFound = errors.New("no such material")
	// ErrConflict: the item is at another generation than the request expects.
	ErrConflict = errors.New("the material is at another generation")
	// ErrStale: the store holds an older envelope than the record expects.
	ErrStale = errors.New("an older generation lies in the store")
	// ErrAhead: the store holds a newer envelope than the record foresees.
	ErrAhead = errors.New("a newer generation than expected lies in the store")
	// ErrVanished: the record expects an envelope and the store holds none.
	ErrVanished = errors.New("the envelope has vanished from the store")
	// ErrUnrecorded: there is an envelope in the store that this mount has no record of.
	ErrUnrecorded = errors.New("the material is not recorded here")
	// ErrRecordMalformed: the record is not one of ours, or damaged.
	ErrRecordMalformed = errors.New("malformed record of material")
)

// State says how store and record stand to each other.
type State string

// The states of an item.
const (
	StateCurrent     State = "current"     // as expected
	StateUnconfirmed State = "unconfirmed" // a write ended unclear; opening the item confirms what it left
	StateUnrecorded  State = "unrecorded"  // no record here; opening the item begins one
	StateStale       State = "stale"       // ErrStale
	StateAhead       State = "ahead"       // ErrAhead, or where keepers share the store: somebody wrote it, opening it catches up
	StateVanished    State = "vanished"    // ErrVanished
)

// Metadata describes an item. It holds no secret. What concerns the envelope is what it claims of itself; only opening
// it proves that.
type Metadata struct {
	Cluster, Name string
	State         State
	Store         string
	Key           string // wrapping key of the envelope
	Version       int    // of the wrapping key
	// LatestVersion is the wrapping key's newest version, 0 where the key is not known here.
	LatestVersion int
	// Generation is the envelope's, 0 where it vanished. Expected is the record's, 0 where there is none.
	Generation, Expected uint64
	// KIDs are the HSM keys that open the envelope, HSMs on how many devices they lie.
	KIDs []string
	HSMs int
	// Size of the envelope in bytes.
	Size int
	// Fields are the names of the fields, where the record tells.
	Fields           []string
	Created, Updated time.Time // zero where the record does not tell
	UpdatedBy        string
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// storePrefix is where items lie, in stores and records alike.
const storePrefix = "material/"

// path is where an item lies.
func path(cluster, name string) string { return storePrefix + cluster + "/" + name }

// checkItem returns ErrInvalid where cluster or name cannot be part of a path.
func checkItem(cluster, name string) error {
	for _, part := range []struct{ what, name string }{{"cluster", cluster}, {"name", name}} {
		if strings.Contains(part.name, "/") {
			return fmt.Errorf("%w: the %s %q contains \"/\"", ErrInvalid, part.what, part.name)
		}
		if err := store.CheckName(part.name); err != nil {
			return fmt.Errorf("%w: the %s: %w", ErrInvalid, part.what, err)
		}
	}
	if err := store.CheckName(path(cluster, name)); err != nil {
		return fmt.Errorf("%w: cluster and name together: %w", ErrInvalid, err)
	}
	return nil
}

// describe names an item in errors.
func describe(cluster, name string) string {
	return fmt.Sprintf("material %q of cluster %q", name, cluster)
}
