// Package frame puts a revision and a checksum in front of a value, for stores whose medium knows neither.
//
// The frame is one line of text, then the value untouched, so that an operator without this program needs only
// `tail -n +2` to get at the envelope:
//
//	nitroseal1 <revision, 26 characters> <first 16 hexadecimal digits of SHA-256 over the value>\n<value>
//
// The checksum is against accidents (a card that stopped in the middle of a write, a file cut short), not against
// people: values are sealed and authenticate themselves.
package frame

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/store"
)

const (
	magic          = "nitroseal1 "
	revisionLength = 26 // crypto/rand.Text: base32 of 130 random bits
	sumLength      = 16
)

// Overhead is what a frame adds to a value, in bytes.
const Overhead = len(magic) + revisionLength + 1 + sumLength + 1

// NewRevision returns a revision that never recurs: a name that was deleted and made anew has another one.
func NewRevision() store.Revision { return store.Revision(rand.Text()) }

// Encode frames a value.
func Encode(revision store.Revision, value []byte) []byte {
	framed := make([]byte, 0, Overhead+len(value))
	framed = fmt.Appendf(framed, "%s%s %s\n", magic, revision, sum(value))
	return append(framed, value...)
}

// Decode takes a frame apart, or returns [store.ErrCorrupt]. The entry's value is a copy.
func Decode(framed []byte) (store.Entry, error) {
	if len(framed) < Overhead {
		return store.Entry{}, fmt.Errorf("%w: %d bytes are too few for a header", store.ErrCorrupt, len(framed))
	}
	header, value := framed[:Overhead], framed[Overhead:]
	rest, found := bytes.CutPrefix(header, []byte(magic))
	if !found {
		return store.Entry{}, fmt.Errorf("%w: it does not begin with %q", store.ErrCorrupt, magic)
	}
	revision, rest := rest[:revisionLength], rest[revisionLength:]
	for _, c := range revision {
		if base32 := 'A' <= c && c <= 'Z' || '2' <= c && c <= '7'; !base32 {
			return store.Entry{}, fmt.Errorf("%w: its revision is malformed", store.ErrCorrupt)
		}
	}
	if string(rest) != " "+sum(value)+"\n" {
		return store.Entry{}, fmt.Errorf("%w: its checksum does not match its value of %d bytes", store.ErrCorrupt, len(value))
	}
	return store.Entry{Value: bytes.Clone(value), Revision: store.Revision(revision)}, nil
}

func sum(value []byte) string {
	digest := sha256.Sum256(value)
	return hex.EncodeToString(digest[:sumLength/2])
}
