package pkcs11

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func TestPKCS1v15PaddingIsTakenOff(t *testing.T) {
	filling := strings.Repeat("\xaa", 8)
	for name, test := range map[string]struct{ block, want string }{
		"a message":                      {"\x00\x02" + filling + "\x00share", "share"},
		"an empty message":               {"\x00\x02" + filling + "\x00", ""},
		"a message with zeros":           {"\x00\x02" + filling + "\x00\x00a\x00", "\x00a\x00"},
		"more filling than is needed":    {"\x00\x02" + filling + filling + "\x00share", "share"},
		"a wrong first byte":             {"\x01\x02" + filling + "\x00share", "!"},
		"a block that is made to sign":   {"\x00\x01" + filling + "\x00share", "!"},
		"too little filling":             {"\x00\x02" + filling[1:] + "\x00share-and-more", "!"},
		"no end of the filling":          {"\x00\x02" + filling + filling, "!"},
		"the end of the filling is last": {"\x00\x02" + filling + filling + "\x00", ""},
		"nothing":                        {"", "!"},
		"a block that is too short":      {"\x00\x02" + filling, "!"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := unpadPKCS1v15([]byte(test.block))
			if test.want == "!" {
				if !errors.Is(err, hsm.ErrCiphertext) {
					t.Errorf("it gives %q, %v; want ErrCiphertext", got, err)
				}
				return
			}
			if err != nil || string(got) != test.want {
				t.Errorf("it gives %q, %v; want %q", got, err, test.want)
			}
		})
	}
}

// TestPKCS1v15AgreesWithCryptoRSA for moduli of whole and of broken bytes.
func TestPKCS1v15AgreesWithCryptoRSA(t *testing.T) {
	odd, err := rsa.GenerateKey(rand.Reader, 2041)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []*rsa.PrivateKey{sharedKey(), odd} {
		for _, size := range []int{0, 1, 66, key.Size() - 12, key.Size() - 11} {
			message := make([]byte, size)
			ciphertext, err := rsa.EncryptPKCS1v15(rand.Reader, &key.PublicKey, message) //nolint:staticcheck // what old values are encrypted with
			if err != nil {
				t.Fatal(err)
			}
			got, err := unpadPKCS1v15(raw(key, ciphertext))
			if err != nil || !bytes.Equal(got, message) {
				t.Errorf("%d bits, %d bytes: got %d bytes, %v", key.N.BitLen(), size, len(got), err)
			}
		}
	}
}

func FuzzUnpadPKCS1v15(f *testing.F) {
	f.Add([]byte("\x00\x02\xaa\xaa\xaa\xaa\xaa\xaa\xaa\xaa\x00share"))
	f.Add([]byte("\x00\x02\xaa\xaa\xaa\xaa\xaa\xaa\xaa\x00\x00share"))
	f.Fuzz(func(t *testing.T, block []byte) {
		// The same as RFC 8017 puts it, without hiding anything.
		var want []byte
		if rest, padded := bytes.CutPrefix(block, []byte{0, 2}); padded {
			if filling, message, ended := bytes.Cut(rest, []byte{0}); ended && len(filling) >= 8 {
				want = append([]byte{}, message...)
			}
		}
		got, err := unpadPKCS1v15(block)
		if (err == nil) != (want != nil) || !bytes.Equal(got, want) {
			t.Errorf("%x gives %x, %v; want %x", block, got, err, want)
		}
	})
}

func TestPKCS1v15NeedsTheBareOperation(t *testing.T) {
	f, m, module := newFake(t)
	k := key(t, f.open(t, m, module))
	if _, err := k.DecryptPKCS1v15(patient(t), make([]byte, k.public.Size())); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("a token without CKM_RSA_X_509 gives %v, want ErrUnsupported", err)
	}
	if n := f.count(wire.OpDecryptRaw); n != 0 {
		t.Errorf("it was asked %d times", n)
	}
}

func TestPKCS1v15SendsNoNumberBeyondTheModulus(t *testing.T) {
	f, m, module := newFake(t)
	k := key(t, f.open(t, m, module))
	k.raw = true
	if _, err := k.DecryptPKCS1v15(patient(t), bytes.Repeat([]byte{0xff}, k.public.Size())); !errors.Is(err, hsm.ErrCiphertext) {
		t.Errorf("it gives %v, want ErrCiphertext", err)
	}
	if n := f.count(wire.OpDecryptRaw); n != 0 {
		t.Errorf("it was asked %d times", n)
	}
}

func TestForeignObjectsThatTheHostCannotHaveMeant(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	for name, size := range map[string]int{"more than it gave": 6, "less than nothing": -1} {
		f.follow(func(h *fakeHost, r wire.Frame) bool {
			if r.Op != wire.OpReadForeign {
				return false
			}
			h.answer(r, wire.Foreign{Objects: []wire.ForeignObject{{Size: size}}}, []byte("value"))
			return true
		})
		if objects, err := d.ReadForeign(patient(t), "vault-root"); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("%s: %v, %v; want ErrUnavailable", name, objects, err)
		}
	}
	if _, err := d.ReadForeign(patient(t), ""); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("no label: %v, want ErrUnsupported", err)
	}
	if err := d.DeleteForeign(patient(t), "", nil); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("no label: %v, want ErrUnsupported", err)
	}
}
