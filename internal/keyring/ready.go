package keyring

import (
	"context"
	"fmt"
	"maps"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// Ready returns nil where the key may be used for that purpose, and else ErrNotReady with what to do. Anything may be
// wrapped and stored with any key; what a whole cluster depends on wants a version that survives the loss of this mount
// and of one HSM: a key record with it was read, and that has it on two HSMs, or somebody confirmed a backup or accepted
// a single HSM.
//
// For [PurposeEncrypt] any version from min_decryption_version will do, and the newest that is ready seals: a Vault
// whose seal is `encrypt/` must be able to start while a new version still waits for its record to be read. For
// [PurposeCluster] it must be the newest version, because that is the one that seals what is stored.
func (k *Keyring) Ready(ctx context.Context, name string, purpose Purpose) error {
	rec, err := k.lookup(ctx, name)
	if err != nil {
		return err
	}
	v := rec.newest()
	if purpose == PurposeEncrypt {
		v = rec.sealsWith(envelope.UseTransit)
	}
	return rec.ready(v, purpose)
}

// ready returns nil where a version may be used for that purpose.
func (r *record) ready(v *version, purpose Purpose) error {
	if r.Deleting != nil || v == nil {
		return r.settled()
	}
	switch purpose {
	case PurposeWrap, PurposeMaterial:
		return nil
	case PurposeEncrypt, PurposeCluster:
	default:
		return fmt.Errorf("%w: purpose %q is not known", ErrInvalid, purpose)
	}
	if _, recipients := r.recordRead(v); recipients == 0 {
		return fmt.Errorf("key %q: %w (%s): its key record was never read since version %d was made; %s and keep it, because with %s "+
			"everything sealed would be lost without it", r.Name, ErrNotReady, purpose, v.Number, r.say().Read(r.Name), r.say().Home)
	}
	if !r.redundant(v) {
		return fmt.Errorf("key %q: %w (%s): version %d opens on one HSM only; %s", r.Name, ErrNotReady, purpose, v.Number, r.lacks(v))
	}
	return nil
}

// sealsWith returns the version that seals for a use: the newest one, for transit and seal the newest that is ready. Where none
// is, that is the newest one too, which tells why; nil while there is no version.
func (r *record) sealsWith(use envelope.Use) *version {
	if sealsOthers(use) {
		if v := r.version(r.encryptVersion()); v != nil {
			return v
		}
	}
	return r.newest()
}

// encryptVersion returns the number of the newest version that is ready for encrypt/, 0 for none.
func (r *record) encryptVersion() int {
	for number := len(r.Versions); number >= r.MinDecryptionVersion; number-- {
		v := r.version(number)
		if _, recipients := r.recordRead(v); recipients > 0 && r.redundant(v) {
			return number
		}
	}
	return 0
}

// recordRead tells who read a key record with that version first, and how many of the version's recipients, the first
// ones, are in it: nil and 0 where nobody did.
func (r *record) recordRead(v *version) (by *Acknowledgement, recipients int) {
	if by := r.Acknowledgements.RecordRead; by != nil {
		return by, len(v.Recipients)
	}
	for i := len(r.Versions) - 1; i >= v.Number; i-- { // a version changes no more when a later one is there
		if by := r.Versions[i].Kept.RecordRead; by != nil {
			return by, len(v.Recipients)
		}
	}
	return v.Kept.RecordRead, v.Kept.Recipients
}

// keepRecordRead notes with the newest version that it is in a key record that was read, because the key record is about
// to change.
func (r *record) keepRecordRead() {
	if v := r.newest(); v != nil && r.Acknowledgements.RecordRead != nil {
		v.Kept.RecordRead, v.Kept.Recipients = r.Acknowledgements.RecordRead, len(v.Recipients)
	}
	r.Acknowledgements.RecordRead = nil
}

// backupConfirmed tells who confirmed a backup of a version's HSM keys.
func (r *record) backupConfirmed(v *version) *Acknowledgement {
	if v.Number == len(r.Versions) {
		return r.Acknowledgements.BackupConfirmed
	}
	return v.Kept.BackupConfirmed
}

// redundant tells whether what a version seals survives one HSM together with this mount, or somebody took it on
// themselves. An HSM that the key record which was read does not name does not count: with that record it opens nothing.
func (r *record) redundant(v *version) bool {
	_, recipients := r.recordRead(v)
	return countHSMs(v.Recipients[:recipients]) > 1 || r.backupConfirmed(v) != nil || r.Acknowledgements.AcceptSingleHSM != nil
}

// lacks says what to do for a version to become ready; empty where it is.
func (r *record) lacks(v *version) string {
	read := r.say().Read(r.Name) + " and keep it"
	_, recipients := r.recordRead(v)
	switch spread := countHSMs(v.Recipients) > 1; {
	case recipients > 0 && r.redundant(v):
		return ""
	case r.redundant(v), spread: // the record is all that is missing
		return read
	case recipients > 0:
		return r.redundancy()
	default:
		return read + ", and " + r.redundancy()
	}
}

// redundancy says what makes up for a version that opens on one HSM only.
func (r *record) redundancy() string {
	return fmt.Sprintf("add a recipient on another HSM, or back the HSM key up and %s, or %s", r.say().Set(r.Name, "backup_confirmed"),
		r.say().Set(r.Name, "accept_single_hsm"))
}

// CountHSMs returns on how many HSMs some recipients are. An HSM is known by its serial number, so two names of one are
// one HSM. One that did not tell it is known by the name of its device, and is the HSM that told it by that name, where
// there is one.
func CountHSMs(recipients []Recipient) int {
	serials, named, unnumbered := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for i := range recipients {
		switch rcpt := &recipients[i]; rcpt.Serial {
		case "":
			unnumbered[rcpt.Device] = true
		default:
			serials[rcpt.Serial], named[rcpt.Device] = true, true
		}
	}
	maps.DeleteFunc(unnumbered, func(device string, _ bool) bool { return named[device] })
	return len(serials) + len(unnumbered)
}

// countHSMs is [CountHSMs] of what a record holds.
func countHSMs(recipients []recipient) int {
	places := make([]Recipient, len(recipients))
	for i := range recipients {
		places[i] = Recipient{Device: recipients[i].Device, Serial: recipients[i].Serial}
	}
	return CountHSMs(places)
}
