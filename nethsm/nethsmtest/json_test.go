package nethsmtest

import (
	"encoding/json"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestJSONIsReadAsTheOriginalReadsIt(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want any
		err  string
	}{
		"an object":                 {`{"a": "b", "c": [1, true, null]}`, []member{{"a", "b"}, {"c", []any{1.0, true, nil}}}, ""},
		"names without quotes":      {`{a: -1.5e2}`, []member{{"a", -150.0}}, ""},
		"escapes":                   {`"a\n\"\u00e9\/"`, "a\n\"é/", ""},
		"nothing":                   {" ", nil, "Invalid JSON: Blank input data."},
		"half an object":            {`{"a"`, nil, "Invalid JSON: Unexpected end of input."},
		"half a text":               {`{"a":"b`, nil, "Invalid JSON: Unexpected end of input."},
		"a name without a value":    {"{not json", nil, "Invalid JSON: Line 1, bytes 5-9:\nExpected ':' but found 'json'."},
		"a word that is no value":   {`{"a":nope}`, nil, "Invalid JSON: Line 1, bytes 5-9:\nInvalid token 'nope'."},
		"something behind the end":  {"{}\n }", nil, "Invalid JSON: Line 2, byte 1:\nJunk after end of JSON value: '}'."},
		"a list with a second end":  {`[1 2]`, nil, "Invalid JSON: Line 1, byte 3:\nExpected ',' or ']' but found '2'."},
		"an object without a comma": {`{"a":1 "b":2}`, nil, "Invalid JSON: Line 1, byte 7:\nExpected ',' or '}' but found '\"'."},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseJSON([]byte(test.text))
			text := ""
			if err != nil {
				text = err.Error()
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(member{})); diff != "" || text != test.err {
				t.Errorf("error %q, want %q; value: %s", text, test.err, diff)
			}
		})
	}
}

func TestTheLastWrongFieldIsNamed(t *testing.T) {
	var a, b, mode string
	var n int
	fields := []field{text("a", &a), choice("mode", "mode", &mode, []string{"x"}), optional(integer("n", &n)), text("b", &b)}
	for body, want := range map[string]string{
		`{"a":"1","mode":"x","b":"2"}`:         "",
		`{"a":"1","mode":"x","n":3,"b":"2"}`:   "",
		`{}`:                                   "Invalid data for JSON schema: Json.req.b.",
		`{"b":"2"}`:                            "Invalid data for JSON schema: Json.req.mode.",
		`{"b":"2","mode":"x"}`:                 "Invalid data for JSON schema: Json.req.a.",
		`{"b":"2","mode":"y","a":1}`:           "Invalid data for JSON schema: Json.mode.",
		`{"b":"2","mode":"x","a":"1","n":"4"}`: "Invalid data for JSON schema: Json.req.n.",
		`{"c":"unknown"}`:                      "Invalid data for JSON schema: Json.req.",
		`["no object"]`:                        "Invalid data for JSON schema: Json.req.",
	} {
		got := ""
		if err := decode("req", []byte(body), fields...); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: %q, want %q", body, got, want)
		}
	}
}

// Whatever encoding/json takes, the lenient parser takes as well; and nothing makes it panic.
func FuzzParseJSON(f *testing.F) {
	for _, seed := range []string{`{"a":["b",1.5,{}]}`, `{not json`, `"\u12`, `[`, `{a:1}`, `nul`, "\"\xff\""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := parseJSON(data)
		if err != nil && json.Valid(data) {
			t.Errorf("%q: %v", data, err)
		}
	})
}

// A backup file comes from outside: nothing in it may make the reader panic.
func FuzzReadBackup(f *testing.F) {
	b := &backupRecord{Salt: make([]byte, 16), Key: make([]byte, 32)}
	r := emptyRecord()
	r.Backup = b
	r.DomainKey = make([]byte, 32)
	r.Users["u"] = &user{Role: roleOperator}
	file, err := r.backup(&nodeRecord{Lock: &lockRecord{Sealed: make([]byte, 60)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(file)
	f.Add(file[:40])
	f.Fuzz(func(t *testing.T, data []byte) {
		if got, _, err := readBackup(data, nil, b); err == nil && got == nil {
			t.Error("neither a backup nor an error")
		}
	})
}
