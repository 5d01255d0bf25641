package kmsplugin

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// records is a store that ends with its wrapper: what a key record says is read from its file at each SetConfig.
type records struct {
	mu      sync.Mutex
	entries map[string]store.Entry
	writes  int
}

var _ store.Store = (*records)(nil)

func newRecords() *records { return &records{entries: map[string]store.Entry{}} }

// enter begins what is done with a name, unless the name is none or the caller has gone. leave ends it.
func (r *records) enter(ctx context.Context, name string) (leave func(), err error) {
	if err := store.CheckName(name); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	return r.mu.Unlock, nil
}

// Get implements [store.Store].
func (r *records) Get(ctx context.Context, name string) (store.Entry, error) {
	leave, err := r.enter(ctx, name)
	if err != nil {
		return store.Entry{}, err
	}
	defer leave()
	entry, known := r.entries[name]
	if !known {
		return store.Entry{}, fmt.Errorf("%q: %w", name, store.ErrNotFound)
	}
	entry.Value = slices.Clone(entry.Value)
	return entry, nil
}

// Put implements [store.Store].
func (r *records) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := store.CheckValue(value, store.MaxValueSize); err != nil {
		return "", err
	}
	leave, err := r.enter(ctx, name)
	if err != nil {
		return "", err
	}
	defer leave()
	if r.entries[name].Revision != expected {
		return "", fmt.Errorf("%q: %w", name, store.ErrConflict)
	}
	r.writes++
	revision := store.Revision(strconv.Itoa(r.writes))
	r.entries[name] = store.Entry{Value: slices.Clone(value), Revision: revision}
	return revision, nil
}

// List implements [store.Store].
func (r *records) List(ctx context.Context, prefix string) ([]string, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var names []string
	for name := range r.entries {
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Delete implements [store.Store].
func (r *records) Delete(ctx context.Context, name string, expected store.Revision) error {
	leave, err := r.enter(ctx, name)
	if err != nil {
		return err
	}
	defer leave()
	entry, known := r.entries[name]
	switch {
	case !known:
		return fmt.Errorf("%q: %w", name, store.ErrNotFound)
	case entry.Revision != expected:
		return fmt.Errorf("%q: %w", name, store.ErrConflict)
	}
	delete(r.entries, name)
	return nil
}

// Close implements [store.Store].
func (r *records) Close() error { return nil }
