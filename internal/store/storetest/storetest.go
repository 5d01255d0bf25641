// Package storetest is the conformance suite of package store: what every store promises, checked alike.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// Place is an empty place where values can lie: a directory, a prefix in etcd, a token. Each call opens another store
// over that same place, as another process would. The suite closes what it opened.
type Place func() store.Store

// Capabilities says how a store's promises differ from the common ones. Zero fields take the defaults.
type Capabilities struct {
	MaxValue int // largest value in bytes, default store.MaxValueSize
	MaxName  int // longest name in bytes, default store.MaxNameLength
	Rounds   int // rounds of the races, default 30; fewer where one write takes long
	Writers  int // writers in a race, default 8
}

// Limit is how long one operation may take before the suite gives up.
const limit = time.Minute

// TestStore runs the suite. newPlace is called once for each part of it and registers its own clean-up with t.
func TestStore(t *testing.T, newPlace func(t *testing.T) Place, caps Capabilities) {
	if caps.MaxValue == 0 {
		caps.MaxValue = store.MaxValueSize
	}
	if caps.MaxName == 0 {
		caps.MaxName = store.MaxNameLength
	}
	if caps.Rounds == 0 {
		caps.Rounds = 30
	}
	if caps.Writers == 0 {
		caps.Writers = 8
	}
	parts := []struct {
		sentence string
		run      func(s *suite)
	}{
		{"what is put can be got", (*suite).putThenGet},
		{"a name that does not exist is not found", (*suite).notFound},
		{"a create over an existing name conflicts", (*suite).createOnly},
		{"a write that expects another revision conflicts and changes nothing", (*suite).compareAndSwap},
		{"a delete that expects another revision conflicts and changes nothing", (*suite).deleteExpects},
		{"no revision ever recurs, not even after a delete", (*suite).revisionsNeverRecur},
		{"values of every size up to the limit come back", (*suite).sizes},
		{"a value above the limit is refused and changes nothing", (*suite).tooLarge},
		{"any bytes are a value", (*suite).binary},
		{"names that break the rules are refused everywhere", (*suite).names},
		{"the longest name works", (*suite).longName},
		{"a list is sorted, whole and exact", (*suite).list},
		{"a name and names below it live side by side", (*suite).nameIsAlsoPrefix},
		{"a store opened later sees everything", (*suite).reopen},
		{"an ended context is an error and changes nothing", (*suite).endedContext},
		{"the caller's slices stay the caller's", (*suite).ownership},
		{"of writers with the same expected revision exactly one wins", (*suite).raceToReplace},
		{"of creators exactly one wins", (*suite).raceToCreate},
		{"of a writer and a deleter exactly one wins", (*suite).raceToDelete},
		{"increments by compare-and-swap lose nothing", (*suite).counter},
	}
	for _, part := range parts {
		t.Run(part.sentence, func(t *testing.T) {
			s := &suite{T: t, caps: caps, place: newPlace(t)}
			s.store = s.open()
			part.run(s)
		})
	}
}

type suite struct {
	*testing.T
	caps  Capabilities
	place Place
	store store.Store
}

func (s *suite) open() store.Store {
	s.Helper()
	opened := s.place()
	s.Cleanup(func() {
		if err := opened.Close(); err != nil {
			s.Errorf("closing the store: %v", err)
		}
	})
	return opened
}

func (s *suite) ctx() context.Context {
	ctx, cancel := context.WithTimeout(s.Context(), limit)
	s.Cleanup(cancel)
	return ctx
}

func (s *suite) put(name, value string, expected store.Revision) store.Revision {
	s.Helper()
	revision, err := s.store.Put(s.ctx(), name, []byte(value), expected)
	if err != nil {
		s.Fatalf("Put(%q, expecting %q) = %v", name, expected, err)
	}
	if revision == store.NoRevision {
		s.Fatalf("Put(%q) returned no revision", name)
	}
	return revision
}

