package object_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// crash is how a process, or the card under it, dies at one call.
type crash string

const (
	before crash = "before the call had an effect"
	after  crash = "after the call had its effect"
	midway crash = "in the middle of a write"
)

var errCrash = errors.New("crashed")

// crashing counts the calls that reach a token and crashes at one of them; no call after that has any effect.
type crashing struct {
	token *hsmtest.Memory
	at    int
	how   crash

	calls int
}

// step returns whether the call takes place and the error to return.
func (c *crashing) step() (happens bool, err error) {
	c.calls++
	switch {
	case c.calls < c.at:
		return true, nil
	case c.calls == c.at:
		return c.how == after, errCrash
	default:
		return false, errCrash
	}
}

func (c *crashing) crashed() bool { return c.calls >= c.at }

func (c *crashing) Objects(ctx context.Context, application string) ([]hsm.ObjectRef, error) {
	if _, err := c.step(); err != nil {
		return nil, err
	}
	return c.token.Objects(ctx, application)
}

func (c *crashing) ReadObject(ctx context.Context, ref hsm.ObjectRef) ([]byte, error) {
	if _, err := c.step(); err != nil {
		return nil, err
	}
	return c.token.ReadObject(ctx, ref)
}

func (c *crashing) WriteObject(ctx context.Context, ref hsm.ObjectRef, value []byte) error {
	happens, err := c.step()
	if happens {
		if e := c.token.WriteObject(ctx, ref, value); e != nil {
			return e
		}
	}
	if c.calls == c.at && c.how == midway {
		c.token.AddObject(ref, value[:len(value)/2])
	}
	return err
}

func (c *crashing) DeleteObject(ctx context.Context, ref hsm.ObjectRef) error {
	happens, err := c.step()
	if happens {
		if e := c.token.DeleteObject(ctx, ref); e != nil {
			return e
		}
	}
	return err
}

// work is something that a crash may interrupt.
type work struct {
	sentence string
	prepare  func(t *testing.T, token *hsmtest.Memory, s store.Store) store.Revision
	do       func(ctx context.Context, s store.Store, revision store.Revision) error
	old, new string // the values before and after, "" for none
}

func put(value string) func(context.Context, store.Store, store.Revision) error {
	return func(ctx context.Context, s store.Store, revision store.Revision) error {
		_, err := s.Put(ctx, "a", []byte(value), revision)
		return err
	}
}

func remove(ctx context.Context, s store.Store, revision store.Revision) error {
	return s.Delete(ctx, "a", revision)
}

func nothing(*testing.T, *hsmtest.Memory, store.Store) store.Revision { return store.NoRevision }

func oldValue(t *testing.T, _ *hsmtest.Memory, s store.Store) store.Revision {
	t.Helper()
	revision, err := s.Put(t.Context(), "a", []byte("older"), store.NoRevision)
	if err == nil {
		revision, err = s.Put(t.Context(), "a", []byte("old"), revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	return revision
}

// oldValueAndLeftovers is the token after two earlier crashes: an older generation that was not deleted any more, and a
// newer one of which only the beginning was written.
func oldValueAndLeftovers(t *testing.T, token *hsmtest.Memory, s store.Store) store.Revision {
	t.Helper()
	if _, err := s.Put(t.Context(), "a", []byte("older"), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	older, err := token.ReadObject(t.Context(), ref("a#1"))
	if err != nil {
		t.Fatal(err)
	}
	entry, err := s.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	revision, err := s.Put(t.Context(), "a", []byte("old"), entry.Revision)
	if err != nil {
		t.Fatal(err)
	}
	token.AddObject(ref("a#1"), older)
	token.AddObject(ref("a#3"), older[:20])
	return revision
}

// A crash at every call of every kind of work, in every way: a fresh store then finds the old value or the new one,
// and nothing keeps it from writing and tidying up.
func TestCrashAtEveryCallLeavesOldOrNew(t *testing.T) {
	works := []work{
		{"creating", nothing, put("new"), "", "new"},
		{"replacing", oldValue, put("new"), "old", "new"},
		{"replacing after earlier crashes", oldValueAndLeftovers, put("new"), "old", "new"},
		{"deleting", oldValue, remove, "old", ""},
		{"deleting after earlier crashes", oldValueAndLeftovers, remove, "old", ""},
	}
	for _, w := range works {
		for _, how := range []crash{before, after, midway} {
			for at, over := 1, false; !over; at++ {
				t.Run(fmt.Sprintf("%s, crash %s, call %d", w.sentence, how, at), func(t *testing.T) {
					over = !w.crashAt(t, how, at)
				})
			}
		}
	}
}

// crashAt returns false where the work was done before the crash was due.
func (w work) crashAt(t *testing.T, how crash, at int) bool {
	t.Helper()
	token, stateDir := hsmtest.NewMemory(), t.TempDir()
	revision := w.prepare(t, token, open(t, token, stateDir))
	device := &crashing{token: token, at: at, how: how}
	err := w.do(t.Context(), open(t, device, stateDir), revision)
	if !device.crashed() && err != nil {
		t.Fatalf("without a crash: %v", err)
	}

	fresh := open(t, token, stateDir)
	entry, getErr := fresh.Get(t.Context(), "a")
	found := string(entry.Value)
	cutShort := w.old == "" && how == midway && errors.Is(getErr, store.ErrCorrupt)
	if getErr != nil && !cutShort && !errors.Is(getErr, store.ErrNotFound) {
		t.Fatalf("Get after the crash = %v", getErr)
	}
	if found != w.old && found != w.new {
		t.Fatalf("Get after the crash = %q, want %q or %q", found, w.old, w.new)
	}
	if err == nil && found != w.new {
		t.Fatalf("it was confirmed, and Get = %q, want %q", found, w.new)
	}
	if _, err := fresh.Put(t.Context(), "a", []byte("next"), entry.Revision); err != nil {
		t.Fatalf("Put after the crash = %v", err)
	}
	if got := labels(t, token); len(got) != 1 {
		t.Fatalf("after the next write the token holds %q, want one object", got)
	}
	entry, err = fresh.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "next" {
		t.Fatalf("Get = %q, %v", entry.Value, err)
	}
	return device.crashed()
}
