package cluster

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
)

// someShares are shares as Vault makes them, none alike.
func someShares(n, first int) [][]byte {
	shares := make([][]byte, n)
	for i := range shares {
		shares[i] = bytes.Repeat([]byte{byte(first + i)}, maxShare)
	}
	return shares
}

func b64(share []byte) string { return base64.StdEncoding.EncodeToString(share) }

func jsonList(shares [][]byte, encode func([]byte) string) string {
	texts := make([]string, len(shares))
	for i, share := range shares {
		texts[i] = `"` + encode(share) + `"`
	}
	return "[" + strings.Join(texts, ",") + "]"
}

func lines(shares [][]byte, format string, encode func([]byte) string) string {
	var text strings.Builder
	for i, share := range shares {
		if strings.Contains(format, "%d") {
			fmt.Fprintf(&text, format, i+1, encode(share))
		} else {
			fmt.Fprintf(&text, format, encode(share))
		}
	}
	return text.String()
}

const sentences = "\nVault initialized with 5 key shares and a key threshold of 3. Please securely\ndistribute the key shares printed above.\n"

func TestParseShares(t *testing.T) {
	unseal, recovery := someShares(5, 1), someShares(3, 101)
	commandJSON := `{"unseal_keys_b64": ` + jsonList(unseal, b64) + `, "unseal_keys_hex": ` + jsonList(unseal, hex.EncodeToString) +
		`, "unseal_shares": 5, "unseal_threshold": 3, "recovery_keys_b64": [], "recovery_keys_hex": [], "recovery_keys_shares": 0, ` +
		`"recovery_keys_threshold": 0, "root_token": "hvs.abc"}`

	for name, test := range map[string]struct {
		raw  string
		want GivenShares
	}{
		"what the command wrote as JSON": {commandJSON, GivenShares{Shares: unseal, RootToken: []byte("hvs.abc"), N: 5, T: 3}},
		"the same with recovery keys only": {
			`{"unseal_keys_b64":[],"unseal_shares":1,"unseal_threshold":1,"recovery_keys_b64":` + jsonList(recovery, b64) +
				`,"recovery_keys_shares":3,"recovery_keys_threshold":2,"root_token":null}`,
			GivenShares{RecoveryShares: recovery, N: 1, T: 1, RecoveryN: 3, RecoveryT: 2},
		},
		"what the API answers": {
			`{"keys":` + jsonList(unseal, hex.EncodeToString) + `,"keys_base64":` + jsonList(unseal, b64) + `,"root_token":"s.x"}`,
			GivenShares{Shares: unseal, RootToken: []byte("s.x")},
		},
		"what the command wrote as text": {
			lines(unseal, "Unseal Key %d: %s\n", b64) + "\nInitial Root Token: hvs.abc\n" + sentences,
			GivenShares{Shares: unseal, RootToken: []byte("hvs.abc"), N: 5, T: 3},
		},
		"the text of a cluster that unseals itself": {
			lines(recovery, "Recovery Key %d: %s\n", b64) + "\nInitial Root Token: hvs.abc\n\nSuccess! Vault is initialized\n\n" +
				"Recovery key initialized with 3 key shares and a key threshold of 2. Please\nsecurely distribute the key shares printed above.\n",
			GivenShares{RecoveryShares: recovery, RootToken: []byte("hvs.abc"), RecoveryN: 3, RecoveryT: 2},
		},
		"the text of a rekey":         {lines(unseal, "Key %d: %s\n", b64) + "\nOperation nonce: 1\n", GivenShares{Shares: unseal}},
		"one share a line, base64":    {lines(unseal, "%s\n", b64), GivenShares{Shares: unseal}},
		"one share a line, hex, CRLF": {lines(unseal[:3], "%s\r\n", hex.EncodeToString), GivenShares{Shares: unseal[:3]}},
		"both, with empty lines":      {"\n" + b64(unseal[0]) + "\n\n  " + hex.EncodeToString(unseal[1]) + "  ", GivenShares{Shares: unseal[:2]}},
		"one key that is no share":    {b64(unseal[0][:32]), GivenShares{Shares: [][]byte{unseal[0][:32]}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseShares([]byte(test.raw))
			if err != nil {
				t.Fatal(err)
			}
			if fmt.Sprintf("%+v", *got) != fmt.Sprintf("%+v", test.want) {
				t.Errorf("ParseShares = %+v, want %+v", *got, test.want)
			}
			got.Wipe()
			for _, share := range append(got.Shares, got.RecoveryShares...) {
				if !bytes.Equal(share, make([]byte, len(share))) {
					t.Error("a share was not wiped")
				}
			}
		})
	}
}

