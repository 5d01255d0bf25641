package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/file"
	"vault-plugin-secrets-nitrokey/internal/store/object"
	vaultstore "vault-plugin-secrets-nitrokey/internal/store/vault"
)

// The kinds of store.
const (
	storeEtcd   = "etcd"
	storeObject = "object"
	storeVault  = "vault"
	storeFile   = "file"
)

var storeTypes = []string{storeEtcd, storeObject, storeVault, storeFile}

// fileStores is the directory under -state-dir in which stores of type "file" lie.
const fileStores = "stores"

// storeRecord is what "stores/<name>" holds in the mount's storage.
type storeRecord struct {
	Type string `json:"type"`

	// etcd
	Endpoints      []string      `json:"endpoints,omitempty"`
	Prefix         string        `json:"prefix,omitempty"`
	Username       string        `json:"username,omitempty"`
	Password       string        `json:"password,omitempty"`
	CACert         string        `json:"ca_cert,omitempty"`
	ClientCert     string        `json:"client_cert,omitempty"`
	ClientKey      string        `json:"client_key,omitempty"`
	ServerName     string        `json:"server_name,omitempty"`
	RequestTimeout time.Duration `json:"request_timeout,omitempty"`
	Insecure       bool          `json:"insecure,omitempty"`

	// object
	Device      string `json:"device,omitempty"`
	Application string `json:"application,omitempty"`

	// file
	Dir string `json:"dir,omitempty"`
}

// errNoStore is wrapped where a name is not configured.
var errNoStore = errors.New("the store is not configured in this mount")

// storeShelf keeps the mount's stores open.
type storeShelf struct {
	locks *vaultstore.Locks // of the mount's storage
	// writing is held, for one store, while its record is read, changed and written.
	writing turns

	mu    sync.Mutex // guards what follows
	open  map[string]openStore
	drops int // counts drops, so that a store opened from a record read before one is not kept
}

// openStore is a store, and the device that it was opened on where it lies on one.
type openStore struct {
	store.Store
	device string
}

// Store implements custody's view of the stores. The store belongs to the mount: the caller does not close it.
func (b *backend) Store(ctx context.Context, name string) (store.Store, error) {
	for {
		b.stores.mu.Lock()
		known, drops := b.stores.open[name], b.stores.drops
		b.stores.mu.Unlock()
		if known.Store != nil {
			return known.Store, nil
		}
		record, err := b.readStore(ctx, name)
		if err != nil {
			return nil, err
		}
		if record == nil {
			return nil, fmt.Errorf("store %q: %w; write stores/%s first", name, errNoStore, name)
		}
		opened, err := b.openStore(ctx, name, record)
		if err != nil {
			return nil, fmt.Errorf("store %q: %w", name, err)
		}
		if owned, ok := opened.(*ownedStore); ok {
			if err := owned.owners.claim(false); err != nil {
				b.closeStore(name, opened)
				return nil, fmt.Errorf("store %q: %w", name, err)
			}
		}
		if b.stores.keep(name, openStore{opened, record.Device}, drops) {
			return opened, nil
		}
		b.closeStore(name, opened)
	}
}

func (s *storeShelf) keep(name string, opened openStore, drops int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drops != drops || s.open[name].Store != nil {
		return false
	}
	if s.open == nil {
		s.open = map[string]openStore{}
	}
	s.open[name] = opened
	return true
}

// dropStore closes a store; the next use opens it from its record.
func (b *backend) dropStore(name string) {
	b.stores.mu.Lock()
	opened := b.stores.open[name]
	delete(b.stores.open, name)
	b.stores.drops++
	b.stores.mu.Unlock()
	if opened.Store != nil {
		b.closeStore(name, opened)
	}
}

// dropStores closes the stores that lie on a device; all stores where device is empty.
func (b *backend) dropStores(device string) {
	b.stores.mu.Lock()
	b.stores.drops++ // also for one that is just being opened
	var names []string
	for name, opened := range b.stores.open {
		if device == "" || opened.device == device {
			names = append(names, name)
		}
	}
	b.stores.mu.Unlock()
	for _, name := range names {
		b.dropStore(name)
	}
}

func (b *backend) closeStore(name string, opened store.Store) {
	if err := opened.Close(); err != nil {
		b.logger.Warn("closing a store", "store", name, "error", err)
	}
}

// readStore returns a store's record, nil where there is none.
func (b *backend) readStore(ctx context.Context, name string) (*storeRecord, error) {
	entry, err := b.storage.Get(ctx, storesPrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading the record of store %q: %w", name, err)
	}
	if entry == nil {
		return nil, nil //nolint:nilnil // "absent" is an ordinary answer, and Vault's own: a nil response is 404
	}
	record := new(storeRecord)
	if err := json.Unmarshal(entry.Value, record); err != nil {
		return nil, fmt.Errorf("reading the record of store %q: it is damaged; delete the store and write it again", name) // no %w: it may quote a password
	}
	return record, nil
}

func (b *backend) writeStore(ctx context.Context, name string, record *storeRecord) error {
	entry, err := logical.StorageEntryJSON(storesPrefix+name, record)
	if err != nil {
		return fmt.Errorf("encoding the record of store %q: %w", name, err)
	}
	entry.SealWrap = true
	err = b.storage.Put(ctx, entry)
	b.dropStore(name)
	if err != nil {
		return fmt.Errorf("writing the record of store %q: %w", name, err)
	}
	return nil
}

