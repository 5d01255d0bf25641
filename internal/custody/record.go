package custody

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// recordFormat is the version of the record's format.
const recordFormat = 1

// maxGeneration is the last generation that an envelope can have: the largest integer that JSON keeps exact.
const maxGeneration = 1<<53 - 1

// record is what this mount expects a store to hold of an item. It holds no secret; what a request tells of its payload
// is in [request].
type record struct {
	Format int    `json:"format"`
	Store  string `json:"store"`
	Key    string `json:"key"` // that sealed Generation
	// Generation is the one that the store holds, 0 before the first write is confirmed.
	Generation uint64 `json:"generation"`
	// Pending are the generations that a write may have left instead, nil for none.
	Pending *pending `json:"pending,omitempty"`
	// Highest is the highest generation ever given to an envelope of this item. The next write takes the next one.
	Highest uint64 `json:"highest"`
	// Deleting is the generation that is being deleted, noted before the envelope is; 0 for none. Deleted is set once it
	// is gone: the record is a gravestone.
	Deleting uint64 `json:"deleting,omitempty"`
	Deleted  bool   `json:"deleted,omitempty"`
	// Buried is the last generation that a deletion took with it, 0 for none.
	Buried uint64 `json:"buried,omitempty"`

	// Requests are the newest writes that carried a request id, the newest first.
	Requests []request `json:"requests,omitempty"`

	// Write is random and new with every write. Without it two writers that do the same write the same bytes, and after
	// an unclear answer each would take the other's write for its own: both with one generation.
	Write string `json:"write"`

	Fields    []string  `json:"fields,omitempty"` // names of the fields of Generation
	Created   time.Time `json:"created"`
	Updated   time.Time `json:"updated"`
	UpdatedBy string    `json:"updated_by,omitempty"`
}

// request is a write that its client may send again, because no answer reached it.
type request struct {
	ID string `json:"id"`
	// Replaces is the generation that it found, 0 for none.
	Replaces uint64 `json:"replaces"`
	// Payload is the HMAC-SHA256 of the encoded fields under Salt, 32 random bytes of this request: a repeat that carries
	// other values is not taken for it. Salt and Payload together let their reader try guesses at a payload, and no more:
	// keys and tokens cannot be guessed. Who reads them has come through Vault's barrier, where the authentication keys
	// lie too. Records of earlier releases have neither.
	Salt    []byte `json:"salt,omitempty"`
	Payload []byte `json:"payload_hmac,omitempty"`
	// Envelopes are what its sendings sealed, at most one of which was stored: hexadecimal SHA-256 by generation.
	Envelopes map[uint64]string `json:"envelopes"`
}

// How many requests of an item, and sendings of each, are remembered.
const (
	maxRequests = 4
	maxSendings = 8
)

// newRequest begins to remember a write.
func newRequest(id string, payload []byte) request {
	r := request{ID: id, Salt: make([]byte, sha256.Size)}
	_, _ = rand.Read(r.Salt) // never fails, says its documentation
	r.Payload = r.digest(payload)
	return r
}

func (r *request) digest(payload []byte) []byte {
	mac := hmac.New(sha256.New, r.Salt)
	mac.Write(payload)
	return mac.Sum(nil)
}

// writes tells whether that is what the request writes.
func (r *request) writes(payload []byte) bool { return hmac.Equal(r.digest(payload), r.Payload) }

// request returns what is known of the write with that id, nil for nothing. Of one whose payload is not known nobody can
// say that a request is its repeat.
func (r *record) request(id string) *request {
	i := slices.IndexFunc(r.Requests, func(known request) bool {
		return known.ID == id && len(known.Salt) == sha256.Size && len(known.Payload) == sha256.Size
	})
	if i >= 0 {
		return &r.Requests[i]
	}
	return nil
}

// sent notes one envelope of a request. What earlier sendings of it sealed stays known where they found the same.
func (r *record) sent(now request, generation uint64, raw []byte) {
	now.Envelopes = map[uint64]string{}
	if known := r.request(now.ID); known != nil && known.Replaces == now.Replaces {
		maps.Copy(now.Envelopes, known.Envelopes)
	}
	if len(now.Envelopes) == maxSendings {
		delete(now.Envelopes, slices.Min(slices.Collect(maps.Keys(now.Envelopes))))
	}
	now.Envelopes[generation] = fingerprint(raw)
	others := slices.DeleteFunc(slices.Clone(r.Requests), func(known request) bool { return known.ID == now.ID })
	r.Requests = append([]request{now}, others[:min(len(others), maxRequests-1)]...)
}

// fingerprint tells one envelope from all others.
func fingerprint(raw []byte) string {
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:])
}