func (s *suite) want(name, value string, revision store.Revision) {
	s.Helper()
	entry, err := s.store.Get(s.ctx(), name)
	if err != nil {
		s.Fatalf("Get(%q) = %v", name, err)
	}
	if string(entry.Value) != value || entry.Revision != revision {
		s.Fatalf("Get(%q) = %.40q at %q, want %.40q at %q", name, entry.Value, entry.Revision, value, revision)
	}
}

func (s *suite) wantError(doing string, err, sentinel error) {
	s.Helper()
	if !errors.Is(err, sentinel) {
		s.Fatalf("%s: %v, want an error that is %q", doing, err, sentinel)
	}
}

func (s *suite) wantNames(prefix string, names ...string) {
	s.Helper()
	got, err := s.store.List(s.ctx(), prefix)
	if err != nil {
		s.Fatalf("List(%q) = %v", prefix, err)
	}
	if !slices.Equal(got, names) {
		s.Fatalf("List(%q) = %q, want %q", prefix, got, names)
	}
}

func (s *suite) putThenGet() {
	first := s.put("prod/unseal", "one", store.NoRevision)
	s.want("prod/unseal", "one", first)
	second := s.put("prod/unseal", "two", first)
	s.want("prod/unseal", "two", second)
	if err := s.store.Delete(s.ctx(), "prod/unseal", second); err != nil {
		s.Fatalf("Delete = %v", err)
	}
	_, err := s.store.Get(s.ctx(), "prod/unseal")
	s.wantError("Get of a deleted name", err, store.ErrNotFound)
	s.wantNames("")
}

func (s *suite) notFound() {
	_, err := s.store.Get(s.ctx(), "missing")
	s.wantError("Get", err, store.ErrNotFound)
	s.wantError("Delete", s.store.Delete(s.ctx(), "missing", "1"), store.ErrNotFound)
	s.wantError("Delete expecting nothing", s.store.Delete(s.ctx(), "missing", store.NoRevision), store.ErrNotFound)
	revision := s.put("a", "x", store.NoRevision)
	_, err = s.store.Put(s.ctx(), "missing", []byte("x"), revision)
	s.wantError("Put that expects a revision of a missing name", err, store.ErrConflict)
	s.wantNames("", "a")
}

func (s *suite) createOnly() {
	first := s.put("a", "one", store.NoRevision)
	_, err := s.store.Put(s.ctx(), "a", []byte("two"), store.NoRevision)
	s.wantError("second create", err, store.ErrConflict)
	s.want("a", "one", first)
}

func (s *suite) compareAndSwap() {
	first := s.put("a", "one", store.NoRevision)
	second := s.put("a", "two", first)
	for _, wrong := range []store.Revision{first, "0", "1", "nonsense", second + "0", store.Revision(strings.Repeat("9", 40))} {
		_, err := s.store.Put(s.ctx(), "a", []byte("three"), wrong)
		s.wantError(fmt.Sprintf("Put expecting %q", wrong), err, store.ErrConflict)
	}
	s.want("a", "two", second)
}

func (s *suite) deleteExpects() {
	first := s.put("a", "one", store.NoRevision)
	second := s.put("a", "two", first)
	for _, wrong := range []store.Revision{store.NoRevision, first, "0", "nonsense"} {
		s.wantError(fmt.Sprintf("Delete expecting %q", wrong), s.store.Delete(s.ctx(), "a", wrong), store.ErrConflict)
	}
	s.want("a", "two", second)
	if err := s.store.Delete(s.ctx(), "a", second); err != nil {
		s.Fatalf("Delete = %v", err)
	}
	s.wantError("second Delete", s.store.Delete(s.ctx(), "a", second), store.ErrNotFound)
}

