// Package object keeps values in data objects on the HSM itself: the stick carries its own envelopes.
//
// A value is one object, private and on the token: APPLICATION names the store, LABEL the name and its generation,
// "material/prod/unseal#7", so that `pkcs11-tool --list-objects` reads like a list of contents. The value is framed:
// a line with revision and checksum, then the value as it is.
//
// HSMs have no transactions. So nothing is replaced: the next generation is written and proved by reading it back
// ([hsm.ObjectStore] does that), and only then the old one is deleted. A crash between any two steps leaves a readable
// value: the newest generation whose checksum is right counts, since a card may stop in the middle of a write. Whoever
// writes next removes what was left. (Where the very first write was cut short nothing is readable: Get says ErrCorrupt,
// and a Put that expects nothing begins anew.) A delete goes from the oldest to the newest, so that no old value comes back.
//
// HSMs have no test-and-set either. Compare-and-swap holds among processes that share the lock file
// <state-dir>/<serial>.lock, which is to say on one machine. Other writers are noticed where the HSM notices them (an
// object of that name exists: ErrConflict) or afterwards (two objects of one generation: ErrAmbiguous, both are kept).
package object

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/internal/filelock"
	"vault-plugin-secrets-nitrokey/internal/store/internal/frame"
)

// MaxValueSize is the largest value, in bytes: with its frame it stays under 64 KiB, which is what every HSM that has
// room at all can take. A card is full much earlier, and says so: ErrFull.
const MaxValueSize = 63 << 10

// DefaultApplication is the APPLICATION of our objects where the configuration names none.
const DefaultApplication = "nitroseal"

// Config says where on the HSM the values lie and how writers of this machine keep out of each other's way.
type Config struct {
	// Application is CKA_APPLICATION of the objects, up to 64 bytes of the characters of a store's name. Stores that
	// share a token without sharing values have different ones. Default [DefaultApplication].
	Application string
	// StateDir holds the lock file. All processes of the machine that write to the token name the same one.
	StateDir string
	// Serial is the serial number of the token, which names the lock file.
	Serial string
}

const maxApplication = 64

// Store is the data objects of one application on one HSM.
type Store struct {
	device      func(context.Context) (hsm.ObjectStore, error)
	application string
	lockFile    string
}

var _ store.Store = (*Store)(nil)

// New uses the HSM that device returns; it is asked anew for every operation, so a device may come and go. It makes
// the state directory with mode 0700 where it is missing, and does not touch the HSM.
func New(device func(context.Context) (hsm.ObjectStore, error), config Config) (*Store, error) {
	if config.Application == "" {
		config.Application = DefaultApplication
	}
	if err := store.CheckName(config.Application); err != nil || len(config.Application) > maxApplication {
		return nil, fmt.Errorf("opening the object store: the application %q is not a name of at most %d bytes", config.Application, maxApplication)
	}
	if config.Serial == "" || config.StateDir == "" {
		return nil, errors.New("opening the object store: the token's serial number and the state directory are needed for its lock file")
	}
	if err := os.MkdirAll(config.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the object store: making the state directory: %w", err)
	}
	return &Store{
		device:      device,
		application: config.Application,
		lockFile:    filepath.Join(config.StateDir, fileName(config.Serial)+".lock"),
	}, nil
}

// fileName makes a serial number safe as a file name. Two that become the same share a lock, which costs only time.
func fileName(serial string) string {
	return strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' {
			return r
		}
		return '_'
	}, serial)
}

// Get implements [store.Store].
func (s *Store) Get(ctx context.Context, name string) (store.Entry, error) {
	if err := checkName(name); err != nil {
		return store.Entry{}, err
	}
	device, err := s.open(ctx)
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q from the HSM: %w", name, err)
	}
	found, err := s.find(ctx, device, name)
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q from the HSM: %w", name, err)
	}
	return found.entry, nil
}

