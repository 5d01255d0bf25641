package keyring

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// newRecord returns the record of a key that has no version yet.
func (k *Keyring) newRecord(name, by string) *record {
	return k.own(&record{
		Format:               recordFormat,
		Name:                 name,
		Created:              k.today(),
		CreatedBy:            by,
		MinDecryptionVersion: 1,
		Versions:             []version{},
	})
}

// addVersion appends a version. What was acknowledged about the key record and about the backup of the HSM key does not
// hold for it; it is kept with the version for which it does.
func (r *record) addVersion(v version) {
	r.keepRecordRead()
	if newest := r.newest(); newest != nil {
		newest.Kept.BackupConfirmed = r.Acknowledgements.BackupConfirmed
	}
	r.Acknowledgements.BackupConfirmed = nil
	r.Versions = append(r.Versions, v)
}

// noteWeakness records that somebody accepted a weak HSM key.
func (r *record) noteWeakness(rcpt recipient) {
	if len(rcpt.WeaknessesAccepted) > 0 {
		r.Acknowledgements.AcceptWeakKey = &Acknowledgement{By: rcpt.AddedBy, At: rcpt.Added}
	}
}

// settled returns ErrGenerating or ErrDeleting where a key is in the middle of something.
func (r *record) settled() error {
	if r.Deleting != nil {
		return fmt.Errorf("key %q: %w since %s: delete it once more to complete that", r.Name, ErrDeleting,
			r.Deleting.Since.Format(time.RFC3339))
	}
	if r.Pending != nil {
		return generating(r)
	}
	return nil
}

// room is what a version with some recipients takes in a record, in bytes, generously.
const room = 8 << 10

// hasRoom returns ErrTooLarge where another version might not fit, before an HSM key is made for it.
func (r *record) hasRoom() error {
	grown := r.clone()
	grown.CreatedBy += string(make([]byte, room))
	raw, err := grown.encode()
	clear(raw)
	return err
}

// today returns the time that records carry: whole seconds, UTC.
func (k *Keyring) today() time.Time { return k.now().UTC().Truncate(time.Second) }

// describe returns what people may see of a record.
func describe(r *record) *Key {
	key := &Key{
		Name:                 r.Name,
		State:                StateReady,
		Created:              r.Created,
		CreatedBy:            r.CreatedBy,
		LatestVersion:        len(r.Versions),
		MinDecryptionVersion: r.MinDecryptionVersion,
		EncryptVersion:       r.encryptVersion(),
		DeletionAllowed:      r.DeletionAllowed,
		Lease:                r.lease(),
		RecordRead:           clonePointer(r.Acknowledgements.RecordRead),
		BackupConfirmed:      clonePointer(r.Acknowledgements.BackupConfirmed),
		AcceptSingleHSM:      clonePointer(r.Acknowledgements.AcceptSingleHSM),
		AcceptWeakKey:        clonePointer(r.Acknowledgements.AcceptWeakKey),
		Warnings:             r.warnings(),
	}
	if p := r.Pending; p != nil {
		key.State = StateGenerating
		if p.Abandoning {
			key.State = StateAbandoning
		}
		key.Pending = &Pending{
			Device: p.Device, Algorithm: p.Algorithm, Label: p.Label, ID: p.ID, RequestID: p.RequestID, Version: p.Version,
			Since: p.Since, By: p.By, LastError: p.LastError,
		}
	}
	if r.Deleting != nil {
		key.State = StateDeleting
	}
	for i := range r.Versions {
		key.Versions = append(key.Versions, r.describeVersion(&r.Versions[i]))
	}
	if len(r.Versions) > 0 {
		key.RecordSHA256 = newKeyRecord(r).SHA256
	}
	return key
}

func (r *record) describeVersion(v *version) Version {
	recordRead, _ := r.recordRead(v)
	described := Version{
		Number:        v.Number,
		Created:       v.Created,
		CreatedBy:     v.CreatedBy,
		ServedEncrypt: v.ServedEncrypt,
		Locked:        len(v.AuthKey) == 0 && !r.sealed,

		RecordRead:      clonePointer(recordRead),
		BackupConfirmed: clonePointer(r.backupConfirmed(v)),
	}
	if v.kek != nil {
		described.KEK = v.kek.ID()
	}
	for i := range v.Recipients {
		rcpt := &v.Recipients[i]
		described.Recipients = append(described.Recipients, Recipient{
			Device: rcpt.Device, Serial: rcpt.Serial, Label: rcpt.Label, ID: rcpt.ID, KID: rcpt.KID, Algorithm: rcpt.Algorithm,
			Kind: rcpt.kind, Public: rcpt.sealTo.Public, Generated: rcpt.Generated, Added: rcpt.Added, AddedBy: rcpt.AddedBy,
			WeaknessesAccepted: slices.Clone(rcpt.WeaknessesAccepted), AlsoUsableFor: slices.Clone(rcpt.AlsoUsableFor),
		})
	}
	return described
}

// warnings are what an operator should know of a key, each with what to do.
func (r *record) warnings() []string {
	var list []string
	warn := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	if p := r.Pending; p != nil && p.LastError != "" {
		warn("version %d was not made: %s; it is tried again, or abandon it", p.Version, p.LastError)
	}
	v := r.newest()
	if v == nil {
		return list
	}
	switch {
	case r.Acknowledgements.RecordRead != nil:
	case v.Kept.RecordRead != nil:
		warn("the key record changed since it was read: the one that was read brings version %d back with fewer of its HSMs; %s "+
			"again and keep it", v.Number, r.say().Read(r.Name))
	default:
		warn("the key record was never read since version %d was made: without it nothing that this version sealed can be opened "+
			"once %s is lost; %s and keep it", v.Number, r.say().Home, r.say().Read(r.Name))
	}
	serves := r.encryptVersion()
	if serves > 0 && serves < v.Number {
		warn("version %d is not used by encrypt/ yet, which goes on with version %d: %s", v.Number, serves, r.lacks(v))
	}
	if serves > 0 && slices.Contains(r.wantsKEK(), serves) { // it came to serve after the lease was set
		warn("version %d, which serves encrypt/, has no key encryption key, so that nothing is sealed to a lease: set the lease once more", serves)
	}
	if countHSMs(v.Recipients) < 2 && r.Acknowledgements.BackupConfirmed == nil && r.Acknowledgements.AcceptSingleHSM == nil {
		warn("version %d opens on one HSM only: add a recipient on another one, or back the HSM key up and %s",
			v.Number, r.say().Set(r.Name, "backup_confirmed"))
	}
	for i := range v.Recipients {
		rcpt := &v.Recipients[i]
		if len(rcpt.WeaknessesAccepted) > 0 {
			warn("the key on device %q is weak, which %s accepted: %s; rotate to a better one", rcpt.Device, rcpt.AddedBy,
				strings.Join(rcpt.WeaknessesAccepted, " and "))
		} else if len(rcpt.AlsoUsableFor) > 0 {
			warn("the key on device %q can also be used for %s by whoever holds the PIN: use it for nothing else", rcpt.Device,
				strings.Join(rcpt.AlsoUsableFor, ", "))
		}
		if rcpt.Algorithm == "RSA-OAEP" {
			warn("the key on device %q decrypts RSA-OAEP with SHA-1 only, which is sound here and may be refused elsewhere: "+
				"prefer an HSM that does SHA-256, or an elliptic-curve key", rcpt.Device)
		}
	}
	return list
}

func clonePointer[T any](p *T) *T {
	if p == nil {
		return nil
	}
	c := *p
	return &c
}
