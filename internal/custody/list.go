package custody

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Ref names an item.
type Ref struct{ Cluster, Name string }

// List names the items of a cluster, of all clusters where it is "", in order: those that the records expect, and those
// that lie in their stores and in the default one without a record. A store that does not answer is a warning, and its
// items are listed as the records know them.
func (k *Keeper) List(ctx context.Context, cluster string) (items []Ref, warnings []string, err error) {
	items, warnings, _, err = k.list(ctx, cluster)
	return items, warnings, err
}

// list is List with the errors of the stores that could not be listed.
func (k *Keeper) list(ctx context.Context, cluster string) (items []Ref, warnings []string, unseen []error, err error) {
	prefix := storePrefix
	if cluster != "" {
		if err := checkItem(cluster, "x"); err != nil {
			return nil, nil, nil, err
		}
		prefix += cluster + "/"
	}
	paths, err := k.records.List(ctx, prefix)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("listing the records of material: %w", err)
	}
	found := map[Ref]bool{}
	stores := map[string]bool{}   // to be asked
	unclear := map[string][]Ref{} // by store: items of which only the store knows whether they exist
	defaultStore, err := k.defaultStore(ctx)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("looking up the default store: %w", err)
	}
	if defaultStore != "" {
		stores[defaultStore] = true
	}
	for _, p := range paths {
		ref, ok := parsePath(p)
		if !ok {
			continue
		}
		rec, err := k.loadRecord(ctx, ref.Cluster, ref.Name)
		if err != nil {
			found[ref] = true // it is there; opening it says what is wrong
			warnings = append(warnings, err.Error())
			continue
		}
		switch {
		case rec.record == nil || rec.Deleted && rec.Pending == nil:
		case rec.Generation == 0 || rec.mayBeGone(): // a delete or a first write ended unclear
			stores[rec.Store] = true
			unclear[rec.Store] = append(unclear[rec.Store], ref)
		default:
			stores[rec.Store] = true
			found[ref] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(stores)) {
		stored, err := k.listStore(ctx, name, prefix)
		if err != nil {
			unseen = append(unseen, fmt.Errorf("listing store %q: %w", name, err))
			warnings = append(warnings, fmt.Sprintf("Store %q could not be listed (%v); its items are those that are recorded here.", name, err))
			stored = unclear[name]
		}
		for _, ref := range stored {
			found[ref] = true
		}
	}
	items = slices.SortedFunc(maps.Keys(found), func(a, b Ref) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Name, b.Name))
	})
	return items, warnings, unseen, nil
}

func (k *Keeper) listStore(ctx context.Context, name, prefix string) ([]Ref, error) {
	s, err := k.stores.Store(ctx, name)
	if err != nil {
		return nil, err
	}
	paths, err := s.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	var refs []Ref
	for _, p := range paths {
		if ref, ok := parsePath(p); ok {
			refs = append(refs, ref)
		}
	}
	return refs, nil
}

// parsePath is the opposite of path.
func parsePath(p string) (Ref, bool) {
	rest, ok := strings.CutPrefix(p, storePrefix)
	if !ok {
		return Ref{}, false
	}
	cluster, name, ok := strings.Cut(rest, "/")
	return Ref{cluster, name}, ok && checkItem(cluster, name) == nil
}

// Survey counts how well material is guarded. "12 of 40 open on one HSM only" are SingleHSM and Items.
type Survey struct {
	Items     int // envelopes that lie in stores
	SingleHSM int // open on one HSM only
	Outdated  int // are not sealed to the newest version of their wrapping key with all its recipients
	// Problems are sentences about items that would not open, or could not be looked at.
	Problems []string
	// Warnings are about stores that could not be listed.
	Warnings []string
	// Unseen are the errors of what could not be looked at, each of which Problems or Warnings tell of: stores that could
	// not be listed, and items that could not be read.
	Unseen []error
}

// Survey looks at all items whose envelope has that wrapping key, at all items where key is "". It asks stores, never an
// HSM.
func (k *Keeper) Survey(ctx context.Context, key string) (Survey, error) {
	refs, warnings, unseen, err := k.list(ctx, "")
	if err != nil {
		return Survey{}, err
	}
	survey := Survey{Warnings: warnings, Unseen: unseen}
	for _, ref := range refs {
		if err := ctx.Err(); err != nil {
			return survey, err
		}
		i, err := k.look(ctx, ref.Cluster, ref.Name, "")
		switch {
		case err != nil:
			survey.Problems, survey.Unseen = append(survey.Problems, err.Error()), append(survey.Unseen, err)
			continue
		case i.state == "" || key != "" && i.key() != key:
			continue
		}
		if problem := i.problem(); problem != nil {
			survey.Problems = append(survey.Problems, problem.Error())
		}
		if i.exists() {
			k.count(ctx, &survey, i)
		}
	}
	return survey, nil
}

// count adds an envelope to a survey.
func (k *Keeper) count(ctx context.Context, survey *Survey, i *item) {
	survey.Items++
	if _, devices, _, _ := k.recipients(ctx, i); devices == 1 {
		survey.SingleHSM++
	}
	outdated, err := k.outdated(ctx, i)
	switch {
	case err != nil:
		survey.Problems = append(survey.Problems, err.Error())
	case outdated:
		survey.Outdated++
	}
}
