package nethsm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// An object lies in the certificate slot of a key of its own, its carrier. The carrier's id names the object, so that a name
// is taken as soon as the id is:
//
//	nitroseal-object.<application>..<label>     "nitroseal-object.nitroseal..material._prod._unseal.-7"
//	nitroseal-object-<SHA-256 of the header, hex>   where that would be longer than 128 characters
//
// A NetHSM's ids have letters, digits, "_", "-" and ".". In application and label "." begins an escape: "._" is "/", ".-"
// is "#", and ".x" with two hexadecimal digits any other byte.
//
// The certificate is one line, the header, with both names in Go's (and C's) quotes, and then the value:
//
//	nitroseal-object "nitroseal" "material/prod/unseal#7"
const (
	carrierPrefix = "nitroseal-object"
	plainPrefix   = carrierPrefix + "."
	digestPrefix  = carrierPrefix + "-"
	separator     = ".."
)

// isCarrier tells whether a key carries an object.
func isCarrier(id string) bool {
	return strings.HasPrefix(id, plainPrefix) || strings.HasPrefix(id, digestPrefix)
}

// carrierID is the id of the key that carries an object.
func carrierID(ref hsm.ObjectRef) string {
	if id := plainPrefix + escape(ref.Application) + separator + escape(ref.Label); len(id) <= maxID {
		return id
	}
	digest := sha256.Sum256(header(ref))
	return digestPrefix + hex.EncodeToString(digest[:])
}

// mayCarry tells whether an id can be that of an object of an application.
func mayCarry(id, application string) bool {
	return strings.HasPrefix(id, plainPrefix+escape(application)+separator) || strings.HasPrefix(id, digestPrefix)
}

// escape writes any text with the characters of an id.
func escape(text string) string {
	var out strings.Builder
	for i := range len(text) {
		switch c := text[i]; {
		case alphanumeric(rune(c)) || c == '_' || c == '-':
			out.WriteByte(c)
		case c == '/':
			out.WriteString("._")
		case c == '#':
			out.WriteString(".-")
		default:
			fmt.Fprintf(&out, ".x%02x", c)
		}
	}
	return out.String()
}

// header is the first line of a certificate.
func header(ref hsm.ObjectRef) []byte {
	return fmt.Appendf(nil, "%s %s %s\n", carrierPrefix, strconv.QuoteToASCII(ref.Application), strconv.QuoteToASCII(ref.Label))
}

// parseCertificate takes a certificate apart. One that no store of ours wrote into this carrier is not ok. The value is
// part of the certificate, not a copy.
func parseCertificate(id string, certificate []byte) (ref hsm.ObjectRef, value []byte, ok bool) {
	line, value, found := bytes.Cut(certificate, []byte("\n"))
	rest, ours := strings.CutPrefix(string(line), carrierPrefix+" ")
	if !found || !ours {
		return hsm.ObjectRef{}, nil, false
	}
	application, rest, ok1 := cutQuoted(rest)
	rest, blank := strings.CutPrefix(rest, " ")
	label, rest, ok2 := cutQuoted(rest)
	ref = hsm.ObjectRef{Application: application, Label: label}
	if !ok1 || !blank || !ok2 || rest != "" || !bytes.Equal(header(ref), certificate[:len(line)+1]) || carrierID(ref) != id {
		return hsm.ObjectRef{}, nil, false
	}
	return ref, value, true
}

// cutQuoted takes a quoted text from the beginning.
func cutQuoted(text string) (unquoted, rest string, ok bool) {
	quoted, err := strconv.QuotedPrefix(text)
	if err != nil {
		return "", "", false
	}
	unquoted, err = strconv.Unquote(quoted)
	return unquoted, text[len(quoted):], err == nil
}
