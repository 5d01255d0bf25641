package envelope

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"
)

// The fast path of the scanner takes nothing that the other one refuses, and the same where both take it.
func TestTheFastPathReadsBase64AsTheSlowOneDoes(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		text := []byte(rapid.StringMatching("[A-Za-z0-9_=+/\\r\\n -]{0,3}[A-Za-z0-9_-]{0,40}[\"\\r\\n=]{0,2}").Draw(rt, "text"))
		least, most := rapid.IntRange(1, 20).Draw(rt, "least"), rapid.IntRange(20, 24).Draw(rt, "most")
		fast := &scanner{what: "it", text: text}
		quick := fast.fastBase64(least, most)
		slow := &scanner{what: "it", text: text}
		encoded := slow.run("it", base64url.EncodedLen(most), isBase64Byte)
		var want []byte
		if slow.err == nil {
			decoded := make([]byte, base64url.DecodedLen(len(encoded)))
			if n, err := base64url.Decode(decoded, encoded); err == nil && n >= least {
				want = decoded[:n]
			}
		}
		if !bytes.Equal(quick, want) || quick != nil && fast.at != slow.at || quick == nil && fast.at != 0 {
			rt.Fatalf("fast %x at %d, slow %x at %d", quick, fast.at, want, slow.at)
		}
	})
}
