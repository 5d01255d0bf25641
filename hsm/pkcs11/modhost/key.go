//go:build cgo

package modhost

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// findKeys lists private keys. Searching by class first makes a certificate or a data object of the same label no match.
func (m *module) findKeys(r wire.FindKeysRequest) (answer wire.Keys, _ error) {
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, uint(pkcs11.CKO_PRIVATE_KEY))}
	if r.Label != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.Label))
	}
	if r.ID != "" {
		id, err := hex.DecodeString(r.ID)
		if err != nil {
			return answer, badRequest("the id %q is not hexadecimal", r.ID)
		}
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	err := m.inSession(r.Slot, 0, func(session pkcs11.SessionHandle) error {
		handles, err := m.find(session, template...)
		if err != nil {
			return err
		}
		for _, handle := range handles {
			key, err := m.describe(session, handle)
			if is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
				continue // deleted by somebody else just now
			}
			if err != nil {
				return err
			}
			answer.Keys = append(answer.Keys, key)
		}
		return nil
	})
	slices.SortFunc(answer.Keys, func(a, b wire.Key) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.Label, b.Label), cmp.Compare(a.Handle, b.Handle))
	})
	return answer, err
}

// uses are the usage attributes of a private key.
var uses = []struct {
	attribute uint
	name      string
}{
	{pkcs11.CKA_DECRYPT, "decrypt"},
	{pkcs11.CKA_SIGN, "sign"},
	{pkcs11.CKA_SIGN_RECOVER, "sign_recover"},
	{pkcs11.CKA_UNWRAP, "unwrap"},
	{pkcs11.CKA_DERIVE, "derive"},
}

// describe reads a private key and finds its public half.
func (m *module) describe(session pkcs11.SessionHandle, handle uint) (wire.Key, error) {
	private := m.reader(session, handle)
	id := private.bytes(pkcs11.CKA_ID)
	key := wire.Key{
		Handle:      handle,
		Label:       private.text(pkcs11.CKA_LABEL),
		ID:          hex.EncodeToString(id),
		Sensitive:   private.flag(pkcs11.CKA_SENSITIVE, false),
		Extractable: private.flag(pkcs11.CKA_EXTRACTABLE, true),
	}
	for _, use := range uses {
		if private.flag(use.attribute, false) {
			key.Uses = append(key.Uses, use.name)
		}
	}
	kind := private.number(pkcs11.CKA_KEY_TYPE)
	if private.err != nil {
		return wire.Key{}, private.err
	}
	if kind != pkcs11.CKK_RSA && kind != pkcs11.CKK_EC {
		key.Unusable = fmt.Sprintf("a key of type 0x%x: RSA and elliptic-curve keys are used", kind)
		return key, nil
	}
	half := readPublic(private, kind)
	publics, err := m.publicHalves(session, id, kind, &half)
	if err != nil {
		return wire.Key{}, err
	}
	if private.flag(pkcs11.CKA_ALWAYS_AUTHENTICATE, false) {
		key.Unusable = "it asks for the PIN at every use (CKA_ALWAYS_AUTHENTICATE)"
		return key, private.err
	}
	if private.err != nil {
		return wire.Key{}, private.err
	}
	switch {
	case len(publics) == 1:
		key.PublicHandle = publics[0]
	case len(publics) > 1 && !half.complete(kind):
		key.Unusable = fmt.Sprintf("%d different public keys have its id %s, and the private key does not tell which is its own", len(publics), key.ID)
		return key, nil
	}
	half.fill(kind, &key)
	return key, nil
}

