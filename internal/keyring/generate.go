package keyring

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Begin records that an HSM key is to be made for a new wrapping key, and answers with a key in [StateGenerating].
// [Keyring.Finish] makes it, which takes half a minute and more on a card. A repeat, by request id or with the same
// device, algorithm and label, answers with the key as it is.
func (k *Keyring) Begin(ctx context.Context, name string, request GenerateRequest) (*Key, error) {
	if err := check(name, request); err != nil {
		return nil, err
	}
	for range 2 {
		rec, _, err := k.load(ctx, name)
		if err == nil {
			return k.begunBefore(rec, 1, request)
		}
		if !errors.Is(err, ErrKeyNotFound) {
			return nil, err
		}
		// An HSM that is not there is a reason not to begin. Nothing is asked of it yet.
		if _, err := k.namedDevice(ctx, request.Device); err != nil {
			return nil, fmt.Errorf("making key %q: %w", name, err)
		}
		rec = k.newRecord(name, request.By)
		rec.Pending = k.newIntent(rec, request)
		err = k.write(ctx, rec, store.NoRevision)
		if err == nil {
			k.logIntent("making an HSM key", rec)
			return describe(rec), nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("making key %q: somebody else makes and deletes it meanwhile: %w: try again", name, store.ErrConflict)
}

// begunBefore answers a request to make version number of a key that has a record already.
func (k *Keyring) begunBefore(rec *record, number int, request GenerateRequest) (*Key, error) {
	if p := rec.Pending; p != nil && p.Version == number {
		same := p.Device == request.Device && p.Algorithm == request.Algorithm &&
			p.Label == request.label(rec.Name, number)
		switch {
		case same && !p.Abandoning:
			return describe(rec), nil
		case !same && request.RequestID != "" && p.RequestID == request.RequestID:
			return nil, fmt.Errorf("key %q: %w: send it with another request id", rec.Name, ErrRequestReused)
		default:
			return nil, generating(rec)
		}
	}
	if key, err := madeBefore(rec, request.RequestID, request.Device, true); key != nil || err != nil {
		return key, err
	}
	return nil, fmt.Errorf("key %q: %w: rotate it to give it another HSM key, or choose another name", rec.Name, ErrKeyExists)
}

// madeBefore answers a request whose id made a version already, by generating an HSM key or adopting one; nil and nil
// where there is none.
func madeBefore(rec *record, requestID, device string, generated bool) (*Key, error) {
	if requestID == "" {
		return nil, nil //nolint:nilnil // documented
	}
	for i := range rec.Versions {
		if rec.Versions[i].RequestID != requestID {
			continue
		}
		if made := &rec.Versions[i].Recipients[0]; made.Device != device || made.Generated != generated {
			return nil, fmt.Errorf("key %q: %w: it made version %d; send this one with another request id", rec.Name,
				ErrRequestReused, rec.Versions[i].Number)
		}
		return describe(rec), nil
	}
	return nil, nil //nolint:nilnil // documented
}

// Rotate gives a key its next version. With Adopt it is done when Rotate returns; with Generate it is begun, as by
// [Keyring.Begin], and Finish makes it. Envelopes of older versions open as before, down to min_decryption_version.
// The new version's key record has to be read, and a backup of its HSM key confirmed anew; `encrypt/` goes on with the
// old version until then.
func (k *Keyring) Rotate(ctx context.Context, name string, request RotateRequest) (*Key, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	switch {
	case request.Adopt != nil && request.Generate == nil:
		return k.rotateAdopt(ctx, name, *request.Adopt)
	case request.Generate != nil && request.Adopt == nil:
		return k.rotateGenerate(ctx, name, *request.Generate)
	default:
		return nil, fmt.Errorf("%w: a rotation either adopts an HSM key or makes one; ask for exactly one of the two", ErrInvalid)
	}
}

func (k *Keyring) rotateGenerate(ctx context.Context, name string, request GenerateRequest) (*Key, error) {
	if err := request.check(); err != nil {
		return nil, err
	}
	rec, _, err := k.load(ctx, name)
	if err != nil {
		return nil, err
	}
	if rec.Pending == nil {
		if _, err := k.namedDevice(ctx, request.Device); err != nil {
			return nil, fmt.Errorf("rotating key %q: %w", name, err)
		}
	}
	var answer *Key
	rec, err = k.update(ctx, name, func(rec *record) error {
		if rec.Deleting != nil {
			return rec.settled()
		}
		if rec.Pending != nil {
			answer, err = k.begunBefore(rec, len(rec.Versions)+1, request)
		} else {
			answer, err = madeBefore(rec, request.RequestID, request.Device, true)
		}
		if err != nil {
			return err
		}
		if answer != nil {
			return errNoChange
		}
		if err := rec.hasRoom(); err != nil {
			return err
		}
		rec.Pending = k.newIntent(rec, request)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if answer != nil {
		return answer, nil
	}
	k.logIntent("making an HSM key", rec)
	return describe(rec), nil
}

func (k *Keyring) rotateAdopt(ctx context.Context, name string, request AdoptRequest) (*Key, error) {
	if err := request.check(); err != nil {
		return nil, err
	}
	rec, _, err := k.load(ctx, name)
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
	rec, _, err = k.load(ctx, name)
	if err != nil {
		return nil, err
	}
	if err := rec.settled(); err != nil {
		return nil, err
	}
	if key, err := madeBefore(rec, request.RequestID, request.Device, false); key != nil || err != nil {
		return key, err
	}
	if err := rec.hasRoom(); err != nil {
		return nil, err
	}
	v, err := k.adoptVersion(ctx, rec, request)
	if err != nil {
		return nil, fmt.Errorf("rotating key %q: %w", name, err)
	}
	rec, err = k.update(ctx, name, func(rec *record) error {
		if err := rec.settled(); err != nil {
			return err
		}
		if len(rec.Versions)+1 != v.Number {
			return fmt.Errorf("key %q was rotated meanwhile: %w: read it before you rotate it again", name, store.ErrConflict)
		}
		rec.addVersion(v)
		rec.noteWeakness(v.Recipients[0])
		return k.giveKEKs(rec)
	})
	if err != nil {
		return nil, err
	}
	k.logVersion("wrapping key rotated", rec, v)
	return describe(rec), nil
}

// Finish makes the HSM key that Begin or Rotate recorded, unless it is there already, and turns it into a version. It
// may be called again after any failure or crash, and ends with exactly one HSM key. Without a pending one it answers
// with the key as it is. Why it failed stays readable in the key's Pending.
func (k *Keyring) Finish(ctx context.Context, name string) (*Key, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	unlock, err := k.turn(ctx, name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	rec, _, err := k.load(ctx, name)
	if err != nil {
		return nil, err
	}
	if rec.Pending == nil {
		return describe(rec), nil
	}
	if rec.Pending.Abandoning {
		return nil, generating(rec)
	}
	intent := *rec.Pending
	done, err := k.finish(ctx, rec, &intent)
	if err != nil {
		err = fmt.Errorf("making version %d of key %q: %w", rec.Pending.Version, name, err)
		k.noteFailure(ctx, name, intent.ID, err)
		return nil, err
	}
	return describe(done), nil
}

// finish does it; the intent is the record's, and gets another id where that becomes necessary.
func (k *Keyring) finish(ctx context.Context, rec *record, intent *intent) (*record, error) {
	device, err := k.device(ctx, intent.Device)
	if err != nil {
		return nil, err
	}
	key, made, err := k.findOrGenerate(ctx, device, rec.Name, intent)
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", intent.Device, err)
	}
	kind, err := kindOf(key.Public())
	if err == nil && kind != intent.Algorithm {
		err = fmt.Errorf("%w: it is %s and %s was asked for; abandon this one and begin anew", ErrUnusableKey, kind, intent.Algorithm)
	}
	if err != nil {
		return nil, fmt.Errorf("device %q: key with id %q: %w", intent.Device, intent.ID, err)
	}
	rcpt, err := k.judge(ctx, device, key, AdoptRequest{Device: intent.Device, By: intent.By})
	if err != nil {
		return nil, err
	}
	rcpt.Generated = true
	v, err := k.newVersion(ctx, rec, rcpt, key, intent.RequestID)
	if err != nil {
		return nil, err
	}
	gone := false
	updated, err := k.update(ctx, rec.Name, func(rec *record) error {
		if rec.Pending == nil || rec.Pending.ID != intent.ID {
			if slices.ContainsFunc(rec.Versions, func(v version) bool { return v.recipient(rcpt.KID) != nil }) {
				return errNoChange // another process finished it
			}
			gone = true
			return fmt.Errorf("it was abandoned meanwhile: %w: begin anew", store.ErrConflict)
		}
		if rec.Pending.Abandoning {
			gone = true
			return generating(rec)
		}
		rec.Pending = nil
		rec.addVersion(v)
		return k.giveKEKs(rec)
	})
	gone = gone || errors.Is(err, ErrKeyNotFound)
	if gone && !made {
		// Whoever undid the intent has deleted the key, unless it came only after that: an attempt whose caller had gone
		// went on in the HSM.
		k.logger.Warn("an HSM key of an abandoned intent may be left over; list the keys of the device, and delete it if it is there",
			"key", rec.Name, "device", intent.Device, "id", intent.ID)
	}
	if gone && made {
		// Another process undid the intent, perhaps before it could see this key. No version ever had it.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
		defer cancel()
		if undo := device.DeleteKey(ctx, key.Ref()); undo != nil && !errors.Is(undo, hsm.ErrNotFound) {
			k.logger.Error("an HSM key that nobody needs is left over; delete it", "key", rec.Name, "device", intent.Device, "id",
				intent.ID, "error", undo)
		}
	}
	if err != nil {
		return nil, err
	}
	k.logVersion("HSM key made", updated, v)
	return updated, nil
}

// findOrGenerate returns the HSM key of an intent; made tells whether it was made just now.
func (k *Keyring) findOrGenerate(ctx context.Context, device hsm.Device, name string, intent *intent) (key hsm.Key, made bool, err error) {
	for _, id := range intent.ids() {
		key, err = hsm.FindKey(ctx, device, hsm.KeyQuery{ID: id})
		if !errors.Is(err, hsm.ErrNotFound) {
			return key, false, err
		}
	}
	if err := k.ask(ctx, name, intent); err != nil {
		return nil, false, err
	}
	key, err = device.GenerateKey(ctx, hsm.KeySpec{Algorithm: intent.Algorithm, Label: intent.Label, ID: intent.ID})
	if errors.Is(err, hsm.ErrExists) { // an attempt that was given up by its caller came through after all
		key, err = hsm.FindKey(ctx, device, hsm.KeyQuery{ID: intent.ID})
		return key, false, err
	}
	if err != nil && surelyNot(err) {
		k.unask(ctx, name, intent)
	}
	return key, err == nil, err
}

// maxFormer is how many ids are given up for one key. An HSM that swallows requests may carry all of them out in the end,
// and every id is looked for at every try.
const maxFormer = 4

// ask records that the HSM is about to be asked for the intent's key, under another id where it was asked before.
func (k *Keyring) ask(ctx context.Context, name string, intent *intent) error {
	rec, err := k.update(ctx, name, func(rec *record) error {
		switch p := rec.Pending; {
		case p == nil || p.ID != intent.ID:
			return fmt.Errorf("somebody else finished or abandoned it: %w: try again", store.ErrConflict)
		case p.Abandoning:
			return generating(rec)
		case p.Asked && len(p.Former) >= maxFormer:
			return fmt.Errorf("%w: the answers to %d requests for an HSM key were lost, and none has appeared; see why the HSM answers nothing, "+
				"then abandon this one and begin anew", hsm.ErrUnavailable, maxFormer+1)
		case p.Asked:
			k.logger.Warn("the answer to a request for an HSM key was lost, and the key is not there: asking for one with another id; "+
				"the first may still appear, and may then be deleted", "key", name, "device", p.Device, "id", p.ID)
			p.Former = append(p.Former, p.ID)
			p.ID = newID()
		}
		rec.Pending.Asked = true
		return nil
	})
	if err != nil {
		return err
	}
	*intent = *rec.Pending
	return nil
}

// unask records that the HSM has surely not made the key that it was asked for, so that the id can serve again. It is no
// harm if that fails: the next try takes another id.
func (k *Keyring) unask(ctx context.Context, name string, intent *intent) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	_, err := k.update(ctx, name, func(rec *record) error {
		if rec.Pending == nil || rec.Pending.ID != intent.ID {
			return errNoChange
		}
		rec.Pending.Asked = false
		return nil
	})
	if err != nil {
		k.logger.Warn("noting that an HSM key was not made failed", "key", name, "error", err)
	}
}

// surelyNot tells whether an HSM that was asked for a key has surely not made it.
func surelyNot(failure error) bool {
	for _, unsure := range []error{hsm.ErrMayHaveHappened, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(failure, unsure) {
			return false
		}
	}
	return true
}

// maxLastError is how much of an error is kept in a record, in bytes.
const maxLastError = 1 << 10

// noteFailure records why an intent failed, for people to read. It is no harm if that fails as well.
func (k *Keyring) noteFailure(ctx context.Context, name, id string, failure error) {
	k.logger.Warn("making an HSM key failed", "key", name, "error", failure)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterwards)
	defer cancel()
	_, err := k.update(ctx, name, func(rec *record) error {
		text := strings.ToValidUTF8(failure.Error(), "?")
		if len(text) > maxLastError {
			text = strings.ToValidUTF8(text[:maxLastError], "") + "…"
		}
		if rec.Pending == nil || rec.Pending.ID != id || rec.Pending.LastError == text {
			return errNoChange
		}
		rec.Pending.LastError = text
		return nil
	})
	if err != nil {
		k.logger.Warn("noting why an HSM key was not made failed", "key", name, "error", err)
	}
}

// Abandon undoes what Begin or Rotate recorded: it destroys the HSM key if one was made, which no version ever had, and
// forgets the intent; a key without a version goes altogether. It may be called again after any failure or crash.
// Without a pending HSM key there is nothing to do. It needs the device; see [Keyring.AbandonWithoutHSM].
func (k *Keyring) Abandon(ctx context.Context, name string) error {
	return k.abandon(ctx, name, k.undo)
}

// AbandonWithoutHSM is Abandon for a device that will not come back. An HSM key that was made on it stays there: the
// log names its id.
func (k *Keyring) AbandonWithoutHSM(ctx context.Context, name string) error {
	return k.abandon(ctx, name, func(context.Context, intent) error { return nil })
}

func (k *Keyring) abandon(ctx context.Context, name string, undo func(context.Context, intent) error) error {
	if err := checkName(name); err != nil {
		return err
	}
	unlock, err := k.turn(ctx, name)
	if err != nil {
		return err
	}
	defer unlock()
	// Before the HSM key goes, the record says so: a Finish in another process stops there.
	rec, err := k.update(ctx, name, func(rec *record) error {
		if rec.Pending == nil || rec.Pending.Abandoning {
			return errNoChange
		}
		rec.Pending.Abandoning = true
		return nil
	})
	if errors.Is(err, ErrKeyNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if rec.Pending == nil {
		return nil
	}
	intent := *rec.Pending
	if err := undo(ctx, intent); err != nil {
		err = fmt.Errorf("abandoning version %d of key %q: %w; try again when the device is back, or abandon it without the HSM",
			intent.Version, name, err)
		k.noteFailure(ctx, name, intent.ID, err)
		return err
	}
	if err := k.forget(ctx, name, intent.ID); err != nil {
		return err
	}
	k.logger.Info("HSM key abandoned", "key", name, "version", intent.Version, "device", intent.Device, "id", intent.ID)
	return nil
}

// undo deletes the HSM key of an intent, if there is one and nobody has adopted it by another way.
func (k *Keyring) undo(ctx context.Context, intent intent) error {
	device, err := k.device(ctx, intent.Device)
	if err != nil {
		return err
	}
	for _, id := range intent.ids() {
		if err := k.undoID(ctx, device, intent, id); err != nil {
			return err
		}
	}
	return nil
}

func (k *Keyring) undoID(ctx context.Context, device hsm.Device, intent intent, id string) error {
	key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{ID: id})
	if errors.Is(err, hsm.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("device %q: %w", intent.Device, err)
	}
	user, err := k.userOf(ctx, key.Ref().Fingerprint, "")
	if err != nil {
		return err
	}
	if user != "" {
		k.logger.Warn("the HSM key of an abandoned intent is kept because it was adopted", "device", intent.Device, "id", id,
			"key", user)
		return nil
	}
	if err := device.DeleteKey(ctx, key.Ref()); err != nil && !errors.Is(err, hsm.ErrNotFound) {
		return fmt.Errorf("device %q: deleting the key with id %q: %w", intent.Device, id, err)
	}
	return nil
}

// forget removes an abandoned intent, and the record where that was all it held.
func (k *Keyring) forget(ctx context.Context, name, id string) error {
	for range maxConflicts {
		rec, revision, err := k.load(ctx, name)
		if errors.Is(err, ErrKeyNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if rec.Pending == nil || rec.Pending.ID != id {
			return nil
		}
		if len(rec.Versions) > 0 {
			next := rec.clone()
			next.Pending = nil
			err = k.write(ctx, next, revision)
		} else {
			err = k.remove(ctx, name, revision)
		}
		if err == nil || !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return fmt.Errorf("changing key %q: others changed it meanwhile: %w: try again", name, store.ErrConflict)
}

// remove deletes a record.
func (k *Keyring) remove(ctx context.Context, name string, revision store.Revision) error {
	k.cache.drop(name)
	defer k.cache.drop(name)
	err := k.records.Delete(ctx, recordPrefix+name, revision)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("deleting the record of key %q: %w", name, err)
	}
	return nil
}

// userOf returns the name of a key, other than except, one of whose versions has that HSM key; empty where none has.
func (k *Keyring) userOf(ctx context.Context, kid, except string) (string, error) {
	names, err := k.List(ctx)
	if err != nil {
		return "", err
	}
	for _, name := range names {
		if name == except {
			continue
		}
		rec, _, err := k.load(ctx, name)
		if errors.Is(err, ErrKeyNotFound) {
			continue
		}
		if err != nil {
			return "", err
		}
		if slices.ContainsFunc(rec.Versions, func(v version) bool { return v.recipient(kid) != nil }) {
			return name, nil
		}
	}
	return "", nil
}

func (k *Keyring) newIntent(rec *record, request GenerateRequest) *intent {
	number := len(rec.Versions) + 1
	return &intent{
		Device:    request.Device,
		Algorithm: request.Algorithm,
		Label:     request.label(rec.Name, number),
		ID:        newID(),
		RequestID: request.RequestID,
		Version:   number,
		Since:     k.today(),
		By:        request.By,
	}
}

// newID returns an id for an HSM key that nobody had before: 16 random bytes in hexadecimal.
func newID() string {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails: crypto/rand
	return hex.EncodeToString(id)
}

// label returns the label that the HSM key will have.
func (r GenerateRequest) label(name string, number int) string {
	if r.Label != "" {
		return r.Label
	}
	return fmt.Sprintf("nitroseal-%s-v%d", name, number)
}

// check returns ErrInvalid where the request describes no key.
func (r GenerateRequest) check() error {
	if r.Device == "" {
		return fmt.Errorf("%w: name the device that is to make the HSM key", ErrInvalid)
	}
	if !slices.Contains(hsm.Algorithms(), r.Algorithm) {
		var known []string
		for _, algorithm := range hsm.Algorithms() {
			known = append(known, string(algorithm))
		}
		return fmt.Errorf("%w: algorithm %q is not known; take one of %s", ErrInvalid, r.Algorithm, strings.Join(known, ", "))
	}
	return nil
}

// generating says that an HSM key is being made or undone, and what can be done about it.
func generating(rec *record) error {
	p := rec.Pending
	if p.Abandoning {
		return fmt.Errorf("key %q: %w: the one for version %d on device %q is being undone; abandon it once more to complete that",
			rec.Name, ErrGenerating, p.Version, p.Device)
	}
	trouble := ""
	if p.LastError != "" {
		trouble = " (the last attempt failed: " + p.LastError + ")"
	}
	return fmt.Errorf("key %q: %w: version %d on device %q since %s; wait until it is ready, or abandon it%s", rec.Name, ErrGenerating,
		p.Version, p.Device, p.Since.Format("2006-01-02 15:04:05 MST"), trouble)
}
