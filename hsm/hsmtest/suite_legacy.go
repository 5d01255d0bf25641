package hsmtest

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"math/big"
	"slices"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// testLegacy checks an hsm.LegacyDecrypter.
func (s *suite) testLegacy(t *testing.T, algorithm hsm.Algorithm) {
	t.Helper()
	device := s.device(t)
	found, err := hsm.FindKey(s.context(t), device, hsm.KeyQuery{Fingerprint: s.keys[algorithm].Fingerprint})
	if err != nil {
		t.Fatal(err)
	}
	key, ok := found.(hsm.LegacyDecrypter)
	if !ok {
		t.Fatal("the key is no hsm.LegacyDecrypter")
	}
	public := found.Public().(*rsa.PublicKey)
	encrypt := func(message []byte) []byte {
		t.Helper()
		block, err := rsa.EncryptPKCS1v15(rand.Reader, public, message) //nolint:staticcheck // what old values are encrypted with
		if err != nil {
			t.Fatal(err)
		}
		return block
	}
	for name, message := range map[string][]byte{
		"a share": []byte("1f2e3d"), "nothing": {}, "the largest": bytes.Repeat([]byte{0}, public.Size()-11),
	} {
		got, err := key.DecryptPKCS1v15(s.context(t), encrypt(message))
		if err != nil || !bytes.Equal(got, message) {
			t.Errorf("%s decrypts to %x, %v", name, got, err)
		}
	}
	wrong := encrypt([]byte("share"))
	wrong[len(wrong)/2] ^= 1
	// What the bare operation does not change: 0, 1 and one less than the modulus. They look like no other answer of a token.
	zero, one := make([]byte, len(wrong)), make([]byte, len(wrong))
	one[len(one)-1] = 1
	most := new(big.Int).Sub(public.N, big.NewInt(1)).FillBytes(make([]byte, len(wrong)))
	for name, block := range map[string][]byte{
		"a block of nothing": zero, "a block of one": one, "the largest block": most,
		"a changed block": wrong, "a short block": wrong[1:], "no block": nil, "a block of nothing but ones": bytes.Repeat([]byte{0xff}, len(wrong)),
	} {
		if got, err := key.DecryptPKCS1v15(s.context(t), block); !errors.Is(err, hsm.ErrCiphertext) {
			t.Errorf("%s gives %x, %v; want ErrCiphertext", name, got, err)
		}
	}
	if _, err := key.DecryptPKCS1v15(s.context(t), encrypt([]byte("again"))); err != nil {
		t.Errorf("after wrong blocks: %v", err)
	}
}

// testForeign checks an hsm.ForeignObjects.
func (s *suite) testForeign(t *testing.T) {
	device := s.device(t)
	foreign, ok := device.(hsm.ForeignObjects)
	if !ok {
		t.Fatal("the device is no hsm.ForeignObjects")
	}
	label, application := "foreign-"+unique(), "suite-"+unique()
	count := func(t *testing.T) (n int) {
		t.Helper()
		labels, err := foreign.ForeignLabels(s.context(t))
		if err != nil || !slices.IsSorted(labels) {
			t.Fatalf("ForeignLabels gives %q, %v", labels, err)
		}
		for _, l := range labels {
			if l == label {
				n++
			}
		}
		return n
	}
	if objects, err := foreign.ReadForeign(s.context(t), label); !errors.Is(err, hsm.ErrNotFound) || count(t) != 0 {
		t.Fatalf("before anything was written ReadForeign gives %v, %v", objects, err)
	}
	if err := foreign.DeleteForeign(s.context(t), label, []byte("one")); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("DeleteForeign of nothing gives %v, want ErrNotFound", err)
	}
	s.caps.Foreign(t, label, []byte("one"))
	s.caps.Foreign(t, label, []byte("two"))
	s.caps.Foreign(t, label, []byte("two"))
	if store, ok := device.(hsm.ObjectStore); ok {
		ref := hsm.ObjectRef{Application: application, Label: label}
		if err := store.WriteObject(s.context(t), ref, []byte("owned")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.sweepObjects(t, store, application) })
	} else {
		s.caps.Foreign(t, label, []byte("owned"))
	}
	values := func(t *testing.T) (values []string) {
		t.Helper()
		objects, err := foreign.ReadForeign(s.context(t), label)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range objects {
			values = append(values, string(o.Value))
			if owned := o.Application == application; owned != (string(o.Value) == "owned") {
				t.Errorf("the application of %q is %q", o.Value, o.Application)
			}
		}
		return values
	}
	if got, want := values(t), []string{"one", "owned", "two", "two"}; !slices.Equal(got, want) || count(t) != len(want) {
		t.Errorf("%d objects with the values %q, want %q", count(t), got, want)
	}
	if err := foreign.DeleteForeign(s.context(t), label, []byte("three")); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("DeleteForeign of another value gives %v, want ErrNotFound", err)
	}
	if err := foreign.DeleteForeign(s.context(t), label, []byte("two")); err != nil {
		t.Errorf("DeleteForeign: %v", err)
	}
	if got, want := values(t), []string{"one", "owned"}; !slices.Equal(got, want) {
		t.Errorf("after a deletion the values are %q, want %q", got, want)
	}
	if err := foreign.DeleteForeign(s.context(t), label, []byte("one")); err != nil {
		t.Errorf("DeleteForeign: %v", err)
	}
}
