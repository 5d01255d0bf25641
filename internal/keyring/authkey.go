package keyring

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// authKey returns a version's authentication key. Where the record does not have it, because a restore could not open it
// or records never have it here, an HSM opens its envelope now, once.
func (k *Keyring) authKey(ctx context.Context, rec *record, number int) (*envelope.AuthKey, error) {
	v := rec.version(number)
	if auth, ok := k.knownAuth(v); ok {
		return &auth, nil
	}
	leave, err := k.opening.lock(ctx, fmt.Sprintf("%s, version %d", rec.Name, number)) // several that need it open it once
	if err != nil {
		return nil, err
	}
	defer leave()
	if auth, ok := k.knownAuth(v); ok {
		return &auth, nil
	}
	parsed, err := envelope.Parse(v.AuthEnvelope)
	if err != nil {
		return nil, fmt.Errorf("key %q: the authentication envelope of version %d: %w", rec.Name, number, err)
	}
	opened, _, err := k.openAnywhere(ctx, parsed, authContext(rec.Name, number), v, nil)
	if err != nil {
		return nil, fmt.Errorf("key %q: opening the authentication key of version %d: %w", rec.Name, number, err)
	}
	defer clear(opened)
	var auth envelope.AuthKey
	if copy(auth[:], opened) != len(auth) || len(opened) != len(auth) {
		return nil, fmt.Errorf("key %q: the authentication key of version %d: %w", rec.Name, number, ErrRecordMalformed)
	}
	if rec.sealed {
		k.opened.keep(v.AuthEnvelope, auth)
		return &auth, nil
	}
	_, err = k.update(ctx, rec.Name, func(rec *record) error {
		v := rec.version(number)
		if v == nil || len(v.AuthKey) > 0 {
			return errNoChange
		}
		v.AuthKey = slices.Clone(auth[:])
		return nil
	})
	if err != nil { // it is here all the same; the next use tries again
		k.logger.Warn("keeping an opened authentication key failed", "key", rec.Name, "version", number, "error", err)
	}
	return &auth, nil
}

// Warm opens the authentication keys of a key's versions where no use has done so yet, at the cost of one private-key
// operation for each. A daemon does it ahead of time, so that what it is there for costs one operation and not two. That of
// the newest version and of the one that serves encrypt/ must open; an older one, whose HSM may be gone, is tried.
func (k *Keyring) Warm(ctx context.Context, name string) error {
	rec, err := k.lookup(ctx, name)
	if err != nil {
		return err
	}
	if rec.newest() == nil {
		return rec.settled()
	}
	serves := rec.sealsWith(envelope.UseTransit).Number
	for _, number := range []int{serves, len(rec.Versions)} {
		if err := k.warm(ctx, rec, number); err != nil {
			return err
		}
	}
	for number := len(rec.Versions) - 1; number >= rec.MinDecryptionVersion; number-- {
		if err := k.warm(ctx, rec, number); err != nil {
			k.logger.Warn("opening the authentication key of an old version ahead of time failed", "key", name, "version", number, "error", err)
		}
	}
	return ctx.Err()
}

func (k *Keyring) warm(ctx context.Context, rec *record, number int) error {
	auth, err := k.authKey(ctx, rec, number)
	if err != nil {
		return err
	}
	clear(auth[:])
	return nil
}

// knownAuth returns a version's authentication key; ok is false where an HSM has to open it first.
func (k *Keyring) knownAuth(v *version) (key envelope.AuthKey, ok bool) {
	if key, ok = v.auth(); ok {
		return key, true
	}
	return k.opened.get(v.authSum)
}

// checkSealed refuses a record from the store that holds an authentication key where none must.
func (r *record) checkSealed() error {
	if !r.sealed {
		return nil
	}
	for i := range r.Versions {
		if len(r.Versions[i].AuthKey) > 0 {
			return fmt.Errorf("record of key %q: %w: it holds the authentication key of version %d in the clear, which this store must "+
				"not; restore the key from its key record", r.Name, ErrRecordMalformed, r.Versions[i].Number)
		}
	}
	return nil
}

// openedAuthKeys are authentication keys that records do not hold, by the SHA-256 of their envelopes. The zero value is
// ready.
type openedAuthKeys struct {
	mu   sync.RWMutex
	keys map[[sha256.Size]byte]envelope.AuthKey
}

func (o *openedAuthKeys) get(sum [sha256.Size]byte) (key envelope.AuthKey, ok bool) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	key, ok = o.keys[sum]
	return key, ok
}

func (o *openedAuthKeys) keep(authEnvelope []byte, key envelope.AuthKey) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.keys == nil {
		o.keys = map[[sha256.Size]byte]envelope.AuthKey{}
	}
	o.keys[sha256.Sum256(authEnvelope)] = key
}

// keepAll keeps the authentication keys of a record that is to be written without them.
func (o *openedAuthKeys) keepAll(rec *record) {
	if !rec.sealed {
		return
	}
	for i := range rec.Versions {
		if key, ok := rec.Versions[i].auth(); ok {
			o.keep(rec.Versions[i].AuthEnvelope, key)
		}
	}
}
