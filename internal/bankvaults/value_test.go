package bankvaults

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"
)

func TestSharesAsVaultPrintsThem(t *testing.T) {
	share := bytes.Repeat([]byte{0xa5, 0x01, 0xff}, 11)
	for name, test := range map[string]struct {
		text string
		want []byte
	}{
		"hexadecimal":             {hex.EncodeToString(share), share},
		"hexadecimal in capitals": {strings.ToUpper(hex.EncodeToString(share)), share},
		"base64":                  {base64.StdEncoding.EncodeToString(share), share},
		"the one share of a key":  {hex.EncodeToString(share[:32]), share[:32]},
		"one in base64":           {base64.StdEncoding.EncodeToString(share[:32]), share[:32]},
		"too short":               {hex.EncodeToString(share[:15]), nil},
		"too long":                {hex.EncodeToString(append(share, 1)), nil},
		"a line end":              {base64.StdEncoding.EncodeToString(share) + "\n", nil},
		"a PGP message":           {base64.StdEncoding.EncodeToString(make([]byte, 400)), nil},
		"a root token":            {"hvs.CAESIJ1f2e3d4c5b6a", nil},
		"nothing":                 {"", nil},
	} {
		got, ok := decodeShare([]byte(test.text))
		if ok != (test.want != nil) || !bytes.Equal(got, test.want) {
			t.Errorf("%s: %x, %v", name, got, ok)
		}
	}
}

func TestTokens(t *testing.T) {
	for text, want := range map[string]bool{
		"hvs.CAESIJ1f2e3d4c5b6a": true, "s.1f2e3d4c5b6a1f2e3d4c5b6a": true, "00000000-1111-2222-3333-444444444444": true,
		"": false, "s.short": false, "with a blank": false, "with\x00zero": false, "no-ascii-é": false, strings.Repeat("x", 513): false,
	} {
		if validToken([]byte(text)) != want {
			t.Errorf("%q: %v", text, !want)
		}
	}
}

func FuzzShare(f *testing.F) {
	f.Add([]byte(strings.Repeat("a5", 33)))
	f.Add([]byte(strings.Repeat("pf", 22)))
	f.Fuzz(func(t *testing.T, text []byte) {
		if share, ok := decodeShare(text); ok && (len(share) < minShare || len(share) > maxShare) {
			t.Errorf("a share of %d bytes", len(share))
		}
	})
}
