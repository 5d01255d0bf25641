package keyring

import (
	"context"
	"errors"
	"fmt"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Configure changes the settings of a key. Taking an acknowledgement back is setting it to false.
func (k *Keyring) Configure(ctx context.Context, name string, settings Settings) (*Key, error) {
	if err := settings.checkLease(name); err != nil {
		return nil, err
	}
	if err := k.prepareKEKs(ctx, name, settings); err != nil {
		return nil, err
	}
	rec, err := k.update(ctx, name, func(rec *record) error {
		if rec.Deleting != nil {
			return rec.settled()
		}
		served := rec.encryptVersion()
		if served > 0 && !rec.Versions[served-1].ServedEncrypt {
			served = 0 // nobody depends on it yet
		}
		if wanted := settings.MinDecryptionVersion; wanted != nil {
			if latest := len(rec.Versions); *wanted < 1 || *wanted > max(1, latest) {
				return fmt.Errorf("key %q: %w: min_decryption_version %d is not between 1 and the newest version, %d", name, ErrInvalid,
					*wanted, latest)
			}
			rec.MinDecryptionVersion = *wanted
		}
		if settings.DeletionAllowed != nil {
			rec.DeletionAllowed = *settings.DeletionAllowed
		}
		acknowledged := &Acknowledgement{By: settings.By, At: k.today()}
		if err := acknowledge(rec, &rec.Acknowledgements.BackupConfirmed, settings.BackupConfirmed, acknowledged); err != nil {
			return err
		}
		if settings.BackupConfirmed != nil && !*settings.BackupConfirmed { // who takes it back means all of them
			for i := range rec.Versions {
				rec.Versions[i].Kept.BackupConfirmed = nil
			}
		}
		if err := acknowledge(rec, &rec.Acknowledgements.AcceptSingleHSM, settings.AcceptSingleHSM, acknowledged); err != nil {
			return err
		}
		if settings.MinDecryptionVersion != nil && served > 0 && rec.encryptVersion() == 0 {
			return fmt.Errorf("key %q: %w (%s): it is still served by version %d, below min_decryption_version %d; first %s", name,
				ErrNotReady, PurposeEncrypt, served, rec.MinDecryptionVersion, rec.lacks(rec.newest()))
		}
		if settings.Lease != nil {
			rec.LeaseSeconds = int64(*settings.Lease / time.Second)
			wanting := len(rec.wantsKEK())
			if err := k.giveKEKs(rec); err != nil {
				return err
			}
			if len(rec.wantsKEK()) > 0 {
				return fmt.Errorf("key %q changed meanwhile: %w: send the request again", name, store.ErrConflict)
			}
			if wanting > 0 { // an HSM key may be in the making, and its version must fit
				return rec.hasRoom()
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	k.shorten(name, rec.lease())
	k.logger.Info("wrapping key configured", "key", name, "min_decryption_version", rec.MinDecryptionVersion, "deletion_allowed",
		rec.DeletionAllowed, "lease", rec.lease(), "by", settings.By)
	return describe(rec), nil
}

// checkLease returns ErrInvalid for a lease that no key can have.
func (s Settings) checkLease(name string) error {
	if s.Lease == nil || *s.Lease == 0 {
		return nil
	}
	if lease := *s.Lease; lease < MinLease || lease > MaxLease || lease%time.Second != 0 {
		return fmt.Errorf("key %q: %w: a lease of %v; it lasts whole seconds from %v to %v, or is 0 for strict mode, where every opening is an "+
			"HSM operation", name, ErrInvalid, lease, MinLease, MaxLease)
	}
	return nil
}

// prepareKEKs opens the authentication keys under which the KEKs are made that a lease will want.
func (k *Keyring) prepareKEKs(ctx context.Context, name string, settings Settings) error {
	if settings.Lease == nil || *settings.Lease == 0 {
		return nil
	}
	rec, _, err := k.load(ctx, name)
	if err != nil {
		return err
	}
	leased := rec.clone()
	leased.LeaseSeconds = int64(*settings.Lease / time.Second)
	for _, number := range leased.wantsKEK() {
		auth, err := k.authKey(ctx, rec, number)
		if err != nil {
			return fmt.Errorf("giving key %q a lease: %w", name, err)
		}
		clear(auth[:])
	}
	return nil
}

// acknowledge sets or takes back one acknowledgement. One that stands keeps its first date and name.
func acknowledge(rec *record, field **Acknowledgement, wanted *bool, given *Acknowledgement) error {
	switch {
	case wanted == nil:
	case !*wanted:
		*field = nil
	case len(rec.Versions) == 0:
		return fmt.Errorf("key %q: nothing can be confirmed about an HSM key that is still to be made: %w: wait until it is ready",
			rec.Name, ErrGenerating)
	case *field == nil:
		*field = given
	}
	return nil
}

// Delete deletes a wrapping key where deletion_allowed is set. Its HSM keys stay unless the request says otherwise;
// those that were adopted or restored, whose version ever served `encrypt/`, or that another wrapping key has, are never
// deleted. It may be called
// again after any failure or crash: with DeleteHSMKeys it goes on where it stopped, without it leaves the HSM keys that
// are still there. A key that [Config.InUse] knows a user of is [ErrInUse], unless by force. Deleting a key that is gone
// is [ErrKeyNotFound].
func (k *Keyring) Delete(ctx context.Context, name string, request DeleteRequest) error {
	if err := checkName(name); err != nil {
		return err
	}
	rec, _, err := k.load(ctx, name) // before the lock: while an HSM key is being made, that can be said at once
	if err != nil {
		return err
	}
	if err := rec.deletable(request.DeleteHSMKeys); err != nil {
		return err
	}
	if err := k.unused(ctx, rec, request); err != nil {
		return err
	}
	unlock, err := k.turn(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	if request.DeleteHSMKeys {
		if err := k.notShared(ctx, rec); err != nil {
			return err
		}
		// Before the first HSM key goes, the record says so: whoever finds it half done completes it, and nobody seals
		// with it any more.
		rec, err = k.update(ctx, name, func(rec *record) error {
			if err := rec.deletable(request.DeleteHSMKeys); err != nil {
				return err
			}
			if rec.Deleting != nil {
				return errNoChange
			}
			rec.Deleting = &deletion{Since: k.today(), By: request.By}
			return nil
		})
		if err != nil {
			return err
		}
		if err := k.deleteHSMKeys(ctx, rec); err != nil {
			return err
		}
	}
	current, revision, err := k.load(ctx, name)
	if err != nil {
		return err
	}
	if err := current.deletable(false); err != nil {
		return err
	}
	if err := k.remove(ctx, name, revision); err != nil {
		return err
	}
	k.shorten(name, 0)
	k.logger.Info("wrapping key deleted", "key", name, "versions", len(current.Versions), "hsm_keys_deleted", current.Deleting != nil,
		"by", request.By)
	return nil
}

// deletable tells whether a record, and its HSM keys if they are to go, may be deleted.
func (r *record) deletable(hsmKeys bool) error {
	if r.Deleting != nil {
		return nil // it was decided already
	}
	if r.Pending != nil {
		return generating(r)
	}
	if !r.DeletionAllowed {
		return fmt.Errorf("key %q: %w: nothing sealed with it could be opened afterwards; if that is what you want, %s first",
			r.Name, ErrDeletionNotAllowed, r.say().Set(r.Name, "deletion_allowed"))
	}
	if !hsmKeys {
		return nil
	}
	for i := range r.Versions {
		v := &r.Versions[i]
		if v.ServedEncrypt {
			return fmt.Errorf("key %q: %w: version %d served encrypt/, so snapshots and backups of other Vaults can be unsealed with "+
				"its HSM key only; delete the wrapping key without its HSM keys", r.Name, ErrInUse, v.Number)
		}
		for j := range v.Recipients {
			if rcpt := &v.Recipients[j]; !rcpt.Generated {
				return fmt.Errorf("key %q: %w: the one of version %d on device %q, label %q, id %q, was adopted or restored, so another "+
					"mount or program may need it; delete the wrapping key without its HSM keys, and this one, where nobody needs it, with "+
					"the vendor's tool (pkcs11-tool --delete-object --type privkey --id %s)", r.Name, ErrNotOurs, v.Number, rcpt.Device,
					rcpt.Label, rcpt.ID, rcpt.ID)
			}
		}
	}
	return nil
}

// unused returns ErrInUse where somebody needs the key and nobody forces its deletion. What was decided is not asked
// again.
func (k *Keyring) unused(ctx context.Context, rec *record, request DeleteRequest) error {
	if k.inUse == nil || request.Force || rec.Deleting != nil {
		return nil
	}
	user, err := k.inUse(ctx, rec.Name)
	if err != nil {
		return fmt.Errorf("finding out whether key %q is still needed: %w; try again, or delete it with force=true", rec.Name, err)
	}
	if user == "" {
		return nil
	}
	return fmt.Errorf("key %q: %w: %s; delete that first, or the key with force=true: what it sealed can then be opened by restoring "+
		"its key record only", rec.Name, ErrInUse, user)
}

// notShared returns ErrInUse where another wrapping key has one of the same HSM keys.
func (k *Keyring) notShared(ctx context.Context, rec *record) error {
	for i := range rec.Versions {
		for j := range rec.Versions[i].Recipients {
			rcpt := &rec.Versions[i].Recipients[j]
			user, err := k.userOf(ctx, rcpt.KID, rec.Name)
			if err != nil {
				return err
			}
			if user != "" {
				return fmt.Errorf("key %q: %w: wrapping key %q has the same key on device %q; delete that one first, or this one "+
					"without its HSM keys", rec.Name, ErrInUse, user, rcpt.Device)
			}
		}
	}
	return nil
}

// deleteHSMKeys destroys the HSM keys of all versions. One that is gone already is fine.
func (k *Keyring) deleteHSMKeys(ctx context.Context, rec *record) error {
	for i := range rec.Versions {
		for j := range rec.Versions[i].Recipients {
			rcpt := &rec.Versions[i].Recipients[j]
			if !rcpt.Generated { // a deletion that an earlier release began
				k.logger.Warn("an HSM key is left because it was not made for the wrapping key that is deleted", "key", rec.Name,
					"device", rcpt.Device, "id", rcpt.ID, "kid", rcpt.KID)
				continue
			}
			if err := k.deleteHSMKey(ctx, rcpt); err != nil {
				return fmt.Errorf("deleting the HSM keys of key %q: %w; delete it once more when the device is back, or without its "+
					"HSM keys", rec.Name, err)
			}
		}
	}
	return nil
}

func (k *Keyring) deleteHSMKey(ctx context.Context, rcpt *recipient) error {
	device, err := k.device(ctx, rcpt.Device)
	if err != nil {
		return err
	}
	key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Fingerprint: rcpt.KID})
	if errors.Is(err, hsm.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("device %q: %w", rcpt.Device, err)
	}
	k.found.drop(rcpt.Device, rcpt.KID)
	if err := device.DeleteKey(ctx, key.Ref()); err != nil && !errors.Is(err, hsm.ErrNotFound) {
		return fmt.Errorf("device %q: %w", rcpt.Device, err)
	}
	k.logger.Info("HSM key deleted", "device", rcpt.Device, "id", key.Ref().ID, "kid", rcpt.KID)
	return nil
}

// logVersion logs that a version is there.
func (k *Keyring) logVersion(event string, rec *record, v version) {
	rcpt := v.Recipients[0]
	k.logger.Info(event, "key", rec.Name, "version", v.Number, "device", rcpt.Device, "id", rcpt.ID, "kid", rcpt.KID, "algorithm",
		rcpt.Algorithm, "record_sha256", newKeyRecord(rec).SHA256, "by", v.CreatedBy)
}

// logIntent logs that an HSM key is to be made.
func (k *Keyring) logIntent(event string, rec *record) {
	p := rec.Pending
	k.logger.Info(event, "key", rec.Name, "version", p.Version, "device", p.Device, "algorithm", p.Algorithm, "id", p.ID, "by", p.By)
}
