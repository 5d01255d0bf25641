package token

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// golden are items as they lie in stores: they must be read for ever.
func golden(t testing.TB) map[string]Token {
	t.Helper()
	var hash [32]byte
	if _, err := hex.Decode(hash[:], []byte("9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")); err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return map[string]Token{
		"token.json": {
			ID: "abcdefgh23", Name: "prod vault", Hash: hash, Keys: []string{"prod", "prod-old"},
			CertificateNames: []string{"vault-1.example.org", "spiffe://example.org/vault"},
			Addresses:        []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::1/128")},
			Limit:            &Limit{Rate: 50, Burst: 500}, Created: at, CreatedBy: "alice on keeper",
		},
		"token-least.json": {ID: "zzzzzzzz77", Name: "lab", Hash: hash, Keys: []string{"lab"}, Created: at},
	}
}

func goldenItem(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestItemsOfEveryReleaseAreReadAndWrittenAlike(t *testing.T) {
	for name, want := range golden(t) {
		raw := goldenItem(t, name)
		got, err := decode(raw)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		again, err := encode(&got)
		if err != nil || !bytes.Equal(raw, again) {
			t.Errorf("%s is written as %s, %v", name, again, err)
		}
	}
}

func TestAnItemThatIsNotExactlyOursIsNone(t *testing.T) {
	whole := string(goldenItem(t, "token.json"))
	for name, change := range map[string][2]string{
		"an unknown member":            {`"format":1`, `"format":1,"expires":"2027-01-01T00:00:00Z"`},
		"a member twice":               {`"keys":["prod","prod-old"]`, `"keys":["prod","prod-old"],"keys":["prod","prod-old"]`},
		"a member in other letters":    {`"addresses"`, `"Addresses"`},
		"a later format":               {`"format":1`, `"format":2`},
		"no format":                    {`"format":1,`, ``},
		"white space":                  {`"format":1`, `"format": 1`},
		"more behind it":               {`"alice on keeper"}`, `"alice on keeper"} {}`},
		"a shorter hash":               {`9f86d081884c7d65`, `9f86d081884c7d`},
		"a hash in capitals":           {`9f86d081884c7d65`, `9F86D081884C7D65`},
		"an id that is none":           {`abcdefgh23`, `abcdefgh01`},
		"no wrapping key":              {`["prod","prod-old"]`, `[]`},
		"a wrapping key twice":         {`"prod-old"`, `"prod"`},
		"a wrapping key with a slash":  {`"prod-old"`, `"prod/old"`},
		"an address inside a network":  {`192.0.2.0/24`, `192.0.2.7/24`},
		"a mapped network":             {`192.0.2.0/24`, `::ffff:192.0.2.0/120`},
		"a network that is none":       {`192.0.2.0/24`, `example.org`},
		"networks that are not listed": {`["192.0.2.0/24","2001:db8::1/128"]`, `null`},
		"a rate without a burst":       {`"rate":50,"burst":500`, `"rate":50`},
		"a negative rate":              {`"rate":50`, `"rate":-50`},
		"no time":                      {`2026-01-02T03:04:05Z`, `yesterday`},
		"a time elsewhere":             {`2026-01-02T03:04:05Z`, `2026-01-02T04:04:05+01:00`},
		"a name with a line break":     {`prod vault`, `prod\nvault`},
		"no name":                      {`prod vault`, ``},
		"a certificate name of spaces": {`vault-1.example.org`, `a b`},
	} {
		t.Run(name, func(t *testing.T) {
			changed := strings.Replace(whole, change[0], change[1], 1)
			if changed == whole {
				t.Fatal("nothing was changed")
			}
			if got, err := decode([]byte(changed)); !errors.Is(err, ErrMalformed) {
				t.Errorf("decoded as %+v, %v", got, err)
			}
		})
	}
	if _, err := decode(bytes.Repeat([]byte(" "), maxItem+1)); !errors.Is(err, ErrMalformed) {
		t.Error("an item of any size is read")
	}
	if _, err := decode([]byte(strings.Replace(whole, `"format":1`, `"format":9`, 1))); err == nil || !strings.Contains(err.Error(), "later version") {
		t.Errorf("an item of a later version: %v", err)
	}
}

func FuzzDecodeItem(f *testing.F) {
	f.Add(goldenItem(f, "token.json"))
	f.Add(goldenItem(f, "token-least.json"))
	f.Add([]byte(`{"format":1,"addresses":null}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := decode(raw)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("another error: %v", err)
			}
			return
		}
		again, err := encode(&got)
		if err != nil || !bytes.Equal(raw, again) {
			t.Fatalf("%q is written as %q, %v", raw, again, err)
		}
		if len(got.Keys) == 0 || !isID(got.ID) || !json.Valid(raw) {
			t.Fatalf("a token that cannot be: %+v", got)
		}
	})
}

func FuzzDecodeCopy(f *testing.F) {
	tokens := map[string]Token{}
	for _, one := range golden(f) {
		tokens[one.ID] = one
	}
	raw, _, err := encodeCopy(tokens, "store", time.Unix(1e9, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		tokens, read, err := decodeCopy(raw, "store")
		if err != nil {
			return
		}
		again, _, err := encodeCopy(tokens, "store", read)
		if err != nil {
			t.Fatal(err)
		}
		twice, _, err := decodeCopy(again, "store")
		if err != nil || len(twice) != len(tokens) {
			t.Fatalf("read again: %d of %d, %v", len(twice), len(tokens), err)
		}
	})
}

// FuzzSplit: whatever somebody sends is a token's text or has no id.
func FuzzSplit(f *testing.F) {
	f.Add("ns.abcdefgh23." + strings.Repeat("A", 43))
	f.Add("hvs.CAESI")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		if id := split(text); id != "" && !strings.HasPrefix(text, "ns."+id+".") {
			t.Fatalf("%q has the id %q", text, id)
		}
	})
}

func TestATokenIsRandomAndItsItemDoesNotHoldIt(t *testing.T) {
	spec := Spec{Name: "prod", Keys: []string{"prod"}, Addresses: []string{"192.0.2.7", "2001:db8::/32"}, By: "alice"}
	seen := map[string]bool{}
	for range 100 {
		made, text, err := spec.make(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if len(text) != textLength || split(string(text)) != made.ID || seen[string(text)] || seen[made.ID] {
			t.Fatalf("text %q of token %s", text, made.ID)
		}
		seen[string(text)], seen[made.ID] = true, true
		raw, err := encode(&made)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(raw, text[len(prefix)+idLength+1:]) {
			t.Fatalf("the item %s holds the secret of %s", raw, text)
		}
		if _, err := decode(raw); err != nil {
			t.Fatal(err)
		}
		if want := []netip.Prefix{netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("2001:db8::/32")}; !slices.Equal(made.Addresses, want) {
			t.Fatalf("addresses %v", made.Addresses)
		}
	}
}

func TestATokenThatCannotBeIsNotMade(t *testing.T) {
	for name, test := range map[string]struct {
		spec Spec
		want string
	}{
		"no name":                 {Spec{Keys: []string{"a"}}, "name whoever will hold the token"},
		"no key":                  {Spec{Name: "a"}, "names no wrapping key"},
		"a key with a slash":      {Spec{Name: "a", Keys: []string{"a/b"}}, "not the name of a wrapping key"},
		"a network that is none":  {Spec{Name: "a", Keys: []string{"a"}, Addresses: []string{"example.org"}}, "write 192.0.2.17 or 192.0.2.0/24"},
		"an address in a network": {Spec{Name: "a", Keys: []string{"a"}, Addresses: []string{"192.0.2.7/24"}}, "write 192.0.2.0/24 for all of it, or 192.0.2.7"},
		"an address of a link":    {Spec{Name: "a", Keys: []string{"a"}, Addresses: []string{"fe80::1%eth0"}}, "neither an address nor a network"},
		"a rate without a burst":  {Spec{Name: "a", Keys: []string{"a"}, Limit: &Limit{Rate: 5}}, "a limit is 1 to"},
		"too many keys":           {Spec{Name: "a", Keys: slices.Repeat([]string{"a"}, maxKeys+1)}, "more than 64 wrapping keys"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := test.spec.make(time.Now())
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want …%s…", err, test.want)
			}
		})
	}
}
