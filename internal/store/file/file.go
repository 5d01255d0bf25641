// Package file keeps values in files of one directory: the store for one machine.
//
// Each name is one file of mode 0600 in a directory of mode 0700. "/" in a name becomes "+", which no name contains,
// so names and file names translate both ways without doubt; files of our own begin with ".", which no name does. A
// file holds a frame: one line with revision and checksum, then the value as it is.
//
// A write goes to a temporary file, is synced, renamed over the name, and the directory is synced: after a crash at
// any moment the name holds the old value or the new one, whole. Compare-and-swap holds among all processes of the
// machine, which lock the file .lock for the time of a write; readers need no lock, since a rename is atomic.
//
// The directory must lie on a local file system: flock and rename do not keep these promises on every network share.
package file

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/internal/filelock"
	"vault-plugin-secrets-nitrokey/internal/store/internal/frame"
)

const (
	lockName        = ".lock"
	lockPrefix      = ".lock-" // of locks that Lock takes
	temporaryPrefix = ".writing-"
)

// Store is a directory of values.
type Store struct {
	dir string
	// interrupt is set by tests: it is asked before every step of a write, and its error ends the write right there
	// as a crash or a full disk would.
	interrupt func(step string) error
}

var _ store.Store = (*Store)(nil)

// Open uses dir, and makes it with mode 0700 where it is missing. A directory in which others may write is refused:
// they could put an older value back.
func Open(dir string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the file store %s: %w", dir, err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the file store: %w: %w", kind(err), err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("opening the file store: %w: %w", kind(err), err)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("opening the file store: %w: others may write in %s (mode %04o); run chmod 700 on it",
			store.ErrDenied, dir, info.Mode().Perm())
	}
	return &Store{dir: dir, interrupt: func(string) error { return nil }}, nil
}

// Get implements [store.Store].
func (s *Store) Get(ctx context.Context, name string) (store.Entry, error) {
	if err := store.CheckName(name); err != nil {
		return store.Entry{}, err
	}
	if err := ctx.Err(); err != nil {
		return store.Entry{}, fmt.Errorf("reading %q: %w", name, err)
	}
	return s.read(name)
}

// Put implements [store.Store].
func (s *Store) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := store.CheckName(name); err != nil {
		return store.NoRevision, err
	}
	if err := store.CheckValue(value, store.MaxValueSize); err != nil {
		return store.NoRevision, fmt.Errorf("writing %q: %w", name, err)
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return store.NoRevision, fmt.Errorf("writing %q: %w", name, err)
	}
	defer unlock()
	s.removeLeftovers()

	if err := s.expect(name, expected); err != nil {
		return store.NoRevision, fmt.Errorf("writing %q: %w", name, err)
	}
	revision := frame.NewRevision()
	if err := s.write(name, frame.Encode(revision, value)); err != nil {
		return store.NoRevision, fmt.Errorf("writing %q: %w: %w", name, kind(err), err)
	}
	return revision, nil
}

