package pkcs11test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// Spy counts the calls of a token's module with OpenSC's pkcs11-spy, which nobody here wrote. Its log holds the PIN and
// the plaintext: throw-away tokens only.
type Spy struct {
	Token
	log string
}

// Spied puts the spy in front of a token.
func Spied(t testing.TB, token *Token) *Spy {
	t.Helper()
	spy := &Spy{Token: *token, log: filepath.Join(t.TempDir(), "spy.log")}
	spy.Module = firstFile(t, "OpenSC's pkcs11-spy (apt-get install opensc-pkcs11)", libraryDirs("pkcs11-spy.so"))
	spy.Env = append(slices.Clone(token.Env), "PKCS11SPY", "PKCS11SPY_OUTPUT")
	t.Setenv("PKCS11SPY", token.Module)
	t.Setenv("PKCS11SPY_OUTPUT", spy.log)
	return spy
}

// spyLine is the first line of a call in the spy's log: "12: C_Decrypt".
var spyLine = regexp.MustCompile(`(?m)^\d+: (C_\w+)`)

// Calls returns how often each function was called so far.
func (s *Spy) Calls(t testing.TB) map[string]int {
	t.Helper()
	content, err := os.ReadFile(s.log)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	calls := map[string]int{}
	for _, match := range spyLine.FindAllSubmatch(content, -1) {
		calls[string(match[1])]++
	}
	return calls
}
