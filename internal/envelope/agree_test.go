package envelope

import (
	"encoding/base64"
	"testing"
)

// The example of RFC 7518, appendix C.
func TestConcatKDFGivesTheKeyOfRFC7518(t *testing.T) {
	z := []byte{
		158, 86, 217, 29, 129, 113, 53, 211, 114, 131, 66, 131, 191, 132, 38, 156,
		251, 49, 110, 163, 218, 128, 106, 72, 246, 218, 167, 121, 140, 254, 144, 196,
	}
	key := concatKDF(z, "A128GCM", "Alice", "Bob", 16)
	if got := base64.RawURLEncoding.EncodeToString(key); got != "VqqN6vgjbSBcIijNcacQGg" {
		t.Errorf("derived %s", got)
	}
}
