package pkcs11

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ledgerFiles is the ledger's directory:
//
//	pin.key            32 random bytes, mode 0600, made once
//	pin-<serial>.json  what is known about one token, see [record]
//	pin-<serial>.lock  held with flock(2) while a log-in to that token runs; never removed
//
// A file is replaced by writing another beside it, fsync, rename and fsync of the directory, so that a power cut leaves
// the old content or the new one.
type ledgerFiles struct {
	dir  string
	sync func(*os.File) error // fsync(2); tests count and break it
}

func syncFile(f *os.File) error { return f.Sync() }

// fingerprint tells PINs apart, poorly on purpose: 10 bits. The same PIN always has the same; another has it once in
// 1,024 and is barred wrongly then; and whoever steals the directory learns next to nothing about the PIN.
type fingerprint uint16

const fingerprintBits = 10

// keySize is the size of pin.key in bytes.
const keySize = 32

// maxLedgerFile bounds what is read of a file, in bytes: far more than 1,024 bars take.
const maxLedgerFile = 256 << 10

// ledgerVersion is the version of the record files.
const ledgerVersion = 1

// damagedError says that a file of the ledger is not what we wrote.
type damagedError struct {
	path string
	err  error
}

func (e *damagedError) Error() string {
	return fmt.Sprintf("the file %s is damaged: %v", e.path, e.err)
}
func (e *damagedError) Unwrap() error { return e.err }

// setAside moves the file out of the way without destroying what it tells.
func (e *damagedError) setAside() error { return os.Rename(e.path, e.path+".damaged") }

// checkDir refuses a directory that somebody else could change, or that is not there: made by ourselves it might lie
// where a volume should be mounted, and what was barred would be forgotten.
func (f ledgerFiles) checkDir() error {
	if f.dir == "" {
		return errors.New("no state directory was given")
	}
	info, err := os.Lstat(f.dir)
	if err != nil {
		return err
	}
	switch {
	case !info.IsDir():
		return errors.New("it is not a directory")
	case owner(info) != os.Geteuid():
		return fmt.Errorf("it belongs to the user with id %d, and this program runs as %d", owner(info), os.Geteuid())
	case info.Mode().Perm()&0o022 != 0:
		return fmt.Errorf("its mode %04o lets others write to it", info.Mode().Perm())
	}
	return nil
}

// lock waits until no other process, and no other goroutine of this one, logs in to the token.
func (f ledgerFiles) lock(ctx context.Context, serial string) (unlock func(), err error) {
	path := f.path(serial, ".lock")
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EROFS) { // one that was there before the disk became read-only does as well
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	unlock = func() { _ = unix.Close(fd) } // closing releases the lock
	const shortest, longest = time.Millisecond, 50 * time.Millisecond
	for pause := shortest; ; pause = min(2*pause, longest) {
		err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return unlock, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			unlock()
			return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			unlock()
			return nil, ctx.Err()
		}
	}
}

// fingerprint is that of a PIN on a token, and the name of the key that it was made with.
func (f ledgerFiles) fingerprint(serial string, pin []byte) (fingerprint, string, error) {
	key, err := f.key()
	if err != nil {
		return 0, "", err
	}
	defer clear(key)
	mac := hmac.New(sha256.New, key)
	_, _ = io.WriteString(mac, serial) // a hash never fails to take bytes
	_, _ = mac.Write([]byte{0})
	_, _ = mac.Write(pin)
	return fingerprint(binary.BigEndian.Uint16(mac.Sum(nil)) >> (16 - fingerprintBits)), keyName(key), nil
}

// keyName tells keys apart without telling what they are.
func keyName(key []byte) string {
	sum := sha256.Sum256(append([]byte("nitroseal pin.key\x00"), key...))
	return hex.EncodeToString(sum[:4])
}

// key returns the key of fingerprints and makes it where there is none. The caller wipes it.
func (f ledgerFiles) key() ([]byte, error) {
	path := filepath.Join(f.dir, "pin.key")
	key, err := f.readPrivate(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err := f.makeKey(path); err != nil {
			return nil, err
		}
		key, err = f.readPrivate(path)
	}
	if err != nil {
		return nil, err
	}
	if len(key) != keySize {
		clear(key)
		return nil, &damagedError{path, fmt.Errorf("it has %d bytes instead of %d", len(key), keySize)}
	}
	return key, nil
}

// makeKey writes a new key unless another process was faster. The log-ins of two tokens do not exclude each other, so
// what is created is a second name of a file already complete.
func (f ledgerFiles) makeKey(path string) error {
	key := make([]byte, keySize)
	defer clear(key)
	_, _ = rand.Read(key) // never fails: crypto/rand
	file, err := os.CreateTemp(f.dir, ".pin.key.*")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(file.Name()) }()
	if err := f.fill(file, key); err != nil {
		return err
	}
	if err := os.Link(file.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return f.syncDir()
}

// readPrivate reads a file that nobody else could have written or read.
func (f ledgerFiles) readPrivate(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, &damagedError{path, errors.New("it is a symbolic link")}
	}
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	file := os.NewFile(uintptr(fd), path)
	defer func() { _ = file.Close() }()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	switch {
	case !info.Mode().IsRegular():
		return nil, &damagedError{path, errors.New("it is not a regular file")}
	case owner(info) != os.Geteuid() || info.Mode().Perm()&0o077 != 0:
		return nil, &damagedError{path, fmt.Errorf("it has mode %04o and owner %d; it was written with mode 0600 by this user",
			info.Mode().Perm(), owner(info))}
	}
	content, err := io.ReadAll(io.LimitReader(file, maxLedgerFile+1))
	if err == nil && len(content) > maxLedgerFile {
		return nil, &damagedError{path, errors.New("it is too long")}
	}
	return content, err
}