// openStore opens a store from its record. What is wrong with the record is a mistake of whoever wrote it. A store on an
// HSM asks that for its serial number; the others ask nothing of anybody before they are used.
func (b *backend) openStore(ctx context.Context, name string, record *storeRecord) (store.Store, error) {
	switch record.Type {
	case storeEtcd:
		opened, err := etcd.Open(etcd.Config{
			Endpoints: record.Endpoints, Prefix: record.Prefix, Username: record.Username, Password: record.Password,
			CACert: []byte(record.CACert), ClientCert: []byte(record.ClientCert), ClientKey: []byte(record.ClientKey),
			ServerName: record.ServerName, RequestTimeout: record.RequestTimeout, Insecure: record.Insecure,
		})
		if err != nil {
			return nil, mistake("%w", err)
		}
		return opened, nil
	case storeObject:
		return b.openObjects(ctx, record)
	case storeVault:
		return vaultstore.New(b.storage, ownStorePrefix+name+"/", b.stores.locks), nil
	case storeFile:
		dir, err := b.fileStoreDir(record.Dir)
		if err != nil {
			return nil, err
		}
		opened, err := file.Open(dir)
		if err != nil {
			return nil, err
		}
		return &ownedStore{opened, owners{b.owner(filepath.Join(dir, ownerFile), "the directory "+dir)}}, nil
	default:
		return nil, mistake("type %q is not known; use one of %s", record.Type, strings.Join(storeTypes, ", "))
	}
}

// owner is the note that something belongs to this mount.
func (b *backend) owner(path, what string) *owner {
	return &owner{path: path, what: what, mount: b.mount, logger: b.logger}
}

// openObjects opens the data objects of a device.
func (b *backend) openObjects(ctx context.Context, record *storeRecord) (store.Store, error) {
	serial, parts, err := b.serialOf(ctx, record.Device)
	if err != nil {
		return nil, err
	}
	objects := func(ctx context.Context) (hsm.ObjectStore, error) {
		opened, err := b.Device(ctx, record.Device)
		if err != nil {
			return nil, fmt.Errorf("device %q: %w", record.Device, err)
		}
		objects, ok := opened.(hsm.ObjectStore)
		if !ok {
			return nil, mistake("device %q keeps no data objects", record.Device)
		}
		return objects, nil
	}
	kept, err := object.New(objects, object.Config{Application: record.Application, StateDir: b.options.StateDir, Serial: serial})
	if err != nil {
		return nil, machineError(err) // the rest of it was checked when the store was written
	}
	owned := &ownedStore{Store: kept}
	for _, part := range parts {
		what := fmt.Sprintf("the application %q on the HSM %s", record.Application, part)
		owned.owners = append(owned.owners, b.owner(objectOwnerPath(b.options.StateDir, part, record.Application), what))
	}
	return owned, nil
}

// serialOf names the HSM of a device for the lock file, and its parts for the notes of the owner: a token by its serial number,
// which it is asked for; a NetHSM, each of whose nodes has another one, by its nodes and namespace.
func (b *backend) serialOf(ctx context.Context, name string) (serial string, parts []string, err error) {
	record, err := b.readDevice(ctx, name)
	if err != nil {
		return "", nil, err
	}
	if record != nil && record.Config.Type == device.TypeNetHSM {
		return record.Config.Place(), record.Config.Places(), nil
	}
	opened, err := b.Device(ctx, name)
	if err != nil {
		return "", nil, fmt.Errorf("device %q: %w", name, err)
	}
	info, err := opened.Info(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("asking device %q for its serial number: %w", name, err)
	}
	if info.Serial == "" {
		return "", nil, mistake("device %q tells no serial number, which data objects need for their lock file; use another kind of store", name)
	}
	return info.Serial, []string{info.Serial}, nil
}

// fileStoreDir returns the directory of a file store. It lies under -state-dir, links resolved: whoever may write a
// mount's configuration must not be able to write files elsewhere on the machine.
func (b *backend) fileStoreDir(dir string) (string, error) {
	if b.options.StateDir == "" {
		return "", mistake("stores of type \"file\" lie under the plugin's -state-dir, and it was registered without one; register it with -args=-state-dir=DIR")
	}
	if !validName(dir) {
		return "", mistake("dir %q is not the name of a directory; give one name, and it lies under %s",
			dir, filepath.Join(b.options.StateDir, fileStores))
	}
	base := filepath.Join(b.options.StateDir, fileStores)
	if err := os.MkdirAll(base, 0o700); err != nil {
		return "", fmt.Errorf("making the directory of the file stores: %w", machineError(err))
	}
	path := filepath.Join(base, dir)
	info, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return path, nil
	}
	if err != nil {
		return "", fmt.Errorf("looking at the directory of the file store: %w", machineError(err))
	}
	if !info.IsDir() {
		return "", mistake("%s is not a directory of its own: a link, or a file", path)
	}
	return path, nil
}

// checkStore writes, reads back and deletes a value.
func checkStore(ctx context.Context, opened store.Store) error {
	const name = "nitroseal-check"
	value := []byte("written by a check of the store; it may be deleted")
	entry, err := opened.Get(ctx, name) // an earlier check may have been cut short
	switch {
	case err == nil:
		if err := opened.Delete(ctx, name, entry.Revision); err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	revision, err := opened.Put(ctx, name, value, store.NoRevision)
	if err != nil {
		return err
	}
	entry, err = opened.Get(ctx, name)
	if err != nil {
		return err
	}
	if !slices.Equal(entry.Value, value) {
		return fmt.Errorf("the store answered with something else than was written: %w", store.ErrUnavailable)
	}
	return opened.Delete(ctx, name, revision)
}
