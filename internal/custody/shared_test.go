package custody_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// sharing returns a keeper over the house's store with records of its own, as another host has it.
func (h *house) sharing(records store.Store) *custody.Keeper {
	return custody.New(custody.Config{
		Keys: h.keys, Stores: h, Records: records, Shared: true,
		DefaultStore: func(context.Context) (string, error) { return "main", nil },
		Now:          func() time.Time { return time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC) },
	})
}

// memory is a store that forgets.
type memory struct {
	mu     sync.Mutex
	values map[string]store.Entry
	puts   int
}

func newMemory() *memory { return &memory{values: map[string]store.Entry{}} }

func (m *memory) Get(_ context.Context, name string) (store.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	entry, found := m.values[name]
	if !found {
		return store.Entry{}, store.ErrNotFound
	}
	return entry, nil
}

func (m *memory) Put(_ context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.values[name].Revision != expected {
		return store.NoRevision, store.ErrConflict
	}
	m.puts++
	entry := store.Entry{Value: slices.Clone(value), Revision: store.Revision(fmt.Sprint(m.puts))}
	m.values[name] = entry
	return entry.Revision, nil
}

func (m *memory) List(_ context.Context, prefix string) (names []string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.values {
		if strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (m *memory) Delete(_ context.Context, name string, expected store.Revision) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch entry, found := m.values[name]; {
	case !found:
		return store.ErrNotFound
	case entry.Revision != expected:
		return store.ErrConflict
	}
	delete(m.values, name)
	return nil
}

func (m *memory) Close() error { return nil }

// twoHosts are two keepers with records of their own over one store.
func twoHosts(t *testing.T) (h *house, first, second *custody.Keeper) {
	t.Helper()
	h = newHouse(t)
	return h, h.sharing(newMemory()), h.sharing(newMemory())
}

func wantText(t *testing.T, k *custody.Keeper, want string) custody.Metadata {
	t.Helper()
	fields, m, err := k.Open(t.Context(), "prod", "unseal", custody.ReadOptions{})
	if err != nil || !equal(fields, text(want)) {
		t.Fatalf("Open = %q, %v, want %q", fields, err, want)
	}
	return m
}

func write(t *testing.T, k *custody.Keeper, value string, cas *uint64) custody.Metadata {
	t.Helper()
	m, err := k.Put(t.Context(), "prod", "unseal", text(value), custody.PutOptions{Key: "prod", CAS: cas})
	if err != nil {
		t.Fatalf("Put(%q) = %v", value, err)
	}
	return m
}

func TestWhatAnotherHostWroteOpensAndTheRecordCatchesUp(t *testing.T) {
	h, first, second := twoHosts(t)
	write(t, first, "one", generation(0))
	wantText(t, second, "one")
	write(t, first, "two", generation(1))
	write(t, first, "three", generation(2))

	m, err := second.Get(t.Context(), "prod", "unseal", custody.ReadOptions{})
	if err != nil || m.State != custody.StateAhead || m.Generation != 3 || m.Expected != 1 {
		t.Fatalf("Get before it is opened = %+v, %v", m, err)
	}
	if text := strings.Join(m.Warnings, " "); !strings.Contains(text, "Another host") {
		t.Errorf("its warnings are %q", text)
	}
	before := h.one.Operations()
	wantText(t, second, "three")
	if spent := h.one.Operations() - before; spent != 1 {
		t.Errorf("opening it cost %d operations", spent)
	}
	m, err = second.Get(t.Context(), "prod", "unseal", custody.ReadOptions{})
	if err != nil || m.State != custody.StateCurrent || m.Expected != 3 || len(m.Fields) != 1 {
		t.Fatalf("Get afterwards = %+v, %v", m, err)
	}
	write(t, second, "four", generation(3))
	wantText(t, first, "four")
}

func TestWhatAnotherHostWroteIsNotWrittenOverUnseen(t *testing.T) {
	_, first, second := twoHosts(t)
	write(t, first, "one", generation(0))
	wantText(t, second, "one")
	write(t, first, "two", generation(1))
	for _, cas := range []*uint64{nil, generation(2)} {
		_, err := second.Put(t.Context(), "prod", "unseal", text("other"), custody.PutOptions{CAS: cas})
		if !errors.Is(err, custody.ErrAhead) {
			t.Errorf("Put = %v, want ErrAhead", err)
		}
	}
	wantText(t, first, "two")
}

func TestOlderThanSeenStaysStaleWhereHostsShareAStore(t *testing.T) {
	h, first, second := twoHosts(t)
	write(t, first, "one", generation(0))
	old := h.raw("main", "material/prod/unseal").Value
	write(t, first, "two", generation(1))
	wantText(t, second, "two")
	h.plant("main", "material/prod/unseal", old)
	for name, k := range map[string]*custody.Keeper{"writer": first, "reader": second} {
		if _, _, err := k.Open(t.Context(), "prod", "unseal", custody.ReadOptions{}); !errors.Is(err, custody.ErrStale) {
			t.Errorf("%s: Open of the older one = %v, want ErrStale", name, err)
		}
	}
}

// Of two hosts that create an item at once one loses. What it had foreseen must not make the winner's look like an old one.
func TestHostThatLostTheRaceOpensTheWinnersItem(t *testing.T) {
	h, first, second := twoHosts(t)
	s := h.stores["main"]
	var once sync.Once
	h.stores["main"] = interposed{s, func() { once.Do(func() { h.stores["main"] = s; write(t, first, "winner", generation(0)) }) }}
	_, err := second.Put(t.Context(), "prod", "unseal", text("loser"), custody.PutOptions{Key: "prod", CAS: generation(0)})
	if !errors.Is(err, custody.ErrConflict) {
		t.Fatalf("Put of the loser = %v, want ErrConflict", err)
	}
	wantText(t, second, "winner")
	write(t, second, "next", generation(1))
	wantText(t, first, "next")
}

// interposed lets something happen before the first write.
type interposed struct {
	store.Store

	before func()
}

func (s interposed) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	s.before()
	return s.Store.Put(ctx, name, value, expected)
}