// publicHalves returns the public key objects that may belong to a private key: those of its kind with its id whose
// parts equal the ones known. Where it is exactly one, half gets what it lacked.
func (m *module) publicHalves(session pkcs11.SessionHandle, id []byte, kind uint, half *publicHalf) ([]uint, error) {
	if len(id) == 0 {
		return nil, nil // all keys without an id would have each other's public halves
	}
	handles, err := m.find(session,
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, uint(pkcs11.CKO_PUBLIC_KEY)),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, kind),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	if err != nil {
		return nil, err
	}
	var matching []uint
	var other publicHalf
	for _, handle := range handles {
		public := m.reader(session, handle)
		candidate := readPublic(public, kind)
		if is(public.err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			continue
		}
		if public.err != nil {
			return nil, public.err
		}
		if half.agrees(candidate) {
			matching, other = append(matching, handle), candidate
		}
	}
	if len(matching) == 1 {
		half.complement(other)
	}
	return matching, nil
}

// generateKey makes a key pair for one purpose.
func (m *module) generateKey(r wire.GenerateRequest) (key wire.Key, _ error) {
	id, err := hex.DecodeString(r.ID)
	if err != nil || len(id) > maxID {
		return key, badRequest("the id %q is not hexadecimal of at most %d bytes", r.ID, maxID)
	}
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id)
	}
	mechanism, public, private, err := keyTemplates(r.Algorithm)
	if err != nil {
		return key, err
	}
	names := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_ID, id),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.Label),
	}
	err = m.inSession(r.Slot, pkcs11.CKF_RW_SESSION, func(session pkcs11.SessionHandle) error {
		same, err := m.find(session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, uint(pkcs11.CKO_PRIVATE_KEY)), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
		if err != nil {
			return err
		}
		if len(same) > 0 {
			return &wire.Error{Function: "C_GenerateKeyPair", Code: wire.CodeExists, Detail: fmt.Sprintf("a key with the id %x is there already", id)}
		}
		_, handle, err := m.ctx.GenerateKeyPair(session, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)},
			append(public, names...), append(private, names...))
		if err != nil {
			return failed("C_GenerateKeyPair", err)
		}
		key, err = m.describe(session, uint(handle))
		return err
	})
	return key, err
}

const maxID = 255 // bytes of a CKA_ID

// keyTemplates returns the attributes of both halves of a new key besides its names. Every usage attribute is set: where
// one is left out, some modules take it for true.
func keyTemplates(algorithm string) (mechanism uint, public, private []*pkcs11.Attribute, _ error) {
	private = []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN, false),
		pkcs11.NewAttribute(pkcs11.CKA_SIGN_RECOVER, false),
		pkcs11.NewAttribute(pkcs11.CKA_UNWRAP, false),
	}
	public = []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, false),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY_RECOVER, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, false),
	}
	rsa := func(bits int) (uint, []*pkcs11.Attribute, []*pkcs11.Attribute, error) {
		return pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN,
			append(public,
				pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, uint(pkcs11.CKK_RSA)),
				pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, bits),
				pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
				pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true)),
			append(private,
				pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, uint(pkcs11.CKK_RSA)),
				pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
				pkcs11.NewAttribute(pkcs11.CKA_DERIVE, false)),
			nil
	}
	ec := func(curve string) (uint, []*pkcs11.Attribute, []*pkcs11.Attribute, error) {
		return pkcs11.CKM_EC_KEY_PAIR_GEN,
			append(public,
				pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, uint(pkcs11.CKK_EC)),
				pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, curveByName(curve).params),
				pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, false)),
			append(private,
				pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, uint(pkcs11.CKK_EC)),
				pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, false),
				pkcs11.NewAttribute(pkcs11.CKA_DERIVE, true)),
			nil
	}
	switch algorithm {
	case "rsa-2048":
		return rsa(2048)
	case "rsa-3072":
		return rsa(3072)
	case "rsa-4096":
		return rsa(4096)
	case "ecdh-p256":
		return ec("P-256")
	case "ecdh-p384":
		return ec("P-384")
	default:
		return 0, nil, nil, badRequest("the algorithm %q is not known", algorithm)
	}
}

