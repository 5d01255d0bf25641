package custody_test

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// house is a keeper with what it needs: a keyring with the keys "prod" and "other" on the HSM "one", and the stores
// "main" (the default one) and "second".
type house struct {
	*custody.Keeper

	t       *testing.T
	one     *hsmtest.Memory
	two     *hsmtest.Memory
	keys    *keyring.Keyring
	records store.Store
	stores  stores
	mu      sync.Mutex
	gone    map[string]error // stores that do not answer
}

type stores map[string]store.Store

// Device implements keyring.Devices.
func (h *house) Device(_ context.Context, name string) (hsm.Device, error) {
	switch name {
	case "one":
		return h.one, nil
	case "two":
		return h.two, nil
	default:
		return nil, fmt.Errorf("device %q: %w", name, hsm.ErrNotFound)
	}
}

// Store implements custody.Stores.
func (h *house) Store(_ context.Context, name string) (store.Store, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.gone[name]; err != nil {
		return nil, err
	}
	s, ok := h.stores[name]
	if !ok {
		return nil, fmt.Errorf("no store %q is configured", name)
	}
	return s, nil
}

func (h *house) setGone(name string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.gone[name] = err
}

func newHouse(t *testing.T) *house {
	t.Helper()
	h := &house{t: t, one: hsmtest.NewMemory(), two: hsmtest.NewMemory(), gone: map[string]error{}}
	h.one.AddEC(t, "ec", "01", ecdh.P256())
	h.one.AddEC(t, "other", "02", ecdh.P256())
	h.two.AddEC(t, "ec", "11", ecdh.P256())
	dir := t.TempDir()
	open := func(name string) store.Store {
		s, err := file.Open(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	h.records = open("records")
	h.stores = stores{"main": open("main"), "second": open("second")}
	h.keys = keyring.New(keyring.Config{Records: open("keys"), Devices: h})
	for name, label := range map[string]string{"prod": "ec", "other": "other"} {
		if _, err := h.keys.Adopt(t.Context(), name, keyring.AdoptRequest{Device: "one", Label: label, By: "test"}); err != nil {
			t.Fatal(err)
		}
	}
	h.Keeper = h.keeper(h.records, h)
	return h
}

// keeper returns a keeper over the house's keys, as another process would have it.
func (h *house) keeper(records store.Store, stores custody.Stores) *custody.Keeper {
	return custody.New(custody.Config{
		Keys: h.keys, Stores: stores, Records: records,
		DefaultStore: func(context.Context) (string, error) { return "main", nil },
		Now:          func() time.Time { return time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC) },
	})
}

func text(value string) custody.Fields { return custody.Fields{"key": []byte(value)} }

func (h *house) put(cluster, name, value string) custody.Metadata {
	h.t.Helper()
	m, err := h.Put(h.t.Context(), cluster, name, text(value), custody.PutOptions{Key: "prod", By: "test"})
	if err != nil {
		h.t.Fatalf("Put(%s/%s) = %v", cluster, name, err)
	}
	return m
}

func (h *house) wantOpen(cluster, name, value string) custody.Metadata {
	h.t.Helper()
	fields, m, err := h.Open(h.t.Context(), cluster, name, custody.ReadOptions{})
	if err != nil {
		h.t.Fatalf("Open(%s/%s) = %v", cluster, name, err)
	}
	if !equal(fields, text(value)) {
		h.t.Fatalf("Open(%s/%s) = %q, want %q", cluster, name, fields, value)
	}
	return m
}

func (h *house) wantOpenError(cluster, name string, want error) {
	h.t.Helper()
	before := h.one.Operations() + h.two.Operations()
	_, _, err := h.Open(h.t.Context(), cluster, name, custody.ReadOptions{})
	if !errors.Is(err, want) {
		h.t.Fatalf("Open(%s/%s) = %v, want %q", cluster, name, err, want)
	}
	if spent := h.one.Operations() + h.two.Operations() - before; spent != 0 {
		h.t.Errorf("that cost %d operations of the HSM", spent)
	}
}

// raw returns what lies in a store.
func (h *house) raw(name, path string) store.Entry {
	h.t.Helper()
	entry, err := h.stores[name].Get(h.t.Context(), path)
	if err != nil {
		h.t.Fatal(err)
	}
	return entry
}

// plant puts a value into a store, as somebody who can write it would.
func (h *house) plant(name, path string, value []byte) {
	h.t.Helper()
	expected := store.NoRevision
	if entry, err := h.stores[name].Get(h.t.Context(), path); err == nil {
		expected = entry.Revision
	}
	if _, err := h.stores[name].Put(h.t.Context(), path, value, expected); err != nil {
		h.t.Fatal(err)
	}
}

// remove deletes a value from a store, as somebody who can write it would.
func (h *house) remove(name, path string) {
	h.t.Helper()
	if err := h.stores[name].Delete(h.t.Context(), path, h.raw(name, path).Revision); err != nil {
		h.t.Fatal(err)
	}
}

// forget deletes a record, as the loss of the mount would.
func (h *house) forget(path string) {
	h.t.Helper()
	entry, err := h.records.Get(h.t.Context(), path)
	if err == nil {
		err = h.records.Delete(h.t.Context(), path, entry.Revision)
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

func equal(a, b custody.Fields) bool {
	return maps.EqualFunc(a, b, func(x, y []byte) bool { return string(x) == string(y) })
}

func generation(n uint64) *uint64 { return &n }

// record returns what lies in the records.
func (h *house) record(path string) store.Entry {
	h.t.Helper()
	entry, err := h.records.Get(h.t.Context(), path)
	if err != nil {
		h.t.Fatal(err)
	}
	return entry
}

// setRecord puts an old record back, as a restored backup of the mount would.
func (h *house) setRecord(path string, value []byte) {
	h.t.Helper()
	if _, err := h.records.Put(h.t.Context(), path, value, h.record(path).Revision); err != nil {
		h.t.Fatal(err)
	}
}
