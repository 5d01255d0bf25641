package keyring

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// Open opens an envelope that was made with this key for want. want.Key is filled; want.Version may be 0 for whatever
// version the envelope names, down to min_decryption_version. It costs one private-key operation, none where a lease is open;
// a recipient whose device is away, locked, without its key or unable to decrypt is passed over for the next one.
func (k *Keyring) Open(ctx context.Context, name string, raw []byte, want envelope.Context) (Opened, error) {
	rec, err := k.lookup(ctx, name)
	if err != nil {
		return Opened{}, err
	}
	parsed, want, err := parseFor(name, raw, want)
	if err != nil {
		return Opened{}, err
	}
	v, err := rec.usable(want.Version)
	if errors.Is(err, ErrVersionUnknown) && k.cache.on {
		if rec, _, err = k.load(ctx, name); err != nil { // somebody else may have rotated it
			return Opened{}, err
		}
		v, err = rec.usable(want.Version)
	}
	if err != nil {
		return Opened{}, err
	}
	auth, err := k.authKey(ctx, rec, v.Number)
	if err != nil {
		return Opened{}, err
	}
	defer clear(auth[:])
	opened := Opened{Context: want, Version: v.Number, LatestVersion: len(rec.Versions)}
	if opened.KID, opened.Leased = parsed.KEKID(); opened.Leased {
		opened.Payload, opened.Device, opened.Recipients, err = k.openLeased(ctx, rec, v, parsed, want, auth)
	} else {
		var rcpt *recipient
		if opened.Payload, rcpt, err = k.openAnywhere(ctx, parsed, want, v, auth); err == nil {
			opened.Device, opened.KID, opened.Recipients = rcpt.Device, rcpt.KID, len(parsed.Recipients())
		}
	}
	if err != nil {
		return Opened{}, fmt.Errorf("opening with key %q, version %d: %w", name, v.Number, err)
	}
	return opened, nil
}

// OpenLeased is [Keyring.Open] where nothing has to be waited for: with a lease that is open, a record that is cached
// ([Config.CacheRecords]) and an authentication key that was opened before. ok is false where that is not so, and
// [Keyring.Open] is to be asked; an error that comes with true is the answer.
func (k *Keyring) OpenLeased(name string, raw []byte, want envelope.Context) (opened Opened, ok bool, err error) {
	rec := k.cache.get(name)
	if rec == nil || rec.LeaseSeconds == 0 {
		return Opened{}, false, nil
	}
	parsed, want, err := parseFor(name, raw, want)
	if err != nil {
		return Opened{}, true, err
	}
	kid, leased := parsed.KEKID()
	v := rec.version(want.Version)
	if !leased || v == nil || want.Version < rec.MinDecryptionVersion {
		return Opened{}, false, nil
	}
	auth, known := k.knownAuth(v)
	l := k.leaseOf(rec, leaseID{name, v.Number, kid})
	if !known || l == nil {
		return Opened{}, false, nil
	}
	defer clear(auth[:])
	payload, ok, err := l.open(parsed, want, &auth)
	if err != nil {
		return Opened{}, ok, fmt.Errorf("opening with key %q, version %d: %w", name, v.Number, err)
	}
	return Opened{
		Payload: payload, Context: want, Version: v.Number, LatestVersion: len(rec.Versions), KID: kid, Recipients: l.recipients(), Leased: true,
	}, ok, nil
}

// Unwrap opens for the entrances unwrap/ (UseWrap) and decrypt/ (UseTransit) and for OpenBao's seal plugin (UseSeal).
func (k *Keyring) Unwrap(ctx context.Context, name string, use envelope.Use, raw, caller []byte) (Opened, error) {
	if err := checkEntrance(use); err != nil {
		return Opened{}, err
	}
	return k.Open(ctx, name, raw, envelope.Context{Use: use, Caller: caller})
}

