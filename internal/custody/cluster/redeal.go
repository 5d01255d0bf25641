package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/custody"
)

// kindItems names the items of a kind that the store has or should have, in order.
func (k *Custodian) kindItems(ctx context.Context, c *Cluster, kind Kind) ([]string, error) {
	refs, _, err := k.keeper.List(ctx, c.Name)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, ref := range refs {
		if ref.Name == string(kind) || strings.HasPrefix(ref.Name, string(kind)+".") {
			names = append(names, ref.Name)
		}
	}
	return names, nil
}

// asDealt is the cluster with the wrapping key or spread that its shares were dealt to, where the configuration has been
// changed since; else it is the cluster itself.
func (k *Custodian) asDealt(ctx context.Context, c *Cluster, kind Kind) (*Cluster, error) {
	names, err := k.kindItems(ctx, c, kind)
	if err != nil {
		return nil, err
	}
	ours := map[string]bool{}
	for _, key := range c.keys() {
		ours[c.item(kind, key)] = true
	}
	foreign := slices.IndexFunc(names, func(name string) bool { return !ours[name] })
	if foreign < 0 {
		return c, nil
	}
	name := names[foreign]
	metadata, err := k.keeper.Get(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: k.host})
	if err != nil {
		return nil, err
	}
	if metadata.State == custody.StateVanished { // the end of an earlier redeal: the record is all that is left
		if err := k.dropItem(ctx, c, name); err != nil {
			return nil, err
		}
		return k.asDealt(ctx, c, kind)
	}
	dealt := *c
	if name == string(kind) {
		dealt.Key, dealt.Spread = metadata.Key, nil
		return &dealt, nil
	}
	// The name of an item of a spread ends with its wrapping key; the facts in it tell the spread.
	fields, _, err := k.keeper.Open(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: k.host})
	if err != nil {
		return nil, err
	}
	defer fields.Wipe()
	facts, err := parseFacts(fields[fieldFacts])
	if err != nil {
		return nil, fmt.Errorf("opening material %q of cluster %q: %w", name, c.Name, err)
	}
	spread, err := ParseSpread(facts.Spread)
	if err != nil {
		return nil, fmt.Errorf("opening material %q of cluster %q: %w: %w", name, c.Name, ErrFacts, err)
	}
	dealt.Key, dealt.Spread = "", &spread
	for _, key := range spread.Keys {
		if ours[dealt.item(kind, key)] {
			return nil, fmt.Errorf("cluster %q: %w: its shares are dealt as %q, and the configuration says %q: both have an item of key %q, which cannot hold "+
				"the shares of both; rekey to one key first (key = %q in place of the spread), then to the new spread", c.Name, ErrInvalid, spread, c.Spread,
				key, key)
		}
	}
	return &dealt, nil
}

func (k *Custodian) dropItem(ctx context.Context, c *Cluster, name string) error {
	err := k.keeper.Delete(ctx, c.Name, name, custody.DeleteOptions{Store: c.Store, By: k.host})
	if errors.Is(err, custody.ErrNotFound) {
		return nil
	}
	return err
}

// redeal deals the shares of a cluster anew, from the wrapping keys that they were dealt to before to those of the
// configuration, and returns the material as it lies there. Vault is not asked, its keys stay. First all new items are
// written, then the old ones are deleted: a crash in between leaves one of the two whole, and the next rekey goes on.
func (k *Custodian) redeal(ctx context.Context, dealt, c *Cluster, m *material, by string) (*material, error) {
	if err := k.ready(ctx, c); err != nil {
		return nil, err
	}
	active := m.active()
	if c.Spread != nil {
		if err := c.checkDeal("the shares as they are", len(active.Indices), active.Threshold); err != nil {
			return nil, fmt.Errorf("cluster %q: %w", c.Name, err)
		}
	}
	next := &material{Facts: m.Facts, whole: true, shares: map[shareName][]byte{}, messages: map[shareName][]byte{}}
	next.Spread = ""
	if c.Spread != nil {
		next.Spread = c.Spread.String()
	}
	next.Sets = nil
	for _, key := range c.keys() {
		item := materialItem{name: c.item(m.Kind, key), key: key, sets: map[string]SetState{}}
		there, err := k.openItem(ctx, c, m.Kind, key)
		switch {
		case errors.Is(err, custody.ErrNotFound):
		case err != nil:
			return nil, err
		default: // an earlier redeal was cut off
			item.generation = there.items[0].generation
			same := there.Origin == m.Origin && there.set(active.ID) != nil
			there.wipe()
			if !same {
				return nil, fmt.Errorf("cluster %q: %w: the item %q holds other keys; find out which ones Vault takes, with `nitroseal verify`, and delete the "+
					"others", c.Name, ErrExists, item.name)
			}
		}
		next.items = append(next.items, item)
	}
	shares, messages := map[int][]byte{}, map[int][]byte{}
	for _, index := range active.Indices {
		shares[index] = slices.Clone(m.shares[shareName{active.ID, index}])
	}
	for _, person := range active.People {
		if message := m.messages[shareName{active.ID, person.Index}]; message != nil {
			messages[person.Index] = message
		}
	}
	next.add(*active, shares, messages)
	if err := k.save(ctx, c, next, by, newID()); err != nil {
		next.wipe()
		return nil, fmt.Errorf("cluster %q: dealing its shares anew, to %s; the old items are still there: %w", c.Name, strings.Join(c.keys(), ", "), err)
	}
	if err := k.dropDealt(ctx, dealt, m.Kind); err != nil {
		next.wipe()
		return nil, err
	}
	k.logger.Info("the shares of a cluster were dealt anew", "cluster", c.Name, "to", strings.Join(c.keys(), ", "))
	return next, nil
}

// redealt finishes a redeal that was cut off when all new items were written and the old ones were being deleted, and returns
// the material; nil where it had not come so far.
func (k *Custodian) redealt(ctx context.Context, dealt, c *Cluster, kind Kind) (*material, error) {
	m, err := k.loadAll(ctx, c, kind)
	if err != nil {
		return nil, nil //nolint:nilerr,nilnil // not all is there: the old items count
	}
	for _, key := range dealt.keys() {
		old, err := k.openItem(ctx, dealt, kind, key)
		if errors.Is(err, custody.ErrNotFound) {
			continue
		}
		same := err == nil && old.Origin == m.Origin && old.set(m.active().ID) != nil
		old.wipe()
		if err == nil && !same {
			err = fmt.Errorf("cluster %q: %w: the items %q and %q hold other keys each; find out which ones Vault takes, with `nitroseal verify --prove`, and "+
				"delete the others", c.Name, ErrExists, m.items[0].name, dealt.item(kind, key))
		}
		if err != nil {
			m.wipe()
			return nil, err
		}
	}
	if err := k.dropDealt(ctx, dealt, kind); err != nil {
		m.wipe()
		return nil, err
	}
	return m, nil
}

// dropDealt deletes the items of an earlier deal.
func (k *Custodian) dropDealt(ctx context.Context, dealt *Cluster, kind Kind) error {
	for _, key := range dealt.keys() {
		if err := k.dropItem(ctx, dealt, dealt.item(kind, key)); err != nil {
			return fmt.Errorf("cluster %q: its shares were dealt anew, and deleting the old item %q failed; run it again: %w", dealt.Name,
				dealt.item(kind, key), err)
		}
	}
	return nil
}