// pending is a range of generations, both ends included.
type pending struct {
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

func (p *pending) clone() *pending {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}

// foresees tells whether a write that is not confirmed may have left this generation.
func (r *record) foresees(generation uint64) bool {
	return r.Pending != nil && r.Pending.First <= generation && generation <= r.Pending.Last
}

// foresee adds the next generation to what may be found.
func (r *record) foresee() (generation uint64) {
	r.Highest++
	if r.Pending == nil {
		r.Pending = &pending{First: r.Highest}
	}
	r.Pending.Last = r.Highest
	return r.Highest
}

// settle drops pending generations up to this one: they cannot appear any more, because their writes expect a revision
// that is gone.
func (r *record) settle(generation uint64) {
	if r.Pending == nil {
		return
	}
	r.Pending.First = max(r.Pending.First, generation+1)
	if r.Pending.First > r.Pending.Last {
		r.Pending = nil
	}
}

// withdraw drops a generation that was foreseen and surely not written.
func (r *record) withdraw(generation uint64) {
	switch p := r.Pending; {
	case p == nil:
	case p.First == p.Last && p.Last == generation:
		r.Pending = nil
	case p.First == generation:
		p.First++
	case p.Last == generation:
		p.Last--
	}
	if r.Generation == 0 && r.Pending == nil {
		r.Deleting, r.Deleted = 0, true // there is nothing
	}
}

// confirm notes that the store holds this generation.
func (r *record) confirm(generation uint64) {
	r.Generation, r.Deleted = generation, false
	r.settle(generation)
	if r.Deleting < generation {
		r.Deleting = 0 // what was to be deleted was written over
	}
}

// mayBeGone tells whether a delete that did not end may have left nothing in the store.
func (r *record) mayBeGone() bool { return r.Deleting > 0 && r.Deleting >= r.Generation }

// bury makes the record a gravestone. Writes that are still under way stay foreseen: the last of them may bring the
// item back.
func (r *record) bury(generation uint64) {
	r.settle(generation)
	r.Buried = max(r.Buried, generation)
	r.Generation, r.Deleting, r.Deleted, r.Fields, r.Requests = 0, 0, true, nil, nil
}

// validate returns ErrRecordMalformed where the record contradicts itself.
func (r *record) validate() error {
	p := r.Pending
	switch {
	case r.Format != recordFormat:
		return fmt.Errorf("%w: format %d, this program knows %d", ErrRecordMalformed, r.Format, recordFormat)
	case r.Store == "" || r.Key == "":
		return fmt.Errorf("%w: it names no store or no key", ErrRecordMalformed)
	case r.Generation > r.Highest || r.Highest > maxGeneration:
		return fmt.Errorf("%w: generation %d above the highest, %d", ErrRecordMalformed, r.Generation, r.Highest)
	case p != nil && (p.First > p.Last || p.First <= r.Generation || p.Last > r.Highest):
		return fmt.Errorf("%w: pending %d to %d with generation %d and highest %d", ErrRecordMalformed, p.First, p.Last, r.Generation, r.Highest)
	case r.Deleting > r.Highest || r.Buried > r.Highest || r.Deleted && (r.Generation != 0 || r.Deleting != 0):
		return fmt.Errorf("%w: deleted and yet there", ErrRecordMalformed)
	}
	return nil
}

// recorded is a record and the revision at which it was read; the zero value is "none".
type recorded struct {
	*record

	revision store.Revision
}

// loadRecord reads the record of an item. None is no error.
func (k *Keeper) loadRecord(ctx context.Context, cluster, name string) (recorded, error) {
	entry, err := k.records.Get(ctx, path(cluster, name))
	if errors.Is(err, store.ErrNotFound) {
		return recorded{}, nil
	}
	if err != nil {
		return recorded{}, fmt.Errorf("reading the record of %s: %w", describe(cluster, name), err)
	}
	rec := new(record)
	if err := json.Unmarshal(entry.Value, rec); err != nil {
		return recorded{}, fmt.Errorf("reading the record of %s: %w: %w", describe(cluster, name), ErrRecordMalformed, err)
	}
	if err := rec.validate(); err != nil {
		return recorded{}, fmt.Errorf("reading the record of %s: %w", describe(cluster, name), err)
	}
	return recorded{rec, entry.Revision}, nil
}

// afterwards is the time that is taken to learn how a write ended that failed, or whose caller has gone.
const afterwards = 5 * time.Second

// saveRecord writes a record where the old one is still at its revision; store.ErrConflict says that it is not. A write
// that was made although the store answered with an error is a success.
func (k *Keeper) saveRecord(ctx context.Context, cluster, name string, rec recorded) (recorded, error) {
	rec.Format, rec.Write = recordFormat, rand.Text()
	if err := rec.validate(); err != nil {
		return recorded{}, fmt.Errorf("writing the record of %s: %w", describe(cluster, name), err)
	}
	raw, err := json.Marshal(rec.record)
	if err != nil {
		return recorded{}, fmt.Errorf("encoding the record of %s: %w", describe(cluster, name), err)
	}
	revision, err := k.records.Put(ctx, path(cluster, name), raw, rec.revision)
	if err != nil && !errors.Is(err, store.ErrConflict) {
		if revision, ok := stored(ctx, k.records, path(cluster, name), raw, rec.revision); ok {
			return recorded{rec.record, revision}, nil
		}
	}
	if err != nil {
		return recorded{}, fmt.Errorf("writing the record of %s: %w", describe(cluster, name), err)
	}
	return recorded{rec.record, revision}, nil
}

// stored tells whether a store holds exactly these bytes at another revision than before: the only way to know after a
// write that failed.
func stored(ctx context.Context, s store.Store, name string, raw []byte, before store.Revision) (store.Revision, bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	entry, err := s.Get(ctx, name)
	if err != nil || entry.Revision == before || !bytes.Equal(entry.Value, raw) {
		return store.NoRevision, false
	}
	return entry.Revision, true
}

// maxConflicts is how often work is begun anew because somebody else was faster.
const maxConflicts = 16

// updateRecord changes a record that exists, again on the newest one where somebody else was faster. change returns
// false where there is nothing to do.
func (k *Keeper) updateRecord(ctx context.Context, cluster, name string, change func(*record) bool) error {
	for range maxConflicts {
		rec, err := k.loadRecord(ctx, cluster, name)
		if err != nil {
			return err
		}
		if rec.record == nil || !change(rec.record) {
			return nil
		}
		_, err = k.saveRecord(ctx, cluster, name, rec)
		if !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return fmt.Errorf("writing the record of %s: others changed it %d times meanwhile: %w: try again", describe(cluster, name), maxConflicts, ErrConflict)
}
