package filelock_test

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store/internal/filelock"
)

func TestOnlyOneHoldsTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	var (
		group   sync.WaitGroup
		holders int // guarded by the lock under test: -race tells when it is not
	)
	for range 8 {
		group.Go(func() {
			for range 50 {
				unlock, err := filelock.Lock(t.Context(), path)
				if err != nil {
					t.Error(err)
					return
				}
				holders++
				if holders != 1 {
					t.Errorf("%d holders", holders)
				}
				holders--
				unlock()
			}
		})
	}
	group.Wait()
}

func TestWaitingEndsWithTheContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := filelock.Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := filelock.Lock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Lock = %v, want DeadlineExceeded", err)
	}
	unlock()
	unlock, err = filelock.Lock(t.Context(), path)
	if err != nil {
		t.Fatalf("Lock after unlock = %v", err)
	}
	unlock()
}

func TestDirectoryThatDoesNotExistIsAnError(t *testing.T) {
	if _, err := filelock.Lock(t.Context(), filepath.Join(t.TempDir(), "none", "lock")); err == nil {
		t.Error("Lock = nil")
	}
}
