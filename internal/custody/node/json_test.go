package node

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func TestTheScannerReadsWhatJSONIs(t *testing.T) {
	for text, want := range map[string]string{
		`"plain"`: "plain", `""`: "", `"a\"b\\c\/d"`: `a"b\c/d`, `"\b\f\n\r\t"`: "\b\f\n\r\t", `"\u0041\u00e9\u20ac"`: "Aé€",
		`"\ud83d\ude00"`: "😀", `"\ud83d"`: "\ufffd", `"\ud83d\u0041"`: "\ufffdA", `"é€😀"`: "é€😀", `"\u002b/\u003d"`: "+/=",
	} {
		buffer := []byte(`{"x":` + text + `,"y":"behind"}`)
		var got, behind string
		err := scanObject(buffer, func(name string, s *scanner) error {
			raw, err := s.text()
			if name == "x" {
				got = string(raw)
			} else {
				behind = string(raw)
			}
			return err
		})
		if err != nil || got != want || behind != "behind" {
			t.Errorf("%s: %q and %q, %v", text, got, behind, err)
		}
	}
}

func TestTheScannerRefusesWhatIsNone(t *testing.T) {
	for _, text := range []string{
		"", " ", "{", `{"a"`, `{"a":`, `{"a":1`, `{"a":1,`, `{"a":1,}`, `{"a" 1}`, `{a:1}`, `{"a":1}x`, `{"a":1}{}`, `[1]`, `"a"`, `null`,
		`{"a":tru}`, `{"a":nul}`, `{"a":"` + "\n" + `"}`, `{"a":"\x"}`, `{"a":"\u12"}`, `{"a":"\u12g4"}`, `{"a":[1,]}`, `{"a":[1 2]}`, `{"a":}`, `{"a":"\"}`,
		`{"a":` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`,
	} {
		if err := scanObject([]byte(text), func(_ string, s *scanner) error { return s.skip() }); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func TestCountsAreSmallAndNotNegative(t *testing.T) {
	for text, want := range map[string]int{"0": 0, "5": 5, " 255 ": 255, "null": 0, "-1": -1, "1.5": -1, "1e3": -1, "99999999999": -1, `"3"`: -1, "true": -1, "": -1} {
		got := 0
		err := scanObject([]byte(`{"n":`+text+`}`), func(_ string, s *scanner) error { return s.count(&got) })
		if (err != nil) != (want < 0) || want >= 0 && got != want {
			t.Errorf("%q: %d, %v", text, got, err)
		}
	}
}

func TestTheWriterWritesJSON(t *testing.T) {
	w := &writer{}
	w.share([]byte{0xfb, 0xff, 0xfe})
	w.text("odd", "a\"b\\c\n\x00é\xff")
	w.texts("list", []string{"a", "b"})
	w.texts("none", nil)
	w.count("n", 12)
	w.count("zero", 0)
	w.flag("yes", true)
	w.flag("no", false)
	var got map[string]any
	if err := json.Unmarshal(w.end(), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 5 || got["key"] != "+//+" || got["odd"] != "a\"b\\c\n\x00é\ufffd" || got["n"] != 12.0 || got["yes"] != true ||
		len(got["list"].([]any)) != 2 {
		t.Errorf("%v", got)
	}
	if empty := (&writer{}).end(); string(empty) != "{}" {
		t.Errorf("%s", empty)
	}
}

// FuzzScanner compares with encoding/json what is taken and what is read.
func FuzzScanner(f *testing.F) {
	for _, text := range []string{`{"a":"b"}`, `{"a":[1,{"b":null}],"c":true}`, `{"a":"\u0041\n"}`, `{`, `{"a":"\ud83d\ude00"}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		got := map[string]string{}
		err := scanObject(bytes.Clone(text), func(name string, s *scanner) error {
			if s.blank(); s.at < len(s.buffer) && s.buffer[s.at] == '"' {
				value, err := s.text()
				got[name] = string(value)
				return err
			}
			delete(got, name)
			return s.skip()
		})
		var want map[string]any
		reference := json.Unmarshal(text, &want)
		if reference == nil && want == nil {
			return // null
		}
		if reference == nil && err != nil && !strings.Contains(err.Error(), "too deep") {
			t.Fatalf("%q is refused: %v", text, err)
		}
		if reference != nil || err != nil {
			return // numbers and invalid UTF-8 are looked at less strictly
		}
		for name, value := range want {
			if s, is := value.(string); is && strings.ToValidUTF8(got[name], "\ufffd") != s && !strings.ContainsRune(s, '\ufffd') &&
				!strings.ContainsRune(name, '\ufffd') {
				t.Fatalf("%q: %q is %q, not %q", text, name, got[name], s)
			}
		}
	})
}
