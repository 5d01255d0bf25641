package custody_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// fault counts the calls to the records and the stores, and strikes at one of them.
type fault struct {
	at     int
	effect bool // the call takes place, and its answer is lost
	crash  bool // no later call takes place: the process is dead; else the outage is over at once

	calls int
}

var errFault = errors.New("fault")

// strike returns whether the call takes place, and the error that it then returns.
func (f *fault) strike() (happens bool, err error) {
	f.calls++
	switch {
	case f.calls == f.at:
		return f.effect, errFault
	case f.calls > f.at && f.crash:
		return false, errFault
	default:
		return true, nil
	}
}

func (f *fault) struck() bool { return f.calls >= f.at }

// faulty is a store with faults.
type faulty struct {
	store.Store

	*fault
}

func (s faulty) Get(ctx context.Context, name string) (store.Entry, error) {
	if _, err := s.strike(); err != nil {
		return store.Entry{}, err
	}
	return s.Store.Get(ctx, name)
}

func (s faulty) List(ctx context.Context, prefix string) ([]string, error) {
	if _, err := s.strike(); err != nil {
		return nil, err
	}
	return s.Store.List(ctx, prefix)
}

func (s faulty) Put(ctx context.Context, name string, value []byte, expected store.Revision) (revision store.Revision, err error) {
	happens, fault := s.strike()
	if happens {
		revision, err = s.Store.Put(ctx, name, value, expected)
	}
	if fault != nil {
		return store.NoRevision, fault
	}
	return revision, err
}

func (s faulty) Delete(ctx context.Context, name string, expected store.Revision) (err error) {
	happens, fault := s.strike()
	if happens {
		err = s.Store.Delete(ctx, name, expected)
	}
	return errors.Join(fault, err)
}

// faultyStores gives faulty stores to a keeper.
type faultyStores struct {
	*house

	fault *fault
}

func (s faultyStores) Store(ctx context.Context, name string) (store.Store, error) {
	under, err := s.house.Store(ctx, name)
	return faulty{under, s.fault}, err
}

// work is something that a fault may interrupt.
type work struct {
	sentence string
	prepare  func(h *house)
	do       func(ctx context.Context, k *custody.Keeper) error
	old, new string // values before and after, "" for no item
}

func put(value, key string) func(context.Context, *custody.Keeper) error {
	return func(ctx context.Context, k *custody.Keeper) error {
		_, err := k.Put(ctx, "prod", "unseal", text(value), custody.PutOptions{Key: key})
		return err
	}
}

func open(ctx context.Context, k *custody.Keeper) error {
	_, _, err := k.Open(ctx, "prod", "unseal", custody.ReadOptions{})
	return err
}

func remove(ctx context.Context, k *custody.Keeper) error {
	return k.Delete(ctx, "prod", "unseal", custody.DeleteOptions{})
}

func rewrap(ctx context.Context, k *custody.Keeper) error {
	report, err := k.Rewrap(ctx, "prod", "", nil)
	for _, failed := range report.Failed {
		err = errors.Join(err, failed.Err)
	}
	return err
}

func twice(h *house) {
	h.put("prod", "unseal", "older")
	h.put("prod", "unseal", "old")
}

func newVersion(h *house) {
	h.put("prod", "unseal", "old")
	h.two.SetError(nil)
	if _, err := h.keys.Rotate(h.t.Context(), "prod", keyring.RotateRequest{Adopt: &keyring.AdoptRequest{Device: "two", Label: "ec"}}); err != nil {
		h.t.Fatal(err)
	}
}

func deleted(h *house) {
	twice(h)
	if err := remove(h.t.Context(), h.Keeper); err != nil {
		h.t.Fatal(err)
	}
}

func unrecorded(h *house) {
	twice(h)
	h.forget(item)
}

// unconfirmed leaves an item whose new envelope is stored and not confirmed.
func unconfirmed(h *house) {
	h.put("prod", "unseal", "older")
	f := &fault{at: 5, crash: true} // record, store, foresee, store, confirm
	_ = put("old", "")(h.t.Context(), h.keeper(faulty{h.records, f}, faultyStores{h, f}))
	if m, err := h.Get(h.t.Context(), "prod", "unseal", custody.ReadOptions{}); err != nil || m.State != custody.StateUnconfirmed {
		h.t.Fatalf("Get = %+v, %v, want an unconfirmed item", m, err)
	}
}