func (s *suite) revisionsNeverRecur() {
	seen := map[store.Revision]bool{}
	for range 5 {
		revision := store.NoRevision
		for range 4 { // the same value each time: a revision is no checksum
			revision = s.put("a", "same", revision)
			if seen[revision] {
				s.Fatalf("revision %q was given twice", revision)
			}
			for old := range seen {
				_, err := s.store.Put(s.ctx(), "a", []byte("late"), old)
				s.wantError("Put by a late writer", err, store.ErrConflict)
				s.wantError("Delete by a late writer", s.store.Delete(s.ctx(), "a", old), store.ErrConflict)
			}
			seen[revision] = true
		}
		if err := s.store.Delete(s.ctx(), "a", revision); err != nil {
			s.Fatalf("Delete = %v", err)
		}
		_, err := s.store.Put(s.ctx(), "a", []byte("late"), revision)
		s.wantError("Put by a writer that did not see the delete", err, store.ErrConflict)
	}
}

func (s *suite) sizes() {
	for _, size := range []int{0, 1, 15, 16, 17, 255, 256, 1000, 4096, 65535, 65536, s.caps.MaxValue - 1, s.caps.MaxValue} {
		if size > s.caps.MaxValue {
			continue
		}
		name := fmt.Sprintf("size/%d", size)
		value := pattern(size)
		revision := s.put(name, value, store.NoRevision)
		s.want(name, value, revision)
		entry, err := s.store.Get(s.ctx(), name)
		if err != nil {
			s.Fatal(err)
		}
		if err := s.store.Delete(s.ctx(), name, entry.Revision); err != nil { // small media hold one at a time
			s.Fatalf("Delete = %v", err)
		}
	}
}

// pattern returns n bytes without a short period, all byte values among them.
func pattern(n int) string {
	value := make([]byte, n)
	state := uint32(n)
	for i := range value {
		state = state*1664525 + 1013904223
		value[i] = byte(state >> 24)
	}
	return string(value)
}

func (s *suite) tooLarge() {
	value := make([]byte, s.caps.MaxValue+1)
	_, err := s.store.Put(s.ctx(), "large", value, store.NoRevision)
	s.wantError("creating", err, store.ErrTooLarge)
	s.wantNames("")
	revision := s.put("large", "small", store.NoRevision)
	_, err = s.store.Put(s.ctx(), "large", value, revision)
	s.wantError("replacing", err, store.ErrTooLarge)
	s.want("large", "small", revision)
}

func (s *suite) binary() {
	for i, value := range []string{"\x00", "\xff\xfe", "a\nb\r\n", "nitroseal1 ", `{"value":"x"}`, "\x00\x00\x00\x00", "ends in NUL\x00"} {
		name := fmt.Sprintf("binary/%d", i)
		s.want(name, value, s.put(name, value, store.NoRevision))
	}
}

func (s *suite) names() {
	for _, name := range []string{"", "/", "/a", "a/", "a//b", "..", "a/../b", ".a", "a b", "a\x00", "a\n", "a+b", "a#1", strings.Repeat("n", store.MaxNameLength+1)} {
		_, err := s.store.Get(s.ctx(), name)
		s.wantError(fmt.Sprintf("Get(%q)", name), err, store.ErrInvalidName)
		_, err = s.store.Put(s.ctx(), name, []byte("x"), store.NoRevision)
		s.wantError(fmt.Sprintf("Put(%q)", name), err, store.ErrInvalidName)
		s.wantError(fmt.Sprintf("Delete(%q)", name), s.store.Delete(s.ctx(), name, "1"), store.ErrInvalidName)
	}
	for _, prefix := range []string{"a", "/", "a//", "../"} {
		_, err := s.store.List(s.ctx(), prefix)
		s.wantError(fmt.Sprintf("List(%q)", prefix), err, store.ErrInvalidName)
	}
	s.wantNames("")
}

func (s *suite) longName() {
	parts := strings.Repeat("p/", s.caps.MaxName)
	name := parts[:s.caps.MaxName-1] + "n"
	name = strings.ReplaceAll(name, "/n", "nn")
	other := strings.Repeat("n", s.caps.MaxName)
	s.want(name, "x", s.put(name, "x", store.NoRevision))
	s.want(other, "y", s.put(other, "y", store.NoRevision))
	s.wantNames("", slices.Sorted(slices.Values([]string{name, other}))...)
}

