package keyring

import (
	"context"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// Seal makes an envelope with the newest version of a key, or with c.Version where that is set. It fills c.Key and
// c.Version. No HSM is touched, but for a version whose authentication key none of its devices has opened yet.
// Uses transit and seal are sealed with the newest version that is ready for it, see [Keyring.Ready]; transit to the
// version's key encryption key where a lease of it is open, see [Keyring.OpenLease].
func (k *Keyring) Seal(ctx context.Context, name string, c envelope.Context, payload []byte) (Sealed, error) {
	rec, err := k.lookup(ctx, name)
	if err != nil {
		return Sealed{}, err
	}
	if c.Key != "" && c.Key != name {
		return Sealed{}, fmt.Errorf("%w: the context names key %q, the request names %q", ErrInvalid, c.Key, name)
	}
	v := rec.sealsWith(c.Use)
	if c.Version != 0 {
		if v, err = rec.usable(c.Version); err != nil {
			return Sealed{}, err
		}
	}
	purpose := PurposeWrap
	if sealsOthers(c.Use) {
		purpose = PurposeEncrypt
	}
	if err := rec.ready(v, purpose); err != nil {
		return Sealed{}, err
	}
	if isOwnUse(c.Use) {
		return Sealed{}, fmt.Errorf("%w: envelopes of use %q are the keyring's own", ErrInvalid, c.Use)
	}
	if sealsOthers(c.Use) && !v.ServedEncrypt {
		if err := k.noteServed(ctx, name, v.Number); err != nil {
			return Sealed{}, err
		}
	}
	auth, err := k.authKey(ctx, rec, v.Number)
	if err != nil {
		return Sealed{}, err
	}
	defer clear(auth[:])
	c.Key, c.Version = name, v.Number
	sealed, leased, err := k.sealLeased(rec, v, c, auth, payload)
	if !leased {
		sealed, err = envelope.Seal(c, v.sealTo(), auth, payload)
	}
	if err != nil {
		return Sealed{}, fmt.Errorf("key %q: %w", name, err)
	}
	return Sealed{Envelope: sealed, Version: v.Number, Recipients: len(v.Recipients), Leased: leased}, nil
}

// sealsOthers tells whether envelopes of that use are what other Vaults and OpenBaos are sealed with. They cannot be made
// anew, so they want a version that is ready, and its HSM keys stay.
func sealsOthers(use envelope.Use) bool { return use == envelope.UseTransit || use == envelope.UseSeal }

// isOwnUse tells whether envelopes of that use are made and opened by the keyring for itself alone.
func isOwnUse(use envelope.Use) bool { return use == envelope.UseAuth || use == envelope.UseKEK }

// Wrap seals for the entrances wrap/ (UseWrap) and encrypt/ (UseTransit) and for OpenBao's seal plugin (UseSeal), bound to
// the caller's own context.
func (k *Keyring) Wrap(ctx context.Context, name string, use envelope.Use, plaintext, caller []byte) (Sealed, error) {
	if err := checkEntrance(use); err != nil {
		return Sealed{}, err
	}
	return k.Seal(ctx, name, envelope.Context{Use: use, Caller: caller}, plaintext)
}

// checkEntrance returns ErrInvalid for a use that is not one of those that Wrap and Unwrap serve.
func checkEntrance(use envelope.Use) error {
	if use != envelope.UseWrap && !sealsOthers(use) {
		return fmt.Errorf("%w: use %q has an entrance of its own", ErrInvalid, use)
	}
	return nil
}

// noteServed records that a version serves encrypt/ or a seal, before the first envelope leaves: afterwards its HSM keys must not
// be deleted.
func (k *Keyring) noteServed(ctx context.Context, name string, number int) error {
	_, err := k.update(ctx, name, func(rec *record) error {
		if rec.Deleting != nil {
			return rec.settled()
		}
		v := rec.version(number)
		if v == nil || v.ServedEncrypt {
			return errNoChange
		}
		v.ServedEncrypt = true
		return nil
	})
	return err
}

// usable returns a version that may still be used, or ErrVersionTooOld or ErrVersionUnknown.
func (r *record) usable(number int) (*version, error) {
	v := r.version(number)
	switch {
	case v == nil:
		return nil, fmt.Errorf("key %q: %w: it asks for version %d and the newest here is %d; restore the key record that has it",
			r.Name, ErrVersionUnknown, number, len(r.Versions))
	case number < r.MinDecryptionVersion:
		return nil, fmt.Errorf("key %q: %w: it is of version %d and min_decryption_version is %d; lower that, then rewrap", r.Name,
			ErrVersionTooOld, number, r.MinDecryptionVersion)
	}
	return v, nil
}
