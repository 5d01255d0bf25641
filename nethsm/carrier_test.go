package nethsm

import (
	"bytes"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// What was written by any version must be found by every later one, so the ids never change.
func TestCarriersHaveTheNamesThatTheyAlwaysHad(t *testing.T) {
	for _, test := range []struct {
		ref hsm.ObjectRef
		id  string
	}{
		{
			hsm.ObjectRef{Application: "nitroseal", Label: "material/prod/unseal#7"},
			"nitroseal-object.nitroseal..material._prod._unseal.-7",
		},
		{hsm.ObjectRef{Application: "nitroseal", Label: "a"}, "nitroseal-object.nitroseal..a"},
		{hsm.ObjectRef{Application: "vault-1/eu", Label: "A_b-C.d"}, "nitroseal-object.vault-1._eu..A_b-C.x2ed"},
		{hsm.ObjectRef{Application: "é ", Label: "\x00\xff"}, "nitroseal-object..xc3.xa9.x20...x00.xff"},
		{hsm.ObjectRef{}, "nitroseal-object..."},
		{
			hsm.ObjectRef{Application: "nitroseal", Label: strings.Repeat("a", 100)},
			"nitroseal-object.nitroseal.." + strings.Repeat("a", 100),
		},
		{
			hsm.ObjectRef{Application: "nitroseal", Label: strings.Repeat("a", 101)},
			"nitroseal-object-f1520e8108ae9e5da10b727579f421a71a9569310124e2ce48b57c6a3cdc808a",
		},
	} {
		if got := carrierID(test.ref); got != test.id {
			t.Errorf("the carrier of %+v is %q, want %q", test.ref, got, test.id)
		}
		if checkID("", "the key", test.id) != nil || !isCarrier(test.id) || !mayCarry(test.id, test.ref.Application) {
			t.Errorf("%q is no id of a carrier of %q", test.id, test.ref.Application)
		}
	}
	for _, id := range []string{"", "nitroseal-object", "nitroseal-objects", "nitroseal-key", "1f3a", "nitroseal_object.a..b"} {
		if isCarrier(id) {
			t.Errorf("%q counts as a carrier", id)
		}
	}
	if mayCarry(carrierID(hsm.ObjectRef{Application: "ab", Label: "c"}), "a") {
		t.Error("a carrier of one application may be one of another")
	}
}

func TestCertificatesBeginWithTheName(t *testing.T) {
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "material/prod/unseal#7"}
	if got, want := string(header(ref)), "nitroseal-object \"nitroseal\" \"material/prod/unseal#7\"\n"; got != want {
		t.Errorf("the header is %q, want %q", got, want)
	}
	good := append(header(ref), "value\nof two lines"...)
	got, value, ok := parseCertificate(carrierID(ref), good)
	if !ok || got != ref || string(value) != "value\nof two lines" {
		t.Errorf("parsing gives %+v, %q, %t", got, value, ok)
	}
	if _, value, ok := parseCertificate(carrierID(ref), header(ref)); !ok || len(value) != 0 {
		t.Errorf("an empty value is parsed as %q, %t", value, ok)
	}
	for name, bad := range map[string]string{
		"no header":            "-----BEGIN CERTIFICATE-----\n",
		"nothing":              "",
		"no end of the line":   `nitroseal-object "nitroseal" "material/prod/unseal#7"`,
		"one name":             "nitroseal-object \"nitroseal\"\n",
		"three names":          "nitroseal-object \"nitroseal\" \"material/prod/unseal#7\" \"x\"\n",
		"another name":         "nitroseal-object \"nitroseal\" \"material/prod/unseal#8\"\n",
		"names without quotes": "nitroseal-object nitroseal material/prod/unseal#7\n",
		"two blanks":           "nitroseal-object \"nitroseal\"  \"material/prod/unseal#7\"\n",
		"other quotes":         "nitroseal-object `nitroseal` \"material/prod/unseal#7\"\n",
		"a needless escape":    "nitroseal-object \"\\x6eitroseal\" \"material/prod/unseal#7\"\n",
	} {
		if got, _, ok := parseCertificate(carrierID(ref), []byte(bad)); ok {
			t.Errorf("a certificate with %s is taken for %+v", name, got)
		}
	}
}

// Every pair of short names of characters that mean something in an id, or that differ in case only, has an id of its own.
func TestNamesThatLookAlikeHaveCarriersOfTheirOwn(t *testing.T) {
	texts := []string{""}
	for begin := 0; len(texts) < 400; {
		end := len(texts)
		for _, text := range texts[begin:end] {
			for _, c := range ".-_/#x2aA" {
				texts = append(texts, text+string(c))
			}
		}
		begin = end
	}
	carried := map[string]hsm.ObjectRef{}
	for _, application := range texts[:91] { // of two characters at most
		for _, label := range texts {
			ref := hsm.ObjectRef{Application: application, Label: label}
			id := carrierID(ref)
			if other, taken := carried[id]; taken {
				t.Fatalf("%+v and %+v have the carrier %q", ref, other, id)
			}
			carried[id] = ref
		}
	}
}

// Two names never share a carrier, and a name always comes back.
func FuzzCarrier(f *testing.F) {
	f.Add("nitroseal", "material/prod/unseal#7", "nitroseal", "material/prod/unseal#8", []byte("value"))
	f.Add("a.", ".b", "a", "..b", []byte("\n"))
	f.Add(strings.Repeat("a", 64), strings.Repeat("b/", 50), strings.Repeat("a", 64), strings.Repeat("b#", 50), []byte{})
	f.Fuzz(func(t *testing.T, application1, label1, application2, label2 string, value []byte) {
		one, two := hsm.ObjectRef{Application: application1, Label: label1}, hsm.ObjectRef{Application: application2, Label: label2}
		id := carrierID(one)
		if err := checkID("", "the key", id); err != nil || !isCarrier(id) || !mayCarry(id, one.Application) {
			t.Fatalf("the carrier %q of %+v: %v", id, one, err)
		}
		if (one == two) != (id == carrierID(two)) {
			t.Errorf("%+v and %+v have the carriers %q and %q", one, two, id, carrierID(two))
		}
		got, back, ok := parseCertificate(id, append(header(one), value...))
		if !ok || got != one || !bytes.Equal(back, value) {
			t.Errorf("%+v with %q comes back as %+v with %q, %t", one, value, got, back, ok)
		}
	})
}

func FuzzParseCertificate(f *testing.F) {
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
	f.Add(append(header(ref), "value"...))
	f.Add([]byte("nitroseal-object \"\" \"\"\n"))
	f.Add([]byte("nitroseal-object `a` 'b'\n"))
	f.Fuzz(func(t *testing.T, certificate []byte) {
		parsed, value, ok := parseCertificate(carrierID(ref), certificate)
		if !ok {
			return
		}
		if parsed != ref || !bytes.Equal(append(header(parsed), value...), certificate) {
			t.Errorf("%q is parsed as %+v with %q", certificate, parsed, value)
		}
	})
}
