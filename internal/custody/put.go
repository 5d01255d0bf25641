package custody

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// PutOptions say how an item is written.
type PutOptions struct {
	Key   string // wrapping key; "" for the one that it has
	Store string // "" for the one that it has, or the default one
	// CAS is the generation that the item must be at, 0 for none at all. nil writes over whatever is expected there;
	// an item without a record in this mount is written over only by its generation.
	CAS *uint64
	By  string // display name of the caller, for the record
	// RequestID, where it is given, names the write: where the item holds what an earlier sending of it stored, the write
	// has happened and is a success. The same id with other fields, other values or another key is [ErrInvalid].
	RequestID string
}

// Put seals the fields into one envelope of a new generation and stores it. No HSM is touched. After an error that is
// not [ErrConflict], [ErrInvalid] or one of the states, the item holds the old fields or the new ones: who repeats the
// write with a CAS gets ErrConflict where it holds the new ones, unless the write has a RequestID.
func (k *Keeper) Put(ctx context.Context, cluster, name string, fields Fields, options PutOptions) (Metadata, error) {
	if err := fields.check(); err != nil {
		return Metadata{}, fmt.Errorf("writing %s: %w", describe(cluster, name), err)
	}
	payload := fields.encode()
	defer clear(payload)
	for range maxConflicts {
		i, err := k.look(ctx, cluster, name, options.Store)
		if err != nil {
			return Metadata{}, err
		}
		c := change{key: options.Key, fields: fields.Names(), by: options.By}
		if options.RequestID != "" {
			if c.request, err = i.request(options.RequestID, payload); err != nil {
				return Metadata{}, err
			}
		}
		happened, err := i.holds(c, options.CAS)
		if err != nil {
			return Metadata{}, err
		}
		if happened {
			return k.settled(ctx, i, c), nil
		}
		if err := i.expect(options.CAS); err != nil {
			return Metadata{}, err
		}
		written, err := k.replace(ctx, i, payload, c)
		switch {
		case err == nil:
			return written, nil
		case !errors.Is(err, store.ErrConflict):
			return Metadata{}, err
		case options.CAS != nil && c.request == nil: // with a request id, it may be our own first sending that was faster
			return Metadata{}, fmt.Errorf("writing %s: %w: somebody else has just written it; read it again", describe(cluster, name), ErrConflict)
		}
	}
	return Metadata{}, fmt.Errorf("writing %s: %w: others wrote it %d times meanwhile; try again", describe(cluster, name), ErrConflict, maxConflicts)
}

// request is what the write of a payload is recognised by when it is sent again. One that is sent again already keeps the
// salt of its first sending.
func (i *item) request(id string, payload []byte) (*request, error) {
	now := newRequest(id, payload)
	if i.rec.record != nil {
		if was := i.rec.request(id); was != nil {
			if !was.writes(payload) {
				return nil, i.reused(id)
			}
			now.Salt, now.Payload = was.Salt, was.Payload
		}
	}
	now.Replaces = i.current()
	return &now, nil
}

// writer is the request that stored what the item holds, nil where none that is known did.
func (i *item) writer() *request {
	if i.rec.record == nil {
		return nil
	}
	for _, known := range i.rec.Requests {
		if known.Envelopes[i.claimed.Generation] == fingerprint(i.entry.Value) {
			return &known
		}
	}
	return nil
}

func (i *item) reused(id string) error {
	return fmt.Errorf("writing %s: %w: %q: this request_id was used for another write; use a new one", describe(i.cluster, i.name), ErrInvalid, id)
}

// holds tells whether the item holds what an earlier sending of a request stored. The envelope itself is recognised:
// what it claims of itself proves nothing.
func (i *item) holds(c change, cas *uint64) (bool, error) {
	if c.request == nil || i.state != StateCurrent && i.state != StateUnconfirmed {
		return false, nil
	}
	was := i.rec.request(c.request.ID)
	if was == nil || was.Envelopes[i.claimed.Generation] != fingerprint(i.entry.Value) || cas != nil && *cas != was.Replaces {
		return false, nil
	}
	if c.key != "" && c.key != i.claimed.Key {
		return false, i.reused(c.request.ID)
	}
	return true, nil
}