// Rewrap opens an envelope and seals its payload to the version that [Keyring.Seal] takes, with the same context, at the
// cost of one private-key operation. Where the envelope is of that version already and every recipient of that is in it,
// the answer is the same envelope, and no HSM is touched; a leased one is sealed to the HSM where the key has no lease any more.
func (k *Keyring) Rewrap(ctx context.Context, name string, raw []byte, want envelope.Context) (Rewrapped, error) {
	rec, err := k.lookup(ctx, name)
	if err != nil {
		return Rewrapped{}, err
	}
	parsed, exact, err := parseFor(name, raw, want)
	if err != nil {
		return Rewrapped{}, err
	}
	v := rec.sealsWith(exact.Use)
	if v != nil && exact.Version == v.Number && rec.current(parsed, v) {
		_, leased := parsed.KEKID()
		return Rewrapped{
			Sealed:      Sealed{Envelope: raw, Version: v.Number, Recipients: len(v.Recipients), Leased: leased},
			FromVersion: v.Number,
		}, nil
	}
	if sealsOthers(exact.Use) { // before an HSM is asked
		if err := rec.ready(v, PurposeEncrypt); err != nil {
			return Rewrapped{}, err
		}
	}
	opened, err := k.Open(ctx, name, raw, want)
	if err != nil {
		return Rewrapped{}, err
	}
	defer clear(opened.Payload)
	next := opened.Context
	next.Version = 0
	sealed, err := k.Seal(ctx, name, next, opened.Payload)
	if err != nil {
		return Rewrapped{}, err
	}
	return Rewrapped{Sealed: sealed, Changed: true, FromVersion: opened.Version, Device: opened.Device}, nil
}

// parseFor parses an envelope and returns what exactly it is wanted to be, key and version included.
func parseFor(name string, raw []byte, want envelope.Context) (*envelope.Envelope, envelope.Context, error) {
	parsed, err := envelope.Parse(raw)
	if err != nil {
		return nil, want, fmt.Errorf("key %q: %w: send the whole envelope as it was returned", name, err)
	}
	if want.Key != "" && want.Key != name {
		return nil, want, fmt.Errorf("%w: the context names key %q, the request names %q", ErrInvalid, want.Key, name)
	}
	if isOwnUse(want.Use) { // what they hold is a key, which nobody else needs
		return nil, want, fmt.Errorf("%w: envelopes of use %q are the keyring's own", ErrInvalid, want.Use)
	}
	want.Key = name
	claimed := parsed.Context()
	if want.Version == 0 {
		want.Version = claimed.Version
	}
	// Opening compares again; here it comes before a device is asked, which may be away, and for envelopes that need not
	// be opened.
	if err := claimed.Differs(want); err != nil {
		return nil, want, fmt.Errorf("key %q: %w: open it with the key, at the entrance and with the context that it was made with",
			name, err)
	}
	return parsed, want, nil
}

// current tells whether a rewrap has nothing to change about an envelope of a version.
func (r *record) current(parsed *envelope.Envelope, v *version) bool {
	if _, leased := parsed.KEKID(); !leased {
		return sealedToAll(parsed, v)
	}
	kek, err := parsed.KEK()
	return err == nil && r.LeaseSeconds != 0 && sealedToAll(kek.Envelope(), v)
}

// sealedToAll tells whether an envelope has exactly the recipients of a version.
func sealedToAll(parsed *envelope.Envelope, v *version) bool {
	ids := parsed.Recipients()
	if len(ids) != len(v.Recipients) {
		return false
	}
	for _, id := range ids {
		if v.recipient(id.KID) == nil {
			return false
		}
	}
	return true
}

