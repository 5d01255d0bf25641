package custody

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// ReadOptions say where an item is looked for.
type ReadOptions struct {
	Store string // "" for the one that it has, or the default one
	By    string // display name of the caller, for a record that is begun
}

// Get describes an item. It reads the store, never an HSM, and succeeds for an item that would not open: State and
// Warnings say why.
func (k *Keeper) Get(ctx context.Context, cluster, name string, options ReadOptions) (Metadata, error) {
	i, err := k.look(ctx, cluster, name, options.Store)
	if err != nil {
		return Metadata{}, err
	}
	if i.state == "" {
		return Metadata{}, k.absent(ctx, i)
	}
	return k.metadata(ctx, i), nil
}

// Open returns the fields of an item at the cost of one private-key operation. The caller wipes them. An item that is
// stale, ahead or vanished fails before an HSM is asked.
func (k *Keeper) Open(ctx context.Context, cluster, name string, options ReadOptions) (Fields, Metadata, error) {
	i, err := k.look(ctx, cluster, name, options.Store)
	if err != nil {
		return nil, Metadata{}, err
	}
	payload, err := k.unseal(ctx, i)
	if err != nil {
		return nil, Metadata{}, err
	}
	defer clear(payload)
	fields, err := decodeFields(payload)
	if err != nil {
		return nil, Metadata{}, fmt.Errorf("opening %s: %w", describe(cluster, name), err)
	}
	opened := k.metadata(ctx, i)
	opened.Fields = fields.Names()
	opened.Warnings = append(opened.Warnings, k.settle(ctx, i, fields.Names(), options.By)...)
	return fields, opened, nil
}

// unseal returns an item's payload. The caller wipes it.
func (k *Keeper) unseal(ctx context.Context, i *item) ([]byte, error) {
	if i.state == "" {
		return nil, k.absent(ctx, i)
	}
	if err := i.problem(); err != nil {
		return nil, err
	}
	key := i.claimed.Key
	if i.state == StateCurrent {
		key = i.rec.Key
	}
	return k.unsealWith(ctx, i, key)
}

func (k *Keeper) unsealWith(ctx context.Context, i *item, key string) ([]byte, error) {
	opened, err := k.keys.Open(ctx, key, i.entry.Value, envelope.Context{
		Use: envelope.UseMaterial, Cluster: i.cluster, Name: i.name, Generation: i.claimed.Generation,
	})
	if err != nil {
		return nil, fmt.Errorf("opening %s from store %q: %w", describe(i.cluster, i.name), i.storeName, err)
	}
	return opened.Payload, nil
}

// settle notes in the record what opening an item has proved. A failure is a warning: the item is open.
func (k *Keeper) settle(ctx context.Context, i *item, fields []string, by string) (warnings []string) {
	switch i.state {
	case StateUnconfirmed:
		return k.confirm(ctx, i, i.claimed.Generation, func(rec *record) {
			rec.confirm(i.claimed.Generation)
			rec.Key, rec.Fields = i.claimed.Key, fields
		})
	case StateAhead:
		return k.catchUp(ctx, i, fields, by)
	case StateUnrecorded:
		begun := k.begin(i, fields, by)
		_, err := k.saveRecord(ctx, i.cluster, i.name, recorded{begun, store.NoRevision})
		if err == nil || errors.Is(err, store.ErrConflict) { // somebody else began one a moment ago
			return nil
		}
		k.logger.Warn("beginning a record failed", "cluster", i.cluster, "name", i.name, "error", err)
		return []string{fmt.Sprintf("Beginning a record failed (%v); open it again.", err)}
	default:
		return nil
	}
}