// settled is the answer to a request that has happened before; what it left unconfirmed is confirmed.
func (k *Keeper) settled(ctx context.Context, i *item, c change) Metadata {
	generation := i.claimed.Generation
	var warnings []string
	if i.state != StateCurrent {
		c.key = i.claimed.Key
		done := k.confirmation(generation, c)
		warnings = k.confirm(ctx, i, generation, done)
		settled := *i.rec.record
		settled.Pending = i.rec.Pending.clone()
		done(&settled)
		i.rec.record, i.state = &settled, StateCurrent
	}
	described := k.metadata(ctx, i)
	described.Warnings = append(described.Warnings, warnings...)
	return described
}

// expect returns an error where an item must not be written over.
func (i *item) expect(cas *uint64) error {
	if cas != nil && *cas != i.current() {
		return fmt.Errorf("writing %s: %w: it is at generation %d and the request expects %d; read it again",
			describe(i.cluster, i.name), ErrConflict, i.current(), *cas)
	}
	switch i.state {
	case StateAhead:
		if i.shared {
			return fmt.Errorf("writing %s in store %q: %w: somebody else wrote generation %d, which was not opened here yet; open it, then "+
				"write it again", describe(i.cluster, i.name), i.storeName, ErrAhead, i.claimed.Generation)
		}
		return i.disorder()
	case StateStale:
		return i.disorder()
	case StateUnrecorded:
		if cas == nil {
			return fmt.Errorf("writing %s in store %q: %w: it is there, at generation %d; open it to begin a record, or give cas=%d to write over it",
				describe(i.cluster, i.name), i.storeName, ErrUnrecorded, i.claimed.Generation, i.claimed.Generation)
		}
	}
	return nil
}

// change is what a write changes besides the payload.
type change struct {
	key    string   // "" for the one that the item has
	fields []string // names; nil where they stay
	by     string
	// request is what the write is recognised by when it is sent again; nil where it is not. That of a rewrap is the
	// request that wrote the payload.
	request *request
}

// replace puts a payload in place of an item as it was looked at: foresee, store, confirm. store.ErrConflict says that
// the item has changed since, and that this write changed nothing.
func (k *Keeper) replace(ctx context.Context, i *item, payload []byte, c change) (Metadata, error) {
	if c.key == "" {
		c.key = i.key()
	}
	if c.key == "" {
		return Metadata{}, fmt.Errorf("writing %s: %w: it names no wrapping key; name one", describe(i.cluster, i.name), ErrInvalid)
	}
	next := k.foreseeing(i, c)
	if next.Highest > maxGeneration {
		return Metadata{}, fmt.Errorf("writing %s: %w: it is at the last generation; take another name", describe(i.cluster, i.name), ErrInvalid)
	}
	generation := next.Highest
	sealed, err := k.keys.Seal(ctx, c.key, envelope.Context{
		Use: envelope.UseMaterial, Cluster: i.cluster, Name: i.name, Generation: generation,
	}, payload)
	if err != nil {
		return Metadata{}, fmt.Errorf("sealing %s: %w", describe(i.cluster, i.name), err)
	}
	if c.request != nil {
		next.sent(*c.request, generation, sealed.Envelope)
	}
	// A key may be deleted at any moment, and what seals does not notice: it may have the key in a cache. Asked before,
	// nothing is replaced by what cannot be opened; asked afterwards, who deleted the key has seen the envelope, or the
	// writer hears of it.
	if err := k.lives(ctx, c.key); err != nil {
		return Metadata{}, fmt.Errorf("sealing %s: %w", describe(i.cluster, i.name), err)
	}
	if _, err := k.saveRecord(ctx, i.cluster, i.name, recorded{next, i.rec.revision}); err != nil {
		return Metadata{}, err
	}
	if err := k.storeEnvelope(ctx, i, sealed.Envelope); err != nil {
		if surelyNotWritten(err) {
			k.withdraw(ctx, i, generation)
		}
		return Metadata{}, fmt.Errorf("writing %s to store %q: %w", describe(i.cluster, i.name), i.storeName, err)
	}
	if err := k.lives(ctx, c.key); err != nil {
		return Metadata{}, fmt.Errorf("%s was stored, and cannot be opened: its wrapping key was deleted meanwhile: %w; write it again "+
			"with another key", describe(i.cluster, i.name), err)
	}
	done := k.confirmation(generation, c)
	warnings := k.confirm(ctx, i, generation, done)

	parsed, err := envelope.Parse(sealed.Envelope)
	if err != nil {
		return Metadata{}, fmt.Errorf("reading %s as it was sealed: %w", describe(i.cluster, i.name), err)
	}
	done(next)
	written := *i
	written.rec.record, written.state = next, StateCurrent
	written.envelope, written.claimed, written.entry.Value = parsed, parsed.Context(), sealed.Envelope
	described := k.metadata(ctx, &written)
	described.Warnings = append(described.Warnings, warnings...)
	return described, nil
}