func TestParseSharesRefuses(t *testing.T) {
	unseal := someShares(3, 1)
	good := b64(unseal[0])
	for name, test := range map[string]struct{ raw, want string }{
		"nothing":                           {"", "there is none"},
		"an empty object":                   {"{}", "there is none"},
		"half an object":                    {`{"unseal_keys_b64": ["` + good + `"`, "at byte"},
		"a number for a key":                {`{"unseal_keys_b64": [1]}`, "JSON"},
		"an object for a list":              {`{"unseal_keys_b64": {"a":"` + good + `"}}`, "at byte"},
		"an escape in a key":                {`{"unseal_keys_b64": ["\u0041"]}`, "JSON"},
		"a key cut short":                   {`{"unseal_keys_b64": ["` + good[:16] + `"]}`, "number 1"},
		"base64 and hex that differ":        {`{"unseal_keys_b64": ["` + good + `"], "unseal_keys_hex": ["` + hex.EncodeToString(unseal[1]) + `"]}`, "not the same"},
		"base64 and hex of other numbers":   {`{"keys_base64": ["` + good + `"], "keys": ` + jsonList(unseal, hex.EncodeToString) + `}`, "not the same"},
		"more keys than it says":            {`{"unseal_keys_b64": ` + jsonList(unseal, b64) + `, "unseal_shares": 2}`, "there are 3"},
		"impossible numbers":                {`{"unseal_keys_b64": ` + jsonList(unseal, b64) + `, "unseal_shares": 5, "unseal_threshold": -3}`, "impossible"},
		"a line that is no share":           {good + "\nhunter2\n", "line 2"},
		"an unseal key that is none":        {"Unseal Key 1: hunter2\n", "line 1"},
		"one share twice":                   {good + "\n" + b64(unseal[1]) + "\n" + hex.EncodeToString(unseal[0]), "unseal key 3 is the same as number 1"},
		"a share with a character missing":  {good + "\n" + hex.EncodeToString(unseal[1])[:64], "another length"},
		"two outputs in one file":           {"Initial Root Token: a\nInitial Root Token: b\n", "second root token"},
		"a root token of several words":     {"Unseal Key 1: " + good + "\nInitial Root Token: hunter2 hunter2\n", "root token"},
		"a token in place of a share":       {"hvs.hunter2hunter2hunter2hunter2hunter2", "line 1"},
		"a PGP message in place of a share": {b64(bytes.Repeat([]byte{1}, 500)), "line 1"},
		"more shares than there can be":     {lines(someShares(256, 0), "%s\n", b64), "more than 255"},
		"a whole disk":                      {strings.Repeat("a", MaxSharesFile+1), "right file"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseShares([]byte(test.raw))
			if !errors.Is(err, ErrShares) || !strings.Contains(err.Error(), test.want) || got != nil {
				t.Fatalf("ParseShares = %v, want ErrShares with %q", err, test.want)
			}
			for _, secret := range []string{"hunter2", good[:8], good[len(good)-8:], "hvs."} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error tells what stands there: %v", err)
				}
			}
		})
	}
}

// Whatever a file holds, it is read or refused, and an error quotes nothing of it.
func FuzzParseShares(f *testing.F) {
	unseal := someShares(3, 1)
	f.Add([]byte(`{"unseal_keys_b64": ` + jsonList(unseal, b64) + `, "unseal_shares": 3, "unseal_threshold": 2, "root_token": "hvs.abc"}`))
	f.Add([]byte(lines(unseal, "Unseal Key %d: %s\n", b64) + "Initial Root Token: hvs.abc\n" + sentences))
	f.Add([]byte(lines(unseal, "%s\n", hex.EncodeToString)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		before := bytes.Clone(raw)
		got, err := ParseShares(raw)
		if !bytes.Equal(raw, before) {
			t.Fatal("it changed what it was given")
		}
		if err != nil {
			if !errors.Is(err, ErrShares) || got != nil {
				t.Errorf("error = %v, want ErrShares", err)
			}
			for word := range strings.FieldsSeq(string(raw)) {
				if len(word) >= 24 && strings.Contains(err.Error(), word) {
					t.Errorf("the error tells what stands there: %v", err)
				}
			}
			return
		}
		again, err := ParseShares([]byte(lines(append(got.Shares, got.RecoveryShares...), "%s\n", b64)))
		if len(got.RecoveryShares) == 0 && (err != nil || len(again.Shares) != len(got.Shares)) {
			t.Errorf("what was read does not come back: %v", err)
		}
	})
}
