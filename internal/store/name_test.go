package store_test

import (
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store"
)

func TestCheckName(t *testing.T) {
	tests := map[string]struct {
		name string
		good bool
	}{
		"one part":                          {"prod", true},
		"several parts":                     {"material/prod/unseal-keys_v1.2", true},
		"upper case and digits":             {"A9/Z0", true},
		"underscore first":                  {"_self/x", true},
		"as long as allowed":                {strings.Repeat("a", store.MaxNameLength), true},
		"one byte too long":                 {strings.Repeat("a", store.MaxNameLength+1), false},
		"empty":                             {"", false},
		"slash at the beginning":            {"/prod", false},
		"slash at the end":                  {"prod/", false},
		"empty part":                        {"a//b", false},
		"dot part":                          {"a/./b", false},
		"dot dot part":                      {"a/../b", false},
		"hidden file":                       {".lock", false},
		"dash first looks like an option":   {"-rf", false},
		"space":                             {"a b", false},
		"NUL":                               {"a\x00b", false},
		"newline":                           {"a\n", false},
		"letter outside ASCII":              {"clé", false},
		"escape character of a store":       {"a+b", false},
		"generation mark of an object name": {"a#1", false},
		"percent":                           {"a%2Fb", false},
		"backslash":                         {`a\b`, false},
		"wildcard":                          {"a*", false},
	}
	for sentence, test := range tests {
		t.Run(sentence, func(t *testing.T) {
			err := store.CheckName(test.name)
			if test.good && err != nil {
				t.Fatalf("CheckName(%q) = %v, want nil", test.name, err)
			}
			if !test.good && !errors.Is(err, store.ErrInvalidName) {
				t.Fatalf("CheckName(%q) = %v, want ErrInvalidName", test.name, err)
			}
		})
	}
}

func TestCheckPrefix(t *testing.T) {
	for prefix, good := range map[string]bool{"": true, "a/": true, "a/b/": true, "a": false, "/": false, "a//": false, "../": false} {
		if err := store.CheckPrefix(prefix); (err == nil) != good {
			t.Errorf("CheckPrefix(%q) = %v, want good=%v", prefix, err, good)
		}
	}
}

func FuzzCheckName(f *testing.F) {
	f.Add("material/prod/unseal")
	f.Add("../../etc/passwd")
	f.Fuzz(func(t *testing.T, name string) {
		if store.CheckName(name) != nil {
			return
		}
		if len(name) > store.MaxNameLength || strings.HasPrefix(name, "/") || strings.ContainsAny(name, "\x00\n#+%\\ ") {
			t.Fatalf("CheckName accepted %q", name)
		}
		for part := range strings.SplitSeq(name, "/") {
			if part == "" || part == "." || part == ".." {
				t.Fatalf("CheckName accepted %q", name)
			}
		}
	})
}
