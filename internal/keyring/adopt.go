package keyring

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Adopt makes a wrapping key of an HSM key that exists already. It costs two private-key operations: one proves what
// the key can do, one that it opens its authentication envelope. A repeat of the same request answers with the key as
// it is; another request for that name is [ErrKeyExists].
func (k *Keyring) Adopt(ctx context.Context, name string, request AdoptRequest) (*Key, error) {
	if err := check(name, request); err != nil {
		return nil, err
	}
	unlock, err := k.turn(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()

	rec, _, err := k.load(ctx, name)
	if err == nil {
		return k.adoptedBefore(rec, request)
	}
	if !errors.Is(err, ErrKeyNotFound) {
		return nil, err
	}
	rec = k.newRecord(name, request.By)
	v, err := k.adoptVersion(ctx, rec, request)
	if err != nil {
		return nil, fmt.Errorf("adopting key %q: %w", name, err)
	}
	rec.addVersion(v)
	rec.noteWeakness(v.Recipients[0])
	if err := k.write(ctx, rec, store.NoRevision); errors.Is(err, store.ErrConflict) {
		return nil, fmt.Errorf("key %q: %w: read it, or choose another name", name, ErrKeyExists)
	} else if err != nil {
		return nil, err
	}
	k.logVersion("wrapping key adopted", rec, v)
	return describe(rec), nil
}

// adoptedBefore answers a request for a name that is taken.
func (k *Keyring) adoptedBefore(rec *record, request AdoptRequest) (*Key, error) {
	if v := rec.version(1); v != nil && rec.Pending == nil {
		repeated := request.RequestID != "" && request.RequestID == v.RequestID && !v.Recipients[0].Generated
		if repeated || (len(rec.Versions) == 1 && request.names(&v.Recipients[0].recipientCore)) {
			return describe(rec), nil
		}
	}
	if rec.Pending != nil && len(rec.Versions) == 0 {
		return nil, generating(rec)
	}
	return nil, fmt.Errorf("key %q: %w: rotate it to give it another HSM key, or choose another name", rec.Name, ErrKeyExists)
}

// AddRecipient lets one more HSM key open what the newest version seals from now on; older envelopes need a rewrap. It
// costs two private-key operations in that HSM. The key record changes and should be read again; until then the one that was
// read brings back all that the version seals, with the HSMs that it had then.
func (k *Keyring) AddRecipient(ctx context.Context, name string, request AdoptRequest) (*Key, error) {
	if err := check(name, request); err != nil {
		return nil, err
	}
	rec, _, err := k.load(ctx, name) // before the lock: while an HSM key is being made, that can be said at once
	if err != nil {
		return nil, err
	}
	if err := rec.settled(); err != nil {
		return nil, err
	}
	unlock, err := k.turn(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if rec, _, err = k.load(ctx, name); err != nil {
		return nil, err
	}
	if err := rec.settled(); err != nil {
		return nil, err
	}
	if repeatedRecipient(rec, request) {
		return describe(rec), nil
	}
	number := len(rec.Versions)
	rcpt, key, err := k.newRecipient(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("adding a recipient to key %q: %w", name, err)
	}
	rcpt.RequestID = request.RequestID
	auth, err := k.authKey(ctx, rec, number) // a restored version may have it in its envelope only: open and keep it
	if err != nil {
		return nil, err
	}
	clear(auth[:])
	rec, err = k.update(ctx, name, func(rec *record) error {
		if err := rec.settled(); err != nil {
			return err
		}
		v := rec.newest()
		switch {
		case v.Number != number:
			return fmt.Errorf("key %q was rotated meanwhile: %w: send the request again", name, store.ErrConflict)
		case v.recipient(rcpt.KID) != nil:
			return fmt.Errorf("key %q: %w: the key on device %q is a recipient of version %d; name another one", name,
				ErrSameKey, rcpt.Device, v.Number)
		case len(v.Recipients) == envelope.MaxRecipients:
			return fmt.Errorf("key %q: %w: version %d has %d recipients, no more fit into an envelope; rotate instead", name,
				ErrTooLarge, v.Number, len(v.Recipients))
		}
		auth, ok := k.knownAuth(v)
		if !ok {
			return fmt.Errorf("key %q changed meanwhile: %w: send the request again", name, store.ErrConflict)
		}
		defer clear(auth[:])
		rec.keepRecordRead() // the record that was read lacks this recipient
		v.Recipients = append(v.Recipients, rcpt)
		if err := sealAuth(ctx, rec.Name, v, &auth, &rcpt, key); err != nil {
			return fmt.Errorf("adding a recipient to key %q: %w", name, err)
		}
		if rec.sealed {
			k.opened.keep(v.AuthEnvelope, auth)
		}
		if v.KEKEnvelope != nil { // it is not sealed to this recipient
			if err := v.makeKEK(rec.Name, &auth); err != nil {
				return fmt.Errorf("adding a recipient to key %q: %w", name, err)
			}
		}
		rec.noteWeakness(rcpt)
		return nil
	})
	if err != nil {
		return nil, err
	}
	k.logger.Info("recipient added", "key", name, "version", number, "device", rcpt.Device, "kid", rcpt.KID, "by", request.By)
	return describe(rec), nil
}

func repeatedRecipient(rec *record, request AdoptRequest) bool {
	return request.RequestID != "" && slices.ContainsFunc(rec.newest().Recipients, func(r recipient) bool {
		return r.RequestID == request.RequestID
	})
}

// adoptVersion makes the next version of rec from an HSM key that exists.
func (k *Keyring) adoptVersion(ctx context.Context, rec *record, request AdoptRequest) (version, error) {
	rcpt, key, err := k.newRecipient(ctx, request)
	if err != nil {
		return version{}, err
	}
	return k.newVersion(ctx, rec, rcpt, key, request.RequestID)
}

// newVersion makes the next version of rec for one recipient, with a fresh authentication key.
func (k *Keyring) newVersion(ctx context.Context, rec *record, rcpt recipient, key hsm.Key, requestID string) (version, error) {
	for i := range rec.Versions {
		if rec.Versions[i].recipient(rcpt.KID) != nil {
			return version{}, fmt.Errorf("%w: version %d of key %q has the key on device %q; a new version wants another HSM key",
				ErrSameKey, rec.Versions[i].Number, rec.Name, rcpt.Device)
		}
	}
	v := version{
		Number:     len(rec.Versions) + 1,
		Created:    rcpt.Added,
		CreatedBy:  rcpt.AddedBy,
		RequestID:  requestID,
		Recipients: []recipient{rcpt},
	}
	auth := envelope.NewAuthKey()
	defer clear(auth[:])
	v.AuthKey = bytes.Clone(auth[:])
	if err := sealAuth(ctx, rec.Name, &v, auth, &v.Recipients[0], key); err != nil {
		return version{}, err
	}
	return v, nil
}

// sealAuth seals the authentication key to all recipients of v and opens the envelope once with the newest one's HSM
// key, as proof.
func sealAuth(ctx context.Context, name string, v *version, auth *envelope.AuthKey, rcpt *recipient, key hsm.Key) error {
	use := authContext(name, v.Number)
	sealed, err := envelope.Seal(use, v.sealTo(), auth, auth[:])
	if err != nil {
		return fmt.Errorf("sealing the authentication key: %w", err)
	}
	parsed, err := envelope.Parse(sealed)
	if err != nil {
		return fmt.Errorf("reading the authentication envelope back: %w", err)
	}
	opened, err := parsed.Open(ctx, use, rcpt.sealTo, key, nil)
	if err != nil {
		return fmt.Errorf("device %q: opening the authentication envelope as proof: %w", rcpt.Device, err)
	}
	defer clear(opened)
	if subtle.ConstantTimeCompare(opened, auth[:]) != 1 {
		return fmt.Errorf("device %q: opening the authentication envelope as proof: %w: it gave something else", rcpt.Device,
			ErrUnusableKey)
	}
	v.AuthEnvelope, v.authSum = sealed, sha256.Sum256(sealed)
	return nil
}

// authContext is the context of a version's authentication envelope.
func authContext(name string, number int) envelope.Context {
	return envelope.Context{Use: envelope.UseAuth, Key: name, Version: number}
}

// newRecipient finds an HSM key, judges it and proves what it can do.
func (k *Keyring) newRecipient(ctx context.Context, request AdoptRequest) (recipient, hsm.Key, error) {
	device, err := k.namedDevice(ctx, request.Device)
	if err != nil {
		return recipient{}, nil, err
	}
	query := hsm.KeyQuery{Label: request.Label, ID: request.ID}
	keys, err := device.FindKeys(ctx, query)
	if err != nil {
		return recipient{}, nil, fmt.Errorf("device %q: %w", request.Device, err)
	}
	switch len(keys) { // both are the request's mistake, not the HSM's
	case 1:
	case 0:
		return recipient{}, nil, fmt.Errorf("%w: device %q: looking up the key with %v: %w; list the keys of the device to see what is "+
			"there", ErrInvalid, request.Device, query, hsm.ErrNotFound)
	default:
		return recipient{}, nil, fmt.Errorf("%w: device %q: looking up the key with %v: %w: %d keys have it; name one by its id as well",
			ErrInvalid, request.Device, query, hsm.ErrAmbiguous, len(keys))
	}
	rcpt, err := k.judge(ctx, device, keys[0], request)
	if err != nil {
		return recipient{}, nil, err
	}
	return rcpt, keys[0], nil
}

// judge returns the recipient that an HSM key makes, if it is good enough and proves it.
func (k *Keyring) judge(ctx context.Context, device hsm.Device, key hsm.Key, request AdoptRequest) (recipient, error) {
	rcpt, err := k.judgeKey(ctx, key, request.AcceptWeak)
	if err != nil {
		return rcpt, fmt.Errorf("device %q: key %q with id %q: %w", request.Device, key.Ref().Label, key.Ref().ID, err)
	}
	rcpt.Device = request.Device
	if info, err := device.Info(ctx); err == nil { // it tells two names of one HSM apart from two HSMs; no more depends on it
		rcpt.Serial = info.Serial
	}
	rcpt.Added, rcpt.AddedBy = k.today(), request.By
	return rcpt, nil
}

func (k *Keyring) judgeKey(ctx context.Context, key hsm.Key, acceptWeak bool) (recipient, error) {
	public := key.Public()
	kind, err := kindOf(public)
	if err != nil {
		return recipient{}, err
	}
	kid, err := hsm.Fingerprint(public)
	if err != nil {
		return recipient{}, err
	}
	weak := weaknesses(key.Traits())
	if len(weak) > 0 && !acceptWeak {
		return recipient{}, fmt.Errorf("%w: it is %s; choose a key made for decryption only, or accept this with %s", ErrWeakKey,
			strings.Join(weak, " and "), k.words.Ask("accept_weak_key"))
	}
	algorithm, err := prove(ctx, key)
	if err != nil {
		return recipient{}, err
	}
	encoded, err := newJWK(public)
	if err != nil {
		return recipient{}, err
	}
	ref := key.Ref()
	return recipient{recipientCore: recipientCore{
		Label:              ref.Label,
		ID:                 ref.ID,
		KID:                kid,
		Algorithm:          algorithm,
		PublicKey:          encoded,
		WeaknessesAccepted: weak,
		AlsoUsableFor:      slices.Clone(key.Traits().AlsoUsableFor),
		kind:               kind,
		sealTo:             envelope.Recipient{KID: kid, Algorithm: algorithm, Public: public},
	}}, nil
}

// check returns ErrInvalid where the request names no key.
func (r AdoptRequest) check() error {
	switch {
	case r.Device == "":
		return fmt.Errorf("%w: name the device that holds the HSM key", ErrInvalid)
	case r.Label == "" && r.ID == "":
		return fmt.Errorf("%w: name the HSM key by its label or id; list the keys of device %q to see them", ErrInvalid, r.Device)
	}
	return nil
}

// names tells whether the request asks for what is recorded.
func (r AdoptRequest) names(core *recipientCore) bool {
	return r.Device == core.Device && (r.Label == "" || r.Label == core.Label) && (r.ID == "" || r.ID == core.ID)
}
