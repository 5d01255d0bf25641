package nethsm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"reflect"
	"strings"
	"testing"
)

func b64(t testing.TB, text string) []byte {
	t.Helper()
	out, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// describe is the JSON of a key with a public half.
func describe(kind KeyType, public string) string {
	return fmt.Sprintf(`{"mechanisms":["M"],"type":%q,"operations":0,"public":%s,"restrictions":{}}`, kind, public)
}

func rsaJSON(modulus, exponent []byte) string {
	encode := base64.StdEncoding.EncodeToString
	return describe(TypeRSA, fmt.Sprintf(`{"modulus":%q,"publicExponent":%q}`, encode(modulus), encode(exponent)))
}

func dataJSON(kind KeyType, data []byte) string {
	return describe(kind, fmt.Sprintf(`{"data":%q}`, base64.StdEncoding.EncodeToString(data)))
}

func TestKeysThatCannotBeAreRefused(t *testing.T) {
	odd := new(big.Int).SetBit(big.NewInt(1), 2047, 1)
	even := new(big.Int).SetBit(new(big.Int), 2047, 1)
	short := new(big.Int).SetBit(big.NewInt(1), 1022, 1)
	long := new(big.Int).SetBit(big.NewInt(1), 8192, 1)
	point := elliptic.P256().Params()
	generator := append([]byte{4}, append(point.Gx.FillBytes(make([]byte, 32)), point.Gy.FillBytes(make([]byte, 32))...)...)
	beside := bytes.Clone(generator)
	beside[64] ^= 1
	f4 := []byte{1, 0, 1}
	for sentence, text := range map[string]string{
		"an even modulus":              rsaJSON(even.Bytes(), f4),
		"a modulus of 1023 bits":       rsaJSON(short.Bytes(), f4),
		"a modulus of 8193 bits":       rsaJSON(long.Bytes(), f4),
		"no modulus":                   rsaJSON(nil, f4),
		"an exponent of 1":             rsaJSON(odd.Bytes(), []byte{1}),
		"an even exponent":             rsaJSON(odd.Bytes(), []byte{1, 0, 0}),
		"an exponent of 32 bits":       rsaJSON(odd.Bytes(), []byte{0x80, 0, 0, 1}),
		"no exponent":                  rsaJSON(odd.Bytes(), nil),
		"an RSA key without any":       describe(TypeRSA, "null"),
		"an RSA key that is a point":   dataJSON(TypeRSA, generator),
		"a point beside the curve":     dataJSON(TypeECP256, beside),
		"a point of another curve":     dataJSON(TypeECP384, generator),
		"half a point":                 dataJSON(TypeECP256, generator[:33]),
		"no point":                     dataJSON(TypeECP256, nil),
		"the point at infinity":        dataJSON(TypeECP256, []byte{0}),
		"a short Ed25519 key":          dataJSON(TypeCurve25519, make([]byte, 31)),
		"a long Ed25519 key":           dataJSON(TypeCurve25519, make([]byte, 33)),
		"base64 that is none":          describe(TypeCurve25519, `{"data":"***"}`),
		"no type":                      `{"mechanisms":["M"],"public":null}`,
		"no mechanism":                 `{"mechanisms":[],"type":"Generic","public":null}`,
		"mechanisms that are a number": `{"mechanisms":7,"type":"Generic","public":null}`,
	} {
		t.Run(sentence, func(t *testing.T) {
			var key Key
			if err := json.Unmarshal([]byte(text), &key); err == nil {
				t.Errorf("%s gave %+v", text, key)
			}
		})
	}
	for sentence, c := range map[string]struct {
		text string
		want any
	}{
		"a point":                  {dataJSON(TypeECP256, generator), generator},
		"an Ed25519 key":           {dataJSON(TypeCurve25519, make([]byte, 32)), ed25519.PublicKey(make([]byte, 32))},
		"a Generic key":            {describe(TypeGeneric, "null"), nil},
		"a curve that Go has not":  {dataJSON(TypeBrainpoolP256, generator), nil},
		"a type from the future":   {describe("MLKEM768", `{"data":"AA==","more":1}`), nil},
		"an exponent of 3":         {rsaJSON(odd.Bytes(), []byte{3}), 3},
		"an exponent with zeros":   {rsaJSON(odd.Bytes(), []byte{0, 0, 0, 1, 0, 1}), 65537},
		"a modulus with a zero":    {rsaJSON(append([]byte{0}, odd.Bytes()...), f4), 65537},
		"the largest of exponents": {rsaJSON(odd.Bytes(), []byte{0x7f, 0xff, 0xff, 0xff}), 1<<31 - 1},
	} {
		t.Run(sentence, func(t *testing.T) {
			var key Key
			if err := json.Unmarshal([]byte(c.text), &key); err != nil {
				t.Fatal(err)
			}
			got := any(key.Public)
			switch public := key.Public.(type) {
			case *rsa.PublicKey:
				got = public.E
			case *ecdsa.PublicKey:
				point, err := public.Bytes()
				if err != nil {
					t.Fatal(err)
				}
				got = point
			}
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("public key %#v, want %#v", got, c.want)
			}
		})
	}
}