// List implements [store.Store].
func (s *Store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("listing %q: %w", prefix, err)
	}
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing %q: %w: %w", prefix, kind(err), err)
	}
	var names []string
	for _, file := range files {
		name := strings.ReplaceAll(file.Name(), "+", "/")
		if strings.HasPrefix(name, prefix) && store.CheckName(name) == nil && file.Type().IsRegular() {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

// Delete implements [store.Store].
func (s *Store) Delete(ctx context.Context, name string, expected store.Revision) error {
	if err := store.CheckName(name); err != nil {
		return err
	}
	unlock, err := s.lock(ctx)
	if err != nil {
		return fmt.Errorf("deleting %q: %w", name, err)
	}
	defer unlock()

	entry, err := s.read(name)
	if err != nil {
		return fmt.Errorf("deleting %q: %w", name, err)
	}
	if entry.Revision != expected {
		return fmt.Errorf("deleting %q: %w: it is at revision %s, not %s", name, store.ErrConflict, entry.Revision, expected)
	}
	if err := errors.Join(s.interrupt("remove"), ctx.Err()); err != nil {
		return fmt.Errorf("deleting %q: %w", name, err)
	}
	if err := os.Remove(s.path(name)); err != nil {
		return fmt.Errorf("deleting %q: %w: %w", name, kind(err), err)
	}
	if err := s.syncDir(); err != nil {
		return fmt.Errorf("deleting %q: %w: %w", name, kind(err), err)
	}
	return nil
}

// Lock waits until no other process, and no other goroutine of this one, holds the lock of that name, which has nothing to
// do with the value of that name: it is for work beside the store that must not be done twice at a time. The caller calls
// unlock once; the death of a process unlocks as well.
func (s *Store) Lock(ctx context.Context, name string) (unlock func(), err error) {
	if err := store.CheckName(name); err != nil {
		return nil, err
	}
	unlock, err = filelock.Lock(ctx, filepath.Join(s.dir, lockPrefix+strings.ReplaceAll(name, "/", "+")))
	if err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("locking %q: %w: %w", name, kind(err), err)
	}
	return unlock, err
}

// Close implements [store.Store]; nothing is held open.
func (s *Store) Close() error { return nil }

func (s *Store) path(name string) string {
	return filepath.Join(s.dir, strings.ReplaceAll(name, "/", "+"))
}

func (s *Store) lock(ctx context.Context) (unlock func(), err error) {
	unlock, err = filelock.Lock(ctx, filepath.Join(s.dir, lockName))
	if err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("%w: %w", kind(err), err)
	}
	return unlock, err
}

func (s *Store) read(name string) (store.Entry, error) {
	framed, err := os.ReadFile(s.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		if _, gone := os.Stat(s.dir); gone == nil { // a directory that is gone tells nothing about its files
			return store.Entry{}, fmt.Errorf("reading %q: %w", name, store.ErrNotFound)
		}
	}
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q: %w: %w", name, kind(err), err)
	}
	entry, err := frame.Decode(framed)
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q from %s: %w; put the file back from a backup, or remove it", name, s.path(name), err)
	}
	return entry, nil
}

// expect compares the revision of name with the expected one. The lock is held.
func (s *Store) expect(name string, expected store.Revision) error {
	entry, err := s.read(name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if entry.Revision != expected {
		return fmt.Errorf("%w: it is at revision %q, not %q", store.ErrConflict, entry.Revision, expected)
	}
	return nil
}

// write puts a whole file in place of name, durably. The lock is held.
func (s *Store) write(name string, framed []byte) error {
	temporary := filepath.Join(s.dir, temporaryPrefix+rand.Text())
	if err := s.interrupt("create"); err != nil {
		return err
	}
	file, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(s.fill(file, framed), file.Close()); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	if err := s.interrupt("rename"); err != nil {
		return err
	}
	if err := os.Rename(temporary, s.path(name)); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	return s.syncDir()
}

func (s *Store) fill(file *os.File, framed []byte) error {
	half := len(framed) / 2
	if _, err := file.Write(framed[:half]); err != nil {
		return err
	}
	if err := s.interrupt("half written"); err != nil {
		return err
	}
	if _, err := file.Write(framed[half:]); err != nil {
		return err
	}
	if err := s.interrupt("sync"); err != nil {
		return err
	}
	return file.Sync()
}

// syncDir makes a rename or a removal durable.
func (s *Store) syncDir() error {
	if err := s.interrupt("sync directory"); err != nil {
		return err
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// removeLeftovers removes what a writer that died left behind. The lock is held, so nobody is writing; what cannot be
// removed now is tried again by the next writer.
func (s *Store) removeLeftovers() {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return
	}
	for _, file := range files {
		if strings.HasPrefix(file.Name(), temporaryPrefix) {
			_ = os.Remove(filepath.Join(s.dir, file.Name()))
		}
	}
}

// kind says what an error of the file system means to a user of a store.
func kind(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS), errors.Is(err, unix.ELOOP):
		return store.ErrDenied
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EFBIG):
		return store.ErrFull
	default:
		return store.ErrUnavailable
	}
}
