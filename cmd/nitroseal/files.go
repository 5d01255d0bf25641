package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// input reads all of a file, or of standard input for "-" and nothing; more than limit bytes are an error. The caller
// wipes what is secret.
func (a *app) input(ctx context.Context, path string, limit int, what string) ([]byte, error) {
	from, name := a.stdin, "standard input"
	if path == "" || path == "-" {
		if err := a.takeStdin(what); err != nil {
			return nil, err
		}
		if isTerminal(a.stdin) {
			a.progress("type %s, and Ctrl-D at the beginning of a line to end it:", what)
		}
	} else {
		file, err := os.Open(path)
		if err != nil {
			return nil, usage("reading %s: %s: %w", what, path, pathless(err))
		}
		defer file.Close()
		from, name = file, path
	}
	content, err := interruptible(ctx, func() ([]byte, error) { return io.ReadAll(io.LimitReader(from, int64(limit)+1)) })
	switch {
	case err != nil:
		clear(content)
		return nil, fmt.Errorf("reading %s: %s: %w", what, name, pathless(err))
	case len(content) > limit:
		clear(content)
		return nil, usage("reading %s: %s has more than %d bytes; is it the right one?", what, name, limit)
	}
	return content, nil
}

// interruptible waits for a read, until Ctrl-C. A read of a terminal or a pipe knows no end but its own.
func interruptible(ctx context.Context, read func() ([]byte, error)) ([]byte, error) {
	type answer struct {
		content []byte
		err     error
	}
	done := make(chan answer, 1)
	go func() { // ends with the read, or with the process
		content, err := read()
		done <- answer{content, err}
	}()
	select {
	case got := <-done:
		return got.content, got.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// output writes a result to a file, or to standard output for "-" and nothing. A file is made with mode 0600, and is there
// whole or not at all.
func (a *app) output(path string, content []byte) error {
	if path == "" || path == "-" {
		_, err := a.stdout.Write(content)
		return written(err)
	}
	if err := writeFile(path, content); err != nil {
		return fmt.Errorf("writing %s: %w", path, pathless(err))
	}
	return nil
}

// writeFile puts content in place of a file, durably: another file is written beside it and renamed. Links are followed,
// and what is no regular file, a device or a pipe, is written to as it is.
func writeFile(path string, content []byte) error {
	target, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		target, err = path, nil
	}
	if err != nil {
		return err
	}
	info, err := os.Stat(target)
	if err == nil && !info.Mode().IsRegular() {
		return writeThrough(target, content)
	}
	beside := filepath.Join(filepath.Dir(target), "."+filepath.Base(target)+"."+rand.Text()[:8])
	file, err := os.OpenFile(beside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(beside, target)
	}
	if err != nil {
		return errors.Join(err, os.Remove(beside))
	}
	return syncDir(filepath.Dir(target))
}

func writeThrough(path string, content []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	return errors.Join(err, file.Close())
}

// syncDir makes a rename durable.
func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
