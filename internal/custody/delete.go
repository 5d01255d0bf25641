package custody

import (
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// DeleteOptions say what is deleted.
type DeleteOptions struct {
	Store string // "" for the one that the item has, or the default one
	// CAS is the generation that the item must be at, nil for any. An item without a record is deleted only by it.
	CAS *uint64
	By  string
}

// Delete removes an item from its store for good. It may be called again after any failure or crash and goes on where
// it stopped. The record stays as a gravestone, so that no old envelope comes back to life.
func (k *Keeper) Delete(ctx context.Context, cluster, name string, options DeleteOptions) error {
	for range maxConflicts {
		i, err := k.look(ctx, cluster, name, options.Store)
		if err != nil {
			return err
		}
		if options.CAS != nil && *options.CAS != i.current() && !i.wasDeletedAt(*options.CAS) {
			return fmt.Errorf("deleting %s: %w: it is at generation %d and the request expects %d; read it again",
				describe(cluster, name), ErrConflict, i.current(), *options.CAS)
		}
		if i.state == StateUnrecorded && options.CAS == nil {
			return fmt.Errorf("deleting %s from store %q: %w: give cas=%d to delete it",
				describe(cluster, name), i.storeName, ErrUnrecorded, i.claimed.Generation)
		}
		if i.exists() {
			err = k.remove(ctx, i, options.By)
		} else {
			err = k.finishDelete(ctx, i)
		}
		if !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return fmt.Errorf("deleting %s: %w: others change it all the time; try again", describe(cluster, name), ErrConflict)
}

// wasDeletedAt tells whether a deletion at that generation has happened: a client that got no answer sends it again.
func (i *item) wasDeletedAt(generation uint64) bool {
	rec := i.rec.record
	return i.state == "" && rec != nil && (rec.Deleted || rec.mayBeGone()) && 0 < generation && generation <= rec.Highest
}

// finishDelete turns the record of an item whose envelope is gone into a gravestone.
func (k *Keeper) finishDelete(ctx context.Context, i *item) error {
	rec := i.rec
	if rec.record == nil || rec.Deleted {
		return i.notFound()
	}
	rec.bury(max(rec.Generation, rec.Deleting))
	_, err := k.saveRecord(ctx, i.cluster, i.name, rec)
	return err
}

// remove deletes an envelope: the intention, the envelope, the gravestone. store.ErrConflict says that the item has
// changed since it was looked at.
func (k *Keeper) remove(ctx context.Context, i *item, by string) error {
	rec, generation := i.rec, i.claimed.Generation
	if rec.record == nil {
		rec.record = k.begin(i, nil, by)
	}
	// Else somebody put an old envelope on the grave.
	if !rec.Deleted || i.state == StateUnconfirmed || i.state == StateAhead {
		rec.Deleting, rec.Deleted, rec.Highest = max(rec.Generation, generation), false, max(rec.Highest, generation)
		rec.Updated, rec.UpdatedBy = k.today(), by
		if _, err := k.saveRecord(ctx, i.cluster, i.name, rec); err != nil {
			return err
		}
	}
	err := i.store.Delete(ctx, path(i.cluster, i.name), i.entry.Revision)
	if err != nil && !errors.Is(err, store.ErrNotFound) && !k.gone(ctx, i) {
		return fmt.Errorf("deleting %s from store %q: %w", describe(i.cluster, i.name), i.storeName, err)
	}
	err = k.updateRecord(ctx, i.cluster, i.name, func(now *record) bool {
		if now.Deleting != rec.Deleting || !now.mayBeGone() {
			return false // somebody has begun the item anew
		}
		now.bury(now.Deleting)
		return true
	})
	if err != nil { // the item is gone, and who comes next sees that it was meant to be
		k.logger.Warn("recording a deletion failed", "cluster", i.cluster, "name", i.name, "error", err)
	}
	return nil
}

// gone tells whether the store holds nothing under an item's name: the only way to know after a delete that failed.
func (k *Keeper) gone(ctx context.Context, i *item) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	_, err := i.store.Get(ctx, path(i.cluster, i.name))
	return errors.Is(err, store.ErrNotFound)
}
