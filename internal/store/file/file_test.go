package file_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
	"vault-plugin-secrets-nitrokey/internal/store/storetest"
)

func open(t *testing.T, dir string) *file.Store {
	t.Helper()
	s, err := file.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestStore(t *testing.T) {
	storetest.TestStore(t, func(t *testing.T) storetest.Place {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "store")
		return func() store.Store { return open(t, dir) }
	}, storetest.Capabilities{})
}

func TestOnlyTheOwnerCanRead(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	if _, err := s.Put(t.Context(), "prod/unseal", []byte("x"), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	wantMode := func(path string, want os.FileMode) {
		t.Helper()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %04o, want %04o", path, info.Mode().Perm(), want)
		}
	}
	wantMode(dir, 0o700)
	wantMode(filepath.Join(dir, "prod+unseal"), 0o600)
	wantMode(filepath.Join(dir, ".lock"), 0o600)
}

func TestDirectoryInWhichOthersMayWriteIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := file.Open(dir); !errors.Is(err, store.ErrDenied) {
		t.Errorf("Open = %v, want ErrDenied", err)
	}
}

func TestDirectoryThatVanishedIsNotAnEmptyStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get = %v, want ErrUnavailable", err)
	}
	if _, err := s.List(t.Context(), ""); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("List = %v, want ErrUnavailable", err)
	}
	if _, err := s.Put(t.Context(), "a", nil, store.NoRevision); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Put = %v, want ErrUnavailable", err)
	}
}

func TestDamagedFileIsSaidToBeDamagedAndKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	revision, err := s.Put(t.Context(), "a", []byte("a value"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "a")
	if err := os.Truncate(path, 60); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Get = %v, want ErrCorrupt", err)
	}
	if _, err := s.Put(t.Context(), "a", nil, revision); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Put = %v, want ErrCorrupt", err)
	}
	if err := s.Delete(t.Context(), "a", revision); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Delete = %v, want ErrCorrupt", err)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != 60 {
		t.Errorf("the damaged file was touched: %v, %v", info, err)
	}
}

func TestForeignFilesAreNotListed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	if _, err := s.Put(t.Context(), "a/b", nil, store.NoRevision); err != nil {
		t.Fatal(err)
	}
	for _, foreign := range []string{".hidden", "with space", "a++b", "+a"} {
		if err := os.WriteFile(filepath.Join(dir, foreign), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	names, err := s.List(t.Context(), "")
	if err != nil || len(names) != 1 || names[0] != "a/b" {
		t.Errorf("List = %q, %v, want only a/b", names, err)
	}
}

func TestWaitingForTheLockEndsWithTheContext(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	holdLock(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Put(ctx, "a", nil, store.NoRevision); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Put = %v, want DeadlineExceeded", err)
	}
}

func TestALockIsHeldByOneAndHindersNoWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, other := open(t, dir), open(t, dir)
	unlock, err := s.Lock(t.Context(), "keys/a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := other.Lock(ctx, "keys/a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the lock was given twice: %v", err)
	}
	if _, err := other.Put(t.Context(), "keys/a", nil, store.NoRevision); err != nil {
		t.Errorf("a write under a lock that has nothing to do with it: %v", err)
	}
	free, err := other.Lock(t.Context(), "keys/b")
	if err != nil {
		t.Fatalf("another name's lock: %v", err)
	}
	free()
	unlock()
	if free, err = other.Lock(t.Context(), "keys/a"); err != nil {
		t.Fatalf("the lock was not given back: %v", err)
	}
	free()
	if _, err := s.Lock(t.Context(), "../a"); !errors.Is(err, store.ErrInvalidName) {
		t.Errorf("a name that is none: %v", err)
	}
	if names, err := s.List(t.Context(), ""); err != nil || len(names) != 1 {
		t.Errorf("List = %q, %v: locks are not values", names, err)
	}
}