// recordFile is a record as it is written.
type recordFile struct {
	Version int `json:"version"`
	// Token is the serial as in the file's name, so that a file copied to another name is noticed.
	Token string `json:"token"`
	record
}

// read returns what is known about a token, nothing where there is no file, and a damagedError where there is one that
// we did not write.
func (f ledgerFiles) read(serial string) (record, error) {
	path := f.path(serial, ".json")
	content, err := f.readPrivate(path)
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, nil
	}
	if err != nil {
		return record{}, err
	}
	r, err := parseRecord(content, escapeSerial(serial))
	if err != nil {
		return record{}, &damagedError{path, err}
	}
	return r, nil
}

// parseRecord reads a record file of a token.
func parseRecord(content []byte, token string) (record, error) {
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.DisallowUnknownFields()
	var file recordFile
	if err := decoder.Decode(&file); err != nil {
		return record{}, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return record{}, errors.New("something follows its end")
	}
	marks := make([]fingerprint, 0, len(file.Barred)+3)
	for _, b := range file.Barred {
		if b.Why != rejected && b.Why != unanswered && b.Why != replaced {
			return record{}, fmt.Errorf("%q is no reason for a bar", b.Why)
		}
		marks = append(marks, b.Mark)
	}
	if file.Good != nil {
		marks = append(marks, *file.Good)
	}
	if file.PassFor != nil {
		marks = append(marks, *file.PassFor)
	}
	if file.Intent != nil {
		marks = append(marks, file.Intent.Mark)
	}
	for _, mark := range marks {
		if mark >= 1<<fingerprintBits {
			return record{}, fmt.Errorf("%d is no fingerprint", mark)
		}
	}
	switch name, err := hex.DecodeString(file.Key); {
	case file.Version != ledgerVersion:
		return record{}, fmt.Errorf("it has version %d, and this program knows %d", file.Version, ledgerVersion)
	case file.Token != token:
		return record{}, fmt.Errorf("it belongs to the token %q", file.Token)
	case err != nil || len(name) != 4:
		return record{}, fmt.Errorf("%q names no key", file.Key)
	}
	if len(file.Barred) == 0 {
		file.Barred = nil // written or not, an empty list is none
	}
	return file.record, nil
}

// write makes a record durable. The caller holds the token's lock.
func (f ledgerFiles) write(serial string, r record) error {
	content, err := encodeRecord(serial, r)
	if err != nil {
		return err
	}
	path := f.path(serial, ".json")                                              // below -state-dir, the serial escaped
	beside := path + ".new"                                                      // one name, so that crashes do not fill the directory; the lock makes us its only writer
	if err := os.Remove(beside); err != nil && !errors.Is(err, fs.ErrNotExist) { //nolint:gosec // as path says
		return err
	}
	file, err := os.OpenFile(beside, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // as path says
	if err != nil {
		return err
	}
	if err := f.fill(file, content); err != nil {
		return err
	}
	if err := os.Rename(beside, path); err != nil { //nolint:gosec // as path says
		return err
	}
	return f.syncDir()
}

func encodeRecord(serial string, r record) ([]byte, error) {
	content, err := json.MarshalIndent(recordFile{Version: ledgerVersion, Token: escapeSerial(serial), record: r}, "", "  ")
	return append(content, '\n'), err
}

// overwrite writes a record over the one before, which takes no room on most disks. A power cut meanwhile may leave neither:
// a damaged file, which is a bar.
func (f ledgerFiles) overwrite(serial string, r record) error {
	content, err := encodeRecord(serial, r)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(f.path(serial, ".json"), os.O_WRONLY|unix.O_NOFOLLOW, 0) //nolint:gosec // below -state-dir, the serial escaped
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		_ = file.Close()
		return err
	}
	if missing := info.Size() - int64(len(content)); missing > 0 { // blanks at the end are none of JSON's business
		content = append(content, bytes.Repeat([]byte{'\n'}, int(missing))...)
	}
	return f.fill(file, content)
}

// noRoom tells errors of a disk that takes nothing more from those of a directory that is not as it should be.
func noRoom(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS)
}

// fill writes all of a file, makes it durable and closes it.
func (f ledgerFiles) fill(file *os.File, content []byte) error {
	_, err := file.Write(content)
	if err == nil {
		err = f.sync(file)
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	return err
}

// syncDir makes new names durable.
func (f ledgerFiles) syncDir() error {
	dir, err := os.Open(f.dir)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return f.sync(dir)
}

// path is that of a token's file.
func (f ledgerFiles) path(serial, suffix string) string {
	return filepath.Join(f.dir, "pin-"+escapeSerial(serial)+suffix)
}

// escapeSerial turns a serial number into part of a file's name, different ones into different ones. A token's serial
// has at most 16 bytes (CK_TOKEN_INFO); what is much longer is named by its SHA-256.
func escapeSerial(serial string) string {
	const longest = 64
	if len(serial) > longest {
		return fmt.Sprintf("=%x", sha256.Sum256([]byte(serial)))
	}
	var name strings.Builder
	for _, b := range []byte(serial) {
		switch {
		case b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', b >= '0' && b <= '9', b == '-':
			name.WriteByte(b)
		default:
			fmt.Fprintf(&name, "%%%02X", b)
		}
	}
	return name.String()
}
