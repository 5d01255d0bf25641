package pkcs11

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// The mechanisms that decide something here, and their flags (PKCS#11 2.40).
const (
	ckmRSAPKCS     uint = 0x1
	ckmRSAX509     uint = 0x3
	ckmRSAPKCSOAEP uint = 0x9
	ckmSHA1        uint = 0x220
	ckmSHA256      uint = 0x250
	ckmECDH1Derive uint = 0x1050

	ckfDecrypt uint = 0x200
)

// The sizes of RSA keys that are used, in bits.
const minRSA, maxRSA = 2048, 4096

// identityOfKey is what every key here has in common.
type keyBase struct {
	device *Device
	ref    hsm.KeyRef
	traits hsm.Traits
}

// Ref implements [hsm.Key].
func (k *keyBase) Ref() hsm.KeyRef { return k.ref }

// Traits implements [hsm.Key].
func (k *keyBase) Traits() hsm.Traits {
	traits := k.traits
	traits.AlsoUsableFor = slices.Clone(traits.AlsoUsableFor)
	return traits
}

// describe names the key for people.
func (k *keyBase) describe() string {
	return fmt.Sprintf("key %q (id %s) on %s", k.ref.Label, k.ref.ID, k.device.describeToken())
}

// FindKeys implements [hsm.Device]. Keys of a kind that is not used here are left out; where a label or id names nothing
// else, the error says what it found.
func (d *Device) FindKeys(ctx context.Context, query hsm.KeyQuery) ([]hsm.Key, error) {
	found, seenBy, err := d.findKeys(ctx, query)
	if err == nil && found == nil && query != (hsm.KeyQuery{}) && d.module.refresh(seenBy) {
		// Another program may have made it since this host was born: pkcs11-tool, just before the key is adopted.
		found, _, err = d.findKeys(ctx, query)
	}
	return found, err
}

// findKeys is FindKeys on the current host, which it names.
func (d *Device) findKeys(ctx context.Context, query hsm.KeyQuery) (found []hsm.Key, seenBy *host, _ error) {
	id := strings.ToLower(query.ID)
	if _, err := hex.DecodeString(id); err != nil {
		return nil, nil, fmt.Errorf("looking for keys with %s: the id is no hexadecimal number of whole bytes", query)
	}
	during := fmt.Sprintf("looking for keys with %s on %s", query, d.describeToken())
	var known map[uint]wire.Mechanism
	frame, a, err := d.runAt(ctx, operation{
		during: during, op: wire.OpFindKeys, private: true, idempotent: true, directory: true,
		build: func(ctx context.Context, a *attachment) (_ any, _ []byte, err error) {
			known, err = d.mechanisms(ctx, a)
			return wire.FindKeysRequest{Slot: a.slot, Label: query.Label, ID: id}, nil, err
		},
	})
	if err != nil {
		return nil, nil, err
	}
	var listed wire.Keys
	if err := wire.Decode(frame.Meta, &listed); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", during, err)
	}
	var unusable []string
	for _, k := range listed.Keys {
		key, err := d.key(a.token, k, known)
		if err != nil {
			unusable = append(unusable, fmt.Sprintf("%q (id %s): %v", k.Label, k.ID, err))
			continue
		}
		a.remember(key.Ref().Fingerprint, k)
		if query.Fingerprint == "" || query.Fingerprint == key.Ref().Fingerprint {
			found = append(found, key)
		}
	}
	if found == nil && unusable != nil && (query.Label != "" || query.ID != "") {
		return nil, nil, fmt.Errorf("%s: %w: what is there cannot be used: %s", during, hsm.ErrUnsupported, quoteAll(unusable))
	}
	slices.SortStableFunc(found, func(a, b hsm.Key) int {
		return cmp.Or(cmp.Compare(a.Ref().ID, b.Ref().ID), cmp.Compare(a.Ref().Label, b.Ref().Label))
	})
	return found, a.host, nil
}

