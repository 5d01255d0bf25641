package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// newborn is an item that Vault has just made and nobody else has.
type newborn struct {
	materialItem

	fields custody.Fields
	stored bool
}

// heldFormat is the version of the format of [held].
const heldFormat = 1

// held is what waits on the local disk for the store to take it: all items of an initialisation in one value, so that a crash
// leaves all of them or none. Each is an envelope of its own, sealed with the wrapping key of the item, and opens as nothing
// else. As JSON:
//
//	{"format":1,"cluster":"prod","origin":"…","items":[{"item":"unseal","envelope":{…}},{"item":"root","envelope":{…}}]}
type held struct {
	Format  int        `json:"format"`
	Cluster string     `json:"cluster"`
	Origin  string     `json:"origin"`
	Items   []heldItem `json:"items"`
}

type heldItem struct {
	Item     string          `json:"item"`
	Envelope json.RawMessage `json:"envelope"`
}

// heldPrefix is where they wait, by the origin.
func heldPrefix(cluster string) string { return "held/" + cluster + "/" }

// heldContext is what such an envelope is made for.
func heldContext(cluster, item string) envelope.Context {
	return envelope.Context{Use: envelope.UseMaterial, Cluster: cluster, Name: "held." + item, Generation: 1}
}

// keepTime bounds each step of keep.
const keepTime = 30 * time.Second

// keep brings the keys of a new cluster to safety, whoever has gone meanwhile: sealed to the local disk first, which answers
// quickest, then to the store. It is nil when the store has all of them, and ErrHeld when the disk has what the store did not
// take. While neither has them it tries again, without end: nobody else has these keys.
func (k *Custodian) keep(ctx context.Context, c *Cluster, items []*newborn, by, origin string) error {
	ctx = context.WithoutCancel(ctx)
	safe := false
	for pause := k.pauses.keepFirst; ; pause = min(2*pause, k.pauses.keepLast) {
		var failed []error
		if !safe {
			err := bounded(ctx, func(ctx context.Context) error { return k.hold(ctx, c, items, origin) })
			safe, failed = err == nil, append(failed, err)
		}
		for _, item := range items {
			if !item.stored {
				failed = append(failed, bounded(ctx, func(ctx context.Context) error { return k.storeNew(ctx, c, item, by, origin) }))
			}
		}
		switch {
		case !slices.ContainsFunc(items, func(i *newborn) bool { return !i.stored }):
			return nil
		case safe:
			return fmt.Errorf("keeping the keys of cluster %q: %w, sealed, until store %q takes them; the next run stores them: %w", c.Name, ErrHeld,
				c.Store, join(failed...))
		}
		k.logger.Error("the keys of a new cluster are in the memory of this process only: neither the local disk nor the store takes them; "+
			"do not stop it, make room or bring the store back", "cluster", c.Name, "again_in", pause, "error", join(failed...))
		k.pause(ctx, pause)
	}
}

// bounded runs one step under a deadline of its own.
func bounded(ctx context.Context, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, keepTime)
	defer cancel()
	return step(ctx)
}

// hold seals items to the local disk. No HSM is touched.
func (k *Custodian) hold(ctx context.Context, c *Cluster, items []*newborn, origin string) error {
	h := held{Format: heldFormat, Cluster: c.Name, Origin: origin}
	for _, item := range items {
		payload, err := item.fields.Encode()
		if err != nil {
			return fmt.Errorf("sealing %q of cluster %q for the local disk: %w", item.name, c.Name, err)
		}
		sealed, err := k.keyring.Seal(ctx, item.key, heldContext(c.Name, item.name), payload)
		clear(payload)
		if err != nil {
			return fmt.Errorf("sealing %q of cluster %q for the local disk: %w", item.name, c.Name, err)
		}
		h.Items = append(h.Items, heldItem{item.name, sealed.Envelope})
	}
	raw, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("holding the keys of cluster %q on the local disk: %w", c.Name, err)
	}
	name := heldPrefix(c.Name) + origin
	_, err = k.local.Put(ctx, name, raw, store.NoRevision)
	if errors.Is(err, store.ErrConflict) { // an earlier try of ours, whose end was unclear
		var before store.Entry
		if before, err = k.local.Get(ctx, name); err == nil {
			_, err = k.local.Put(ctx, name, raw, before.Revision)
		}
	}
	if err != nil {
		return fmt.Errorf("holding the keys of cluster %q on the local disk: %w", c.Name, err)
	}
	return nil
}

// parseHeld reads what hold wrote.
func parseHeld(cluster string, raw []byte) (*held, error) {
	h := new(held)
	if err := json.Unmarshal(raw, h); err != nil {
		return nil, fmt.Errorf("%w: what is held on the local disk: %w", ErrFacts, err)
	}
	if h.Format != heldFormat || h.Cluster != cluster || !validID(h.Origin) || len(h.Items) == 0 {
		return nil, fmt.Errorf("%w: what is held on the local disk is of format %d and cluster %q", ErrFacts, h.Format, h.Cluster)
	}
	return h, nil
}

// storeNew stores an item under a request id by which its repeat is recognised.
func (k *Custodian) storeNew(ctx context.Context, c *Cluster, item *newborn, by, origin string) error {
	if err := k.put(ctx, c, &item.materialItem, item.fields, by, "init."+origin); err != nil {
		return err
	}
	item.stored = true
	return nil
}

// heldNow is what the local disk holds of a cluster, by its names there.
func (k *Custodian) heldNow(ctx context.Context, c *Cluster) (names []string, err error) {
	names, err = k.local.List(ctx, heldPrefix(c.Name))
	if err != nil {
		return nil, fmt.Errorf("looking for held keys of cluster %q: %w", c.Name, err)
	}
	return names, nil
}

