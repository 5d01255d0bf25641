package keyring

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// keyRecordType is the type that a key record states, so that no other JSON is taken for one.
const keyRecordType = "nitroseal key record"

// keyRecord is a wrapping key without its secrets: what brings it back together with one of its HSMs. What changes with
// daily use is not in it, so that its SHA-256 stays the one that was printed when a version was made.
type keyRecord struct {
	Type                 string             `json:"type"`
	Format               int                `json:"format"`
	Name                 string             `json:"name"`
	Created              time.Time          `json:"created"`
	MinDecryptionVersion int                `json:"min_decryption_version"`
	Versions             []keyRecordVersion `json:"versions"`
}

type keyRecordVersion struct {
	Number       int             `json:"version"`
	Created      time.Time       `json:"created"`
	Recipients   []recipientCore `json:"recipients"`
	AuthEnvelope json.RawMessage `json:"auth_envelope"`
	// KEKEnvelope lets servers that are restored from the record share one key encryption key.
	KEKEnvelope json.RawMessage `json:"kek_envelope,omitempty"`
}

// newKeyRecord returns the key record of a key that has a version.
func newKeyRecord(rec *record) KeyRecord {
	public := keyRecord{
		Type:                 keyRecordType,
		Format:               recordFormat,
		Name:                 rec.Name,
		Created:              rec.Created,
		MinDecryptionVersion: rec.MinDecryptionVersion,
	}
	for i := range rec.Versions {
		v := &rec.Versions[i]
		kept := keyRecordVersion{Number: v.Number, Created: v.Created, AuthEnvelope: v.AuthEnvelope, KEKEnvelope: v.KEKEnvelope}
		for j := range v.Recipients {
			kept.Recipients = append(kept.Recipients, v.Recipients[j].recipientCore)
		}
		public.Versions = append(public.Versions, kept)
	}
	return public.canonical()
}

// canonical returns the bytes that are hashed: members in the order of the types above, no white space.
func (r keyRecord) canonical() KeyRecord {
	raw, err := json.Marshal(r)
	if err != nil { // no member can fail: AuthEnvelope was parsed
		panic(fmt.Sprintf("encoding a key record: %v", err))
	}
	sum := sha256.Sum256(raw)
	return KeyRecord{Record: raw, SHA256: hex.EncodeToString(sum[:])}
}

// Backup returns the key record: no secret, and together with one of the HSMs all that is needed to open what the key
// sealed. Reading it is recorded, because a key whose record nobody has is lost with this store.
func (k *Keyring) Backup(ctx context.Context, name, by string) (KeyRecord, error) {
	var backup KeyRecord
	rec, err := k.update(ctx, name, func(rec *record) error {
		if len(rec.Versions) == 0 {
			return rec.settled()
		}
		backup = newKeyRecord(rec)
		return rec.noteRead(by, k.today())
	})
	if err != nil {
		return KeyRecord{}, err
	}
	k.logger.Info("key record read", "key", name, "versions", len(rec.Versions), "record_sha256", backup.SHA256, "by", by)
	return backup, nil
}

// BackupTo is [Keyring.Backup] for a caller that can tell whether the key record arrived: only where keep returns nil is
// the reading recorded.
func (k *Keyring) BackupTo(ctx context.Context, name, by string, keep func(KeyRecord) error) error {
	rec, _, err := k.load(ctx, name)
	if err != nil {
		return err
	}
	if len(rec.Versions) == 0 {
		return rec.settled()
	}
	backup := newKeyRecord(rec)
	if err := keep(backup); err != nil {
		return err
	}
	_, err = k.update(ctx, name, func(rec *record) error {
		if newKeyRecord(rec).SHA256 != backup.SHA256 {
			return fmt.Errorf("key %q: %w while its key record was being read: read it again, and keep the new one", name, store.ErrConflict)
		}
		return rec.noteRead(by, k.today())
	})
	return err
}

// noteRead records that the key record was read, unless somebody did before.
func (r *record) noteRead(by string, at time.Time) error {
	if r.Acknowledgements.RecordRead != nil {
		return errNoChange
	}
	r.Acknowledgements.RecordRead = &Acknowledgement{By: by, At: at}
	return nil
}