// remember keeps the handles of a key for as long as the host lives.
func (a *attachment) remember(fingerprint string, k wire.Key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.handles[fingerprint] = handles{private: k.Handle, public: k.PublicHandle}
}

// key makes a key of what the host found.
func (d *Device) key(t *token, k wire.Key, known map[uint]wire.Mechanism) (hsm.Key, error) {
	public, err := publicKey(k)
	if err != nil {
		return nil, err
	}
	fingerprint, err := hsm.Fingerprint(public)
	if err != nil {
		return nil, err
	}
	base := keyBase{
		device: d,
		ref:    hsm.KeyRef{Label: trim(k.Label), ID: strings.ToLower(k.ID), Fingerprint: fingerprint},
		traits: hsm.Traits{Extractable: k.Extractable, Sensitive: k.Sensitive, AlsoUsableFor: otherUses(k, known)},
	}
	switch public := public.(type) {
	case *rsa.PublicKey:
		raw := known[ckmRSAX509].Flags&ckfDecrypt != 0
		return &rsaKey{keyBase: base, public: public, token: t, way: wayToDecrypt(known), raw: raw}, nil
	case *ecdh.PublicKey:
		return &ecKey{keyBase: base, public: public}, nil
	default:
		return nil, fmt.Errorf("%w: a public key of type %T", hsm.ErrUnsupported, public)
	}
}

// publicKey checks and decodes the public half of a key.
func publicKey(k wire.Key) (crypto.PublicKey, error) {
	switch {
	case k.Unusable != "":
		return nil, errors.New(k.Unusable)
	case k.Modulus != nil:
		modulus, exponent := new(big.Int).SetBytes(k.Modulus), new(big.Int).SetBytes(k.Exponent)
		if bits := modulus.BitLen(); bits < minRSA || bits > maxRSA {
			return nil, fmt.Errorf("an RSA key of %d bits: %d to %d are used", bits, minRSA, maxRSA)
		}
		if exponent.BitLen() > 31 || exponent.Cmp(big.NewInt(3)) < 0 || exponent.Bit(0) == 0 {
			return nil, errors.New("an RSA key with a public exponent out of range")
		}
		return &rsa.PublicKey{N: modulus, E: int(exponent.Int64())}, nil
	case k.Curve == "P-256":
		return ecdh.P256().NewPublicKey(k.Point)
	case k.Curve == "P-384":
		return ecdh.P384().NewPublicKey(k.Point)
	default:
		return nil, fmt.Errorf("a key on the curve %q: P-256 and P-384 are used", k.Curve)
	}
}

// otherUses names what the private key can be used for besides what we use it for. On a PKCS#11 token the holder of the
// PIN chooses the mechanism: a key that may decrypt does so with every mechanism that the token has.
func otherUses(k wire.Key, known map[uint]wire.Mechanism) []string {
	var others []string
	isRSA := k.Modulus != nil
	for _, use := range k.Uses {
		switch {
		case isRSA && use == "decrypt":
			if known[ckmRSAPKCS].Flags&ckfDecrypt != 0 {
				others = append(others, "decrypt v1.5 (CKM_RSA_PKCS)")
			}
			if known[ckmRSAX509].Flags&ckfDecrypt != 0 {
				others = append(others, "raw RSA (CKM_RSA_X_509)")
			}
		case !isRSA && use == "derive":
		default:
			others = append(others, use)
		}
	}
	return others
}

