package nethsm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/scrypt"

	"vault-plugin-secrets-nitrokey/hsm"
)

// The format of a NetHSM's backup, as its server writes it (Nitrokey/nethsm, src/keyfender/hsm.ml, "the backup format"). A
// field is a length of three bytes, big-endian, and so many bytes. A sealed field is a nonce of 12 bytes, an AES-256-GCM
// ciphertext and its tag of 16; the key is scrypt(backup passphrase, salt), and the additional data names the field:
//
//	"_NETHSM_BACKUP_", one byte: the format, 0 or 1
//	field: salt
//	sealed "backup-version":           the format once more
//	sealed "domain-key":               the domain key, itself locked with the unlock passphrase
//	sealed "backup-device-id":         format 1 only
//	sealed "backup-config-store-key":  format 1 only
//	sealed "backup", as often as there are entries: field: path, then the value
//	format 1 only: a field of length 0, then "_NETHSM_BACKUP_END_"
const (
	backupMagic   = "_NETHSM_BACKUP_"
	backupTrailer = "_NETHSM_BACKUP_END_"

	nonceSize = 12
	tagSize   = 16

	// The server's own parameters of scrypt, and the sizes of key and salt in bytes.
	scryptN, scryptR, scryptP = 16384, 8, 16
	backupKeySize             = 32
	minSaltSize               = 8 // the server's is 16
)

// ErrBackup is wrapped by every complaint about a backup file that is not whole, or not one at all.
var ErrBackup = errors.New("not a whole NetHSM backup")

// BackupInfo is what a verified backup file tells.
type BackupInfo struct {
	// Format is 0 (before version 4) or 1.
	Format int
	// Size is in bytes.
	Size int64
	// Entries counts the records of the NetHSM's database, whatever they are.
	Entries int
	// Opened is true where a passphrase was given: then every field and entry was decrypted, and what follows is known.
	Opened bool
	// DeviceID is that of the NetHSM that made the backup; empty in format 0. All containers have 0000000000.
	DeviceID string
	// Users, Keys and Namespaces count what the backup holds, those of all namespaces together.
	Users, Keys, Namespaces int
}

// ReadBackup reads a backup from its beginning to its end and says what it holds. It fails with [ErrBackup] where
// that is not a whole backup. With a passphrase everything in it is decrypted too: a wrong one is an *hsm.PINError, a
// damaged byte anywhere is [ErrBackup]. Without one only the structure is checked. Never more than one field is in
// memory, 16 MiB at most.
func ReadBackup(r io.Reader, passphrase []byte) (BackupInfo, error) {
	return readBackup(r, passphrase, keyOfBackup)
}

func readBackup(r io.Reader, passphrase []byte, derive deriveKey) (BackupInfo, error) {
	in := &backupReader{in: bufio.NewReaderSize(r, 64<<10)}
	info, err := in.header()
	if err != nil {
		return BackupInfo{}, err
	}
	if passphrase != nil {
		if err := in.open(passphrase, derive); err != nil {
			return BackupInfo{}, err
		}
		info.Opened, info.DeviceID = true, in.deviceID
	}
	if err := in.entries(&info); err != nil {
		return BackupInfo{}, err
	}
	info.Size = in.offset
	return info, nil
}

// deriveKey makes the key of a backup.
type deriveKey func(passphrase, salt []byte) ([]byte, error)

// keyOfBackup is [backupKey]. That takes a third of a second, ten times as long with the race detector, so tests put one
// here that remembers what it made.
var keyOfBackup deriveKey = backupKey

func backupKey(passphrase, salt []byte) ([]byte, error) {
	return scrypt.Key(passphrase, salt, scryptN, scryptR, scryptP, backupKeySize)
}

// backupReader reads a backup field by field.
type backupReader struct {
	in     *bufio.Reader
	offset int64 // bytes read

	format   byte
	salt     []byte
	version  []byte      // sealed
	sealed   []namedSeal // the other sealed fields of the header
	aead     cipher.AEAD // nil: nothing is decrypted
	deviceID string
}

