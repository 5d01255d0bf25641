package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// file appends lines to a file. Several processes may write the same one: each holds a lock (flock) while it appends, so
// that a line which a crash or a full disk cut short is seen by the next writer and closed off with a newline.
type file struct {
	path string
	open *os.File // nil before Reopen
	sync func(*os.File) error
}

// File is a sink that appends to a file of mode 0600 and syncs it. The file is made where it is missing, and opened anew
// where it was renamed or removed, so logrotate needs no signal, and copytruncate works as well. A symlink, a file of another
// user and one that others may write take no lines, with [ErrUnsafe]: then it is not the log that it seems. That is no error
// here, no more than a disk that is full or away: a mode that somebody changed must not keep a Vault sealed where another sink
// takes the lines, and it can be mended while we run.
func File(path string) (Sink, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("audit file %q: %w: its path does not begin with \"/\"", path, ErrUnsafe)
	}
	return &file{path: filepath.Clean(path), sync: (*os.File).Sync}, nil
}

// Name implements [Sink].
func (f *file) Name() string { return "file " + f.path }

// Reopen implements [Sink].
func (f *file) Reopen() error {
	if err := f.Close(); err != nil {
		return err
	}
	if err := checkFolder(filepath.Dir(f.path)); err != nil {
		return err
	}
	// O_NONBLOCK: a FIFO without a reader would hang here.
	const flags = os.O_RDWR | os.O_APPEND | unix.O_NOFOLLOW | unix.O_CLOEXEC | unix.O_NONBLOCK
	opened, err := os.OpenFile(f.path, flags, 0)
	created := false
	if errors.Is(err, fs.ErrNotExist) {
		opened, err = os.OpenFile(f.path, flags|os.O_CREATE, 0o600)
		created = true
	}
	if errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%w: it is a symbolic link; name the file itself", ErrUnsafe)
	}
	if err != nil {
		return fmt.Errorf("opening it: %w", pathless(err))
	}
	if err := checkFile(opened); err != nil {
		return errors.Join(err, opened.Close())
	}
	if created {
		if err := syncFolder(filepath.Dir(f.path)); err != nil {
			return errors.Join(err, opened.Close())
		}
	}
	f.open = opened
	return nil
}

// Write implements [Sink].
func (f *file) Write(lines []Line) (err error) {
	if f.open == nil || f.moved() {
		if err := f.Reopen(); err != nil {
			return err
		}
	}
	descriptor := int(f.open.Fd())
	if err := lock(descriptor); err != nil {
		return fmt.Errorf("locking it: %w", err)
	}
	defer func() { err = errors.Join(err, flock(descriptor, unix.LOCK_UN)) }()

	var text []byte
	torn, err := f.torn()
	if err != nil {
		return err
	}
	if torn {
		text = append(text, '\n')
	}
	for _, line := range lines {
		text = append(text, line.Text...)
	}
	if _, err := f.open.Write(text); err != nil {
		return fmt.Errorf("writing it: %w", pathless(err))
	}
	if err := f.sync(f.open); err != nil {
		return fmt.Errorf("syncing it: %w", pathless(err))
	}
	return nil
}

// Room tells whether the disk has room for a line.
func (f *file) Room() error {
	var disk unix.Statfs_t
	if err := unix.Fstatfs(int(f.open.Fd()), &disk); err != nil {
		return fmt.Errorf("looking at its disk: %w", err)
	}
	if disk.Blocks > 0 && disk.Bavail == 0 && (os.Geteuid() != 0 || disk.Bfree == 0) { // some file systems tell nothing
		return fmt.Errorf("its disk is full: %w", unix.ENOSPC)
	}
	return nil
}

// Close implements [Sink].
func (f *file) Close() error {
	if f.open == nil {
		return nil
	}
	err := f.open.Close()
	f.open = nil
	return err
}

// torn tells whether the file ends in the middle of a line.
func (f *file) torn() (bool, error) {
	end, err := f.open.Seek(0, io.SeekEnd)
	if err != nil || end == 0 {
		return false, err
	}
	var last [1]byte
	if _, err := f.open.ReadAt(last[:], end-1); err != nil {
		return false, fmt.Errorf("reading its end: %w", pathless(err))
	}
	return last[0] != '\n', nil
}

// moved tells whether the path leads to another file than the open one, or to none: it was rotated.
func (f *file) moved() bool {
	open, err := f.open.Stat()
	if err != nil {
		return true
	}
	there, err := os.Lstat(f.path)
	return err != nil || !os.SameFile(open, there)
}

// checkFile refuses a file whose content others decide.
func checkFile(opened *os.File) error {
	var info unix.Stat_t
	if err := unix.Fstat(int(opened.Fd()), &info); err != nil {
		return fmt.Errorf("looking at it: %w", err)
	}
	refuse := func(why string) error { return fmt.Errorf("%w: %s", ErrUnsafe, why) }
	switch {
	case info.Mode&unix.S_IFMT != unix.S_IFREG:
		return refuse("it is not a regular file")
	case int(info.Uid) != os.Geteuid():
		return refuse("it belongs to another user; move it away, and a new one is made")
	case info.Mode&0o022 != 0:
		return refuse(fmt.Sprintf("others may write it (mode %04o); run: chmod go-w %s", info.Mode&0o7777, opened.Name()))
	case info.Nlink != 1:
		return refuse("it has a second name (a hard link); move it away, and a new one is made")
	}
	return nil
}

// checkFolder refuses a folder in which everybody may put another file in place.
func checkFolder(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("looking at its folder: %w", pathless(err))
	}
	if info.Mode().Perm()&0o002 != 0 && info.Mode()&os.ModeSticky == 0 {
		return fmt.Errorf("%w: everybody may write in its folder; run: chmod o-w %s", ErrUnsafe, dir)
	}
	return nil
}

// syncFolder makes a new name in a folder durable.
func syncFolder(dir string) error {
	opened, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("syncing its folder: %w", pathless(err))
	}
	defer opened.Close()
	if err := opened.Sync(); err != nil {
		return fmt.Errorf("syncing its folder: %w", pathless(err))
	}
	return nil
}

// pathless leaves out the path, which the name of the sink says already.
func pathless(err error) error {
	var failed *fs.PathError
	if errors.As(err, &failed) {
		return failed.Err
	}
	return err
}

// lockLimit is how long a file that others hold locked is waited for, lockPause how often they are asked.
const (
	lockLimit = time.Second
	lockPause = 5 * time.Millisecond
)

// lock locks a file among processes. Whoever may read the file can lock it and keep it so, and a process that was stopped does
// not let go; so after a while it is written without the lock, which costs an empty line at worst: an append is whole anyway.
func lock(descriptor int) error {
	for begun := time.Now(); ; <-time.After(lockPause) {
		err := flock(descriptor, unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		if time.Since(begun) > lockLimit {
			return nil
		}
	}
}

// flock locks a file among processes; a signal does not interrupt it.
func flock(descriptor, how int) error {
	for {
		if err := unix.Flock(descriptor, how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