// openAnywhere opens an envelope with the first of the version's recipients that can, healthy devices first and of these the
// least busy, and returns which one did. The caller wipes the payload.
func (k *Keyring) openAnywhere(
	ctx context.Context, parsed *envelope.Envelope, want envelope.Context, v *version, auth *envelope.AuthKey,
) ([]byte, *recipient, error) {
	var candidates []*recipient
	for _, id := range parsed.Recipients() {
		if rcpt := v.recipient(id.KID); rcpt != nil {
			candidates = append(candidates, rcpt)
		}
	}
	if len(candidates) == 0 {
		return nil, nil, fmt.Errorf("%w: none of its recipients belongs to version %d; open it with the key it was made with",
			envelope.ErrNotRecipient, v.Number)
	}
	candidates = k.health.order(candidates, k.now())
	var tried failures
	for i, rcpt := range candidates {
		payload, err := k.openAt(ctx, parsed, want, rcpt, auth, len(candidates)-i)
		if err == nil {
			if undecryptable(tried) {
				k.logger.Warn("an envelope that one HSM opened does not decrypt on another; see whether that one is in order", "key", want.Key,
					"version", v.Number, "device", rcpt.Device, "error", tried)
			}
			return payload, rcpt, nil
		}
		// That it does not decrypt may be this HSM's fault: another one may open it. Where none does, the first said why.
		if !undecryptable(err) || !undecryptable(tried) {
			tried = append(tried, atRecipient(rcpt, err))
		}
		if ctx.Err() != nil || !elsewhere(err) && !undecryptable(err) {
			break
		}
		level, unsaid := slog.LevelDebug, 0
		if !undecryptable(err) { // of the others anybody can send any number, and is told
			if say, since := k.health.complain(rcpt.Device, k.now()); say {
				level, unsaid = slog.LevelWarn, since
			}
		}
		k.logger.Log(ctx, level, "a recipient did not open an envelope", "key", want.Key, "version", v.Number, "device", rcpt.Device,
			"left", len(candidates)-i-1, "unsaid", unsaid, "error", err)
	}
	return nil, nil, tried
}

// atRecipient names the device of a recipient that failed, unless the error begins with it.
func atRecipient(rcpt *recipient, err error) error {
	if strings.HasPrefix(err.Error(), fmt.Sprintf("device %q: ", rcpt.Device)) {
		return err
	}
	return fmt.Errorf("recipient on device %q: %w", rcpt.Device, err)
}

// openAt opens an envelope at one recipient's HSM. Of the caller's time it takes the share of one among so many
// candidates, so that a device that hangs leaves time for the next.
func (k *Keyring) openAt(
	ctx context.Context, parsed *envelope.Envelope, want envelope.Context, rcpt *recipient, auth *envelope.AuthKey, shares int,
) ([]byte, error) {
	attempt := ctx
	if deadline, ok := ctx.Deadline(); ok && shares > 1 {
		var cancel context.CancelFunc
		attempt, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(shares))
		defer cancel()
	}
	done := k.health.begin(rcpt.Device)
	defer done()
	key, err := k.hsmKey(attempt, rcpt)
	var payload []byte
	if err == nil {
		payload, err = parsed.Open(attempt, want, rcpt.sealTo, key, auth)
		if err != nil && elsewhere(err) {
			k.found.drop(rcpt.Device, rcpt.KID)
		}
	}
	if ctx.Err() == nil { // a caller who goes away says nothing about the device
		k.health.note(rcpt.Device, err == nil || !elsewhere(err), k.now())
	}
	return payload, err
}

// elsewhere tells whether the trouble is with this HSM: everything but a fault of the envelope itself.
func elsewhere(err error) bool {
	for _, final := range []error{
		envelope.ErrMalformed, envelope.ErrContext, envelope.ErrDecrypt, envelope.ErrNotAuthentic, envelope.ErrInvalid,
		hsm.ErrCiphertext,
	} {
		if errors.Is(err, final) {
			return false
		}
	}
	return true
}

// undecryptable tells whether an HSM answered that the envelope does not decrypt with its key. Nearly always that is the
// envelope's fault, so nothing is held against the HSM.
func undecryptable(err error) bool {
	return errors.Is(err, envelope.ErrDecrypt) || errors.Is(err, hsm.ErrCiphertext)
}
