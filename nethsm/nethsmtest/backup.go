package nethsmtest

import (
	"bytes"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"

	"golang.org/x/crypto/scrypt"
)

// A backup file has the original's format 1, as nethsm's export_backup tool and nethsm-sdk-py read it:
//
//	"_NETHSM_BACKUP_", 1 byte: the format (1)
//	field: the salt of the backup key
//	field: sealed "backup-version"           the format again, 1 byte
//	field: sealed "domain-key"               the domain key, locked with the unlock passphrase
//	field: sealed "backup-device-id"         the device that made the file
//	field: sealed "backup-config-store-key"  the key of that device's configuration
//	field: sealed "backup", again and again  field: a path of the database; the rest: its value
//	a field of length 0
//	"_NETHSM_BACKUP_END_"
//
// A field is its length in 3 bytes, big-endian, and as many bytes. Sealed is AES-256-GCM with the name as additional
// data: 12 bytes of nonce, the ciphertext, 16 bytes of tag. The key is scrypt(passphrase, salt, N=16384, r=8, p=16), 32
// bytes. The paths are the original's, the values behind them are JSON of this double's own, so that only doubles can
// restore each other's files.
const (
	backupHeader  = "_NETHSM_BACKUP_"
	backupTrailer = "_NETHSM_BACKUP_END_"
	backupFormat  = 1
	deviceID      = "0000000000"
)

// backupKey derives the key of backup files. Its cost, half a second and more, is part of their format; so that a test
// pays it once for a passphrase, the process remembers the keys and makes them with one salt.
func backupKey(salt, passphrase []byte) ([]byte, error) {
	name := string(digest(salt, passphrase))
	if key, ok := backupKeys.Load(name); ok {
		return slices.Clone(key.([]byte)), nil
	}
	key, err := scrypt.Key(passphrase, salt, scryptN, scryptR, scryptP, 32)
	if err == nil {
		backupKeys.Store(name, slices.Clone(key))
	}
	return key, err
}

var (
	backupKeys sync.Map // of []byte
	backupSalt = random(16)
)

func putBackupPassphrase(x *exchange) answer {
	fresh, current, refused := x.twoPassphrases()
	if refused != nil {
		return *refused
	}
	var old *backupRecord
	x.hsm.store.read(func(r *record) { old = r.Backup })
	if !old.opens(current) {
		return refuse(http.StatusForbidden, "backup passphrase is incorrect.")
	}
	made, err := newBackupRecord([]byte(fresh))
	if err != nil {
		return crash(err.Error())
	}
	return x.configure(func(r *record, _ *nodeRecord) { r.Backup = made })
}

func newBackupRecord(passphrase []byte) (*backupRecord, error) {
	b := &backupRecord{Salt: backupSalt}
	var err error
	b.Key, err = backupKey(b.Salt, passphrase)
	return b, err
}

// opens says whether a passphrase is the one that was set; before one is set it is the empty one.
func (b *backupRecord) opens(passphrase string) bool {
	if b == nil {
		return passphrase == ""
	}
	key, err := backupKey(b.Salt, []byte(passphrase))
	return err == nil && hmac.Equal(key, b.Key)
}

// lengthField is a length and as many bytes.
func lengthField(data []byte) []byte {
	return append([]byte{byte(len(data) >> 16), byte(len(data) >> 8), byte(len(data))}, data...)
}

func makeBackup(x *exchange) answer {
	var file []byte
	var err error
	x.hsm.store.read(func(r *record) {
		if r.Backup != nil {
			file, err = r.backup(x.node.record())
		}
	})
	switch {
	case err != nil:
		return refuse(http.StatusInternalServerError, "Corrupted database.")
	case file == nil:
		return refuse(http.StatusPreconditionFailed, "Please configure backup key before doing a backup.")
	}
	return answer{status: http.StatusOK, kind: typeBytes, body: file}
}