// heldItems names the items that the local disk holds of a cluster.
func (k *Custodian) heldItems(ctx context.Context, c *Cluster) (items []string, err error) {
	names, err := k.heldNow(ctx, c)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		entry, err := k.local.Get(ctx, name)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		var h *held
		if err == nil {
			h, err = parseHeld(c.Name, entry.Value)
		}
		if err != nil {
			return nil, fmt.Errorf("looking at the held keys of cluster %q, %s: %w", c.Name, name, err)
		}
		for _, item := range h.Items {
			items = append(items, item.Item)
		}
	}
	return items, nil
}

// finishHeld stores what the local disk holds, at the cost of one HSM operation for each item, and removes it there. The local
// lock of the cluster is held. It is ErrHeld where something stays.
func (k *Custodian) finishHeld(ctx context.Context, c *Cluster) (stored []string, err error) {
	names, err := k.heldNow(ctx, c)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	for _, name := range names {
		items, err := k.finish(ctx, c, name)
		stored = append(stored, items...)
		if err != nil {
			return stored, fmt.Errorf("storing the keys of cluster %q: %w, sealed; it is tried again: %w", c.Name, ErrHeld, err)
		}
	}
	k.logger.Info("what was held on the local disk is stored", "cluster", c.Name, "items", stored)
	if err := k.settleIntent(ctx, c); err != nil {
		k.logger.Warn("the keys are stored, and the intent to make them could not be removed; it does no harm", "cluster", c.Name, "error", err)
	}
	return stored, nil
}

// finish stores what is held under one name.
func (k *Custodian) finish(ctx context.Context, c *Cluster, name string) (stored []string, err error) {
	entry, err := k.local.Get(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	h, err := parseHeld(c.Name, entry.Value)
	if err != nil {
		return nil, err
	}
	for _, item := range h.Items {
		if err := k.finishItem(ctx, c, item, h.Origin); err != nil {
			return stored, fmt.Errorf("item %q: %w", item.Item, err)
		}
		stored = append(stored, item.Item)
	}
	return stored, k.dropHeld(ctx, c, h.Origin)
}

// finishItem stores one held item, unless the store has it.
func (k *Custodian) finishItem(ctx context.Context, c *Cluster, item heldItem, origin string) error {
	parsed, err := envelope.Parse(item.Envelope)
	if err != nil {
		return err
	}
	key := parsed.Context().Key
	opened, err := k.keyring.Open(ctx, key, item.Envelope, heldContext(c.Name, item.Item))
	if err != nil {
		return err
	}
	defer clear(opened.Payload)
	fields, err := custody.DecodeFields(opened.Payload)
	if err != nil {
		return err
	}
	defer fields.Wipe()
	if sealed, err := originOf(fields); err != nil || sealed != origin {
		return join(err, fmt.Errorf("%w: it is of another origin than its place says", ErrFacts))
	}
	err = k.storeNew(ctx, c, &newborn{materialItem: materialItem{name: item.Item, key: key}, fields: fields}, k.host, origin)
	if errors.Is(err, custody.ErrConflict) {
		err = join2(err, k.sameOrigin(ctx, c, item.Item, origin))
	}
	if errors.Is(err, custody.ErrVanished) && item.Item == itemRoot {
		// The store had it, as the record here says, and another host has revoked and deleted it.
		return k.keeper.Delete(ctx, c.Name, itemRoot, custody.DeleteOptions{Store: c.Store, By: k.host})
	}
	return err
}

// join2 is nil where the second error is, because that has looked whether the first one was a failure, and else both.
func join2(first, second error) error {
	if second == nil {
		return nil
	}
	return join(first, second)
}

// sameOrigin is nil where the store has the item of that initialisation or import already, perhaps in a later generation.
func (k *Custodian) sameOrigin(ctx context.Context, c *Cluster, item, origin string) error {
	fields, _, err := k.keeper.Open(ctx, c.Name, item, custody.ReadOptions{Store: c.Store, By: k.host})
	if err != nil {
		return err
	}
	defer fields.Wipe()
	there, err := originOf(fields)
	if err == nil && there != origin {
		err = fmt.Errorf("%w: the store has another %q; find out which one the cluster takes, and delete the other", ErrExists, item)
	}
	return err
}

// dropHeld removes what is held under an origin from the local disk, now that it is stored.
func (k *Custodian) dropHeld(ctx context.Context, c *Cluster, origin string) error {
	name := heldPrefix(c.Name) + origin
	entry, err := k.local.Get(ctx, name)
	if err == nil {
		err = k.local.Delete(ctx, name, entry.Revision)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("removing the keys of cluster %q from the local disk, now that they are stored: %w", c.Name, err)
	}
	return nil
}

// settleIntent removes the intent of this host once its keys are in the store. The copy on the local disk goes last: while it is
// there the host knows that the intent was its own.
func (k *Custodian) settleIntent(ctx context.Context, c *Cluster) error {
	hostID, err := k.hostID(ctx)
	if err != nil {
		return err
	}
	s, err := k.store(ctx, c)
	if err != nil {
		return err
	}
	found, err := readIntent(ctx, s, c.Name)
	if err != nil {
		return err
	}
	if found.Intent != nil && (found.HostID == hostID || !found.alive(k.now())) {
		if err := removeIntent(ctx, s, found); err != nil {
			return err
		}
	}
	copied, err := readIntent(ctx, k.local, c.Name)
	if err != nil {
		return err
	}
	return removeIntent(ctx, k.local, copied)
}

// pause waits.
func (k *Custodian) pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