// Restore writes a key back from its key record, if the SHA-256 is the one that the operator confirms. Each version's
// authentication key is opened with one private-key operation; a version none of whose HSMs answers stays locked until
// its first use, but one version at least has to open. A key of that name takes on what the record has more, and nothing is
// taken away from it: [ErrKeyExists] where the record has not all that is here. A repeat answers with the key.
func (k *Keyring) Restore(ctx context.Context, name string, request RestoreRequest) (*Key, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	restored, err := parseKeyRecord(request)
	if err != nil {
		return nil, fmt.Errorf("restoring key %q: %w", name, err)
	}
	if restored.Name != name {
		return nil, fmt.Errorf("restoring key %q: %w: it is the record of key %q, whose envelopes name it; restore it under that name",
			name, ErrInvalid, restored.Name)
	}
	unlock, err := k.turn(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()

	rec, _, err := k.load(ctx, name)
	if err == nil {
		return k.grow(ctx, rec, restored, request)
	}
	if !errors.Is(err, ErrKeyNotFound) {
		return nil, err
	}
	rec = k.fromKeyRecord(restored, request)
	if err := rec.validate(name); err != nil {
		return nil, fmt.Errorf("restoring key %q: %w", name, err)
	}
	all := make([]*version, len(rec.Versions))
	for i := range rec.Versions {
		all[i] = &rec.Versions[i]
	}
	if !request.Deferred {
		if err := k.openAuthKeys(ctx, name, all); err != nil {
			return nil, fmt.Errorf("restoring key %q: %w", name, err)
		}
	}
	if err := k.write(ctx, rec, store.NoRevision); errors.Is(err, store.ErrConflict) {
		return nil, fmt.Errorf("key %q: %w: somebody made it just now; send the request again", name, ErrKeyExists)
	} else if err != nil {
		return nil, err
	}
	k.logger.Info("wrapping key restored", "key", name, "versions", len(rec.Versions), "record_sha256", strings.ToLower(request.SHA256),
		"by", request.By)
	return describe(rec), nil
}

// parseKeyRecord reads a key record and compares its SHA-256. The hash is taken of what was understood, so white space does
// not matter and nothing that a reader might overlook gets by.
func parseKeyRecord(request RestoreRequest) (keyRecord, error) {
	r, err := readKeyRecord(request.Record)
	if err != nil {
		return r, err
	}
	if actual := r.canonical().SHA256; !strings.EqualFold(actual, request.SHA256) {
		return r, fmt.Errorf("%w: its SHA-256 is %s and %q was confirmed; compare it with the one that was printed when the key was "+
			"made, and do not restore it if they differ", ErrRecordMismatch, actual, request.SHA256)
	}
	return r, nil
}

// readKeyRecord reads a key record strictly.
func readKeyRecord(raw []byte) (keyRecord, error) {
	var r keyRecord
	if len(raw) > store.MaxValueSize {
		return r, fmt.Errorf("%w: it has %d bytes, at most %d can be one", ErrRecordMalformed, len(raw), store.MaxValueSize)
	}
	if err := decodeStrictly(raw, &r); err != nil {
		return r, fmt.Errorf("%w: send the key record as the backup returned it", err)
	}
	if r.Type != keyRecordType || r.Format != recordFormat {
		return r, fmt.Errorf("%w: it is of type %q and format %d, this release reads %q and %d", ErrRecordMalformed, r.Type, r.Format,
			keyRecordType, recordFormat)
	}
	if len(r.Versions) == 0 {
		return r, fmt.Errorf("%w: it has no version", ErrRecordMalformed)
	}
	for i := range r.Versions {
		var compact bytes.Buffer
		if err := json.Compact(&compact, r.Versions[i].AuthEnvelope); err != nil {
			return r, fmt.Errorf("%w: version %d has no authentication envelope", ErrRecordMalformed, r.Versions[i].Number)
		}
		r.Versions[i].AuthEnvelope = compact.Bytes()
		if r.Versions[i].KEKEnvelope == nil {
			continue
		}
		compact = bytes.Buffer{}
		if err := json.Compact(&compact, r.Versions[i].KEKEnvelope); err != nil {
			return r, fmt.Errorf("%w: version %d has a key encryption key that is none", ErrRecordMalformed, r.Versions[i].Number)
		}
		r.Versions[i].KEKEnvelope = compact.Bytes()
	}
	return r, nil
}

// fromKeyRecord returns the record that a key record restores. Acknowledgements are not carried over, but for the one
// that is evident: whoever restores a key record has read it. Nobody knows what the versions served: encrypt/ is assumed.
func (k *Keyring) fromKeyRecord(restored keyRecord, request RestoreRequest) *record {
	rec := k.own(&record{
		Format:               recordFormat,
		Name:                 restored.Name,
		Created:              restored.Created,
		CreatedBy:            request.By,
		MinDecryptionVersion: restored.MinDecryptionVersion,
		Acknowledgements:     acknowledgements{RecordRead: &Acknowledgement{By: request.By, At: k.today()}},
	})
	for _, v := range restored.Versions {
		kept := version{
			Number:        v.Number,
			Created:       v.Created,
			CreatedBy:     request.By,
			AuthEnvelope:  v.AuthEnvelope,
			KEKEnvelope:   v.KEKEnvelope,
			ServedEncrypt: true,
		}
		for _, core := range v.Recipients {
			if today, renamed := request.Devices[core.Device]; renamed {
				core.Device = today
			}
			kept.Recipients = append(kept.Recipients, recipient{recipientCore: core, Added: k.today(), AddedBy: request.By})
		}
		rec.Versions = append(rec.Versions, kept)
	}
	return rec
}

// openAuthKeys opens the authentication keys of some versions. An HSM that is away is tolerated for all of them but one;
// an envelope that does not open is not.
func (k *Keyring) openAuthKeys(ctx context.Context, name string, versions []*version) error {
	var away failures
	for _, v := range versions {
		parsed, err := envelope.Parse(v.AuthEnvelope)
		if err != nil {
			return fmt.Errorf("the authentication envelope of version %d: %w", v.Number, err)
		}
		opened, _, err := k.openAnywhere(ctx, parsed, authContext(name, v.Number), v, nil)
		if err != nil {
			err = fmt.Errorf("opening the authentication key of version %d: %w", v.Number, err)
			if !elsewhere(err) || ctx.Err() != nil {
				return err
			}
			away = append(away, err)
			continue
		}
		v.AuthKey = slices.Clone(opened)
		clear(opened)
	}
	if len(away) == len(versions) {
		return fmt.Errorf("no HSM opened a version of it: configure and attach one of its devices, then try again: %w",
			away)
	}
	return nil
}
