package custody

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// The encoding lies in envelopes that must open with every later release.
func TestEncodingOfFieldsIsFixed(t *testing.T) {
	fields := Fields{"unseal_key_2": {0, 1, 2}, "root-token": []byte("hvs.x"), "empty": nil}
	const golden = `{"empty":"","root-token":"aHZzLng=","unseal_key_2":"AAEC"}`
	if got := fields.encode(); string(got) != golden {
		t.Errorf("encode = %s, want %s", got, golden)
	}
	if size := fields.size(); size != len(golden) {
		t.Errorf("size = %d, want %d", size, len(golden))
	}
	decoded, err := decodeFields([]byte(golden))
	if err != nil || len(decoded) != 3 || !bytes.Equal(decoded["unseal_key_2"], []byte{0, 1, 2}) || len(decoded["empty"]) != 0 {
		t.Errorf("decodeFields = %v, %v", decoded, err)
	}
}

func TestEncodingLeavesNoCopyBehind(t *testing.T) {
	fields := Fields{"a": bytes.Repeat([]byte{7}, 1000), "b": bytes.Repeat([]byte{9}, 1001)}
	if payload := fields.encode(); cap(payload) < len(payload) || len(payload) != fields.size() {
		t.Errorf("the buffer of %d bytes grew while %d were written", fields.size(), len(payload))
	}
}

func TestOnlyOurOwnEncodingIsRead(t *testing.T) {
	for sentence, payload := range map[string]string{
		"nothing":                 ``,
		"no member":               `{}`,
		"other JSON":              `["a"]`,
		"white space":             `{"a": "AA=="}`,
		"text at the end":         `{"a":"AA=="} `,
		"a member twice":          `{"a":"AA==","a":"AA=="}`,
		"members out of order":    `{"b":"AA==","a":"AA=="}`,
		"comma at the end":        `{"a":"AA==",}`,
		"escape in a name":        `{"\u0061":"AA=="}`,
		"base64 without padding":  `{"a":"AA"}`,
		"base64 with spare bits":  `{"a":"AB=="}`,
		"base64 with a line end":  "{\"a\":\"AA\n==\"}",
		"base64 for URLs":         `{"a":"__8="}`,
		"number":                  `{"a":1}`,
		"name with a slash":       `{"a/b":"AA=="}`,
		"empty name":              `{"":"AA=="}`,
		"cut short in the middle": `{"a":"AA=`,
	} {
		if fields, err := decodeFields([]byte(payload)); !errors.Is(err, errPayload) || fields != nil {
			t.Errorf("%s: decodeFields = %v, %v, want errPayload", sentence, fields, err)
		}
	}
}

func TestFieldsThatCannotBeAnItem(t *testing.T) {
	many := Fields{}
	for i := range MaxFields + 1 {
		many[fmt.Sprint(i)] = nil
	}
	for sentence, fields := range map[string]Fields{
		"none":       {},
		"too many":   many,
		"empty name": {"": nil},
		"long name":  {strings.Repeat("a", MaxFieldName+1): nil},
		"bad name":   {"a b": nil},
		"quote":      {`a"b`: nil},
		"too large":  {"a": make([]byte, envelope.MaxPayload)},
	} {
		if err := fields.check(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: check = %v, want ErrInvalid", sentence, err)
		}
	}
	largest := Fields{"a": make([]byte, (envelope.MaxPayload-len(`{"a":""}`))/4*3)}
	if err := largest.check(); err != nil {
		t.Errorf("the largest: check = %v", err)
	}
	if n := len(largest.encode()); n > envelope.MaxPayload {
		t.Errorf("the largest takes %d bytes", n)
	}
}

func FuzzDecodeFields(f *testing.F) {
	f.Add([]byte(`{"empty":"","root-token":"aHZzLng=","unseal_key_2":"AAEC"}`))
	f.Add([]byte(`{"a":"AA==","a":"AA=="}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		fields, err := decodeFields(payload)
		if err != nil {
			return
		}
		if err := fields.check(); err != nil && len(payload) <= envelope.MaxPayload {
			t.Fatalf("decoded fields that cannot be written: %v", err)
		}
		if again := fields.encode(); !bytes.Equal(again, payload) {
			t.Fatalf("decoded %q, which is written as %q", payload, again)
		}
	})
}