func (s *suite) list() {
	s.wantNames("")
	s.wantNames("none/")
	names := []string{"a", "a-b/x", "a.b", "a/1", "a/10", "a/2", "a/b/c", "ab/1", "B/1", "b"}
	for _, name := range slices.Backward(names) {
		s.put(name, "x", store.NoRevision)
	}
	s.wantNames("", slices.Sorted(slices.Values(names))...)
	s.wantNames("a/", "a/1", "a/10", "a/2", "a/b/c")
	s.wantNames("a/b/", "a/b/c")
	s.wantNames("a/b/c/")
	s.wantNames("ab/", "ab/1")
	s.wantNames("b/")
	s.wantNames("B/", "B/1")
}

func (s *suite) nameIsAlsoPrefix() {
	below := s.put("a/b/c", "below", store.NoRevision)
	at := s.put("a/b", "at", store.NoRevision)
	above := s.put("a", "above", store.NoRevision)
	s.wantNames("", "a", "a/b", "a/b/c")
	s.want("a/b", "at", at)
	if err := s.store.Delete(s.ctx(), "a/b", at); err != nil {
		s.Fatalf("Delete = %v", err)
	}
	s.want("a", "above", above)
	s.want("a/b/c", "below", below)
	s.wantNames("a/", "a/b/c")
}

func (s *suite) reopen() {
	first := s.put("a", "one", store.NoRevision)
	kept := s.put("kept/b", "two", store.NoRevision)
	s.store = s.open()
	s.want("a", "one", first)
	s.want("kept/b", "two", kept)
	second := s.put("a", "three", first)
	s.store = s.open()
	s.want("a", "three", second)
	_, err := s.store.Put(s.ctx(), "a", []byte("late"), first)
	s.wantError("Put expecting an old revision in a store opened later", err, store.ErrConflict)
	s.wantNames("", "a", "kept/b")
}

func (s *suite) endedContext() {
	revision := s.put("a", "one", store.NoRevision)
	ended, cancel := context.WithCancel(s.Context())
	cancel()
	check := func(doing string, err error) {
		s.Helper()
		s.wantError(doing, err, context.Canceled)
		for _, sentinel := range []error{store.ErrConflict, store.ErrNotFound, store.ErrUnavailable} {
			if errors.Is(err, sentinel) {
				s.Errorf("%s: %v must not be %q: nobody knows", doing, err, sentinel)
			}
		}
	}
	_, err := s.store.Get(ended, "a")
	check("Get", err)
	_, err = s.store.Put(ended, "a", []byte("two"), revision)
	check("Put", err)
	_, err = s.store.Put(ended, "b", []byte("two"), store.NoRevision)
	check("Put of a new name", err)
	_, err = s.store.List(ended, "")
	check("List", err)
	check("Delete", s.store.Delete(ended, "a", revision))
	s.want("a", "one", revision)
	s.wantNames("", "a")
}

func (s *suite) ownership() {
	value := []byte("one")
	revision, err := s.store.Put(s.ctx(), "a", value, store.NoRevision)
	if err != nil {
		s.Fatal(err)
	}
	clear(value) // secrets are wiped by who made them: the store must hold its own copy
	s.want("a", "one", revision)
	entry, err := s.store.Get(s.ctx(), "a")
	if err != nil {
		s.Fatal(err)
	}
	clear(entry.Value)
	s.want("a", "one", revision)
}

// race lets every writer run attempt at once, each on a store of its own, and returns how many succeeded. Losers must
// have got one of the allowed errors.
func (s *suite) race(stores []store.Store, attempt func(writer int, over store.Store) error, allowed ...error) int {
	s.Helper()
	var (
		group sync.WaitGroup
		start = make(chan struct{})
		errs  = make([]error, len(stores))
	)
	for writer, over := range stores {
		group.Go(func() {
			<-start
			errs[writer] = attempt(writer, over)
		})
	}
	close(start)
	group.Wait()
	won := 0
	for writer, err := range errs {
		switch {
		case err == nil:
			won++
		case !slices.ContainsFunc(allowed, func(sentinel error) bool { return errors.Is(err, sentinel) }):
			s.Fatalf("writer %d: %v", writer, err)
		}
	}
	return won
}

