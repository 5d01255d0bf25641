// Package transit is the wire of `seal "transit"`: what a Vault or OpenBao that auto-unseals with another Vault's transit
// engine sends and gets back.
//
// A ciphertext is `vault:v<version>:<base64>`. The client splits it at ":" into exactly three parts, keeps the second one
// as its key id and gives the whole string back for decryption; a changed version makes it rewrap its values at the next
// unseal. The third part is an envelope of ours, in standard base64 with padding.
//
// [Parse] is strict: a ciphertext has one spelling only, so that whoever compares, logs or deduplicates ciphertexts can
// rely on it.
package transit

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
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
	return prefix + strconv.Itoa(version) + ":" + base64.StdEncoding.EncodeToString(envelope)
}

// Parse takes a ciphertext apart. Only what [Format] makes is accepted; all else is [ErrMalformed]. The version is what
// the text claims: what the envelope says is authenticated, and decides.
func Parse(ciphertext string) (version int, envelope []byte, err error) {
	rest, found := strings.CutPrefix(ciphertext, prefix)
	if !found {
		return 0, nil, fmt.Errorf("%w: no prefix", ErrMalformed)
	}
	number, encoded, found := strings.Cut(rest, ":")
	if !found || encoded == "" {
		return 0, nil, fmt.Errorf("%w: wrong number of fields", ErrMalformed)
	}
	// The comparison refuses the other spellings of a number that ParseInt takes: +1, 01.
	parsed, err := strconv.ParseInt(number, 10, 32)
	if err != nil || parsed < 1 || parsed > math.MaxInt32 || strconv.FormatInt(parsed, 10) != number {
		return 0, nil, fmt.Errorf("%w: version number could not be decoded", ErrMalformed)
	}
	if len(encoded) > base64.StdEncoding.EncodedLen(MaxEnvelope) {
		return 0, nil, fmt.Errorf("%w: larger than %d bytes", ErrMalformed, MaxEnvelope)
	}
	// Go's decoder skips line breaks, even a strict one.
	envelope, err = base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || strings.ContainsAny(encoded, "\r\n") {
		return 0, nil, fmt.Errorf("%w: could not decode base64", ErrMalformed)
	}
	return int(parsed), envelope, nil
}