// namedSeal is a sealed field together with the additional data that it was sealed with.
type namedSeal struct {
	name  string
	bytes []byte
}

// header reads all that comes before the entries, and decrypts nothing.
func (b *backupReader) header() (BackupInfo, error) {
	magic, err := b.take(len(backupMagic), "its first bytes")
	if err != nil {
		return BackupInfo{}, err
	}
	if string(magic) != backupMagic {
		return BackupInfo{}, fmt.Errorf("reading the backup: %w: it does not begin with %s; is it the right file?",
			ErrBackup, backupMagic)
	}
	format, err := b.take(1, "its format")
	if err != nil {
		return BackupInfo{}, err
	}
	b.format = format[0]
	if b.format > 1 {
		return BackupInfo{}, fmt.Errorf("reading the backup: %w of a format that is known here: it has format %d, and 0 "+
			"and 1 are known; use a newer version of this program",
			ErrBackup, b.format)
	}
	if b.salt, err = b.field("the salt"); err != nil {
		return BackupInfo{}, err
	}
	if len(b.salt) < minSaltSize {
		return BackupInfo{}, b.damaged("the salt has %d bytes", len(b.salt))
	}
	if b.version, err = b.seal("backup-version"); err != nil {
		return BackupInfo{}, err
	}
	names := []string{"domain-key"}
	if b.format == 1 {
		names = append(names, "backup-device-id", "backup-config-store-key")
	}
	for _, name := range names {
		sealed, err := b.seal(name)
		if err != nil {
			return BackupInfo{}, err
		}
		b.sealed = append(b.sealed, namedSeal{name, sealed})
	}
	return BackupInfo{Format: int(b.format)}, nil
}

// open derives the key from the passphrase and decrypts the header.
func (b *backupReader) open(passphrase []byte, derive deriveKey) error {
	if err := b.unlock(passphrase, derive); err != nil {
		return err
	}
	for _, field := range b.sealed {
		plain, err := b.decrypt(field.name, field.bytes)
		if err != nil {
			return err
		}
		if field.name == "backup-device-id" {
			b.deviceID = string(plain)
		}
		clear(plain)
	}
	return nil
}

// unlock derives the key from the passphrase and proves it on the first sealed field.
func (b *backupReader) unlock(passphrase []byte, derive deriveKey) error {
	key, err := derive(passphrase, b.salt)
	if err != nil {
		return fmt.Errorf("reading the backup: deriving the key: %w", err)
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return fmt.Errorf("reading the backup: %w", err)
	}
	if b.aead, err = cipher.NewGCM(block); err != nil {
		return fmt.Errorf("reading the backup: %w", err)
	}
	version, err := b.decrypt("backup-version", b.version)
	if err != nil {
		// The first field that the key opens: what fails here is far more likely the passphrase than the file.
		return &hsm.PINError{TriesLeft: -1, Wrong: true, Detail: "reading the backup: the backup passphrase does not " +
			"open it; give the one that the NetHSM had when the backup was made"}
	}
	if len(version) != 1 || version[0] != b.format {
		return b.damaged("its format is %d outside and another one inside", b.format)
	}
	return nil
}

// entries reads the records of the database up to the end of the file.
func (b *backupReader) entries(info *BackupInfo) error {
	for {
		if b.format == 0 {
			if _, err := b.in.Peek(1); errors.Is(err, io.EOF) {
				break
			}
		}
		sealed, err := b.field("an entry")
		if err != nil {
			return err
		}
		if len(sealed) == 0 {
			if b.format == 0 {
				return b.damaged("an entry is empty")
			}
			if err := b.trailer(); err != nil {
				return err
			}
			break
		}
		info.Entries++
		if err := b.entry(sealed, info); err != nil {
			return err
		}
	}
	// A NetHSM that has a backup passphrase has an administrator, so a file without entries was cut, or made when the database
	// could not be read: the server leaves out what it cannot read and goes on.
	if info.Entries == 0 || info.Opened && info.Users == 0 {
		return b.damaged("it holds no user; restoring it would leave a NetHSM that nobody can log in to")
	}
	return nil
}