// confirmation is what a write that has happened changes in the record.
func (k *Keeper) confirmation(generation uint64, c change) func(*record) {
	return func(rec *record) {
		rec.confirm(generation)
		rec.Key, rec.Updated, rec.UpdatedBy = c.key, k.today(), c.by
		if c.fields != nil {
			rec.Fields = c.fields
		}
	}
}

// lives returns an error where a wrapping key is gone or going. One that could not be asked about is logged only: the
// write itself is not in doubt.
func (k *Keeper) lives(ctx context.Context, key string) error {
	err := k.keys.Lives(ctx, key)
	if errors.Is(err, keyring.ErrKeyNotFound) || errors.Is(err, keyring.ErrDeleting) {
		return err
	}
	if err != nil {
		k.logger.Warn("finding out whether a wrapping key was deleted meanwhile", "key", key, "error", err)
	}
	return nil
}

// key is the wrapping key that an item has, "" where it has none yet.
func (i *item) key() string {
	switch {
	case i.exists():
		return i.claimed.Key
	case i.rec.record != nil:
		return i.rec.Key
	default:
		return ""
	}
}

// foreseeing is the record of an item with one more generation that the store may hold, which is then Highest.
func (k *Keeper) foreseeing(i *item, c change) *record {
	next := &record{Store: i.storeName, Key: c.key, Created: k.today(), Updated: k.today(), UpdatedBy: c.by}
	switch rec := i.rec.record; {
	case rec == nil && i.exists(): // written over by its generation
		next.Key, next.Generation, next.Highest = i.claimed.Key, i.claimed.Generation, i.claimed.Generation
	case rec == nil:
	case i.state == "": // deleted, or a first write ended unclear
		next.Highest, next.Buried, next.Pending, next.Requests = rec.Highest, rec.Buried, rec.Pending.clone(), rec.Requests
	default:
		*next = *rec
		next.Pending = rec.Pending.clone()
	}
	next.foresee()
	return next
}

// storeEnvelope replaces the envelope. A write that was made although the store answered with an error is a success.
func (k *Keeper) storeEnvelope(ctx context.Context, i *item, raw []byte) error {
	_, err := i.store.Put(ctx, path(i.cluster, i.name), slices.Clone(raw), i.entry.Revision)
	if err == nil || surelyNotWritten(err) {
		return err
	}
	if _, ok := stored(ctx, i.store, path(i.cluster, i.name), raw, i.entry.Revision); ok {
		return nil
	}
	return err
}

// surelyNotWritten tells whether a store has refused a write, so that there is no doubt how it ended.
func surelyNotWritten(err error) bool {
	return errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrTooLarge) || errors.Is(err, store.ErrInvalidName)
}

// withdraw takes back what foreseeing wrote. Where that fails the record foresees a generation that never comes.
func (k *Keeper) withdraw(ctx context.Context, i *item, generation uint64) {
	err := k.updateRecord(ctx, i.cluster, i.name, func(rec *record) bool {
		if !rec.foresees(generation) {
			return false
		}
		rec.withdraw(generation)
		return true
	})
	if err != nil {
		k.logger.Warn("taking back a foreseen generation failed", "cluster", i.cluster, "name", i.name, "generation", generation, "error", err)
	}
}

// confirm notes in the record what the store holds. A failure loses nothing, because the record foresees it: it is a
// warning for the operator, and the next open confirms again.
func (k *Keeper) confirm(ctx context.Context, i *item, generation uint64, done func(*record)) (warnings []string) {
	err := k.updateRecord(ctx, i.cluster, i.name, func(rec *record) bool {
		if !rec.foresees(generation) {
			return false // somebody wrote or deleted after us, or confirmed before
		}
		done(rec)
		return true
	})
	if err == nil {
		return nil
	}
	k.logger.Warn("confirming a generation failed", "cluster", i.cluster, "name", i.name, "generation", generation, "error", err)
	return []string{fmt.Sprintf("It is stored, and confirming generation %d in the record failed (%v); open it once to confirm it.", generation, err)}
}

// today is the time for records, to the second.
func (k *Keeper) today() time.Time { return k.now().UTC().Truncate(time.Second) }