// halfDeleted leaves an item that is to be deleted and is still there.
func halfDeleted(h *house) {
	twice(h)
	f := &fault{at: 4, crash: true} // record, store, intention, store
	_ = remove(h.t.Context(), h.keeper(faulty{h.records, f}, faultyStores{h, f}))
	h.wantOpen("prod", "unseal", "old")
}

var works = []work{
	{"writing for the first time", func(*house) {}, put("new", "prod"), "", "new"},
	{"writing over", twice, put("new", ""), "old", "new"},
	{"writing over with another key", twice, put("new", "other"), "old", "new"},
	{"writing what was deleted", deleted, put("new", "prod"), "", "new"},
	{"writing over what is unconfirmed", unconfirmed, put("new", ""), "old", "new"},
	{"writing over what is half deleted", halfDeleted, put("new", ""), "old", "new"},
	{"opening", twice, open, "old", "old"},
	{"opening what is unconfirmed", unconfirmed, open, "old", "old"},
	{"opening what has no record", unrecorded, open, "old", "old"},
	{"deleting", twice, remove, "old", ""},
	{"deleting what is unconfirmed", unconfirmed, remove, "old", ""},
	{"deleting what is half deleted", halfDeleted, remove, "old", ""},
	{"rewrapping", newVersion, rewrap, "old", "old"},
	{"rewrapping what is unconfirmed", func(h *house) { unconfirmed(h); h.addSecondHSM() }, rewrap, "old", "old"},
}

// A fault at every call to a store, in every way: what comes next finds the old value or the new one, never neither and
// never an older one, and can write, open and delete as if nothing had happened.
func TestFaultAtEveryCallLeavesOldOrNew(t *testing.T) {
	for _, w := range works {
		for _, crash := range []bool{true, false} {
			for _, effect := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s, crash=%v effect=%v", w.sentence, crash, effect), func(t *testing.T) {
					t.Parallel() // they wait for the disk most of the time
					for at, over := 1, false; !over; at++ {
						t.Run(fmt.Sprintf("call %d", at), func(t *testing.T) {
							over = !w.faultAt(t, &fault{at: at, effect: effect, crash: crash})
						})
					}
				})
			}
		}
	}
}

// faultAt returns false where the work was done before the fault was due.
func (w work) faultAt(t *testing.T, f *fault) bool {
	t.Helper()
	h := newHouse(t)
	w.prepare(h)
	before := h.envelope()
	err := w.do(t.Context(), h.keeper(faulty{h.records, f}, faultyStores{h, f}))
	if !f.struck() && err != nil {
		t.Fatalf("without a fault: %v", err)
	}

	found := ""
	fields, _, openErr := h.Open(t.Context(), "prod", "unseal", custody.ReadOptions{})
	switch {
	case openErr == nil:
		found = string(fields["key"])
	case !errors.Is(openErr, custody.ErrNotFound):
		t.Fatalf("Open afterwards = %v", openErr)
	}
	if found != w.old && found != w.new {
		t.Fatalf("Open afterwards = %q, want %q or %q", found, w.old, w.new)
	}
	if err == nil && found != w.new {
		t.Fatalf("it was confirmed, and Open = %q, want %q", found, w.new)
	}
	h.wantListed(found != "")

	// The value before is never taken for the present one again, once the next run has seen what counts.
	if now := h.envelope(); before != nil && string(now) != string(before) {
		h.plant("main", item, before)
		h.wantOpenError("prod", "unseal", custody.ErrStale)
		if now == nil {
			if err := remove(t.Context(), h.Keeper); err != nil {
				t.Fatal(err)
			}
		} else {
			h.plant("main", item, now)
			h.wantOpen("prod", "unseal", found)
		}
	}
	h.put("prod", "unseal", "next")
	h.wantOpen("prod", "unseal", "next")
	if err := remove(t.Context(), h.Keeper); err != nil {
		t.Fatalf("Delete afterwards = %v", err)
	}
	h.wantOpenError("prod", "unseal", custody.ErrNotFound)
	return f.struck()
}

// envelope returns what the store holds, nil for nothing.
func (h *house) envelope() []byte {
	h.t.Helper()
	entry, err := h.stores["main"].Get(h.t.Context(), item)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		h.t.Fatal(err)
	}
	return entry.Value
}

func (h *house) wantListed(listed bool) {
	h.t.Helper()
	refs, warnings, err := h.List(h.t.Context(), "")
	if err != nil || len(warnings) != 0 || (len(refs) == 1) != listed {
		h.t.Fatalf("List = %v, %q, %v, want it listed: %v", refs, warnings, err, listed)
	}
}