// entry checks one record of the database and counts it.
func (b *backupReader) entry(sealed []byte, info *BackupInfo) error {
	if err := b.checkSeal("an entry", sealed); err != nil {
		return err
	}
	if b.aead == nil {
		return nil
	}
	plain, err := b.decrypt("backup", sealed)
	if err != nil {
		return err
	}
	defer clear(plain)
	if len(plain) < 3 {
		return b.damaged("an entry has no path")
	}
	size := fieldSize(plain)
	if size > len(plain)-3 {
		return b.damaged("an entry's path is longer than the entry")
	}
	info.count(string(plain[3 : 3+size]))
	return nil
}

// count counts an entry by its path, such as /authentication/admin. A name that begins with "." is the database's own.
func (i *BackupInfo) count(path string) {
	store, name, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if name == "" || strings.HasPrefix(name[strings.LastIndexByte(name, '/')+1:], ".") {
		return
	}
	switch store {
	case "authentication":
		i.Users++
	case "key":
		i.Keys++
	case "namespace":
		i.Namespaces++
	}
}

// trailer reads what ends a backup of format 1. A server restores a file without it too, with whatever is there.
func (b *backupReader) trailer() error {
	text, err := b.take(len(backupTrailer), "its end mark")
	if err != nil {
		return err
	}
	if string(text) != backupTrailer {
		return b.damaged("its end mark is spoilt")
	}
	if _, err := b.in.Peek(1); !errors.Is(err, io.EOF) {
		if err != nil {
			return fmt.Errorf("reading the backup: %w", err)
		}
		return b.damaged("there is more after its end mark")
	}
	return nil
}

// field reads a length and so many bytes.
func (b *backupReader) field(what string) ([]byte, error) {
	size, err := b.take(3, what)
	if err != nil {
		return nil, err
	}
	return b.take(fieldSize(size), what)
}

// seal reads a field that is sealed.
func (b *backupReader) seal(name string) ([]byte, error) {
	sealed, err := b.field(name)
	if err != nil {
		return nil, err
	}
	return sealed, b.checkSeal(name, sealed)
}

func (b *backupReader) checkSeal(name string, sealed []byte) error {
	if len(sealed) < nonceSize+tagSize+1 {
		return b.damaged("%s has %d bytes", name, len(sealed))
	}
	return nil
}

// take reads n bytes. It takes memory as the bytes arrive, so that a wrong length does not cost 16 MiB.
func (b *backupReader) take(n int, what string) ([]byte, error) {
	var buf bytes.Buffer
	read, err := io.CopyN(&buf, b.in, int64(n))
	b.offset += read
	switch {
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("reading the backup: %w: it ends after %d bytes, in the middle of %s; make another one",
			ErrBackup, b.offset, what)
	case err != nil:
		return nil, fmt.Errorf("reading the backup: %w", err)
	}
	return buf.Bytes(), nil
}

// decrypt opens a sealed field.
func (b *backupReader) decrypt(name string, sealed []byte) ([]byte, error) {
	plain, err := b.aead.Open(nil, sealed[:nonceSize], sealed[nonceSize:], []byte(name))
	if err != nil {
		return nil, b.damaged("%s does not decrypt", name)
	}
	return plain, nil
}

