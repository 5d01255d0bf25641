package nethsmtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// databaseFile is the one file of a double's directory.
const databaseFile = "database.json"

// record is the whole database, as it is written: one JSON object. Maps are keyed by the names that the API uses:
// users by "id" or "namespace~id", keys by "id" or "namespace~id" as well.
type record struct {
	// DomainKey is what the values of a backup are encrypted with. Empty: not provisioned.
	DomainKey  []byte                `json:"domainKey,omitempty"`
	Users      map[string]*user      `json:"users"`
	Namespaces map[string]bool       `json:"namespaces"`
	Keys       map[string]*keyRecord `json:"keys"`
	Backup     *backupRecord         `json:"backup,omitempty"`
	ClusterCA  []byte                `json:"clusterCA,omitempty"`
	Members    []*memberRecord       `json:"members,omitempty"`
	Authority  *pairRecord           `json:"authority,omitempty"`
	Nodes      []*nodeRecord         `json:"nodes"`
	// Revision grows with every change and is the source of ETags.
	Revision int64 `json:"revision"`
}

// backupRecord is the key that backups are encrypted with: scrypt(passphrase, Salt).
type backupRecord struct {
	Salt []byte `json:"salt"`
	Key  []byte `json:"key"`
}

// pairRecord is a certificate and its private key, both PEM.
type pairRecord struct {
	Certificate []byte `json:"certificate"`
	Key         []byte `json:"key"`
}

// store is the database of a cluster. Readers and writers hold its lock for as long as they look at the record; nobody
// holds it while computing with a key.
type store struct {
	path string // empty: memory only

	mu     sync.RWMutex
	record *record
}

// openStore reads the database of dir, or starts an empty one.
func openStore(dir string) (*store, error) {
	s := &store{record: emptyRecord()}
	if dir == "" {
		return s, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s.path = filepath.Join(dir, databaseFile)
	if err := s.sweep(); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, s.record); err != nil {
		return nil, fmt.Errorf("reading the database %s: %w", s.path, err)
	}
	for id, k := range s.record.Keys {
		if err := k.parse(); err != nil {
			return nil, fmt.Errorf("reading key %q of the database %s: %w", id, s.path, err)
		}
	}
	return s, nil
}

func emptyRecord() *record {
	return &record{
		Users:      map[string]*user{},
		Namespaces: map[string]bool{},
		Keys:       map[string]*keyRecord{},
	}
}

// sweep removes what a process that was killed while it wrote has left beside the database.
func (s *store) sweep() error {
	dir := filepath.Dir(s.path)
	files, err := os.ReadDir(dir)
	for _, f := range files {
		if strings.HasPrefix(f.Name(), databaseFile+".") {
			err = errors.Join(err, os.Remove(filepath.Join(dir, f.Name())))
		}
	}
	return err
}

// read gives a look at the record.
func (s *store) read(look func(*record)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	look(s.record)
}

// update changes the record and writes it down before anybody sees the change acknowledged. When change fails nothing
// is written; it must not have changed anything then.
func (s *store) update(change func(*record) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := change(s.record); err != nil {
		return err
	}
	s.record.Revision++
	return s.save()
}

// save writes a new file, makes it durable and renames it over the old one: a crash leaves the one or the other.
func (s *store) save() error {
	if s.path == "" {
		return nil
	}
	data, err := json.MarshalIndent(s.record, "", "\t")
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(s.path), databaseFile+".*")
	if err != nil {
		return err
	}
	_, err = file.Write(data)
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(file.Name(), s.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return nil
}