// destroyKey destroys the private half and then the public one: a private key without its public half may be lost to
// its owner, a public key alone is litter.
func (m *module) destroyKey(r wire.DestroyKeyRequest) error {
	return m.inSession(r.Slot, pkcs11.CKF_RW_SESSION, func(session pkcs11.SessionHandle) error {
		private := m.reader(session, r.Handle)
		class, id := private.number(pkcs11.CKA_CLASS), private.bytes(pkcs11.CKA_ID)
		if private.err != nil {
			return private.err
		}
		if class != pkcs11.CKO_PRIVATE_KEY {
			return badRequest("the object %d to be destroyed is no private key", r.Handle)
		}
		if r.PublicHandle != 0 {
			public := m.reader(session, r.PublicHandle)
			class, same := public.number(pkcs11.CKA_CLASS), bytes.Equal(id, public.bytes(pkcs11.CKA_ID))
			if public.err != nil {
				return public.err
			}
			if class != pkcs11.CKO_PUBLIC_KEY || !same {
				return badRequest("the object %d to be destroyed is not the public half of %d", r.PublicHandle, r.Handle)
			}
		}
		if err := m.ctx.DestroyObject(session, pkcs11.ObjectHandle(r.Handle)); err != nil {
			return failed("C_DestroyObject", err)
		}
		if r.PublicHandle == 0 {
			return nil
		}
		err := failed("C_DestroyObject", m.ctx.DestroyObject(session, pkcs11.ObjectHandle(r.PublicHandle)))
		if is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
			return nil // some tokens delete both at once
		}
		return err
	})
}

// The mask generation function of a hash (PKCS#11 2.40 mechanisms, 2.1.7): both use the same one.
var masks = map[uint]uint{
	pkcs11.CKM_SHA_1:  pkcs11.CKG_MGF1_SHA1,
	pkcs11.CKM_SHA256: pkcs11.CKG_MGF1_SHA256,
}

func (m *module) decryptOAEP(r wire.DecryptRequest, ciphertext, out []byte) (n int, err error) {
	mask, known := masks[r.Hash]
	if !known {
		return 0, badRequest("the hash 0x%x is not known: CKM_SHA_1 and CKM_SHA256 are", r.Hash)
	}
	err = m.inSession(r.Slot, 0, func(session pkcs11.SessionHandle) error {
		n, err = m.calls.decryptOAEP(session, r.Handle, r.Hash, mask, ciphertext, out)
		return err
	})
	return n, err
}

func (m *module) decryptRaw(r wire.DecryptRequest, ciphertext, out []byte) error {
	if r.Hash != 0 {
		return badRequest("a hash for a raw operation")
	}
	return m.inSession(r.Slot, 0, func(session pkcs11.SessionHandle) error {
		n, err := m.calls.decryptRaw(session, r.Handle, ciphertext, out)
		if err != nil {
			return err
		}
		// A number has no leading zeros for some modules; a padded block begins with one.
		copy(out[len(out)-n:], out[:n])
		clear(out[:len(out)-n])
		return nil
	})
}

func (m *module) derive(r wire.DeriveRequest, point, out []byte) error {
	return m.inSession(r.Slot, 0, func(session pkcs11.SessionHandle) error {
		secret, err := m.calls.derive(session, r.Handle, point, r.Size)
		if err != nil {
			return err
		}
		n, err := m.calls.attribute(session, secret, pkcs11.CKA_VALUE, out)
		// It is gone with the session at the latest, and a module that refuses this has derived all the same.
		_ = m.ctx.DestroyObject(session, pkcs11.ObjectHandle(secret))
		switch {
		case errors.Is(err, errNoAttribute):
			return &wire.Error{Function: "C_DeriveKey", Code: wire.CodeUnsupported, Detail: "the shared secret has no CKA_VALUE that can be read"}
		case err != nil:
			return err
		case n != len(out):
			return &wire.Error{Function: "C_DeriveKey", Code: wire.CodeUnsupported, Detail: fmt.Sprintf("a shared secret of %d bytes, %d are expected", n, len(out))}
		default:
			return nil
		}
	})
}
