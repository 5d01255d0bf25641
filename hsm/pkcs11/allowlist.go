package pkcs11

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// maxLinks is how many symbolic links a path may lead through, as in the kernel.
const maxLinks = 40

// resolveModule returns the file that a module's path leads to, symbolic links resolved, provided that one of the paths
// in allowed leads to the same file and that nobody but root and ourselves can put another file in its place: whoever
// may write a mount's configuration must not be able to choose what this program loads.
//
// A path that is not allowed gets one and the same error whether or not it exists.
func resolveModule(path string, allowed []string) (string, error) {
	if len(allowed) == 0 {
		return "", errors.New("no PKCS#11 module is allowed: name the modules that mounts may use with -pkcs11-module=PATH " +
			"among the plugin's own arguments (vault plugin register -args=…)")
	}
	notAllowed := fmt.Errorf("the PKCS#11 module %q is not among those that the plugin was started with; add "+
		"-pkcs11-module=%s to the plugin's own arguments if it should be, or use one of: %s",
		path, path, strings.Join(allowed, ", "))
	if !filepath.IsAbs(path) {
		return "", notAllowed
	}
	named := slices.ContainsFunc(allowed, func(a string) bool { return filepath.Clean(a) == filepath.Clean(path) })
	if !named {
		// It may be another name of an allowed file. Nothing about a file that is not comes out of here.
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return "", notAllowed
		}
		named = slices.ContainsFunc(allowed, func(a string) bool {
			resolved, err := filepath.EvalSymlinks(a)
			return err == nil && filepath.IsAbs(a) && resolved == target
		})
		if !named {
			return "", notAllowed
		}
	}
	resolved, err := resolveSafely(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("there is no PKCS#11 module %q; install it, or correct the path: %w", path, err)
	}
	if err != nil {
		return "", fmt.Errorf("checking the PKCS#11 module %q: %w", path, err)
	}
	return resolved, nil
}

// resolveSafely walks along an absolute path as the kernel does and checks every directory, link and file on the way.
func resolveSafely(path string) (string, error) {
	current, rest := "/", strings.Split(path, "/")
	if err := checkSafe(current, true); err != nil {
		return "", err
	}
	links := 0
	for len(rest) > 0 {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			current = filepath.Dir(current)
			continue
		}
		next := filepath.Join(current, name)
		info, err := os.Lstat(next)
		if err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink != 0 {
			if links++; links > maxLinks {
				return "", fmt.Errorf("more than %d symbolic links", maxLinks)
			}
			if err := checkOwner(next, info); err != nil {
				return "", err
			}
			target, err := os.Readlink(next)
			if err != nil {
				return "", err
			}
			if filepath.IsAbs(target) {
				current = "/"
			}
			rest = append(strings.Split(target, "/"), rest...)
			continue
		}
		if err := checkSafe(next, len(rest) > 0); err != nil {
			return "", err
		}
		current = next
	}
	info, err := os.Lstat(current)
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is not a regular file", current)
	}
	return current, nil
}

// checkSafe refuses a file or directory that somebody besides root and ourselves can change. A directory of root's with
// the sticky bit passes: others can add to it, and cannot replace what is not theirs.
func checkSafe(path string, directory bool) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if directory && !info.IsDir() {
		return fmt.Errorf("%s is not a directory", path)
	}
	if err := checkOwner(path, info); err != nil {
		return err
	}
	if info.Mode().Perm()&0o022 == 0 {
		return nil
	}
	if info.IsDir() && info.Mode()&fs.ModeSticky != 0 && owner(info) == 0 {
		return nil
	}
	return fmt.Errorf("%s has mode %04o, so users besides its owner can replace what is loaded; correct it with chmod go-w %s",
		path, info.Mode().Perm(), path)
}

func checkOwner(path string, info fs.FileInfo) error {
	if uid := owner(info); uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to the user with id %d, who can replace what is loaded; it must belong to root or to "+
			"the user that the plugin runs as (id %d)", path, uid, os.Geteuid())
	}
	return nil
}

// owner returns the user id of a file, or -1 where the system has none, which is nobody's.
func owner(info fs.FileInfo) int {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(stat.Uid)
	}
	return -1
}