func TestPEMOfOneKind(t *testing.T) {
	for sentence, c := range map[string]struct {
		text string
		fits bool
	}{
		"one":                       {someCert, true},
		"one without a last line":   {strings.TrimSpace(someCert), true},
		"a chain":                   {someCert + "\n" + someCert, true},
		"another kind":              {somePEM, false},
		"another kind behind it":    {someCert + somePEM, false},
		"nothing":                   {"", false},
		"blanks":                    {" \n", false},
		"something else":            {"404 page not found", false},
		"something else behind it":  {someCert + "and more", false},
		"one that is cut":           {someCert[:len(someCert)-9], false},
		"a second one that is cut":  {someCert + someCert[:len(someCert)-9], false},
		"a private key where a ...": {strings.ReplaceAll(someCert, "CERTIFICATE", "PRIVATE KEY"), false},
	} {
		if err := checkPEM(pemCertificate, []byte(c.text)); (err == nil) != c.fits {
			t.Errorf("%s: %v", sentence, err)
		}
	}
}

// No method puts a name into a path that would lead elsewhere.
func TestNoNameLeadsElsewhere(t *testing.T) {
	client, node := startNode(t, replying(204, ""))
	names := 0
	for _, name := range EndpointMethods(t) {
		method, _ := reflect.TypeFor[*Client]().MethodByName(name)
		if method.Type.NumIn() < 3 || method.Type.In(2).Kind() != reflect.String || method.Type.In(2) == reflect.TypeFor[KeyType]() {
			continue
		}
		names++
		for _, id := range []string{"a/../../users", "..", ".", "", "a%2fb", "a?b", "a#b", "a b", "a\n", "ä", "a\x00", strings.Repeat("a", 129)} {
			if id == "" && name == "AddUser" {
				continue // the NetHSM chooses
			}
			arguments := []reflect.Value{reflect.ValueOf(client), reflect.ValueOf(t.Context())}
			for i := 2; i < method.Type.NumIn(); i++ {
				argument := reflect.New(method.Type.In(i)).Elem()
				if argument.Kind() == reflect.String {
					argument.SetString("good")
				}
				arguments = append(arguments, argument)
			}
			arguments[2].SetString(id)
			out := method.Func.Call(arguments)
			if err, _ := out[len(out)-1].Interface().(error); !errors.Is(err, ErrRequest) {
				t.Errorf("%s(%q) = %v, want ErrRequest", name, id, err)
			}
		}
	}
	if seen := node.seen(); names < 25 || len(seen) != 0 {
		t.Errorf("%d methods take a name, and the node saw %+v", names, seen)
	}
}
