package nethsm

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"unicode/utf8"

	"vault-plugin-secrets-nitrokey/hsm"
)

// ourMechanism is the one thing that our keys can do.
const ourMechanism = RSADecryptionOAEPSHA256

// rsaBits are the algorithms that a NetHSM has for us. It has elliptic-curve keys, and nothing to agree on a secret with.
var rsaBits = map[hsm.Algorithm]int{hsm.RSA2048: 2048, hsm.RSA3072: 3072, hsm.RSA4096: 4096}

// GenerateKey implements [hsm.Device]. It needs the Administrator. The key can do nothing but RSA_Decryption_OAEP_SHA256, and
// has the tags of the configuration; where the operator has none of them nothing is made, because a key that nobody can use
// must not be sealed to. An answer that was lost is looked for by the key's id.
//
// A NetHSM takes labels of 32 bytes. A longer one is shortened, and so is one that is looked for. A server older than
// 5.0 takes none: then the key is called by its id.
func (d *Device) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	key, err := d.generate(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("generating the %s key %q: %w", spec.Algorithm, spec.Label, err)
	}
	return key, nil
}

func (d *Device) generate(ctx context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	bits, known := rsaBits[spec.Algorithm]
	if !known {
		return nil, fmt.Errorf("%w: a NetHSM makes RSA keys of 2048, 3072 and 4096 bits for this", hsm.ErrUnsupported)
	}
	id := spec.ID
	if id == "" {
		random := make([]byte, 10)
		_, _ = rand.Read(random) // never fails: crypto/rand
		id = hex.EncodeToString(random)
	}
	if err := checkID("choosing an id", "the key", id); err != nil {
		return nil, err
	}
	if isCarrier(id) {
		return nil, fmt.Errorf("%w: ids that begin with %q are for objects; take another one", ErrRequest, carrierPrefix)
	}
	administrator, err := d.administrator()
	if err != nil {
		return nil, err
	}
	if err := d.mayUse(ctx, d.tags); err != nil {
		return nil, err
	}
	wanted := NewKey{
		ID: id, Type: TypeRSA, Length: bits, Mechanisms: []Mechanism{ourMechanism}, Tags: d.tags, Label: shortLabel(spec.Label),
	}
	err = d.inOrder(ctx, administrator, func(node *Client) error { return d.make(ctx, node, wanted) })
	if err != nil {
		return nil, err
	}
	return d.made(ctx, id, bits)
}

// make makes a key, whatever happens to the answer.
func (d *Device) make(ctx context.Context, node *Client, wanted NewKey) error {
	// Known to be free before, a key that is there after a lost answer is the one that was asked for.
	switch _, err := node.described(ctx, wanted.ID); {
	case err == nil:
		return fmt.Errorf("%w: a key with id %s", hsm.ErrExists, wanted.ID)
	case !errors.Is(err, hsm.ErrNotFound):
		return err
	}
	_, err := node.GenerateKey(ctx, wanted)
	if errors.Is(err, ErrRequest) && wanted.Label != "" {
		// An older server refuses a label as it refuses all that it does not know. Then nothing was made.
		unlabelled := wanted
		unlabelled.Label = ""
		if _, again := node.GenerateKey(ctx, unlabelled); again == nil || !errors.Is(again, ErrRequest) {
			err = again
		}
	}
	if errors.Is(err, hsm.ErrMayHaveHappened) && ctx.Err() == nil {
		// Any node will do: the one that made it may have gone down over it.
		if _, there := d.shared.administrator.Key(ctx, wanted.ID); there == nil {
			return nil
		}
	}
	return err
}

// made reads a new key back as the operator sees it.
func (d *Device) made(ctx context.Context, id string, bits int) (hsm.Key, error) {
	told, err := d.shared.operator.described(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("reading the new key back as the operator %q: %w", d.shared.operatorName, err)
	}
	key, err := d.newKey(told)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: the key was made and cannot be used: %w", hsm.ErrUnsupported, err)
	case key.public.N.BitLen() != bits || len(key.OAEPHashes()) == 0 || len(key.Traits().AlsoUsableFor) > 0:
		return nil, fmt.Errorf("%w: under the id %s is an RSA key of %d bits with the mechanisms %s", hsm.ErrKeyChanged, id,
			key.public.N.BitLen(), listMechanisms(key.mechanisms))
	}
	return key, nil
}

// mayUse fails where the operator may not use a key that is restricted to tags.
func (d *Device) mayUse(ctx context.Context, tags []string) error {
	if len(tags) == 0 {
		return nil
	}
	name := d.shared.operatorName
	has, err := d.shared.operator.UserTags(ctx, name)
	if err != nil {
		return fmt.Errorf("asking for the tags of the operator %q: %w", name, err)
	}
	if slices.ContainsFunc(tags, func(tag string) bool { return slices.Contains(has, tag) }) {
		return nil
	}
	return fmt.Errorf("%w: the key is for operators with one of the tags %s, and %q has none of them; an administrator gives it one "+
		"with PUT /users/%s/tags/%s", hsm.ErrForbidden, quoted(tags), name, name, tags[0])
}

// DeleteKey implements [hsm.Device]. It needs the Administrator.
func (d *Device) DeleteKey(ctx context.Context, ref hsm.KeyRef) error {
	if err := d.delete(ctx, ref); err != nil {
		return fmt.Errorf("deleting the key %q (id %s): %w", ref.Label, ref.ID, err)
	}
	return nil
}

func (d *Device) delete(ctx context.Context, ref hsm.KeyRef) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	if ref.ID == "" || ref.Fingerprint == "" {
		return fmt.Errorf("%w: both the id and the fingerprint are needed", ErrRequest)
	}
	administrator, err := d.administrator()
	if err != nil {
		return err
	}
	return d.inOrder(ctx, administrator, func(node *Client) error {
		there, err := node.described(ctx, ref.ID)
		if err != nil {
			return err
		}
		key, err := d.newKey(there)
		if err != nil || key.ref.Fingerprint != ref.Fingerprint {
			return fmt.Errorf("%w: the id belongs to another one", hsm.ErrKeyChanged)
		}
		return d.destroy(ctx, node, ref.ID)
	})
}

// destroy deletes a key that was there a moment ago, whatever happens to the answer.
func (d *Device) destroy(ctx context.Context, node *Client, id string) error {
	// Not Client.DeleteKey, which does not say whether it may have happened.
	in := call{op: fmt.Sprintf("deleting key %q", id), method: http.MethodDelete, path: path("keys", id), creates: true}
	_, err := node.do(ctx, in)
	if errors.Is(err, hsm.ErrMayHaveHappened) && ctx.Err() == nil {
		if _, gone := d.shared.administrator.Key(ctx, id); errors.Is(gone, hsm.ErrNotFound) {
			return nil
		}
	}
	if errors.Is(err, hsm.ErrNotFound) {
		return nil // somebody else was faster
	}
	return err
}

// shortLabel makes a label fit into the 32 bytes that a NetHSM takes. A longer one keeps its beginning and its end, which has
// the version; what stands between them are 8 digits of its SHA-256, for labels that differ in the middle.
func shortLabel(label string) string {
	label = strings.ToValidUTF8(label, "?")
	if len(label) <= maxLabel {
		return label
	}
	digest := sha256.Sum256([]byte(label))
	begin, end := label[:14], label[len(label)-8:]
	for !utf8.ValidString(begin) {
		begin = begin[:len(begin)-1]
	}
	for !utf8.ValidString(end) {
		end = end[1:]
	}
	return fmt.Sprintf("%s~%x~%s", begin, digest[:4], end)
}
