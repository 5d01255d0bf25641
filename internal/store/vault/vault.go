// Package vault keeps values in the storage of the mount: logical.Storage, behind Vault's barrier, replicated and
// backed up with it.
//
// An entry is JSON, {"revision": …, "value": base64}, under prefix and name. Vault's storage has no compare-and-swap
// of its own; only the active node writes, and there one plugin process serves a mount, so a lock for each name
// ([Locks], kept by the backend and shared by the stores of all requests) makes it one. A revision is random, so it
// does not recur after a delete.
//
// Writing on a standby or a performance secondary fails with logical.ErrReadOnly, which errors.Is finds in what this
// package returns. Vault forwards a request only when the backend returns the bare sentinel: that is the backend's
// work.
package vault

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// Store is a part of a mount's storage. It holds nothing open and is cheap to make for each request.
type Store struct {
	storage logical.Storage
	prefix  string
	locks   *Locks
}

var _ store.Store = (*Store)(nil)

// New keeps values in storage under prefix, which is "" or ends in "/". All stores over one mount share locks; with
// locks of its own a store excludes only its own users.
func New(storage logical.Storage, prefix string, locks *Locks) *Store {
	return &Store{storage: storage, prefix: prefix, locks: locks}
}

// entry is what lies in Vault's storage. A JSON string would not keep every byte, so the value is base64.
type entry struct {
	Revision store.Revision `json:"revision"`
	Value    []byte         `json:"value"`
}

// Get implements [store.Store].
func (s *Store) Get(ctx context.Context, name string) (store.Entry, error) {
	if err := store.CheckName(name); err != nil {
		return store.Entry{}, err
	}
	found, err := s.read(ctx, name)
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q: %w", name, err)
	}
	return store.Entry{Value: found.Value, Revision: found.Revision}, nil
}

// Put implements [store.Store].
func (s *Store) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := store.CheckName(name); err != nil {
		return store.NoRevision, err
	}
	if err := store.CheckValue(value, store.MaxValueSize); err != nil {
		return store.NoRevision, fmt.Errorf("writing %q: %w", name, err)
	}
	revision, err := s.put(ctx, name, value, expected)
	if err != nil {
		return store.NoRevision, fmt.Errorf("writing %q: %w", name, err)
	}
	return revision, nil
}

func (s *Store) put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	unlock, err := s.locks.lock(ctx, s.prefix+name)
	if err != nil {
		return store.NoRevision, err
	}
	defer unlock()

	current, err := s.read(ctx, name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return store.NoRevision, err
	}
	if current.Revision != expected {
		return store.NoRevision, fmt.Errorf("%w: it is at revision %q, not %q", store.ErrConflict, current.Revision, expected)
	}
	next := entry{Revision: store.Revision(rand.Text()), Value: value}
	raw, err := json.Marshal(next)
	if err != nil {
		return store.NoRevision, fmt.Errorf("encoding the entry: %w", err)
	}
	if err := s.storage.Put(ctx, &logical.StorageEntry{Key: s.prefix + name, Value: raw}); err != nil {
		return store.NoRevision, explain(ctx, err)
	}
	return next.Revision, nil
}

// List implements [store.Store].
func (s *Store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, err
	}
	names, err := s.list(ctx, prefix)
	if err != nil {
		return nil, fmt.Errorf("listing %q: %w", prefix, err)
	}
	slices.Sort(names) // "a", "a-b", "a/b": folder by folder is not this order
	return names, nil
}

// list walks through the folders that Vault's storage shows one at a time.
func (s *Store) list(ctx context.Context, folder string) ([]string, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	parts, err := s.storage.List(ctx, s.prefix+folder)
	if err != nil {
		return nil, explain(ctx, err)
	}
	var names []string
	for _, part := range parts {
		if !strings.HasSuffix(part, "/") {
			names = append(names, folder+part)
			continue
		}
		below, err := s.list(ctx, folder+part)
		if err != nil {
			return nil, err
		}
		names = append(names, below...)
	}
	return names, nil
}

// Delete implements [store.Store].
func (s *Store) Delete(ctx context.Context, name string, expected store.Revision) error {
	if err := store.CheckName(name); err != nil {
		return err
	}
	if err := s.remove(ctx, name, expected); err != nil {
		return fmt.Errorf("deleting %q: %w", name, err)
	}
	return nil
}

func (s *Store) remove(ctx context.Context, name string, expected store.Revision) error {
	unlock, err := s.locks.lock(ctx, s.prefix+name)
	if err != nil {
		return err
	}
	defer unlock()

	current, err := s.read(ctx, name)
	if err != nil {
		return err
	}
	if current.Revision != expected {
		return fmt.Errorf("%w: it is at revision %q, not %q", store.ErrConflict, current.Revision, expected)
	}
	if err := s.storage.Delete(ctx, s.prefix+name); err != nil {
		return explain(ctx, err)
	}
	return nil
}

// Close implements [store.Store]; the storage is Vault's.
func (s *Store) Close() error { return nil }

func (s *Store) read(ctx context.Context, name string) (entry, error) {
	if err := ctx.Err(); err != nil {
		return entry{}, err
	}
	raw, err := s.storage.Get(ctx, s.prefix+name)
	if err != nil {
		return entry{}, explain(ctx, err)
	}
	if raw == nil {
		return entry{}, store.ErrNotFound
	}
	var found entry
	if err := json.Unmarshal(raw.Value, &found); err != nil || found.Revision == store.NoRevision {
		return entry{}, fmt.Errorf("%w: the mount's storage holds no entry of ours there", store.ErrCorrupt)
	}
	return found, nil
}

// explain gives an error of Vault's storage its meaning for users of a store.
func explain(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("asking the mount's storage: %w", ctx.Err())
	case errors.Is(err, logical.ErrReadOnly):
		return err
	// Between Vault and its plugins an error of the storage travels as text only; Vault compares it as text, too. It
	// has to get its identity back here, or nobody forwards the request to the active node.
	case strings.Contains(err.Error(), logical.ErrReadOnly.Error()):
		return logical.ErrReadOnly
	default:
		return fmt.Errorf("%w: asking the mount's storage: %w", store.ErrUnavailable, err)
	}
}
