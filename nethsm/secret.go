package nethsm

import (
	"fmt"
	"io"
	"log/slog"
	"unicode/utf8"
)

// Secret is a password, a passphrase or a private key. It prints, logs and marshals as "[secret]", alone or in a struct, so
// that it cannot leak by accident; its bytes are there for those who ask for them. Whoever made it wipes it, with clear.
type Secret []byte

const secretText = "[secret]"

// String implements fmt.Stringer.
func (Secret) String() string { return secretText }

// Format implements fmt.Formatter, for all verbs.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, secretText) }

// LogValue implements slog.LogValuer.
func (Secret) LogValue() slog.Value { return slog.StringValue(secretText) }

// MarshalText implements encoding.TextMarshaler, which JSON uses as well.
func (Secret) MarshalText() ([]byte, error) { return []byte(secretText), nil }

// A NetHSM takes passphrases of so many bytes, except where it asks for the current one.
const (
	minPassphrase = 10
	maxPassphrase = 200
)

// checkPassphrase refuses what a NetHSM would refuse; a refusal of its own counts towards its rate limit.
func checkPassphrase(op, what string, passphrase []byte) error {
	switch {
	case len(passphrase) < minPassphrase || len(passphrase) > maxPassphrase:
		return fmt.Errorf("%s: %w: %s has %d bytes; a NetHSM takes %d to %d",
			op, ErrRequest, what, len(passphrase), minPassphrase, maxPassphrase)
	case !utf8.Valid(passphrase):
		return fmt.Errorf("%s: %w: %s is not UTF-8, which a NetHSM asks for", op, ErrRequest, what)
	default:
		return nil
	}
}

// checkCurrent refuses a current passphrase that JSON could not carry. Its length is the NetHSM's to judge.
func checkCurrent(op, what string, passphrase []byte) error {
	if !utf8.Valid(passphrase) {
		return fmt.Errorf("%s: %w: %s is not UTF-8, so that it cannot be the right one", op, ErrRequest, what)
	}
	return nil
}
