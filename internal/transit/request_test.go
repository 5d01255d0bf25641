package transit

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestWhatABodySays(t *testing.T) {
	deep := strings.Repeat("[", maxDepth+2) + strings.Repeat("]", maxDepth+2)
	tests := map[string]struct {
		body, want string
		found, bad bool
	}{
		"nothing":                        {"", "", false, false},
		"white space":                    {" \n", "", false, false},
		"an object without members":      {"{}", "", false, false},
		"the member":                     {`{"plaintext":"YQ=="}`, "YQ==", true, false},
		"the member, with space":         {" {\t\"plaintext\" :\r\"YQ==\" }\n", "YQ==", true, false},
		"the member, empty":              {`{"plaintext":""}`, "", true, false},
		"the member, null":               {`{"plaintext":null}`, "", false, false},
		"an escaped slash":               {`{"plaintext":"a\/b"}`, "a/b", true, false},
		"all escapes":                    {`{"plaintext":"\"\\\/\b\f\n\r\t\u0041\u00e9\u20ac"}`, "\"\\/\b\f\n\r\tAé€", true, false},
		"a pair of surrogates":           {`{"plaintext":"\ud83d\ude00!"}`, "😀!", true, false},
		"half a pair":                    {`{"plaintext":"\ud83d!"}`, "\ufffd!", true, false},
		"half a pair and another":        {`{"plaintext":"\ud83d\u0041"}`, "\ufffdA", true, false},
		"other members":                  {`{"a":[1,-2.5e+3,true,false,null,"x",{"b":{}}],"plaintext":"YQ==","z":0}`, "YQ==", true, false},
		"another case is another member": {`{"Plaintext":"YQ=="}`, "", false, false},
		"members that say nothing":       {`{"context":"","nonce":null,"batch_input":[],"key_version":0,"convergent_encryption":false,"plaintext":"YQ=="}`, "YQ==", true, false},
		"a context":                      {`{"context":"YQ==","plaintext":"YQ=="}`, "", false, true},
		"a nonce after it":               {`{"plaintext":"YQ==","nonce":"YQ=="}`, "", false, true},
		"associated data":                {`{"plaintext":"YQ==","associated_data":"YQ=="}`, "", false, true},
		"a batch":                        {`{"batch_input":[{}]}`, "", false, true},
		"convergent":                     {`{"plaintext":"YQ==","convergent_encryption":true}`, "", false, true},
		"the member twice":               {`{"plaintext":"a","plaintext":"a"}`, "", false, true},
		"the member twice, once null":    {`{"plaintext":null,"plaintext":"a"}`, "", false, true},
		"the member in two spellings":    {`{"plaintext":"a","pl\u0061intext":"b"}`, "", false, true},
		"a list":                         {`[]`, "", false, true},
		"a string":                       {`"plaintext"`, "", false, true},
		"no end":                         {`{"plaintext":"YQ=="`, "", false, true},
		"no end of the string":           {`{"plaintext":"YQ==`, "", false, true},
		"no end of an escape":            {`{"plaintext":"\`, "", false, true},
		"no end of a unit":               {`{"plaintext":"\u00`, "", false, true},
		"something after it":             {`{} x`, "", false, true},
		"two objects":                    {`{}{}`, "", false, true},
		"a comma too many":               {`{"plaintext":"a",}`, "", false, true},
		"a comma too few":                {`{"a":1 "b":2}`, "", false, true},
		"a colon too few":                {`{"plaintext" "a"}`, "", false, true},
		"a number that is none":          {`{"a":01}`, "", false, true},
		"a number without digits":        {`{"a":-}`, "", false, true},
		"a number that ends in a point":  {`{"a":1.}`, "", false, true},
		"a word that is none":            {`{"a":nul}`, "", false, true},
		"a line break in a string":       {"{\"plaintext\":\"a\nb\"}", "", false, true},
		"an escape that is none":         {`{"plaintext":"\x41"}`, "", false, true},
		"nested too deep":                {`{"a":` + deep + `}`, "", false, true},
		"a number":                       {`{"plaintext":1}`, "", false, true},
		"an object":                      {`{"plaintext":{}}`, "", false, true},
		"a byte order mark":              {"\ufeff{}", "", false, true},
		"a name without quotes":          {`{plaintext:"a"}`, "", false, true},
		"a zero byte":                    {"{\"plaintext\":\"\x00\"}", "", false, true},
	}
	for what, test := range tests {
		t.Run(what, func(t *testing.T) {
			got, err := parseRequest([]byte(test.body), "plaintext")
			if (err != nil) != test.bad {
				t.Fatalf("error: %v", err)
			}
			if string(got) != test.want || (got != nil) != test.found {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// TestErrorsQuoteNothing: what does not parse may still be a secret.
func TestErrorsQuoteNothing(t *testing.T) {
	for _, body := range []string{`{"plaintext":"c2VjcmV0`, `{"plaintext":"c2VjcmV0" x`, `c2VjcmV0`, `{"c2VjcmV0" 1}`, `{"context":"c2VjcmV0"}`, `{"a":"c2VjcmV0\x"}`} {
		_, err := parseRequest([]byte(body), "plaintext")
		if err == nil || strings.Contains(err.Error(), "c2V") {
			t.Errorf("%s: %v", body, err)
		}
	}
}

// FuzzRequest compares with encoding/json: what is taken here is the same there, and what is refused is refused for a reason.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `{"plaintext":"YQ=="}`, `{"ciphertext":"vault:v1:AAAA"}`, `{"plaintext":"\ud83d\ude00"}`, `{"plaintext":null,"x":[1,2,{"y":-1.5e9}]}`,
		`{"plaintext":"a","context":"b"}`, `{"plaintext":"a","plaintext":"b"}`, `{"a":"\u0000","plaintext":"\/"}`, `[]`, `{"batch_input":[{"plaintext":"YQ=="}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		got, err := parseRequest(body, "plaintext")
		if len(bytes.TrimSpace(before)) == 0 {
			return
		}
		var there map[string]json.RawMessage
		valid := json.Unmarshal(before, &there) == nil && there != nil
		if err != nil {
			if valid && errors.Is(err, errRequest) && bytes.Count(before, []byte("laintext")) < 2 && bytes.Count(before, []byte("[")) < maxDepth &&
				bytes.Count(before, []byte("{")) < maxDepth && isString(there["plaintext"]) && !bytes.Contains(before, []byte(`\u`)) {
				t.Errorf("%q is refused: %v", before, err)
			}
			return
		}
		if !valid {
			t.Fatalf("%q is taken and is no JSON object", before)
		}
		if !utf8.Valid(before) {
			return // encoding/json replaces what is not UTF-8; base64 refuses it afterwards
		}
		var text *string
		if raw, found := there["plaintext"]; found {
			if err := json.Unmarshal(raw, &text); err != nil {
				t.Fatalf("%q is taken: %v", before, err)
			}
		}
		if (text != nil) != (got != nil) || text != nil && *text != string(got) {
			t.Errorf("%q: got %q", before, got)
		}
	})
}

func isString(raw json.RawMessage) bool {
	var text *string
	return raw == nil || json.Unmarshal(raw, &text) == nil
}