// backupOpens tells whether the NetHSM has a backup passphrase, and whether it is this one: it begins a backup, which
// changes nothing, and reads its first bytes. Another one is an *hsm.PINError. The view is that of a user with the
// role Backup.
func (c *Client) backupOpens(ctx context.Context, passphrase []byte) (set bool, err error) {
	var beginning beginning
	err = c.backupTo(ctx, &beginning)
	switch {
	case unencrypted(err):
		return false, nil
	case err != nil && !errors.Is(err, errEnough):
		return false, err
	}
	b := &backupReader{in: bufio.NewReader(bytes.NewReader(beginning))}
	if _, err := b.header(); err != nil {
		return true, err
	}
	return true, b.open(passphrase, keyOfBackup)
}

// backupTo makes a backup and stops where w fails. That error is returned, and does not count against the node.
func (c *Client) backupTo(ctx context.Context, w io.Writer) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	full := &stopper{to: w, stop: stop}
	_, err := c.Backup(ctx, full)
	if full.err != nil {
		return full.err
	}
	return err
}

// stopper writes until that fails, and then ends the request that the bytes come from.
type stopper struct {
	to   io.Writer
	stop context.CancelFunc
	err  error
}

func (s *stopper) Write(p []byte) (int, error) {
	if s.err == nil {
		if _, s.err = s.to.Write(p); s.err != nil {
			s.stop()
		}
	}
	return len(p), nil
}

// unencrypted is true for the refusal of a NetHSM without a backup passphrase.
func unencrypted(err error) bool {
	no, is := errors.AsType[*Error](err)
	return is && no.Status == http.StatusPreconditionFailed && !no.outOfService()
}

// beginning keeps the first bytes written to it and then wants no more.
type beginning []byte

// beginningSize is more than the header of a backup has, which is 350 bytes.
const beginningSize = 4 << 10

var errEnough = errors.New("that is enough")

func (b *beginning) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	if len(*b) >= beginningSize {
		return len(p), errEnough
	}
	return len(p), nil
}

func (b *backupReader) damaged(format string, args ...any) error {
	return fmt.Errorf("reading the backup: %w: before byte %d "+format+"; make another one",
		append([]any{ErrBackup, b.offset}, args...)...)
}

// fieldSize reads the length of a field; b has at least three bytes.
func fieldSize(b []byte) int { return int(b[0])<<16 | int(b[1])<<8 | int(b[2]) }

// CheckBackupFile is [ReadBackup] of a file.
func CheckBackupFile(path string, passphrase []byte) (BackupInfo, error) {
	file, err := os.Open(path)
	if err != nil {
		return BackupInfo{}, fmt.Errorf("reading the backup: %w", err)
	}
	defer file.Close()
	return ReadBackup(file, passphrase)
}

// Backup is a backup that was read to its end and found whole.
type Backup struct {
	Info    BackupInfo
	content []byte
}

// LoadBackup reads a backup file, checks it as [ReadBackup] does, and keeps it, so that what was checked is what will
// be restored. A file larger than [MaxBackup] is [ErrBackup].
func LoadBackup(path string, passphrase []byte) (Backup, error) {
	content, err := readLimited(path)
	if err != nil {
		return Backup{}, err
	}
	info, err := ReadBackup(bytes.NewReader(content), passphrase)
	if err != nil {
		return Backup{}, err
	}
	return Backup{Info: info, content: content}, nil
}

func readLimited(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading the backup: %w", err)
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, MaxBackup+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the backup: %w", err)
	case len(content) > MaxBackup:
		return nil, fmt.Errorf("reading the backup: %w that can be restored: it is larger than %d bytes", ErrBackup, MaxBackup)
	}
	return content, nil
}

