package nethsm

import (
	"testing"
	"unicode/utf8"
)

func TestLongLabelKeepsBeginningAndEnd(t *testing.T) {
	for label, want := range map[string]string{
		"":                                  "",
		"nitroseal-prod-v1":                 "nitroseal-prod-v1",
		"exactly-thirty-two-bytes-long-ok":  "exactly-thirty-two-bytes-long-ok",
		"now-this-is-thirty-three-bytes-ok": "now-this-is-th~b6e53047~bytes-ok",
		"schlüssel-für-die-größte-aller-möglichen-übungen": "schlüssel-fü~005825a4~übungen",
		"\xff": "?",
	} {
		if got := shortLabel(label); got != want {
			t.Errorf("shortLabel(%q) = %q, want %q", label, got, want)
		}
	}
}

func FuzzShortLabel(f *testing.F) {
	f.Add("nitroseal-the-production-cluster-of-the-bank-v12")
	f.Add("\xf0\x9f\x94\x91\xf0\x9f\x94\x91\xf0\x9f\x94\x91\xf0\x9f\x94\x91\xf0\x9f\x94\x91\xf0\x9f\x94\x91\xf0\x9f\x94\x91\xf0\x9f\x94\x91\xf0")
	f.Fuzz(func(t *testing.T, label string) {
		short := shortLabel(label)
		if len(short) > maxLabel || !utf8.ValidString(short) || (short == "") != (label == "") {
			t.Errorf("shortLabel(%q) = %q", label, short)
		}
		if again := shortLabel(short); again != short {
			t.Errorf("shortLabel(%q) = %q, and of that %q", label, short, again)
		}
	})
}