// Put implements [store.Store].
func (s *Store) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := checkName(name); err != nil {
		return store.NoRevision, err
	}
	if err := store.CheckValue(value, MaxValueSize); err != nil {
		return store.NoRevision, fmt.Errorf("writing %q to the HSM: %w", name, err)
	}
	var revision store.Revision
	err := s.exclusive(ctx, func(device hsm.ObjectStore) (err error) {
		revision, err = s.put(ctx, device, name, value, expected)
		return err
	})
	if err != nil {
		return store.NoRevision, fmt.Errorf("writing %q to the HSM: %w", name, err)
	}
	return revision, nil
}

func (s *Store) put(ctx context.Context, device hsm.ObjectStore, name string, value []byte, expected store.Revision) (store.Revision, error) {
	current, err := s.find(ctx, device, name)
	// A first write that was cut short leaves a damaged object and nothing else. Who expects nothing may begin anew;
	// who expects a value is told that it is damaged.
	begin := expected == store.NoRevision && errors.Is(err, store.ErrCorrupt)
	if err != nil && !begin && !errors.Is(err, store.ErrNotFound) {
		return store.NoRevision, err
	}
	if current.entry.Revision != expected {
		return store.NoRevision, fmt.Errorf("%w: it is at revision %q, not %q", store.ErrConflict, current.entry.Revision, expected)
	}
	// What a crash left takes room that the new value may need.
	if err := s.remove(ctx, device, current.others); err != nil {
		return store.NoRevision, fmt.Errorf("tidying up after an interrupted write: %w", err)
	}
	revision := frame.NewRevision()
	next := version{hsm.ObjectRef{Application: s.application, Label: label(name, current.newest+1)}, current.newest + 1}
	framed := frame.Encode(revision, value)
	err = device.WriteObject(ctx, next.ref, framed)
	if errors.Is(err, hsm.ErrExists) {
		err = s.whose(ctx, device, next.ref, framed, err)
	}
	if err != nil {
		return store.NoRevision, explain(ctx, err)
	}
	// The new value is safe. What remains can wait for the next writer, except for another writer's trace.
	refs, err := device.Objects(ctx, s.application)
	if err != nil {
		return revision, nil //nolint:nilerr // the write is done and proved; looking for other writers is a courtesy
	}
	all, err := versions(refs, name)
	if err != nil {
		return store.NoRevision, err
	}
	older := slices.DeleteFunc(all, func(v version) bool { return v.generation >= next.generation })
	_ = s.remove(ctx, device, older)
	return revision, nil
}

// whose asks whether an object that was in the way of a write is that very write: an HSM may do what it says that it did
// not, and a repeat below us then meets its own trace. The random revision in the frame makes every write different. nil
// means that it is ours; where that cannot be told, the write may or may not have happened.
func (s *Store) whose(ctx context.Context, device hsm.ObjectStore, ref hsm.ObjectRef, framed []byte, exists error) error {
	there, err := device.ReadObject(ctx, ref)
	switch {
	case errors.Is(err, hsm.ErrAmbiguous):
		return err
	case err != nil:
		return fmt.Errorf("%w: an object is in the way of the write that may be the write itself: %w", hsm.ErrUnavailable, err)
	case bytes.Equal(there, framed):
		return nil
	default:
		return exists
	}
}

// List implements [store.Store].
func (s *Store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, err
	}
	device, err := s.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing %q on the HSM: %w", prefix, err)
	}
	refs, err := device.Objects(ctx, s.application)
	if err != nil {
		return nil, fmt.Errorf("listing %q on the HSM: %w", prefix, explain(ctx, err))
	}
	var names []string
	for _, ref := range refs {
		if name, _, ok := parseLabel(ref.Label); ok && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil // several generations of one name
}

// Delete implements [store.Store].
func (s *Store) Delete(ctx context.Context, name string, expected store.Revision) error {
	if err := checkName(name); err != nil {
		return err
	}
	err := s.exclusive(ctx, func(device hsm.ObjectStore) error {
		current, err := s.find(ctx, device, name)
		if err != nil {
			return err
		}
		if current.entry.Revision != expected {
			return fmt.Errorf("%w: it is at revision %q, not %q", store.ErrConflict, current.entry.Revision, expected)
		}
		// The current one last: a crash before leaves it, and no older value comes back.
		return s.remove(ctx, device, append(current.others, current.version))
	})
	if err != nil {
		return fmt.Errorf("deleting %q on the HSM: %w", name, err)
	}
	return nil
}

