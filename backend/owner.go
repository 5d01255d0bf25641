package backend

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// Directories of the machine and objects of a token are seen by every mount that the plugin serves, and their names are
// easily the same. A file says to which mount they belong: another one that could write there would overwrite and delete
// what is not its own, and whoever may configure one mount would have the material of all.

// ownerFile is the name of that file in the directory of a file store. Files of the store's own begin with ".", too.
const ownerFile = ".owner"

// objectOwners is the directory under -state-dir with the owners of data objects.
const objectOwners = "owners"

// objectOwnerPath is where the owner of an application's data objects on a token is noted. Neither part contains "+".
func objectOwnerPath(stateDir, serial, application string) string {
	return filepath.Join(stateDir, objectOwners, "objects+"+url.QueryEscape(serial)+"+"+application)
}

// errOthers: it belongs to another mount.
var errOthers = errors.New("belongs to another mount of this plugin")

// owner is the note that says which mount something belongs to.
type owner struct {
	path   string
	what   string // "the directory /x/y", for people
	mount  string // who asks
	logger *slog.Logger
}

// check returns an error where it belongs to another mount.
func (o *owner) check() error {
	noted, err := os.ReadFile(o.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("finding out whose %s is: %w", o.what, machineError(err))
	case strings.TrimSpace(string(noted)) == o.mount:
		return nil
	default:
		return mistake("%s %w; take another one, or, where that mount is lost for good, write the store with take_over=true", o.what, errOthers)
	}
}

// claim notes that it belongs to this mount. Where it belongs to another one, it takes it over, if told to, or returns an
// error.
func (o *owner) claim(takeOver bool) error {
	switch err := o.check(); {
	case errors.Is(err, errOthers) && takeOver:
		o.logger.Warn("taking over what belonged to another mount", "what", o.what)
	case err != nil:
		return err
	}
	if _, err := os.Lstat(o.path); err == nil && !takeOver {
		return nil // it is ours
	}
	if err := o.note(takeOver); errors.Is(err, fs.ErrExist) {
		return o.check() // somebody noted it at the same moment
	} else if err != nil {
		return fmt.Errorf("noting whose %s is: %w", o.what, machineError(err))
	}
	return nil
}

// note writes the note whole: a reader never sees half of it.
func (o *owner) note(replace bool) (err error) {
	if err := os.MkdirAll(filepath.Dir(o.path), 0o700); err != nil {
		return err
	}
	file, err := os.CreateTemp(filepath.Dir(o.path), ownerFile+"-*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if removing := os.Remove(file.Name()); !errors.Is(removing, fs.ErrNotExist) {
			err = errors.Join(err, removing)
		}
	}()
	_, err = file.WriteString(o.mount + "\n")
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return err
	}
	if replace {
		return os.Rename(file.Name(), o.path)
	}
	return os.Link(file.Name(), o.path) // fails where another one is there
}

// machineError gives an error of the file system its meaning for users of a store.
func machineError(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: %w", store.ErrDenied, err)
	}
	return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
}

// owners are the notes of one store: one for each node of a NetHSM, because mounts may name other nodes of one cluster.
type owners []*owner

func (o owners) check() error {
	for _, one := range o {
		if err := one.check(); err != nil {
			return err
		}
	}
	return nil
}

// claim claims all, or none that was not ours where one belongs to another mount.
func (o owners) claim(takeOver bool) error {
	if err := o.check(); err != nil && !(takeOver && errors.Is(err, errOthers)) {
		return err
	}
	for _, one := range o {
		if err := one.claim(takeOver); err != nil {
			return err
		}
	}
	return nil
}

// ownedStore is a store that belongs to one mount. Each write looks whether it still does.
type ownedStore struct {
	store.Store
	owners owners
}

func (s *ownedStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := s.owners.claim(false); err != nil {
		return store.NoRevision, err
	}
	return s.Store.Put(ctx, name, value, expected)
}

func (s *ownedStore) Delete(ctx context.Context, name string, expected store.Revision) error {
	if err := s.owners.claim(false); err != nil {
		return err
	}
	return s.Store.Delete(ctx, name, expected)
}
