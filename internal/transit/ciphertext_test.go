package transit_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/internal/transit"
)

func TestFormatIsWhatClientsSplit(t *testing.T) {
	got := transit.Format(3, []byte(`{"protected":"…"}`))
	want := "vault:v3:eyJwcm90ZWN0ZWQiOiLigKYifQ=="
	if got != want {
		t.Fatalf("Format = %q, want %q", got, want)
	}
	if parts := strings.Split(got, ":"); len(parts) != 3 {
		t.Errorf("a ciphertext has %d parts, want 3: Vault's seal refuses any other number", len(parts))
	}
}

func TestParseGivesBackWhatFormatMade(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		version := rapid.IntRange(1, 1<<31-1).Draw(t, "version")
		envelope := rapid.SliceOfN(rapid.Byte(), 1, 200).Draw(t, "envelope")
		gotVersion, gotEnvelope, err := transit.Parse(transit.Format(version, envelope))
		if err != nil || gotVersion != version || !bytes.Equal(gotEnvelope, envelope) {
			t.Fatalf("Parse = %d, %x, %v; want %d, %x", gotVersion, gotEnvelope, err, version, envelope)
		}
	})
}

func TestParseRefuses(t *testing.T) {
	for name, test := range map[string]struct{ ciphertext, complaint string }{
		"nothing":                             {"", "no prefix"},
		"another scheme":                      {"enc:v1:YQ==", "no prefix"},
		"upper case":                          {"VAULT:v1:YQ==", "no prefix"},
		"a space before it":                   {" vault:v1:YQ==", "no prefix"},
		"two parts, as vault:AAAA":            {"vault:AAAA", "no prefix"},
		"no envelope":                         {"vault:v1", "wrong number of fields"},
		"an empty envelope":                   {"vault:v1:", "wrong number of fields"},
		"no version":                          {"vault:v:YQ==", "version number"},
		"version zero":                        {"vault:v0:YQ==", "version number"},
		"a negative version":                  {"vault:v-1:YQ==", "version number"},
		"a version with a sign":               {"vault:v+1:YQ==", "version number"},
		"a version with a leading zero":       {"vault:v01:YQ==", "version number"},
		"a version that is no number":         {"vault:vx:YQ==", "version number"},
		"a version beyond 31 bits":            {"vault:v2147483648:YQ==", "version number"},
		"a fourth part":                       {"vault:v1:YQ==:YQ==", "base64"},
		"base64 without padding":              {"vault:v1:YQ", "base64"},
		"base64 of the URL alphabet":          {"vault:v1:-_-_", "base64"},
		"base64 with stray bits at its end":   {"vault:v1:YR==", "base64"},
		"base64 with a line break inside":     {"vault:v1:YW\nFh", "base64"},
		"base64 with a line break at its end": {"vault:v1:YWFh\n", "base64"},
		"more than an envelope can be": {
			"vault:v1:" + base64.StdEncoding.EncodeToString(make([]byte, transit.MaxEnvelope+3)), "larger than",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, envelope, err := transit.Parse(test.ciphertext)
			if !errors.Is(err, transit.ErrMalformed) || envelope != nil {
				t.Fatalf("Parse = %x, %v; want ErrMalformed", envelope, err)
			}
			if !strings.HasPrefix(err.Error(), "invalid ciphertext: ") || !strings.Contains(err.Error(), test.complaint) {
				t.Errorf("error %q does not complain of %q", err, test.complaint)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{"vault:v1:YQ==", "vault:v12:", "vault:v1:YQ==:x", "vault:v01:YQ==", "vault:v1:YW\nFh", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, ciphertext string) {
		version, envelope, err := transit.Parse(ciphertext)
		if err != nil {
			if !errors.Is(err, transit.ErrMalformed) {
				t.Fatalf("Parse(%q): %v is not ErrMalformed", ciphertext, err)
			}
			return
		}
		if again := transit.Format(version, envelope); again != ciphertext {
			t.Fatalf("Parse accepts %q, a second spelling of %q", ciphertext, again)
		}
	})
}
