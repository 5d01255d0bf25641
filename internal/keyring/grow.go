package keyring

import (
	"bytes"
	"context"
	"crypto/subtle"
	"fmt"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// grow takes a key record over the key that is here, because another machine rotated it or added a recipient: the record must
// be of the same key and have all that is here, or [ErrKeyExists] says what it lacks. What is called or was confirmed otherwise
// here stays. Whether a version is the same is told by its authentication key, which costs one private-key operation
// for each version that is new or changed, and by one compare-and-swap all of them are taken or none.
func (k *Keyring) grow(ctx context.Context, rec *record, restored keyRecord, request RestoreRequest) (*Key, error) {
	incoming := k.fromKeyRecord(restored, request)
	defer incoming.wipe()
	if err := incoming.validate(rec.Name); err != nil {
		return nil, fmt.Errorf("restoring key %q: %w", rec.Name, err)
	}
	if len(rec.Versions) == 0 || rec.Deleting != nil {
		return nil, rec.settled()
	}
	if lacks := incoming.lacksOf(rec); lacks != "" {
		return nil, notGrown(rec, lacks)
	}
	changed, added, leased := rec.news(incoming)
	if len(changed)+len(added)+len(leased) == 0 {
		return describe(rec), nil
	}
	if err := rec.settled(); err != nil {
		return nil, err
	}
	if !request.AcceptRecipients {
		return nil, rec.notAccepted(changed, added, leased)
	}
	for _, v := range changed { // each of them: nobody can tell otherwise whether it is the same
		if err := k.openAuthKeys(ctx, rec.Name, []*version{v}); err != nil {
			return nil, fmt.Errorf("restoring key %q: %w", rec.Name, err)
		}
		auth, err := k.authKey(ctx, rec, v.Number)
		if err != nil {
			return nil, fmt.Errorf("restoring key %q: comparing with what is here: %w", rec.Name, err)
		}
		same := subtle.ConstantTimeCompare(v.AuthKey, auth[:]) == 1
		clear(auth[:])
		if !same {
			return nil, notGrown(rec, fmt.Sprintf("version %d has another authentication key", v.Number))
		}
	}
	if len(added) > 0 {
		if err := k.openAuthKeys(ctx, rec.Name, added); err != nil {
			return nil, fmt.Errorf("restoring key %q: %w", rec.Name, err)
		}
	}
	seen := newKeyRecord(rec).SHA256
	read := &Acknowledgement{By: request.By, At: k.today()}
	next, err := k.update(ctx, rec.Name, func(now *record) error {
		if err := now.settled(); err != nil {
			return err
		}
		if newKeyRecord(now).SHA256 != seen {
			return fmt.Errorf("key %q changed meanwhile: %w: send the request again", now.Name, store.ErrConflict)
		}
		now.take(changed, added, leased, read)
		return k.giveKEKs(now)
	})
	if err != nil {
		return nil, err
	}
	k.logger.Info("wrapping key restored over the one that was here", "key", next.Name, "versions", len(next.Versions), "new_versions",
		len(added), "changed_versions", len(changed), "new_keks", len(leased), "record_sha256", strings.ToLower(request.SHA256), "by", request.By)
	return describe(next), nil
}

func notGrown(rec *record, lacks string) error {
	return fmt.Errorf("key %q: %w, and the record has not all that is here: %s; nothing was changed. Take the record that was read "+
		"last; only where this key is the wrong one, delete it before you restore", rec.Name, ErrKeyExists, lacks)
}

// notAccepted says what a record would bring that nobody accepted. Nothing in it proves that a recipient is one of ours: a
// version more may be anybody's as a whole, and an envelope for several does not authenticate to whom it is. For the same
// reason a KEK of ours may open with one of them alone.
func (r *record) notAccepted(changed, added, leased []*version) error {
	var news []string
	for _, v := range slices.Concat(changed, added) {
		known := r.version(v.Number)
		for i := range v.Recipients {
			if rcpt := &v.Recipients[i]; known == nil || known.recipient(rcpt.KID) == nil {
				news = append(news, fmt.Sprintf("version %d to the one on device %q, %s", v.Number, rcpt.Device, rcpt.KID))
			}
		}
	}
	for _, v := range leased {
		news = append(news, fmt.Sprintf("version %d to another key encryption key, %s", v.Number, v.kek.ID()))
	}
	if len(news) == 0 {
		news = []string{"what is sealed to now, by another authentication envelope"}
	}
	return fmt.Errorf("key %q: %w, and with this record it would seal to keys that it does not know here: %s; nothing was changed. Where "+
		"you know that they are yours, by the SHA-256 that was printed where they were added, send it again with %s", r.Name, ErrKeyExists,
		strings.Join(news, "; "), r.say().Ask("accept_recipients"))
}

// lacksOf says what of another record of the key this one lacks, "" for nothing. Authentication keys are not compared.
func (r *record) lacksOf(here *record) string {
	if !r.Created.Equal(here.Created) {
		return fmt.Sprintf("it is of a key that was made at %s, and the one here was at %s", r.Created.Format(time.RFC3339),
			here.Created.Format(time.RFC3339))
	}
	for i := range here.Versions {
		known := &here.Versions[i]
		v := r.version(known.Number)
		if v == nil {
			return fmt.Sprintf("it lacks version %d", known.Number)
		}
		for j := range known.Recipients {
			rcpt := &known.Recipients[j]
			there := v.recipient(rcpt.KID)
			switch {
			case there == nil:
				return fmt.Sprintf("it lacks the recipient of version %d on device %q, %s", v.Number, rcpt.Device, rcpt.KID)
			case there.Algorithm != rcpt.Algorithm:
				return fmt.Sprintf("the recipient of version %d on device %q opens with %s there and with %s here", v.Number, rcpt.Device,
					there.Algorithm, rcpt.Algorithm)
			}
		}
		if !v.Created.Equal(known.Created) {
			return fmt.Sprintf("its version %d was made at %s, and the one here at %s", v.Number, v.Created.Format(time.RFC3339),
				known.Created.Format(time.RFC3339))
		}
	}
	return ""
}

// news returns the versions of another record of the key that are not here as they are there, those that are not here at all,
// and those that differ by nothing but a KEK. A record that lacks a KEK lacks nothing: no envelope depends on it.
func (r *record) news(incoming *record) (changed, added, leased []*version) {
	for i := range incoming.Versions {
		v := &incoming.Versions[i]
		switch known := r.version(v.Number); {
		case known == nil:
			added = append(added, v)
		case !bytes.Equal(known.AuthEnvelope, v.AuthEnvelope): // which names the recipients, too
			changed = append(changed, v)
		case v.KEKEnvelope != nil && !bytes.Equal(known.KEKEnvelope, v.KEKEnvelope):
			leased = append(leased, v)
		}
	}
	return changed, added, leased
}

// take makes the record have some versions of another one, and the KEKs of others. A KEK that somebody made up opens nothing
// and seals nothing: the HSM that opens it tells, by the authentication key. Recipients that are known stay as they are known here. The HSM keys
// are used elsewhere as well, nobody knows what for: encrypt/ is assumed.
//
// A KEK for fewer recipients than the version has now is dropped.
func (r *record) take(changed, added, leased []*version, read *Acknowledgement) {
	r.keepRecordRead()
	for _, v := range leased {
		known := r.version(v.Number)
		known.KEKEnvelope, known.kek = v.KEKEnvelope, v.kek
	}
	for _, v := range changed {
		known := r.version(v.Number)
		recipients := slices.Clone(v.Recipients)
		for i := range recipients {
			if here := known.recipient(recipients[i].KID); here != nil {
				recipients[i] = *here
			}
		}
		known.Recipients, known.AuthEnvelope, known.AuthKey = recipients, v.AuthEnvelope, slices.Clone(v.AuthKey)
		known.authSum, known.KEKEnvelope, known.kek = v.authSum, v.KEKEnvelope, v.kek
	}
	for _, v := range added {
		own := *v
		own.AuthKey = slices.Clone(v.AuthKey)
		r.addVersion(own)
	}
	for i := range r.Versions {
		r.Versions[i].ServedEncrypt = true
	}
	r.Acknowledgements.RecordRead = read
}

// wipe overwrites the authentication keys of a record that goes nowhere.
func (r *record) wipe() {
	for i := range r.Versions {
		clear(r.Versions[i].AuthKey)
	}
}
