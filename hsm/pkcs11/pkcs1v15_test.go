package pkcs11

import (
	"bytes"
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