// backup is the file that one node makes.
func (r *record) backup(n *nodeRecord) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(backupHeader)
	b.WriteByte(backupFormat)
	b.Write(lengthField(r.Backup.Salt))
	var failed error
	sealed := func(name string, data []byte) {
		s, err := seal(r.Backup.Key, []byte(name), data)
		failed = errors.Join(failed, err)
		b.Write(lengthField(s))
	}
	sealed("backup-version", []byte{backupFormat})
	sealed("domain-key", n.Lock.Sealed)
	sealed("backup-device-id", []byte(deviceID))
	sealed("backup-config-store-key", make([]byte, 32))
	values, err := r.values(n)
	if err != nil {
		return nil, err
	}
	for _, path := range slices.Sorted(maps.Keys(values)) {
		sealed("backup", append(lengthField([]byte(path)), values[path]...))
	}
	b.Write(lengthField(nil))
	b.WriteString(backupTrailer)
	return b.Bytes(), failed
}

// The paths of a backup.
const (
	userPath      = "/authentication/"
	namespacePath = "/namespace/"
	keyPath       = "/key/"
	sharedPath    = "/config/"
	localPath     = "/local/" + deviceID + "/config/"
)

// values are the contents of a backup: the database without TLS and the other nodes.
func (r *record) values(n *nodeRecord) (map[string][]byte, error) {
	values := map[string][]byte{}
	var failed error
	put := func(path string, value any) {
		data, err := json.Marshal(value)
		failed = errors.Join(failed, err)
		values[path] = data
	}
	for name, u := range r.Users {
		put(userPath+name, u)
	}
	for name := range r.Namespaces {
		put(namespacePath+name, true)
	}
	for name, k := range r.Keys {
		if namespace, id := splitName(name); namespace != "" {
			name = "." + namespace + "/" + id // where the original keeps those of namespaces
		}
		put(keyPath+name, k.with(k.Revision, func(*keyRecord) {}))
	}
	put(sharedPath+"domain-key", r.DomainKey)
	put(sharedPath+"backup", r.Backup)
	put(localPath+"unlock-salt", n.Lock.Salt)
	put(localPath+"unlock-cost", n.Lock.N)
	return values, failed
}

// restore is POST /system/restore.
func restore(x *exchange) answer {
	parts, err := x.form()
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	var passphrase *string
	var systemTime *string
	if len(parts["arguments"]) > 1024 {
		return refuse(http.StatusBadRequest, "Part arguments is too long")
	}
	err = decode("restore_req", parts["arguments"],
		optionalText("backupPassphrase", &passphrase), optionalText("systemTime", &systemTime))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if systemTime != nil {
		if _, err := parseTime(*systemTime); err != nil {
			return refuse(http.StatusBadRequest, err.Error())
		}
	}
	var known *backupRecord
	x.hsm.store.read(func(r *record) { known = r.Backup })
	restored, lock, err := readBackup(parts["backup_file"], passphrase, known)
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if err := x.hsm.restore(restored, lock); err != nil {
		return databaseTrouble("write to")
	}
	return empty(http.StatusNoContent)
}

// restore replaces the database. A node that was Unprovisioned is Locked afterwards; one that was Operational stays so,
// unless the domain key changed: then unattended boot is off and the node Locked, with the unlock passphrase of the file.
func (h *HSM) restore(restored *record, lock *lockRecord) error {
	fresh, changed := false, false
	err := h.store.update(func(r *record) error {
		fresh = r.DomainKey == nil
		changed = !hmac.Equal(r.DomainKey, restored.DomainKey)
		r.Users, r.Keys, r.Namespaces = restored.Users, restored.Keys, restored.Namespaces
		if fresh {
			r.Backup = restored.Backup
		}
		if changed {
			r.DomainKey = restored.DomainKey
			for i := range h.nodes {
				r.Nodes[i].Lock, r.Nodes[i].UnattendedBoot = lock, false
			}
		}
		return nil
	})
	if err == nil && changed {
		for _, n := range h.nodes {
			n.boot()
		}
	}
	return err
}