// GenerateKey implements [hsm.Device]. Where the module dies meanwhile the key may or may not be there: the error is
// ErrUnavailable, and a caller who chose the ID finds out with FindKeys.
func (d *Device) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	during := fmt.Sprintf("generating the %s key %q on %s", spec.Algorithm, spec.Label, d.describeToken())
	if !slices.Contains(hsm.Algorithms(), spec.Algorithm) {
		return nil, fmt.Errorf("%s: %w: unknown algorithm", during, hsm.ErrUnsupported)
	}
	id := strings.ToLower(spec.ID)
	if _, err := hex.DecodeString(id); err != nil {
		return nil, fmt.Errorf("%s: the id %q is no hexadecimal number of whole bytes", during, spec.ID)
	}
	if id == "" {
		random := make([]byte, 8)
		_, _ = rand.Read(random) // never fails (crypto/rand)
		id = hex.EncodeToString(random)
	}
	// On a token that does several things at a time, two requests for one id would both find it free.
	turn, err := d.writing(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	defer turn.leave()
	var known map[uint]wire.Mechanism
	frame, a, err := d.runAt(ctx, operation{
		during: during, op: wire.OpGenerateKey, private: true, directory: true, turn: turn,
		build: func(ctx context.Context, a *attachment) (any, []byte, error) {
			there, err := d.keysWithID(ctx, a, id)
			if err != nil {
				return nil, nil, err
			}
			if len(there) > 0 {
				return nil, nil, fmt.Errorf("%w: a key with id %s", hsm.ErrExists, id)
			}
			if known, err = d.mechanisms(ctx, a); err != nil {
				return nil, nil, err
			}
			return wire.GenerateRequest{Slot: a.slot, Algorithm: string(spec.Algorithm), Label: spec.Label, ID: id}, nil, nil
		},
	})
	if err != nil {
		if mayHaveWritten(err) {
			d.manager.wrote(nil)
		}
		return nil, err
	}
	d.manager.wrote(a.host)
	var made wire.Key
	if err := wire.Decode(frame.Meta, &made); err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	key, err := d.key(a.token, made, known)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: the key was made and cannot be used: %w", during, hsm.ErrUnsupported, err)
	}
	a.remember(key.Ref().Fingerprint, made)
	return key, nil
}

// keysWithID asks one host for the keys of an id.
func (d *Device) keysWithID(ctx context.Context, a *attachment, id string) ([]wire.Key, error) {
	frame, err := d.exchange(ctx, a, wire.OpFindKeys, wire.FindKeysRequest{Slot: a.slot, ID: id}, nil)
	if err != nil {
		return nil, err
	}
	var found wire.Keys
	if err := wire.Decode(frame.Meta, &found); err != nil {
		return nil, err
	}
	return found.Keys, nil
}

// DeleteKey implements [hsm.Device]. It is believed only when a fresh host no longer finds the key.
func (d *Device) DeleteKey(ctx context.Context, ref hsm.KeyRef) error {
	during := fmt.Sprintf("deleting the key %q (id %s) from %s", ref.Label, ref.ID, d.describeToken())
	if ref.ID == "" || ref.Fingerprint == "" {
		return fmt.Errorf("%s: both the id and the fingerprint are needed", during)
	}
	there := func(ctx context.Context, a *attachment) (handles, error) {
		keys, err := d.keysWithID(ctx, a, strings.ToLower(ref.ID))
		if err != nil {
			return handles{}, err
		}
		return pick(keys, ref)
	}
	destroy := operation{
		during: during, op: wire.OpDestroyKey, private: true, directory: true,
		build: func(ctx context.Context, a *attachment) (any, []byte, error) {
			h, err := there(ctx, a)
			return wire.DestroyKeyRequest{Slot: a.slot, Handle: h.private, PublicHandle: h.public}, nil, err
		},
	}
	return d.removed(ctx, destroy, func(ctx context.Context, a *attachment) (bool, error) {
		_, err := there(ctx, a)
		if errors.Is(err, hsm.ErrNotFound) || errors.Is(err, hsm.ErrKeyChanged) {
			return true, nil
		}
		return false, err
	})
}

