//go:build cgo

package modhost

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/asn1"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func TestPointsInEverySpelling(t *testing.T) {
	for _, c := range curves {
		private, err := c.ecdh.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		point := private.PublicKey().Bytes()
		octets, err := asn1.Marshal(point)
		if err != nil {
			t.Fatal(err)
		}
		bits, err := asn1.Marshal(asn1.BitString{Bytes: point, BitLength: 8 * len(point)})
		if err != nil {
			t.Fatal(err)
		}
		otherCurve := curves[0].params
		if c.name == "P-256" {
			otherCurve = curves[1].params
		}
		offCurve := bytes.Clone(point)
		offCurve[len(offCurve)-1] ^= 1
		for name, half := range map[string]struct {
			params, point []byte
			unusable      string
		}{
			"in an OCTET STRING":           {c.params, octets, ""},
			"bare":                         {c.params, point, ""},
			"in a BIT STRING":              {c.params, bits, ""},
			"with bytes behind it":         {c.params, append(bytes.Clone(octets), 0), "no point on " + c.name},
			"cut short":                    {c.params, octets[:len(octets)-1], "no point on " + c.name},
			"not on the curve":             {c.params, offCurve, "no point on " + c.name},
			"compressed":                   {c.params, append([]byte{2}, point[1:1+len(point)/2]...), "no point on " + c.name},
			"of another curve":             {otherCurve, octets, "no point on P-"},
			"of a curve that we lack":      {[]byte{0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x0a}, octets, "1.3.132.0.10"},
			"of a curve by name":           {append([]byte{0x13, 9}, "secp256k1"...), octets, `"secp256k1"`},
			"of a curve that is spelt out": {bytes.Repeat([]byte{0x30}, 100), octets, "a curve of its own"},
			"of a curve in other bytes":    {[]byte{0x30, 0}, octets, "3000"},
			"missing":                      {c.params, nil, "cannot be read"},
			"of no curve":                  {nil, octets, "cannot be read"},
		} {
			t.Run(c.name+" "+name, func(t *testing.T) {
				var key wire.Key
				publicHalf{params: half.params, point: half.point}.fill(pkcs11.CKK_EC, &key)
				if half.unusable != "" {
					if !strings.Contains(key.Unusable, half.unusable) || key.Point != nil {
						t.Errorf("got %+v, want it unusable because %q", key, half.unusable)
					}
					return
				}
				if key.Unusable != "" || key.Curve != c.name || !bytes.Equal(key.Point, point) {
					t.Errorf("got %+v, want %x", key, point)
				}
			})
		}
	}
}

func TestRSANumbers(t *testing.T) {
	modulus := func(bits int) []byte {
		b := make([]byte, bits/8)
		b[0] = 0x80
		return b
	}
	for name, c := range map[string]struct {
		modulus, exponent []byte
		unusable          string
	}{
		"an ordinary key":           {modulus(2048), []byte{1, 0, 1}, ""},
		"the exponent 3":            {modulus(4096), []byte{3}, ""},
		"a key that is too short":   {modulus(1024), []byte{1, 0, 1}, "1024 bits"},
		"a key of an odd length":    {modulus(2056), []byte{1, 0, 1}, "2056 bits"},
		"the exponent 1":            {modulus(2048), []byte{1}, "exponent 1"},
		"an even exponent":          {modulus(2048), []byte{1, 0, 0}, "exponent 65536"},
		"an exponent of 32 bits":    {modulus(2048), []byte{0x80, 0, 0, 1}, "exponent 2147483649"},
		"no exponent":               {modulus(2048), nil, "cannot be read"},
		"no modulus":                {nil, []byte{1, 0, 1}, "cannot be read"},
		"an exponent as long as it": {modulus(2048), modulus(2048), "exponent"},
	} {
		t.Run(name, func(t *testing.T) {
			var key wire.Key
			publicHalf{modulus: c.modulus, exponent: c.exponent}.fill(pkcs11.CKK_RSA, &key)
			if (key.Unusable == "") != (c.unusable == "") || !strings.Contains(key.Unusable, c.unusable) {
				t.Errorf("got %q, want %q", key.Unusable, c.unusable)
			}
		})
	}
}

func TestHalvesOfOneKeyAgree(t *testing.T) {
	point, err := hex.DecodeString("04" + strings.Repeat("11", 64))
	if err != nil {
		t.Fatal(err)
	}
	octets := append([]byte{4, 65}, point...)
	for name, c := range map[string]struct {
		a, b publicHalf
		want bool
	}{
		"nothing is known":                     {publicHalf{}, publicHalf{}, true},
		"one knows nothing":                    {publicHalf{}, publicHalf{modulus: []byte{5}}, true},
		"both know the same":                   {publicHalf{modulus: []byte{5}}, publicHalf{modulus: []byte{5}, exponent: []byte{3}}, true},
		"they differ":                          {publicHalf{modulus: []byte{5}}, publicHalf{modulus: []byte{7}}, false},
		"the same point in two spellings":      {publicHalf{point: point}, publicHalf{point: octets}, true},
		"the same point on different curves":   {publicHalf{point: point, params: []byte{1}}, publicHalf{point: octets, params: []byte{2}}, false},
		"different exponents of equal modulus": {publicHalf{modulus: []byte{5}, exponent: []byte{3}}, publicHalf{modulus: []byte{5}, exponent: []byte{7}}, false},
	} {
		if got := c.a.agrees(c.b); got != c.want || c.b.agrees(c.a) != c.want {
			t.Errorf("%s: %t, want %t", name, got, c.want)
		}
	}
}

func FuzzPublicHalf(f *testing.F) {
	f.Add(uint(pkcs11.CKK_EC), curves[0].params, append([]byte{4, 65, 4}, make([]byte, 64)...))
	f.Add(uint(pkcs11.CKK_RSA), make([]byte, 256), []byte{1, 0, 1})
	f.Add(uint(pkcs11.CKK_EC), []byte{0x13, 1, 'x'}, []byte{3, 2, 0, 4})
	f.Fuzz(func(t *testing.T, kind uint, a, b []byte) {
		half := publicHalf{modulus: a, exponent: b}
		if kind != pkcs11.CKK_RSA {
			half = publicHalf{params: a, point: b}
		}
		var key wire.Key
		half.fill(kind, &key)
		if key.Unusable == "" && len(key.Modulus) == 0 {
			if _, err := map[string]ecdh.Curve{"P-256": ecdh.P256(), "P-384": ecdh.P384()}[key.Curve].NewPublicKey(key.Point); err != nil {
				t.Errorf("a key that is called usable: %v", err)
			}
		}
	})
}