// readBackup opens a backup file. Its errors are the original's, for whoever sent the file.
func readBackup(file []byte, passphrase *string, known *backupRecord) (*record, *lockRecord, error) {
	rest, ok := bytes.CutPrefix(file, []byte(backupHeader))
	switch {
	case !ok:
		return nil, nil, errors.New("Not a NetHSM backup file") //nolint:staticcheck // the original's words
	case len(rest) == 0:
		return nil, nil, errEndOfData
	case rest[0] != backupFormat:
		return nil, nil, fmt.Errorf("Version mismatch on restore, provided backup version is %d, "+ //nolint:staticcheck // the original's words
			"server expects one of [ 1]", rest[0])
	}
	d := &backupReader{rest: rest[1:]}
	salt := d.field()
	key, err := restoreKey(salt, passphrase, known)
	if err != nil {
		return nil, nil, err
	}
	d.key = key
	if version := d.sealed("backup-version"); d.err == nil && !bytes.Equal(version, []byte{backupFormat}) {
		return nil, nil, errors.New("Internal and external version mismatch.") //nolint:staticcheck // the original's words
	}
	lock := &lockRecord{Sealed: d.sealed("domain-key")}
	d.sealed("backup-device-id")
	d.sealed("backup-config-store-key")
	restored := emptyRecord()
	for d.err == nil {
		pair := d.sealed("backup")
		if pair == nil {
			break
		}
		inner := &backupReader{rest: pair}
		path := inner.field()
		d.err = errors.Join(d.err, inner.err, restored.restoreValue(string(path), inner.rest, lock))
	}
	if d.err == nil && string(d.rest) != backupTrailer {
		d.err = errEndOfData
	}
	return restored, lock, d.err
}

var errEndOfData = errors.New("Unexpected end of data") //nolint:staticcheck // the original's words

func restoreKey(salt []byte, passphrase *string, known *backupRecord) ([]byte, error) {
	if passphrase != nil {
		return backupKey(salt, []byte(*passphrase))
	}
	if known != nil && bytes.Equal(known.Salt, salt) {
		return known.Key, nil
	}
	return nil, errors.New("No backupPassphrase provided") //nolint:staticcheck // the original's words
}

// backupReader reads fields until one fails; after that all are empty.
type backupReader struct {
	rest, key []byte
	err       error
}

func (d *backupReader) field() []byte {
	if d.err != nil {
		return nil
	}
	if len(d.rest) < 3 {
		d.err = errEndOfData
		return nil
	}
	n := int(d.rest[0])<<16 | int(d.rest[1])<<8 | int(d.rest[2])
	if len(d.rest)-3 < n {
		d.err = errEndOfData
		return nil
	}
	data := d.rest[3 : 3+n]
	d.rest = d.rest[3+n:]
	return data
}

// sealed opens a field; nil for one of length zero.
func (d *backupReader) sealed(name string) []byte {
	data := d.field()
	if len(data) == 0 {
		return nil
	}
	plain, err := open(d.key, []byte(name), data)
	if err != nil {
		d.err = fmt.Errorf("Could not decrypt %s, authentication failed. Is the passphrase correct?", name) //nolint:staticcheck // the original's words
		return nil
	}
	return plain
}

// restoreValue puts one value of a backup where it belongs.
func (r *record) restoreValue(path string, value []byte, lock *lockRecord) error {
	into := func(target any) error { return json.Unmarshal(value, target) }
	switch path {
	case sharedPath + "domain-key":
		return into(&r.DomainKey)
	case sharedPath + "backup":
		return into(&r.Backup)
	case localPath + "unlock-salt":
		return into(&lock.Salt)
	case localPath + "unlock-cost":
		return into(&lock.N)
	}
	if name, ok := strings.CutPrefix(path, userPath); ok {
		r.Users[name] = &user{}
		return into(r.Users[name])
	}
	if name, ok := strings.CutPrefix(path, namespacePath); ok {
		r.Namespaces[name] = true
		return nil
	}
	if name, ok := strings.CutPrefix(path, keyPath); ok {
		if inside, ok := strings.CutPrefix(name, "."); ok {
			namespace, id, _ := strings.Cut(inside, "/")
			name = keyName(namespace, id)
		}
		k := &keyRecord{}
		if err := into(k); err != nil {
			return err
		}
		r.Keys[name] = k
		return k.parse()
	}
	return nil // somebody else's, as the original leaves it
}