// RestoreBackup restores a backup to one node and returns the state that it is in afterwards. See [Client.Restore]
// for what that does to the node, and who may. Where the answer is lost the node is asked: a new one that has become
// Locked was restored.
func (c *Client) RestoreBackup(ctx context.Context, backup Backup, passphrase []byte) (State, error) {
	before, err := c.State(ctx)
	if err != nil {
		return "", err
	}
	err = c.Restore(ctx, Restoration{Backup: bytes.NewReader(backup.content), Passphrase: passphrase})
	if err != nil && !errors.Is(err, hsm.ErrMayHaveHappened) {
		return before, err
	}
	after, asked := c.State(ctx)
	switch {
	case err == nil, before == StateUnprovisioned && after == StateLocked:
		return after, asked
	case asked != nil:
		return "", errors.Join(err, asked)
	default:
		return after, fmt.Errorf("%w; the node is %s now; look at its users and keys, and restore again where they are "+
			"not those of the backup", err, after)
	}
}

// SaveBackup makes a backup into a new file with mode 0600 and returns what it holds. The view must have the credentials of
// a user with the role Backup. The backup goes to a temporary file of the same folder, is synced, read again and checked as
// [ReadBackup] does, with the passphrase where one is given, and only then gets its name: a file of that name is a whole
// backup. An existing file is never replaced (fs.ErrExist). Whatever fails leaves no file behind.
func (c *Client) SaveBackup(ctx context.Context, path string, passphrase []byte) (BackupInfo, error) {
	return saveBackup(path, passphrase, osFiles{}, func(w io.Writer) error {
		err := c.backupTo(ctx, w)
		if unencrypted(err) {
			return fmt.Errorf("the NetHSM has no backup passphrase yet, and encrypts its backups with it; set one first: %w", err)
		}
		return err
	})
}

// saveBackup saves what fetch writes.
func saveBackup(path string, passphrase []byte, files backupFiles, fetch func(io.Writer) error) (_ BackupInfo, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("saving the backup to %s: %w", path, err)
		}
	}()
	if _, err := os.Lstat(path); err == nil {
		return BackupInfo{}, fmt.Errorf("%w; an old backup is not replaced: give another name", fs.ErrExist)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return BackupInfo{}, err
	}
	temporary := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".partial-"+randomName())
	file, err := files.create(temporary)
	if err != nil {
		return BackupInfo{}, err
	}
	// Closing twice is harmless, and after the rename there is nothing to remove.
	defer func() { err = errors.Join(err, ignoreMissing(os.Remove(temporary))) }()
	defer file.Close()
	if err := fetch(file); err != nil {
		return BackupInfo{}, err
	}
	if err := errors.Join(file.Sync(), file.Close()); err != nil {
		return BackupInfo{}, err
	}
	info, err := CheckBackupFile(temporary, passphrase)
	if err != nil {
		return BackupInfo{}, err
	}
	if err := files.name(temporary, path); err != nil {
		return BackupInfo{}, err
	}
	return info, nil
}

// backupFiles are the steps of saving that a full disk, or a crash, can end. Tests bring their own.
type backupFiles interface {
	// create makes a new file with mode 0600.
	create(path string) (backupFile, error)
	// name gives the finished file its name, which must be free, and makes that durable.
	name(temporary, path string) error
}

type backupFile interface {
	io.WriteCloser
	Sync() error
}

// osFiles are those of the machine.
type osFiles struct{}

func (osFiles) create(path string) (backupFile, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}

// name links rather than renames, since a rename would replace a file that somebody made meanwhile. File systems without
// links, those of USB sticks for example, get the rename after another look.
func (osFiles) name(temporary, path string) error {
	if err := os.Link(temporary, path); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; an old backup is not replaced: give another name", fs.ErrExist)
	} else if err != nil {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%w; an old backup is not replaced: give another name", fs.ErrExist)
		}
		if err := os.Rename(temporary, path); err != nil {
			return err
		}
	}
	if err := syncFolder(filepath.Dir(path)); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// syncFolder makes the names in a folder durable.
func syncFolder(path string) error {
	folder, err := os.Open(path)
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// randomName is a name that no other file has.
func randomName() string {
	var name [6]byte
	_, _ = rand.Read(name[:]) // never fails: crypto/rand ends the program where it cannot
	return hex.EncodeToString(name[:])
}
