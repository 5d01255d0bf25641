package token

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// maxCopy is the size of the largest copy that is read, in bytes.
const maxCopy = 64 << 20

// copyFormat is the version of the form of the copy.
const copyFormat = 1

// copied is the list on the local disk. It holds no secret: hashes of random bytes.
type copied struct {
	Format int               `json:"format"`
	Origin string            `json:"origin"`
	Read   string            `json:"read"`
	Tokens []json.RawMessage `json:"tokens"`
}

// encodeCopy is the form of the copy, and what tells two lists apart.
func encodeCopy(tokens map[string]Token, origin string, at time.Time) (raw []byte, sum [sha256.Size]byte, err error) {
	c := copied{Format: copyFormat, Origin: origin, Tokens: []json.RawMessage{}}
	hash := sha256.New()
	for _, id := range slices.Sorted(maps.Keys(tokens)) {
		t := tokens[id]
		one, err := encode(&t)
		if err != nil {
			return nil, sum, err
		}
		hash.Write(one)
		c.Tokens = append(c.Tokens, one)
	}
	hash.Sum(sum[:0])
	c.Read = at.UTC().Format(time.RFC3339)
	if raw, err = json.Marshal(c); err != nil {
		return nil, sum, fmt.Errorf("encoding the copy of the tokens: %w", err)
	}
	return raw, sum, nil
}

// readCopy reads the copy of an origin's list, and when the store told it.
func readCopy(path, origin string) (tokens map[string]Token, read time.Time, err error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not make the server wait
	if err != nil {
		return nil, time.Time{}, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, time.Time{}, err
	}
	if mode := info.Mode().Perm(); !info.Mode().IsRegular() || mode&0o022 != 0 {
		return nil, time.Time{}, fmt.Errorf("%s: others may write it (mode %04o), so it says nothing about who may ask", path, mode)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() {
		return nil, time.Time{}, fmt.Errorf("%s: it belongs to another user, so it says nothing about who may ask", path)
	}
	raw, err := io.ReadAll(io.LimitReader(file, maxCopy+1))
	if err != nil {
		return nil, time.Time{}, err
	}
	if len(raw) > maxCopy {
		return nil, time.Time{}, fmt.Errorf("%s has more than %d bytes", path, maxCopy)
	}
	return decodeCopy(raw, origin)
}

func decodeCopy(raw []byte, origin string) (tokens map[string]Token, read time.Time, err error) {
	var c copied
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&c); err != nil {
		return nil, time.Time{}, fmt.Errorf("%w: the copy: %w", ErrMalformed, err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) || c.Format != copyFormat {
		return nil, time.Time{}, fmt.Errorf("%w: the copy is of format %d, or there is more behind it", ErrMalformed, c.Format)
	}
	if c.Origin != origin {
		return nil, time.Time{}, fmt.Errorf("%w: the copy is of %s, not of %s", ErrMalformed, c.Origin, origin)
	}
	if read, err = time.Parse(time.RFC3339, c.Read); err != nil {
		return nil, time.Time{}, fmt.Errorf("%w: the copy was read at no time", ErrMalformed)
	}
	tokens = make(map[string]Token, len(c.Tokens))
	for _, one := range c.Tokens {
		t, err := decode(one)
		if err != nil {
			return nil, time.Time{}, err
		}
		tokens[t.ID] = t
	}
	return tokens, read, nil
}

// writeCopy puts the copy in place, whole or not at all.
func writeCopy(path string, raw []byte) error {
	beside := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text()[:8])
	file, err := os.OpenFile(beside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(raw)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = os.Rename(beside, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(beside))
	}
	return syncFolder(filepath.Dir(path))
}

// syncFolder makes a new name in a folder last: after a power cut the copy from before a revocation must not be back.
func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}