// contenders opens a few stores over the place and hands them to the writers in turn: some share one, others do not.
func (s *suite) contenders(n int) []store.Store {
	opened := []store.Store{s.store, s.open(), s.open()}
	stores := make([]store.Store, n)
	for i := range stores {
		stores[i] = opened[i%len(opened)]
	}
	return stores
}

func (s *suite) raceToReplace() {
	stores := s.contenders(s.caps.Writers)
	revision := s.put("a", "start", store.NoRevision)
	for round := range s.caps.Rounds {
		revisions := make([]store.Revision, len(stores))
		won := s.race(stores, func(writer int, over store.Store) (err error) {
			value := fmt.Sprintf("round %d writer %d", round, writer)
			revisions[writer], err = over.Put(s.ctx(), "a", []byte(value), revision)
			return err
		}, store.ErrConflict)
		if won != 1 {
			s.Fatalf("round %d: %d writers won, want 1", round, won)
		}
		winner := slices.IndexFunc(revisions, func(r store.Revision) bool { return r != store.NoRevision })
		revision = revisions[winner]
		s.want("a", fmt.Sprintf("round %d writer %d", round, winner), revision)
	}
}

func (s *suite) raceToCreate() {
	stores := s.contenders(s.caps.Writers)
	for round := range s.caps.Rounds {
		name := fmt.Sprintf("new/%d", round)
		won := s.race(stores, func(_ int, over store.Store) error {
			_, err := over.Put(s.ctx(), name, []byte("x"), store.NoRevision)
			return err
		}, store.ErrConflict)
		if won != 1 {
			s.Fatalf("round %d: %d creators won, want 1", round, won)
		}
	}
}

func (s *suite) raceToDelete() {
	stores := s.contenders(2)
	for round := range s.caps.Rounds {
		name := fmt.Sprintf("gone/%d", round)
		revision := s.put(name, "x", store.NoRevision)
		var replaced bool
		won := s.race(stores, func(writer int, over store.Store) error {
			if writer == 0 {
				return over.Delete(s.ctx(), name, revision)
			}
			_, err := over.Put(s.ctx(), name, []byte("y"), revision)
			replaced = err == nil
			return err
		}, store.ErrConflict)
		if won != 1 {
			s.Fatalf("round %d: %d won, want 1", round, won)
		}
		entry, err := s.store.Get(s.ctx(), name)
		if replaced && (err != nil || !bytes.Equal(entry.Value, []byte("y"))) {
			s.Fatalf("round %d: the writer won and Get = %q, %v", round, entry.Value, err)
		}
		if !replaced {
			s.wantError("Get after the deleter won", err, store.ErrNotFound)
		}
	}
}

func (s *suite) counter() {
	stores := s.contenders(4)
	s.put("n", "", store.NoRevision)
	each := max(1, s.caps.Rounds/4)
	won := s.race(stores, func(_ int, over store.Store) error {
		for done := 0; done < each; {
			entry, err := over.Get(s.ctx(), "n")
			if err != nil {
				return err
			}
			_, err = over.Put(s.ctx(), "n", append(entry.Value, '|'), entry.Revision)
			if err != nil && !errors.Is(err, store.ErrConflict) {
				return err
			}
			if err == nil {
				done++
			}
		}
		return nil
	})
	if won != len(stores) {
		s.Fatalf("%d of %d counters finished", won, len(stores))
	}
	entry, err := s.store.Get(s.ctx(), "n")
	if err != nil || len(entry.Value) != each*len(stores) {
		s.Fatalf("counted %d (%v), want %d", len(entry.Value), err, each*len(stores))
	}
}
