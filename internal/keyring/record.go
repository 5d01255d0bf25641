package keyring

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// recordFormat is the version of the record's format. A reader refuses every other one: a record carries secrets and
// rules, and half-understood rules are not kept.
const recordFormat = 1

// record is a wrapping key as it lies in the store. A record is never changed in place: mutations work on a clone, so
// that a cached record can be read without a lock.
type record struct {
	Format               int       `json:"format"`
	Name                 string    `json:"name"`
	Created              time.Time `json:"created"`
	CreatedBy            string    `json:"created_by"`
	MinDecryptionVersion int       `json:"min_decryption_version"`
	DeletionAllowed      bool      `json:"deletion_allowed"`
	// LeaseSeconds is how long an opened KEK is held; 0 for strict mode.
	LeaseSeconds     int64            `json:"lease_seconds,omitempty"`
	Acknowledgements acknowledgements `json:"acknowledgements"`
	Versions         []version        `json:"versions"`
	Pending          *intent          `json:"pending,omitempty"`
	Deleting         *deletion        `json:"deleting,omitempty"`

	sealed bool   // Config.SealAuthKeys: what the store keeps has no AuthKey
	words  *Words // Config.Words
}

// acknowledgements are what people confirmed about the key as it is: RecordRead about all of it, BackupConfirmed about
// the newest version. What they confirmed before that is kept with the versions.
type acknowledgements struct {
	RecordRead      *Acknowledgement `json:"record_read,omitempty"`
	BackupConfirmed *Acknowledgement `json:"backup_confirmed,omitempty"`
	AcceptSingleHSM *Acknowledgement `json:"accept_single_hsm,omitempty"`
	AcceptWeakKey   *Acknowledgement `json:"accept_weak_key,omitempty"`
}

// version is one version of a wrapping key.
type version struct {
	Number     int         `json:"version"` // 1, 2, …
	Created    time.Time   `json:"created"`
	CreatedBy  string      `json:"created_by"`
	RequestID  string      `json:"request_id,omitempty"`
	Recipients []recipient `json:"recipients"`
	// AuthKey is the authentication key, 32 bytes. Empty after a restore that could not open AuthEnvelope yet.
	AuthKey []byte `json:"auth_key,omitempty"`
	// AuthEnvelope is AuthKey sealed to the recipients, an envelope of use "auth".
	AuthEnvelope json.RawMessage `json:"auth_envelope"`
	// KEKEnvelope is the key encryption key that leased envelopes are sealed to now, sealed to the recipients, an envelope of
	// use "kek". Nothing depends on it: each leased envelope carries its own. Empty where the key never had a lease.
	KEKEnvelope   json.RawMessage `json:"kek_envelope,omitempty"`
	ServedEncrypt bool            `json:"served_encrypt"`
	Kept          kept            `json:"kept,omitzero"`

	authSum [sha256.Size]byte // of AuthEnvelope; filled by validate
	kek     *envelope.KEK     // KEKEnvelope, parsed; filled by validate
}

// kept is what was acknowledged about a version and was put aside when the key went on: it does not hold for what came
// after, and goes on holding for what was there.
type kept struct {
	RecordRead *Acknowledgement `json:"record_read,omitempty"`
	// Recipients is how many recipients the version had, the first ones, in the key record that was read then.
	Recipients      int              `json:"recipients,omitempty"`
	BackupConfirmed *Acknowledgement `json:"backup_confirmed,omitempty"`
}

// recipient is an HSM key pair.
type recipient struct {
	recipientCore
	Added   time.Time `json:"added"`
	AddedBy string    `json:"added_by"`
	// RequestID is that of the AddRecipient that brought it; a version's first recipient has none.
	RequestID string `json:"request_id,omitempty"`
	// Generated is true where this record's own intent made the HSM key. Nobody else had it before; an adopted key may
	// be in use by another mount or program, and what a restored one is used for nobody knows.
	Generated bool `json:"generated,omitempty"`
}

// recipientCore is what the record and the key record tell of a recipient alike.
type recipientCore struct {
	Device             string             `json:"device"`
	Serial             string             `json:"serial,omitempty"` // of the HSM, at adoption
	Label              string             `json:"label"`
	ID                 string             `json:"id"`
	KID                string             `json:"kid"`
	Algorithm          envelope.Algorithm `json:"alg"`
	PublicKey          jwk                `json:"public_key"`
	WeaknessesAccepted []string           `json:"weaknesses_accepted,omitempty"`
	AlsoUsableFor      []string           `json:"also_usable_for,omitempty"`

	kind   hsm.Algorithm
	sealTo envelope.Recipient // filled by validate
}