// catchUp notes in the record a generation that another keeper wrote. It never goes back: somebody may have seen a newer one
// meanwhile.
func (k *Keeper) catchUp(ctx context.Context, i *item, fields []string, by string) (warnings []string) {
	generation := i.claimed.Generation
	var before uint64
	err := k.updateRecord(ctx, i.cluster, i.name, func(rec *record) bool {
		if generation <= rec.Generation || generation <= rec.Buried {
			return false
		}
		before = rec.Generation
		rec.Highest = max(rec.Highest, generation)
		rec.confirm(generation)
		rec.Key, rec.Fields, rec.Updated, rec.UpdatedBy = i.claimed.Key, fields, k.today(), by
		return true
	})
	if err != nil {
		k.logger.Warn("noting what another host wrote failed", "cluster", i.cluster, "name", i.name, "generation", generation, "error", err)
		return []string{fmt.Sprintf("It is open, and noting generation %d in the record failed (%v); open it again.", generation, err)}
	}
	k.logger.Info("another host has written an item", "cluster", i.cluster, "name", i.name, "before", before, "generation", generation)
	return nil
}

// begin is a record that expects what was found.
func (k *Keeper) begin(i *item, fields []string, by string) *record {
	return &record{
		Store: i.storeName, Key: i.claimed.Key, Generation: i.claimed.Generation, Highest: i.claimed.Generation,
		Fields: fields, Created: k.today(), Updated: k.today(), UpdatedBy: by,
	}
}

// absent is the error for an item that is not there. Where a delete was cut short between the envelope and the
// gravestone, the gravestone is made now, so that nobody can put the envelope back.
func (k *Keeper) absent(ctx context.Context, i *item) error {
	if i.rec.record != nil && i.rec.mayBeGone() {
		if err := k.finishDelete(ctx, i); err != nil && !errors.Is(err, store.ErrConflict) {
			k.logger.Warn("recording a deletion failed", "cluster", i.cluster, "name", i.name, "error", err)
		}
	}
	return i.notFound()
}

func (i *item) notFound() error {
	return fmt.Errorf("%s in store %q: %w", describe(i.cluster, i.name), i.storeName, ErrNotFound)
}

// AcceptGeneration makes the record expect the envelope that the store holds, at the generation that the operator
// names: after a backup of the store or of the mount was restored. The envelope has to open, which costs one
// private-key operation. Generations that were given before are still never given again.
func (k *Keeper) AcceptGeneration(ctx context.Context, cluster, name string, generation uint64, options ReadOptions) (Metadata, error) {
	for range maxConflicts {
		i, err := k.look(ctx, cluster, name, options.Store)
		if err != nil {
			return Metadata{}, err
		}
		if !i.exists() {
			return Metadata{}, cmp.Or(i.problem(), i.notFound())
		}
		if i.claimed.Generation != generation {
			return Metadata{}, fmt.Errorf("accepting generation %d of %s: %w: the store holds generation %d",
				generation, describe(cluster, name), ErrConflict, i.claimed.Generation)
		}
		payload, err := k.unsealWith(ctx, i, i.claimed.Key)
		if err != nil {
			return Metadata{}, err
		}
		fields, err := decodeFields(payload)
		clear(payload)
		if err != nil {
			return Metadata{}, fmt.Errorf("opening %s: %w", describe(cluster, name), err)
		}
		fields.Wipe()
		accepted := k.begin(i, fields.Names(), options.By)
		if rec := i.rec.record; rec != nil {
			accepted.Highest, accepted.Created = max(generation, rec.Highest), rec.Created
		}
		saved, err := k.saveRecord(ctx, cluster, name, recorded{accepted, i.rec.revision})
		if errors.Is(err, store.ErrConflict) {
			continue
		}
		if err != nil {
			return Metadata{}, err
		}
		k.logger.Warn("a generation was accepted by an operator", "cluster", cluster, "name", name, "generation", generation, "by", options.By)
		i.rec, i.state = saved, StateCurrent
		return k.metadata(ctx, i), nil
	}
	return Metadata{}, fmt.Errorf("accepting generation %d of %s: %w: others change it all the time; try again", generation, describe(cluster, name), ErrConflict)
}
