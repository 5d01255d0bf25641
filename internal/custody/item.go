package custody

import (
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// item is what record and store say about a name.
type item struct {
	cluster, name string
	rec           recorded // rec.record is nil where there is none
	storeName     string
	store         store.Store
	entry         store.Entry        // the zero value where the store holds none
	envelope      *envelope.Envelope // nil where the store holds none
	claimed       envelope.Context   // by the envelope, proved only by opening it
	state         State              // "" where there is no such item
	shared        bool               // Config.Shared
}

// exists tells whether the store holds an envelope.
func (i *item) exists() bool { return i.envelope != nil }

// current is the generation that a request may expect: 0 where there is no item.
func (i *item) current() uint64 {
	if i.exists() {
		return i.claimed.Generation
	}
	if i.state == StateVanished {
		return i.rec.Generation
	}
	return 0
}

// looks is how often an item is read that seems out of order. Record and store are two reads, and a writer may have
// been between them.
const looks = 4

// look reads record and store of an item. Where the item is out of order it looks again, until nothing has changed
// between two looks. wanted names the store where the record does not; "" is the default one.
func (k *Keeper) look(ctx context.Context, cluster, name, wanted string) (*item, error) {
	if err := checkItem(cluster, name); err != nil {
		return nil, err
	}
	before, err := k.lookOnce(ctx, cluster, name, wanted)
	for range looks {
		if err != nil || before.inOrder() {
			return before, err
		}
		var now *item
		if now, err = k.lookOnce(ctx, cluster, name, wanted); err != nil {
			return nil, err
		}
		if now.rec.revision == before.rec.revision && now.entry.Revision == before.entry.Revision {
			return now, nil
		}
		before = now
	}
	return before, err
}

func (i *item) inOrder() bool {
	return i.state == "" || i.state == StateCurrent || i.state == StateUnconfirmed
}

func (k *Keeper) lookOnce(ctx context.Context, cluster, name, wanted string) (*item, error) {
	i := &item{cluster: cluster, name: name, shared: k.shared}
	var err error
	if i.rec, err = k.loadRecord(ctx, cluster, name); err != nil {
		return nil, err
	}
	if i.storeName, err = k.storeFor(ctx, i, wanted); err != nil {
		return nil, err
	}
	if i.store, err = k.stores.Store(ctx, i.storeName); err != nil {
		return nil, fmt.Errorf("reading %s: %w", describe(cluster, name), err)
	}
	i.entry, err = i.store.Get(ctx, path(cluster, name))
	if errors.Is(err, store.ErrNotFound) {
		i.state = i.judge()
		return i, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s from store %q: %w", describe(cluster, name), i.storeName, err)
	}
	if i.envelope, err = envelope.Parse(i.entry.Value); err != nil {
		return nil, fmt.Errorf("reading %s from store %q: %w: something else than our envelope lies there; put a backup of it back",
			describe(cluster, name), i.storeName, err)
	}
	i.claimed = i.envelope.Context()
	for _, field := range []struct{ name, claimed, wanted string }{
		{"use", string(i.claimed.Use), string(envelope.UseMaterial)},
		{"cluster", i.claimed.Cluster, cluster},
		{"name", i.claimed.Name, name},
	} {
		if field.claimed != field.wanted {
			return nil, fmt.Errorf("reading %s from store %q: %w: somebody moved it there; put the right one back", describe(cluster, name),
				i.storeName, &envelope.ContextError{Field: field.name, Claimed: field.claimed, Wanted: field.wanted})
		}
	}
	i.state = i.judge()
	return i, nil
}

// storeFor returns the name of the store of an item.
func (k *Keeper) storeFor(ctx context.Context, i *item, wanted string) (string, error) {
	if i.rec.record != nil && !i.rec.Deleted {
		if wanted != "" && wanted != i.rec.Store {
			return "", fmt.Errorf("%w: %s lies in store %q; name that one or none, or delete it first to put it into %q",
				ErrInvalid, describe(i.cluster, i.name), i.rec.Store, wanted)
		}
		return i.rec.Store, nil
	}
	if wanted != "" {
		return wanted, nil
	}
	if i.rec.record != nil && i.rec.Pending != nil {
		return i.rec.Store, nil // it was deleted while it was written, and may still appear
	}
	name, err := k.defaultStore(ctx)
	if err != nil {
		return "", fmt.Errorf("looking up the default store: %w", err)
	}
	if name == "" && i.rec.record != nil {
		name = i.rec.Store // where it lay before it was deleted
	}
	if name == "" {
		return "", fmt.Errorf("%w: %s names no store, and there is no default one; name one", ErrInvalid, describe(i.cluster, i.name))
	}
	return name, nil
}

// judge compares what the store holds with what the record expects.
func (i *item) judge() State {
	rec, generation := i.rec.record, i.claimed.Generation
	switch {
	case !i.exists() && (rec == nil || rec.Generation == 0 || rec.mayBeGone()):
		return ""
	case !i.exists():
		return StateVanished
	case rec == nil:
		return StateUnrecorded
	case generation == rec.Generation:
		return StateCurrent
	case rec.foresees(generation):
		return StateUnconfirmed
	case generation < rec.Generation || rec.Deleted && generation <= i.grave():
		return StateStale
	default:
		return StateAhead
	}
}

// grave is the last generation that a deletion took with it. Where nobody else writes the store, that is the highest ever
// given; where others do, they give the same numbers, and what they wrote after it is alive.
func (i *item) grave() uint64 {
	if i.shared {
		return i.rec.Buried
	}
	return i.rec.Highest
}

// problem returns the error of an item that must not be used, nil for one in order or absent. One that another keeper wrote is
// in order.
func (i *item) problem() error {
	if i.state == StateAhead && i.shared {
		return nil
	}
	return i.disorder()
}

// disorder is problem without regard to other keepers.
func (i *item) disorder() error {
	where := fmt.Sprintf("%s in store %q", describe(i.cluster, i.name), i.storeName)
	switch i.state {
	case StateStale:
		expected := fmt.Sprintf("generation %d is expected", i.rec.Generation)
		if i.rec.Deleted {
			expected = "it was deleted"
		}
		return fmt.Errorf("%s: %w: %s and generation %d is there; where you restored a backup of the store yourself, accept-generation %d "+
			"lets it open, else find out who put it there", where, ErrStale, expected, i.claimed.Generation, i.claimed.Generation)
	case StateAhead:
		return fmt.Errorf("%s: %w: generation %d is expected at most and %d is there; where this mount was restored from a backup, or another "+
			"mount writes the store, accept-generation %d lets it open", where, ErrAhead, i.rec.Highest, i.claimed.Generation, i.claimed.Generation)
	case StateVanished:
		if i.shared {
			return fmt.Errorf("%s: %w: generation %d is expected; where another host deleted it, delete it here as well, else put a backup of "+
				"the store back, or write it anew", where, ErrVanished, i.rec.Generation)
		}
		return fmt.Errorf("%s: %w: generation %d is expected; put a backup of the store back, or write it anew, or delete it",
			where, ErrVanished, i.rec.Generation)
	default:
		return nil
	}
}

// metadata describes an item that exists or vanished.
func (k *Keeper) metadata(ctx context.Context, i *item) Metadata {
	m := Metadata{Cluster: i.cluster, Name: i.name, State: i.state, Store: i.storeName, Size: len(i.entry.Value)}
	if rec := i.rec.record; rec != nil {
		m.Key, m.Expected = rec.Key, rec.Generation
		m.Created, m.Updated, m.UpdatedBy = rec.Created, rec.Updated, rec.UpdatedBy
		if i.claimed.Generation == rec.Generation {
			m.Fields = rec.Fields
		}
		if rec.Deleting > 0 {
			m.Warnings = append(m.Warnings, "Deleting it was begun and did not end; delete it again, or write it to keep it.")
		}
	}
	if err := i.problem(); err != nil {
		m.Warnings = append(m.Warnings, err.Error())
	}
	switch i.state {
	case StateUnrecorded:
		m.Warnings = append(m.Warnings, notRecorded)
	case StateAhead:
		if i.shared {
			m.Warnings = append(m.Warnings, "Another host has written it since; opening it notes that here.")
		}
	case StateUnconfirmed:
		m.Warnings = append(m.Warnings, "A write of it ended unclear; opening it confirms which generation counts.")
	}
	if i.exists() {
		m.Key, m.Version, m.Generation = i.claimed.Key, i.claimed.Version, i.claimed.Generation
		var accepted bool
		m.KIDs, m.HSMs, m.LatestVersion, accepted = k.recipients(ctx, i)
		if m.HSMs == 1 && !accepted {
			m.Warnings = append(m.Warnings, "It opens on one HSM only; add a recipient to its wrapping key and rewrap, or confirm that the key in that HSM is backed up.")
		}
	}
	return m
}

const notRecorded = "There is no record of it here, so nobody can say whether it is the newest generation; " +
	"compare with what you know, then opening it begins a record."

// recipients tells which HSM keys open an envelope and on how many HSMs they lie, as [keyring.CountHSMs] counts; keys that
// the keyring does not know count as one each. accepted: somebody confirmed a backup of the HSM keys of that version, or accepted that
// there is one HSM.
func (k *Keeper) recipients(ctx context.Context, i *item) (kids []string, hsms, latest int, accepted bool) {
	known := map[string]keyring.Recipient{}
	key, err := k.keys.Get(ctx, i.claimed.Key)
	if err == nil {
		latest, accepted = key.LatestVersion, key.AcceptSingleHSM != nil
		for _, version := range key.Versions {
			accepted = accepted || version.Number == i.claimed.Version && version.BackupConfirmed != nil
			for _, recipient := range version.Recipients {
				known[recipient.KID] = recipient
			}
		}
	}
	var places []keyring.Recipient
	for _, recipient := range i.envelope.Recipients() {
		kids = append(kids, recipient.KID)
		on, found := known[recipient.KID]
		if !found {
			hsms++
			continue
		}
		places = append(places, on)
	}
	return kids, hsms + keyring.CountHSMs(places), latest, accepted
}