// Close implements [store.Store]; the device belongs to whoever opened it.
func (s *Store) Close() error { return nil }

// state is what the HSM holds under a name.
type state struct {
	version
	entry  store.Entry
	newest uint64    // the highest generation, valid or not; 0 where there is none
	others []version // what an interrupted write left: older ones and damaged ones, the oldest first
}

// readings is how often a reader looks again when a writer changes the objects under its eyes.
const readings = 10

// find reads what counts: the newest generation that is whole.
func (s *Store) find(ctx context.Context, device hsm.ObjectStore, name string) (state, error) {
	for range readings {
		found, again, err := s.look(ctx, device, name)
		if !again {
			return found, err
		}
	}
	return state{}, fmt.Errorf("%w: the objects change faster than they can be read; try again", store.ErrUnavailable)
}

// look lists and reads once. again is true where an object vanished between being listed and being read.
func (s *Store) look(ctx context.Context, device hsm.ObjectStore, name string) (found state, again bool, err error) {
	refs, err := device.Objects(ctx, s.application)
	if err != nil {
		return state{}, false, explain(ctx, err)
	}
	all, err := versions(refs, name)
	if err != nil {
		return state{}, false, err
	}
	if len(all) == 0 {
		return state{}, false, store.ErrNotFound
	}
	found.newest = all[0].generation
	var damage error
	for i, v := range all {
		framed, err := device.ReadObject(ctx, v.ref)
		if errors.Is(err, hsm.ErrNotFound) {
			return state{}, true, nil
		}
		if err != nil {
			return state{}, false, explain(ctx, err)
		}
		entry, err := frame.Decode(framed)
		if err == nil {
			found.version, found.entry = v, entry
			found.others = slices.Concat(all[:i], all[i+1:])
			slices.Reverse(found.others)
			return found, false, nil
		}
		damage = errors.Join(damage, fmt.Errorf("object %q: %w", v.ref.Label, err))
	}
	found.others = all
	slices.Reverse(found.others)
	return found, false, fmt.Errorf("no generation of it is whole: %w", damage)
}

func (s *Store) remove(ctx context.Context, device hsm.ObjectStore, unwanted []version) error {
	for _, v := range unwanted {
		if err := device.DeleteObject(ctx, v.ref); err != nil && !errors.Is(err, hsm.ErrNotFound) {
			return explain(ctx, err)
		}
	}
	return nil
}

// exclusive runs work while no other process of this machine writes to the token.
func (s *Store) exclusive(ctx context.Context, work func(hsm.ObjectStore) error) error {
	unlock, err := filelock.Lock(ctx, s.lockFile)
	if err != nil {
		return err
	}
	defer unlock()
	device, err := s.open(ctx)
	if err != nil {
		return err
	}
	return work(device)
}

func (s *Store) open(ctx context.Context) (hsm.ObjectStore, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	device, err := s.device(ctx)
	if err != nil {
		return nil, explain(ctx, err)
	}
	return device, nil
}

// explain gives an error of the HSM its meaning for users of a store, and keeps it.
func explain(ctx context.Context, err error) error {
	var pin *hsm.PINError
	switch {
	case errors.Is(ctx.Err(), context.Canceled):
		return fmt.Errorf("%w: %w", ctx.Err(), err)
	case errors.As(err, &pin), errors.Is(err, hsm.ErrLocked):
		return fmt.Errorf("%w: %w", store.ErrDenied, err)
	case errors.Is(err, hsm.ErrFull):
		return fmt.Errorf("%w: %w", store.ErrFull, err)
	case errors.Is(err, hsm.ErrExists):
		return fmt.Errorf("%w: somebody who does not share our lock writes to this HSM: %w", store.ErrConflict, err)
	case errors.Is(err, hsm.ErrAmbiguous):
		return fmt.Errorf("%w: %w", store.ErrAmbiguous, err)
	case errors.Is(err, hsm.ErrUnsupported):
		return err // no data objects, or not of this size: waiting does not help
	default:
		return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
	}
}
