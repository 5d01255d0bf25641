package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// kindItems names the items of a kind that the store has or should have, in order.
func (k *Custodian) kindItems(ctx context.Context, c *Cluster, kind Kind) ([]string, error) {
	names, err := k.itemNames(ctx, c)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(name string) bool {
		head, _, _ := strings.Cut(name, ".")
		return head != string(kind)
	}), nil
}

// dropItem deletes an item, whatever state it is in. One that is not there is fine.
func (k *Custodian) dropItem(ctx context.Context, c *Cluster, name string) error {
	generation, err := k.generation(ctx, c, name)
	if err != nil {
		return err
	}
	options := custody.DeleteOptions{Store: c.Store, By: k.host}
	if generation > 0 {
		options.CAS = &generation
	}
	err = k.keeper.Delete(ctx, c.Name, name, options)
	if errors.Is(err, custody.ErrNotFound) {
		return nil
	}
	return err
}

// generation is what an item is at that is to be written or deleted without having been opened; 0 where there is none.
func (k *Custodian) generation(ctx context.Context, c *Cluster, name string) (uint64, error) {
	metadata, err := k.keeper.Get(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: k.host})
	switch {
	case errors.Is(err, custody.ErrNotFound):
		return 0, nil
	case err != nil:
		return 0, err
	case metadata.State == custody.StateVanished:
		return metadata.Expected, nil
	}
	return metadata.Generation, nil
}

// putOver is put for an item that was not opened. Where it is out of order, as one that another host has written, it is deleted
// first: nobody needs what it holds.
func (k *Custodian) putOver(ctx context.Context, c *Cluster, item *materialItem, fields custody.Fields, by, request string) error {
	err := k.put(ctx, c, item, fields, by, request)
	if !errors.Is(err, custody.ErrAhead) && !errors.Is(err, custody.ErrStale) {
		return err
	}
	if err := k.dropItem(ctx, c, item.name); err != nil {
		return err
	}
	item.generation = 0
	return k.put(ctx, c, item, fields, by, request)
}

// heal prepares the items of the configuration that did not open, to be made anew with the new shares alone. The keys from
// before stay in the items that opened, which hold the threshold, until Vault has verified the new ones. One whose HSM is away
// so that nothing can be sealed for it is left out.
func (r *rekey) heal(ctx context.Context) error {
	var kept []materialItem
	for _, item := range r.m.items {
		if len(item.sets) > 0 || item.foreign {
			kept = append(kept, item)
			continue
		}
		if item.lost != nil && errors.Is(item.lost, store.ErrUnavailable) {
			return item.lost // it is the store that is away
		}
		probe := envelope.Context{Use: envelope.UseMaterial, Cluster: r.c.Name, Name: "probe." + item.name, Generation: 1}
		switch _, err := r.k.keyring.Seal(ctx, item.key, probe, []byte("probe")); {
		case err == nil:
		case item.lost == nil: // it never was there: the configuration was changed to a key that does not work
			return fmt.Errorf("cluster %q: the key %q, which its shares are to be dealt to: %w", r.c.Name, item.key, err)
		default:
			r.warn("The item %q could not be opened, and no new shares can be sealed for it: %v. It was left as it is, and is of no use any more: give the "+
				"key %q a new version on another HSM, or take another key in its place, and rekey again.", item.name, err, item.key)
			continue
		}
		var err error
		if item.generation, err = r.k.generation(ctx, r.c, item.name); err != nil {
			return err
		}
		if item.lost != nil {
			r.warn("The item %q could not be opened, and is made anew with the new shares: %v.", item.name, item.lost)
		}
		kept = append(kept, item)
	}
	own := 0
	for _, item := range kept {
		if !item.foreign {
			own++
		}
	}
	if own < r.c.needed() {
		return fmt.Errorf("cluster %q: %w: new shares could be sealed to %d of its wrapping keys, and %d are needed", r.c.Name, ErrInvalid, own, r.c.needed())
	}
	r.m.items = kept
	return nil
}

func (r *rekey) warn(format string, arguments ...any) {
	warning := fmt.Sprintf(format, arguments...)
	r.k.logger.Warn(warning, "cluster", r.c.Name)
	r.result.Warnings = append(r.result.Warnings, warning)
}

// dropForeign deletes the items that another configuration dealt shares to, when those of this one hold the active set.
func (r *rekey) dropForeign(ctx context.Context) error {
	active := r.m.active()
	if active == nil || slices.ContainsFunc(r.m.items, func(item materialItem) bool {
		_, held := item.sets[active.ID]
		return held == item.foreign // a foreign one has it, or one of ours has not
	}) {
		return nil
	}
	if len(active.Indices)+len(active.People) < active.Shares {
		return nil // one that did not open may have the others
	}
	foreign, err := r.k.foreignItems(ctx, r.c, r.kind)
	if err != nil {
		return err
	}
	for _, item := range foreign {
		if err := r.k.dropItem(ctx, r.c, item.name); err != nil {
			return fmt.Errorf("cluster %q: its shares are dealt anew, and deleting the old item %q failed; run it again: %w", r.c.Name, item.name, err)
		}
	}
	r.m.items = slices.DeleteFunc(r.m.items, func(item materialItem) bool { return item.foreign })
	return nil
}