// intent is an HSM key that is to be made: written before the HSM is touched.
type intent struct {
	Device     string        `json:"device"`
	Algorithm  hsm.Algorithm `json:"algorithm"`
	Label      string        `json:"label"`
	ID         string        `json:"id"` // CKA_ID, 16 random bytes in hexadecimal
	RequestID  string        `json:"request_id,omitempty"`
	Version    int           `json:"version"`
	Since      time.Time     `json:"since"`
	By         string        `json:"by"`
	Abandoning bool          `json:"abandoning,omitempty"`
	LastError  string        `json:"last_error,omitempty"`
	// Asked is true from just before the HSM is asked for the key until it surely refused: an id is asked for once. What
	// a lost request does when it arrives late nobody knows; it may put its key in the place of one that was made
	// meanwhile. Former are ids that were asked for before, without a key that was seen.
	Asked  bool     `json:"asked,omitempty"`
	Former []string `json:"former,omitempty"`
}

// ids lists all ids under which a key of the intent may be, the newest first.
func (i *intent) ids() []string {
	all := append(slices.Clone(i.Former), i.ID)
	slices.Reverse(all)
	return all
}

// deletion is a wrapping key that is to go together with its HSM keys: written before the first of them is destroyed.
type deletion struct {
	Since time.Time `json:"since"`
	By    string    `json:"by"`
}

// newest returns the newest version, nil while there is none.
func (r *record) newest() *version {
	if len(r.Versions) == 0 {
		return nil
	}
	return &r.Versions[len(r.Versions)-1]
}

// version returns a version by its number, nil where there is none.
func (r *record) version(number int) *version {
	if number < 1 || number > len(r.Versions) {
		return nil
	}
	return &r.Versions[number-1]
}

// recipient returns a version's recipient by its kid, nil where there is none.
func (v *version) recipient(kid string) *recipient {
	for i := range v.Recipients {
		if v.Recipients[i].KID == kid {
			return &v.Recipients[i]
		}
	}
	return nil
}

// sealTo returns the recipients as the envelope wants them.
func (v *version) sealTo() []envelope.Recipient {
	list := make([]envelope.Recipient, len(v.Recipients))
	for i := range v.Recipients {
		list[i] = v.Recipients[i].sealTo
	}
	return list
}

// auth returns the authentication key; ok is false where a restored version's was not opened yet.
func (v *version) auth() (key envelope.AuthKey, ok bool) {
	if len(v.AuthKey) != len(key) {
		return key, false
	}
	copy(key[:], v.AuthKey)
	return key, true
}

// clone returns a copy that can be changed without harm to r.
func (r *record) clone() *record {
	c := *r
	c.Versions = slices.Clone(r.Versions)
	for i := range c.Versions {
		c.Versions[i].Recipients = slices.Clone(r.Versions[i].Recipients)
		c.Versions[i].AuthKey = slices.Clone(r.Versions[i].AuthKey)
	}
	if r.Pending != nil {
		pending := *r.Pending
		c.Pending = &pending
	}
	return &c
}

// encode returns the bytes that the store keeps. The caller wipes them.
func (r *record) encode() ([]byte, error) {
	kept := r
	if r.sealed {
		kept = r.clone()
		for i := range kept.Versions {
			clear(kept.Versions[i].AuthKey)
			kept.Versions[i].AuthKey = nil
		}
	}
	raw, err := json.Marshal(kept)
	if err != nil {
		return nil, fmt.Errorf("encoding key %q: %w", r.Name, err)
	}
	if len(raw) > store.MaxValueSize {
		clear(raw)
		return nil, fmt.Errorf("key %q: %w: make another wrapping key and rewrap to it", r.Name, ErrTooLarge)
	}
	return raw, nil
}

// decodeRecord parses what the store kept under that name and checks every rule that the rest of the package relies on.
func decodeRecord(name string, raw []byte) (*record, error) {
	var r record
	if err := decodeStrictly(raw, &r); err != nil {
		return nil, fmt.Errorf("record of key %q: %w: restore the store from a backup or the key from its key record", name, err)
	}
	if err := r.validate(name); err != nil {
		return nil, fmt.Errorf("record of key %q: %w: restore the store from a backup or the key from its key record", name, err)
	}
	return &r, nil
}

// decodeStrictly refuses unknown members and anything after the value. The decoder's own errors are left out of the
// answer: they quote the input, and the input may hold secrets.
func decodeStrictly(raw []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return fmt.Errorf("%w: not the JSON that this release writes; where a newer release wrote it, use that one", ErrRecordMalformed)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: something follows the JSON", ErrRecordMalformed)
	}
	return nil
}

