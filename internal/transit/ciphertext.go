// Package transit is the wire of `seal "transit"`: what a Vault or OpenBao that auto-unseals with another Vault's transit
// engine sends and gets back.
//
// A ciphertext is `vault:v<version>:<base64>`. The client splits it at ":" into exactly three parts, keeps the second one
// as its key id and gives the whole string back for decryption; a changed version makes it rewrap its values at the next
// unseal. The third part is an envelope of ours, in standard base64 with padding.
//
// [NewHandler] answers what a seal asks over HTTP: it encrypts, decrypts and renews its token. Whatever a request costs besides
// the opening itself is kept small: bodies are read and answers written by hand, in buffers that are used again.
//
// [Parse] is strict: a ciphertext has one spelling only, so that whoever compares, logs or deduplicates ciphertexts can
// rely on it.
package transit

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
)

// MaxEnvelope is the size in bytes of the largest envelope that Parse decodes. One with the largest payload and the most
// recipients is smaller.
const MaxEnvelope = 128 << 10

// prefix is what Vault's own transit writes; clients and scripts look for it.
const prefix = "vault:v"

// ErrMalformed is wrapped by every error of [Parse]. Its text is the one of Vault's transit.
var ErrMalformed = errors.New("invalid ciphertext")

// Format returns the ciphertext of an envelope that was sealed under a version of a wrapping key, 1 or more.
func Format(version int, envelope []byte) string {
	return string(appendCiphertext(nil, version, envelope))
}

// appendCiphertext is [Format] into a buffer.
func appendCiphertext(to []byte, version int, envelope []byte) []byte {
	to = append(to, prefix...)
	to = strconv.AppendInt(to, int64(version), 10)
	to = append(to, ':')
	return base64.StdEncoding.AppendEncode(to, envelope)
}

// Parse takes a ciphertext apart. Only what [Format] makes is accepted; all else is [ErrMalformed]. The version is what
// the text claims: what the envelope says is authenticated, and decides.
func Parse(ciphertext string) (version int, envelope []byte, err error) {
	return parse([]byte(ciphertext))
}

// strict refuses the second spelling of a value, in which unused bits at the end are set. Making it costs more than a parse.
var strict = base64.StdEncoding.Strict()

// parse is [Parse] of bytes that the caller may use again: the envelope is a copy.
func parse(ciphertext []byte) (version int, envelope []byte, err error) {
	rest, found := bytes.CutPrefix(ciphertext, []byte(prefix))
	if !found {
		return 0, nil, fmt.Errorf("%w: no prefix", ErrMalformed)
	}
	number, encoded, found := bytes.Cut(rest, []byte(":"))
	if !found || len(encoded) == 0 {
		return 0, nil, fmt.Errorf("%w: wrong number of fields", ErrMalformed)
	}
	// The comparison refuses the other spellings of a number that ParseInt takes: +1, 01.
	parsed, err := strconv.ParseInt(string(number), 10, 32)
	if err != nil || parsed < 1 || parsed > math.MaxInt32 || strconv.FormatInt(parsed, 10) != string(number) {
		return 0, nil, fmt.Errorf("%w: version number could not be decoded", ErrMalformed)
	}
	if len(encoded) > base64.StdEncoding.EncodedLen(MaxEnvelope) {
		return 0, nil, fmt.Errorf("%w: larger than %d bytes", ErrMalformed, MaxEnvelope)
	}
	envelope = make([]byte, strict.DecodedLen(len(encoded)))
	n, err := strict.Decode(envelope, encoded)
	// Go's decoder skips line breaks, even a strict one.
	if err != nil || bytes.IndexByte(encoded, '\r') >= 0 || bytes.IndexByte(encoded, '\n') >= 0 {
		return 0, nil, fmt.Errorf("%w: could not decode base64", ErrMalformed)
	}
	return int(parsed), envelope[:n], nil
}