// pick chooses the key with the fingerprint among those of its id or label.
func pick(keys []wire.Key, ref hsm.KeyRef) (handles, error) {
	var matches []handles
	for _, k := range keys {
		public, err := publicKey(k)
		if err != nil {
			continue
		}
		if fingerprint, err := hsm.Fingerprint(public); err == nil && fingerprint == ref.Fingerprint {
			matches = append(matches, handles{private: k.Handle, public: k.PublicHandle})
		}
	}
	switch {
	case len(matches) == 1:
		return matches[0], nil
	case len(matches) > 1:
		return handles{}, fmt.Errorf("%w: %d objects of that id and public key", hsm.ErrAmbiguous, len(matches))
	case len(keys) > 0 && ref.ID != "":
		return handles{}, fmt.Errorf("%w: id %s now belongs to another one", hsm.ErrKeyChanged, ref.ID)
	default:
		return handles{}, fmt.Errorf("%w: no key with id %s", hsm.ErrNotFound, ref.ID)
	}
}

// handle returns the key's handle on a host, finding the key again, and comparing it with the one recorded, where that
// host has not seen it yet.
func (k *keyBase) handle(ctx context.Context, a *attachment) (uint, error) {
	a.mu.Lock()
	h, known := a.handles[k.ref.Fingerprint]
	a.mu.Unlock()
	if known {
		return h.private, nil
	}
	frame, err := k.device.exchange(ctx, a, wire.OpFindKeys, wire.FindKeysRequest{Slot: a.slot, Label: k.ref.Label, ID: k.ref.ID}, nil)
	if err != nil {
		return 0, err
	}
	var found wire.Keys
	if err := wire.Decode(frame.Meta, &found); err != nil {
		return 0, err
	}
	if h, err = pick(found.Keys, k.ref); err != nil {
		return 0, err
	}
	a.mu.Lock()
	a.handles[k.ref.Fingerprint] = h
	a.mu.Unlock()
	return h.private, nil
}

// ecKey is an elliptic-curve key.
type ecKey struct {
	keyBase
	public *ecdh.PublicKey
}

var (
	_ hsm.Agreer = (*ecKey)(nil)
	_ hsm.Prover = (*ecKey)(nil)
)

// Public implements [hsm.Key].
func (k *ecKey) Public() crypto.PublicKey { return k.public }

// Agree implements [hsm.Agreer].
func (k *ecKey) Agree(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	during := "agreeing with " + k.describe()
	if peer.Curve() != k.public.Curve() {
		return nil, fmt.Errorf("%s: %w: the peer's key is on another curve", during, hsm.ErrUnsupported)
	}
	size := (len(k.public.Bytes()) - 1) / 2 // SEC 1, 2.3.3: 4 ‖ x ‖ y
	frame, err := k.device.run(ctx, operation{
		during: during, op: wire.OpDerive, private: true, idempotent: true,
		build: func(ctx context.Context, a *attachment) (any, []byte, error) {
			handle, err := k.handle(ctx, a)
			return wire.DeriveRequest{Slot: a.slot, Handle: handle, Size: size}, peer.Bytes(), err
		},
	})
	if err != nil {
		return nil, err
	}
	if len(frame.Data) != size {
		clear(frame.Data)
		return nil, fmt.Errorf("%s: %w: the token gave %d bytes, not %d", during, hsm.ErrUnavailable, len(frame.Data), size)
	}
	return frame.Data, nil
}

// Prove implements [hsm.Prover].
func (k *ecKey) Prove(ctx context.Context) error {
	peer, err := k.public.Curve().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	want, err := peer.ECDH(k.public)
	if err != nil {
		return err
	}
	defer clear(want)
	got, err := k.Agree(ctx, peer.PublicKey())
	if err != nil {
		return fmt.Errorf("proving: %w", err)
	}
	defer clear(got)
	if !bytes.Equal(got, want) {
		return fmt.Errorf("proving %s: %w: it agrees on something else than its public key does", k.describe(), hsm.ErrUnsupported)
	}
	return nil
}