func TestWhatAHostDeletedDoesNotComeBackThere(t *testing.T) {
	h, first, second := twoHosts(t)
	write(t, first, "one", generation(0))
	wantText(t, second, "one")
	old := h.raw("main", "material/prod/unseal").Value
	if err := second.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := first.Open(t.Context(), "prod", "unseal", custody.ReadOptions{}); !errors.Is(err, custody.ErrVanished) {
		t.Errorf("Open by the host that does not know = %v, want ErrVanished", err)
	}
	h.plant("main", "material/prod/unseal", old)
	if _, _, err := second.Open(t.Context(), "prod", "unseal", custody.ReadOptions{}); !errors.Is(err, custody.ErrStale) {
		t.Errorf("Open of what was deleted = %v, want ErrStale", err)
	}
}

func TestRewrapTakesWhatAnotherHostWrote(t *testing.T) {
	h, first, second := twoHosts(t)
	write(t, first, "one", generation(0))
	wantText(t, second, "one")
	write(t, first, "two", generation(1))
	if _, err := h.keys.Rotate(t.Context(), "prod", keyring.RotateRequest{Adopt: &keyring.AdoptRequest{Device: "two", Label: "ec", By: "test"}}); err != nil {
		t.Fatal(err)
	}
	before := h.one.Operations() + h.two.Operations()
	report, err := second.Rewrap(t.Context(), "prod", "test", nil)
	if err != nil || report.Rewrapped != 1 || len(report.Failed) != 0 {
		t.Fatalf("Rewrap = %+v, %v", report, err)
	}
	if spent := h.one.Operations() + h.two.Operations() - before; spent != 1 {
		t.Errorf("Rewrap cost %d operations", spent)
	}
	if m := wantText(t, first, "two"); m.Generation != 3 {
		t.Errorf("it is generation %d, want 3", m.Generation)
	}
}

// Two keepers with records of their own write, open and delete one item, and somebody who can write the store puts older
// envelopes back. No keeper may ever open one that is older than what it has seen, and each follows what the other wrote.
func TestModelOfTwoHostsOverOneStore(t *testing.T) {
	h := newHouse(t)
	rapid.Check(t, func(t *rapid.T) {
		main := newMemory()
		h.mu.Lock()
		h.stores["main"] = main
		h.mu.Unlock()
		hosts := []*custody.Keeper{h.sharing(newMemory()), h.sharing(newMemory())}
		seen := []uint64{0, 0}        // the highest generation that each opened, wrote or deleted
		values := map[string]string{} // by envelope, what lies in it
		var past [][]byte
		written := 0
		current := func() []byte {
			entry, err := main.Get(h.t.Context(), "material/prod/unseal")
			if err != nil {
				return nil
			}
			return entry.Value
		}
		generationOf := func(who int) uint64 {
			m, err := hosts[who].Get(h.t.Context(), "prod", "unseal", custody.ReadOptions{})
			if err != nil {
				return 0
			}
			return m.Generation
		}
		open := func(who int) {
			there := generationOf(who)
			fields, m, err := hosts[who].Open(h.t.Context(), "prod", "unseal", custody.ReadOptions{})
			switch {
			case err == nil && m.Generation < seen[who]:
				t.Fatalf("host %d opened generation %d and had seen %d", who, m.Generation, seen[who])
			case err == nil && string(fields["key"]) != values[string(current())]:
				t.Fatalf("host %d opened %q, want %q", who, fields["key"], values[string(current())])
			case err == nil:
				seen[who] = m.Generation
			case there > seen[who]:
				t.Fatalf("host %d does not follow generation %d, having seen %d: %v", who, there, seen[who], err)
			case there == 0 && !errors.Is(err, custody.ErrNotFound) && !errors.Is(err, custody.ErrVanished),
				there > 0 && !errors.Is(err, custody.ErrStale):
				t.Fatalf("host %d, generation %d, having seen %d: %v", who, there, seen[who], err)
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"open": func(t *rapid.T) { open(rapid.IntRange(0, 1).Draw(t, "host")) },
			"write": func(t *rapid.T) {
				who := rapid.IntRange(0, 1).Draw(t, "host")
				written++
				value := fmt.Sprint(written)
				m, err := hosts[who].Put(h.t.Context(), "prod", "unseal", text(value), custody.PutOptions{Key: "prod"})
				if err != nil {
					return // it had not seen the newest, or an old one lies there
				}
				if m.Generation <= seen[who] {
					t.Fatalf("host %d wrote generation %d and had seen %d", who, m.Generation, seen[who])
				}
				seen[who] = m.Generation
				past = append(past, current())
				values[string(current())] = value
			},
			"delete": func(t *rapid.T) {
				who := rapid.IntRange(0, 1).Draw(t, "host")
				there := generationOf(who)
				if hosts[who].Delete(h.t.Context(), "prod", "unseal", custody.DeleteOptions{}) == nil {
					seen[who] = max(seen[who], there)
				}
			},
			"put an old one back": func(t *rapid.T) {
				if len(past) == 0 {
					return
				}
				entry, _ := main.Get(h.t.Context(), "material/prod/unseal")
				old := rapid.IntRange(0, len(past)-1).Draw(t, "which")
				if _, err := main.Put(h.t.Context(), "material/prod/unseal", past[old], entry.Revision); err != nil {
					t.Fatal(err)
				}
			},
		})
	})
}
