package bankvaults

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"strings"
)

// The sizes of a share in bytes: Vault's key has 16 to 32, and a share of several one more.
const minShare, maxShare = 16, 33

// The sizes of a token, in bytes.
const minToken, maxToken = 8, 512

// decodeShare reads a share as Vault prints it: in hexadecimal, as Bank-Vaults keeps it, or in base64. Hexadecimal counts
// where it can be both, which 2⁻⁸⁸ of all shares in base64 can. The caller wipes the result.
func decodeShare(text []byte) ([]byte, bool) {
	decoded := make([]byte, max(hex.DecodedLen(len(text)), base64.StdEncoding.DecodedLen(len(text))))
	n, err := hex.Decode(decoded, text)
	if err != nil {
		clear(decoded)
		n, err = base64.StdEncoding.Strict().Decode(decoded, text)
	}
	if err != nil || n < minShare || n > maxShare || bytes.ContainsAny(text, "\r\n") { // the decoder passes over line ends
		clear(decoded)
		return nil, false
	}
	return decoded[:n:n], true
}

// validToken tells whether a text can be one of Vault's tokens.
func validToken(text []byte) bool {
	if len(text) < minToken || len(text) > maxToken {
		return false
	}
	for _, c := range text {
		if c <= ' ' || c >= 0x7f {
			return false
		}
	}
	return true
}

// unwrapText returns the block that a text is the base64 of, and else the text's own bytes.
func unwrapText(text string) ([]byte, error) {
	if block, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(text)); err == nil && len(block) >= 256 {
		return block, nil
	}
	return []byte(text), nil
}
