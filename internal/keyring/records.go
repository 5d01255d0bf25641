package keyring

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// recordPrefix is where records lie in the store.
const recordPrefix = "keys/"

// maxConflicts is how often a change is begun anew because somebody else changed the record meanwhile.
const maxConflicts = 16

// afterwards is the time that is taken to learn or note how something ended whose caller has gone.
const afterwards = 5 * time.Second

// errNoChange is returned by a change that finds nothing to do.
var errNoChange = errors.New("no change")

// lookup returns the record of a key, from the cache where that is on.
func (k *Keyring) lookup(ctx context.Context, name string) (*record, error) {
	if rec := k.cache.get(name); rec != nil {
		return rec, nil
	}
	rec, _, err := k.load(ctx, name)
	return rec, err
}

// load reads the record of a key from the store.
func (k *Keyring) load(ctx context.Context, name string) (*record, store.Revision, error) {
	if err := checkName(name); err != nil {
		return nil, "", err
	}
	epoch := k.cache.epoch()
	entry, err := k.records.Get(ctx, recordPrefix+name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, "", fmt.Errorf("key %q: %w: make or adopt it first, or restore it from its key record", name, ErrKeyNotFound)
	}
	if err != nil {
		return nil, "", fmt.Errorf("reading the record of key %q: %w", name, err)
	}
	rec, err := decodeRecord(name, entry.Value)
	clear(entry.Value)
	if err == nil {
		err = k.own(rec).checkSealed()
	}
	if err != nil {
		return nil, "", err
	}
	k.cache.put(rec, epoch)
	return rec, entry.Revision, nil
}

// write puts a record where the store has the expected revision. It returns store.ErrConflict only where somebody
// else's record is there; a write that was made although the store answered with an error is a success.
func (k *Keyring) write(ctx context.Context, rec *record, expected store.Revision) error {
	if err := rec.validate(rec.Name); err != nil {
		return fmt.Errorf("writing the record of key %q: %w", rec.Name, err)
	}
	raw, err := rec.encode()
	if err != nil {
		return err
	}
	defer clear(raw)
	k.opened.keepAll(rec)
	k.cache.drop(rec.Name)
	defer k.cache.drop(rec.Name)
	_, err = k.records.Put(ctx, recordPrefix+rec.Name, bytes.Clone(raw), expected)
	if err != nil && !k.isStored(ctx, rec.Name, raw) {
		return fmt.Errorf("writing the record of key %q: %w", rec.Name, err)
	}
	return nil
}

// isStored tells whether the store holds exactly these bytes: the only way to know after a write that failed.
func (k *Keyring) isStored(ctx context.Context, name string, raw []byte) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	entry, err := k.records.Get(ctx, recordPrefix+name)
	if err != nil {
		return false
	}
	defer clear(entry.Value)
	return bytes.Equal(entry.Value, raw)
}

// update changes a record by compare-and-swap. The change gets a clone and is called again on the newest record where
// somebody else was faster; errNoChange leaves the record as it is. It returns the record as it is then.
func (k *Keyring) update(ctx context.Context, name string, change func(*record) error) (*record, error) {
	for range maxConflicts {
		rec, revision, err := k.load(ctx, name)
		if err != nil {
			return nil, err
		}
		next := rec.clone()
		if err := change(next); errors.Is(err, errNoChange) {
			return rec, nil
		} else if err != nil {
			return nil, err
		}
		err = k.write(ctx, next, revision)
		if err == nil {
			return next, nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("changing key %q: others changed it %d times meanwhile: %w: try again", name, maxConflicts, store.ErrConflict)
}

// List returns the names of all keys, sorted.
func (k *Keyring) List(ctx context.Context) ([]string, error) {
	names, err := k.records.List(ctx, recordPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing keys: %w", err)
	}
	for i := range names {
		names[i] = strings.TrimPrefix(names[i], recordPrefix)
	}
	return names, nil
}

// Get describes a key. It reads the store, never an HSM.
func (k *Keyring) Get(ctx context.Context, name string) (*Key, error) {
	rec, err := k.lookup(ctx, name)
	if err != nil {
		return nil, err
	}
	return describe(rec), nil
}

// Lives returns ErrKeyNotFound or ErrDeleting where a key is gone, or going together with its HSM keys. It reads the
// store, never the cache: who has stored what the key sealed asks it whether the key was deleted meanwhile.
func (k *Keyring) Lives(ctx context.Context, name string) error {
	rec, _, err := k.load(ctx, name)
	if err != nil {
		return err
	}
	if rec.Deleting != nil {
		return rec.settled()
	}
	return nil
}

// Invalidate forgets what is cached of a key because somebody else wrote its record; an empty name forgets all keys.
//
// A lease that it has no more ends.
func (k *Keyring) Invalidate(name string) {
	if name == "" {
		k.cache.clear()
	} else {
		k.cache.drop(name)
	}
	if leased := k.leased(name); len(leased) > 0 {
		k.background(func(ctx context.Context) { k.shortenAll(ctx, leased) })
	}
}

// shortenAll makes the leases of some keys no longer than their settings are in the store.
func (k *Keyring) shortenAll(ctx context.Context, names []string) {
	for _, name := range names {
		rec, err := k.lookup(ctx, name)
		switch {
		case errors.Is(err, ErrKeyNotFound):
			k.shorten(name, 0)
		case err != nil: // they end by themselves, and every use looks again
			k.logger.Warn("reading the lease of a key that somebody changed failed", "key", name, "error", err)
		default:
			k.shorten(name, rec.lease())
		}
	}
}

// recordCache holds parsed records. Off by default, and then all its methods do nothing.
type recordCache struct {
	on      bool
	mu      sync.RWMutex
	count   uint64 // of writes and invalidations
	records map[string]*record
}

func (c *recordCache) get(name string) *record {
	if !c.on {
		return nil
	}
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.records[name]
}

// epoch is taken before the store is read, and given to put: what was read before a write is not cached after it.
func (c *recordCache) epoch() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.count
}

func (c *recordCache) put(rec *record, epoch uint64) {
	if !c.on {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count != epoch {
		return
	}
	if c.records == nil {
		c.records = map[string]*record{}
	}
	c.records[rec.Name] = rec
}

func (c *recordCache) drop(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	delete(c.records, name)
}

func (c *recordCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	clear(c.records)
}
