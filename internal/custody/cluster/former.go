package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// The keys from before the last rekey are kept in items of their own: "former", or "former.<key>" for each item of a spread, and
// "former-recovery" for recovery keys. Two things want them when Vault has long taken the new ones: a node of raft storage
// that missed the rekey, because it was sealed or down, reads from its own disk how it is unsealed, and learns of the new keys
// only once it is; and a snapshot from before the rekey. The next rekey puts those from before it in their place.
const (
	itemFormer         = "former"
	itemFormerRecovery = "former-recovery"
)

// IsItem tells whether the name of an item is one that custody uses: what opens a cluster lies there.
func IsItem(name string) bool {
	head, _, _ := strings.Cut(name, ".")
	return slices.Contains([]string{string(KindUnseal), string(KindRecovery), itemRoot, itemFormer, itemFormerRecovery}, head)
}

// formerHead is what the names of the former items of a kind begin with.
func formerHead(kind Kind) string {
	if kind == KindRecovery {
		return itemFormerRecovery
	}
	return itemFormer
}

// formerName is the name of the former item of an item.
func formerName(kind Kind, item string) string {
	return formerHead(kind) + strings.TrimPrefix(item, string(kind))
}

// formerItems names the former items of a kind that are there.
func (k *Custodian) formerItems(ctx context.Context, c *Cluster, kind Kind) ([]string, error) {
	names, err := k.itemNames(ctx, c)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(name string) bool {
		head, _, _ := strings.Cut(name, ".")
		return head != formerHead(kind)
	}), nil
}

// keepFormer writes the active set into the former items, each by compare-and-swap, and deletes those that are left of an
// earlier one. Done twice it is the same. It is done before the set is dropped.
func (k *Custodian) keepFormer(ctx context.Context, c *Cluster, m *material, by string) error {
	active := m.active()
	if active == nil {
		return nil
	}
	former := &material{Facts: m.Facts, shares: m.shares, messages: m.messages}
	set := *active
	set.State, set.VerificationNonce = SetFormer, ""
	former.Sets = []Set{set}
	var written []string
	for _, of := range m.items {
		own, held := of.sets[set.ID]
		if !held {
			continue
		}
		own.state = SetFormer
		item := &materialItem{name: formerName(m.Kind, of.name), key: of.key, sets: map[string]part{set.ID: own}}
		err := k.putFormer(ctx, c, former, item, by)
		if err != nil && of.foreign && !passing(err) { // its wrapping key is not to be used any more, and may not be
			k.logger.Warn("the keys from before a rekey could not be kept under the old wrapping key", "cluster", c.Name, "item", item.name, "error", err)
			continue
		}
		if err != nil {
			return fmt.Errorf("keeping the keys from before the rekey as %q: %w", item.name, err)
		}
		written = append(written, item.name)
	}
	names, err := k.formerItems(ctx, c, m.Kind)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !slices.Contains(written, name) {
			if err := k.dropItem(ctx, c, name); err != nil {
				return fmt.Errorf("deleting the keys from before an earlier rekey, %q: %w", name, err)
			}
		}
	}
	return nil
}

// passing tells whether it is a store that failed, or a caller that has gone, and the next run may do better.
func passing(err error) bool {
	return slices.ContainsFunc([]error{
		store.ErrUnavailable, store.ErrFull, store.ErrDenied, custody.ErrConflict, context.Canceled, context.DeadlineExceeded,
	}, func(of error) bool { return errors.Is(err, of) })
}

func (k *Custodian) putFormer(ctx context.Context, c *Cluster, m *material, item *materialItem, by string) error {
	fields, err := m.fields(*item)
	if err != nil {
		return err
	}
	if item.generation, err = k.generation(ctx, c, item.name); err != nil {
		return err
	}
	return k.putOver(ctx, c, item, fields, by, newID())
}

// loadFormer opens the former items until the keys from before the last rekey are in hand, each at the cost of one HSM
// operation. It is nil where there are none.
func (k *Custodian) loadFormer(ctx context.Context, c *Cluster, kind Kind) (*material, error) {
	names, err := k.formerItems(ctx, c, kind)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	g := &gathering{k: k, c: c, kind: kind}
	for _, name := range names {
		g.open(ctx, materialItem{name: name, foreign: true})
		if g.former() != nil {
			break
		}
	}
	if len(g.parts) == 0 && onlyNotFound(join(g.errs...)) {
		return nil, nil //nolint:nilnil // none is the ordinary case
	}
	m, err := g.material()
	if err != nil {
		return nil, fmt.Errorf("from before the last rekey: %w", err)
	}
	if m.formerSet() == nil {
		m.wipe()
		return nil, fmt.Errorf("the %s keys of cluster %q from before the last rekey: %w", kind, c.Name, join(append(g.errs, ErrFacts)...))
	}
	m.items = slices.DeleteFunc(m.items, func(item materialItem) bool { return len(item.sets) == 0 })
	return m, nil
}

// former is the set that is in hand, nil for none.
func (g *gathering) former() *Set {
	if len(g.parts) == 0 {
		return nil
	}
	m, err := merge(g.parts)
	if err != nil {
		return nil
	}
	return m.formerSet()
}

func (m *material) formerSet() *Set {
	for _, set := range m.inState(SetFormer) {
		if m.inHand(set) {
			return set
		}
	}
	return nil
}

// formerStatus adds how the keys from before the last rekey are kept.
func (k *Custodian) formerStatus(ctx context.Context, c *Cluster, s *Status) {
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		names, err := k.formerItems(ctx, c, kind)
		if err != nil {
			return // of the store, the other items tell
		}
		for _, name := range names {
			item := MaterialStatus{Item: name, Kind: kind}
			if item.Metadata, item.Err = k.keeper.Get(ctx, c.Name, name, custody.ReadOptions{Store: c.Store}); !errors.Is(item.Err, custody.ErrNotFound) {
				s.Material = append(s.Material, item)
			}
		}
	}
}