// validate checks the record and fills what is derived from it.
func (r *record) validate(name string) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrRecordMalformed}, args...)...)
	}
	switch {
	case r.Format != recordFormat:
		return bad("its format is %d, this release reads %d", r.Format, recordFormat)
	case r.Name != name:
		return bad("it is the record of key %q", r.Name)
	case checkName(r.Name) != nil:
		return bad("its name is not one")
	case len(r.Versions) == 0 && r.Pending == nil && r.Deleting == nil:
		return bad("it has no version and none is being made")
	case r.MinDecryptionVersion < 1 || r.MinDecryptionVersion > max(1, len(r.Versions)):
		return bad("min_decryption_version is out of bounds")
	case r.LeaseSeconds != 0 && (r.LeaseSeconds < int64(MinLease/time.Second) || r.LeaseSeconds > int64(MaxLease/time.Second)):
		return bad("its lease is out of bounds")
	}
	if p := r.Pending; p != nil && (p.Version != len(r.Versions)+1 || p.Device == "" || p.ID == "" || p.Label == "" ||
		!slices.Contains(hsm.Algorithms(), p.Algorithm)) {
		return bad("the HSM key to be made is not described")
	}
	for i := range r.Versions {
		v := &r.Versions[i]
		if v.Number != i+1 {
			return bad("version %d stands where %d belongs", v.Number, i+1)
		}
		if len(v.AuthKey) != 0 && len(v.AuthKey) != len(envelope.AuthKey{}) {
			return bad("version %d has an authentication key of %d bytes", v.Number, len(v.AuthKey))
		}
		if err := validateRecipients(name, v); err != nil {
			return fmt.Errorf("version %d: %w", v.Number, err)
		}
		if n := v.Kept.Recipients; n < 0 || n > len(v.Recipients) || (n == 0) != (v.Kept.RecordRead == nil) {
			return bad("version %d has a key record that was read with %d of its recipients", v.Number, n)
		}
	}
	return nil
}

// validateRecipients checks a version's recipients and that its authentication envelope is for them and nobody else.
func validateRecipients(name string, v *version) error {
	if len(v.Recipients) == 0 || len(v.Recipients) > envelope.MaxRecipients {
		return fmt.Errorf("%w: it has %d recipients", ErrRecordMalformed, len(v.Recipients))
	}
	seen := map[string]bool{}
	for i := range v.Recipients {
		rcpt := &v.Recipients[i]
		if err := rcpt.derive(); err != nil {
			return err
		}
		if seen[rcpt.KID] {
			return fmt.Errorf("%w: the recipient %s is there twice", ErrRecordMalformed, rcpt.KID)
		}
		seen[rcpt.KID] = true
	}
	auth, err := envelope.Parse(v.AuthEnvelope)
	if err != nil {
		return fmt.Errorf("%w: its authentication envelope: %w", ErrRecordMalformed, err)
	}
	claimed := auth.Context()
	if claimed.Use != envelope.UseAuth || claimed.Key != name || claimed.Version != v.Number {
		return fmt.Errorf("%w: its authentication envelope belongs to something else", ErrRecordMalformed)
	}
	if !sealedToAll(auth, v) {
		return fmt.Errorf("%w: its authentication envelope is for other recipients", ErrRecordMalformed)
	}
	v.authSum = sha256.Sum256(v.AuthEnvelope)
	return v.validateKEK(name)
}

// validateKEK checks that the version's key encryption key, where it has one, is for its recipients and nobody else.
func (v *version) validateKEK(name string) error {
	if v.KEKEnvelope == nil {
		v.kek = nil
		return nil
	}
	kek, err := envelope.ParseKEK(v.KEKEnvelope)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRecordMalformed, err)
	}
	if claimed := kek.Envelope().Context(); claimed.Key != name || claimed.Version != v.Number {
		return fmt.Errorf("%w: its key encryption key belongs to something else", ErrRecordMalformed)
	}
	if !sealedToAll(kek.Envelope(), v) {
		return fmt.Errorf("%w: its key encryption key is for other recipients", ErrRecordMalformed)
	}
	v.kek = kek
	return nil
}

// derive checks a recipient's public key against its kid and algorithm and fills what follows from them.
func (c *recipientCore) derive() error {
	if c.Device == "" || (c.Label == "" && c.ID == "") {
		return fmt.Errorf("%w: a recipient names no key on a device", ErrRecordMalformed)
	}
	public, err := c.PublicKey.public()
	if err != nil {
		return fmt.Errorf("the recipient on device %q: %w", c.Device, err)
	}
	kid, err := hsm.Fingerprint(public)
	if err != nil || kid != c.KID {
		return fmt.Errorf("%w: the public key of the recipient on device %q is not the one that its kid names",
			ErrRecordMalformed, c.Device)
	}
	if c.kind, err = kindOf(public); err != nil {
		return err
	}
	if !fits(c.kind, c.Algorithm) {
		return fmt.Errorf("%w: algorithm %q does not fit the key on device %q", ErrRecordMalformed, c.Algorithm, c.Device)
	}
	c.sealTo = envelope.Recipient{KID: c.KID, Algorithm: c.Algorithm, Public: public}
	return nil
}

// checkName returns ErrInvalid where name cannot be a wrapping key's: it becomes a part of a store's name and of a
// path in Vault.
func checkName(name string) error {
	bad := len(name) > maxNameLength || store.CheckName(name) != nil || strings.Contains(name, "/")
	if bad {
		return fmt.Errorf("%w: %q cannot be the name of a wrapping key; use 1 to %d letters, digits, \".\", \"_\" and \"-\", "+
			"a letter, a digit or \"_\" first", ErrInvalid, name, maxNameLength)
	}
	return nil
}

const maxNameLength = 64

// check checks the name and the request of a change.
func check(name string, request interface{ check() error }) error {
	if err := checkName(name); err != nil {
		return err
	}
	return request.check()
}
