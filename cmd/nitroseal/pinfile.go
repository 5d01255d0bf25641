package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// pinFile is the file with a device's PIN while the PIN is changed: the new PIN lies beside it before the token gets it. An
// empty path is a PIN that lies elsewhere, and nothing is done.
type pinFile struct{ path string }

// beside is where the new PIN waits.
func (f pinFile) beside() string { return f.path + ".new" }

// prepare writes the new PIN beside the file, durably, with the file's owner and mode.
func (f *pinFile) prepare(pin []byte) error {
	if f.path == "" {
		return nil
	}
	target, err := filepath.EvalSymlinks(f.path)
	if err != nil {
		return fmt.Errorf("the PIN file %s: %w; the PIN was not changed", f.path, pathless(err))
	}
	f.path = target
	info, err := os.Stat(target)
	if err != nil {
		return fmt.Errorf("the PIN file %s: %w; the PIN was not changed", f.path, pathless(err))
	}
	file, err := os.OpenFile(f.beside(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there from a change of the PIN that was cut short: the token has the PIN in it, or the old one. Find out with "+
			"\"nitroseal device pin try\" and --pin-file, rename it to %s where the token has it, else remove it", f.beside(), f.path)
	}
	if err != nil {
		return fmt.Errorf("writing the new PIN to %s: %w; the PIN was not changed", f.beside(), pathless(err))
	}
	line := append(pin[:len(pin):len(pin)], '\n')
	defer clear(line)
	_, err = file.Write(line)
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() {
		err = errors.Join(err, file.Chown(int(owner.Uid), int(owner.Gid)))
	}
	err = errors.Join(err, file.Chmod(info.Mode().Perm()), file.Sync(), file.Close(), syncDir(filepath.Dir(f.path)))
	if err != nil {
		return errors.Join(fmt.Errorf("writing the new PIN to %s: %w; the PIN was not changed", f.beside(), pathless(err)), f.forget())
	}
	return nil
}

// replace puts the new PIN in place of the old one: the token has it.
func (f *pinFile) replace() error {
	if f.path == "" {
		return nil
	}
	if err := errors.Join(os.Rename(f.beside(), f.path), syncDir(filepath.Dir(f.path))); err != nil {
		return fmt.Errorf("it lies in %s; rename that to %s: %w", f.beside(), f.path, err)
	}
	return nil
}

// forget removes the new PIN: the token does not have it.
func (f *pinFile) forget() error {
	if f.path == "" {
		return nil
	}
	if err := os.Remove(f.beside()); err != nil {
		return fmt.Errorf("removing %s: %w", f.beside(), pathless(err))
	}
	return nil
}

// afterDoubt says what to do where nobody knows whether the token has the new PIN.
func (f *pinFile) afterDoubt(device string) string {
	if f.path == "" {
		return "; find out with \"nitroseal device pin try " + device + "\""
	}
	return fmt.Sprintf("; %s holds the old PIN and %s the new one: find out which is right with \"nitroseal device pin try %s\", and keep that",
		f.path, f.beside(), device)
}
