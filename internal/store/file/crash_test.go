package file

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// steps of a write, in their order; a new one that is not listed here makes the test fail.
var steps = []string{"create", "half written", "sync", "rename", "sync directory"}

// Stopping a write before each of its steps, a fresh store must find the old value or the new one, and write again.
func TestCrashAtEveryStepLeavesOldOrNew(t *testing.T) {
	for _, create := range []bool{true, false} {
		for i, at := range steps {
			t.Run(fmt.Sprintf("create=%v before %s", create, at), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "store")
				s, err := Open(dir)
				if err != nil {
					t.Fatal(err)
				}
				old := store.NoRevision
				if !create {
					if old, err = s.Put(t.Context(), "a", []byte("old"), store.NoRevision); err != nil {
						t.Fatal(err)
					}
				}
				var passed []string
				s.interrupt = func(step string) error {
					passed = append(passed, step)
					if step == at {
						return unix.ENOSPC
					}
					return nil
				}
				if _, err := s.Put(t.Context(), "a", []byte("new"), old); !errors.Is(err, store.ErrFull) {
					t.Fatalf("Put = %v, want ErrFull", err)
				}
				if fmt.Sprint(passed) != fmt.Sprint(steps[:i+1]) {
					t.Fatalf("steps were %q, want %q", passed, steps[:i+1])
				}
				renamed := at == "sync directory"

				fresh, err := Open(dir)
				if err != nil {
					t.Fatal(err)
				}
				entry, err := fresh.Get(t.Context(), "a")
				switch {
				case renamed && (err != nil || string(entry.Value) != "new"):
					t.Fatalf("Get = %q, %v, want the new value", entry.Value, err)
				case !renamed && create && !errors.Is(err, store.ErrNotFound):
					t.Fatalf("Get = %q, %v, want ErrNotFound", entry.Value, err)
				case !renamed && !create && (err != nil || string(entry.Value) != "old" || entry.Revision != old):
					t.Fatalf("Get = %q, %v, want the old value", entry.Value, err)
				}
				if _, err := fresh.Put(t.Context(), "a", []byte("next"), entry.Revision); err != nil {
					t.Fatalf("Put after the crash = %v", err)
				}
				files, err := filepath.Glob(filepath.Join(dir, temporaryPrefix+"*"))
				if err != nil || len(files) != 0 {
					t.Errorf("left behind: %q, %v", files, err)
				}
			})
		}
	}
}
