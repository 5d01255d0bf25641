package store

import (
	"fmt"
	"strings"
)

// MaxNameLength is the longest name, in bytes. A whole name becomes one file name in the file store, and those end at
// 255. Data objects take less, as their package says.
const MaxNameLength = 200

// CheckName returns [ErrInvalidName] with a sentence where name breaks the rules that every store shares:
//
//   - 1 to [MaxNameLength] bytes, one or more parts joined by "/", none empty;
//   - each part of the letters A–Z and a–z, digits, ".", "_" and "-", and it begins with a letter, a digit or "_".
//
// So no name begins with "/", none contains "." or ".." as a part, and every other character is free for a store to
// escape "/" or to mark what is its own. Names that differ only in case are different names.
func CheckName(name string) error {
	if name == "" {
		return fmt.Errorf("%w: it is empty; give one or more parts joined by \"/\"", ErrInvalidName)
	}
	if len(name) > MaxNameLength {
		return fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrInvalidName, len(name), MaxNameLength)
	}
	for part := range strings.SplitSeq(name, "/") {
		if complaint := checkPart(part); complaint != "" {
			return fmt.Errorf("%w %q: %s", ErrInvalidName, name, complaint)
		}
	}
	return nil
}

// CheckPrefix returns [ErrInvalidName] where prefix is neither "" nor a name followed by "/".
func CheckPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	name, found := strings.CutSuffix(prefix, "/")
	if !found {
		return fmt.Errorf("%w: the prefix %q does not end in \"/\"", ErrInvalidName, prefix)
	}
	return CheckName(name)
}

// CheckValue returns [ErrTooLarge] for a value of more than limit bytes.
func CheckValue(value []byte, limit int) error {
	if len(value) > limit {
		return fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrTooLarge, len(value), limit)
	}
	return nil
}

// checkPart says what is wrong with a part of a name, "" for nothing.
func checkPart(part string) string {
	if part == "" {
		return "a part is empty; write no \"/\" at the beginning, at the end or twice in a row"
	}
	if part[0] == '.' || part[0] == '-' {
		return "a part begins with \".\" or \"-\"; begin with a letter, a digit or \"_\""
	}
	for i := range len(part) {
		if !allowed(part[i]) {
			return fmt.Sprintf("byte %#02x is not allowed; use letters, digits, \".\", \"_\" and \"-\"", part[i])
		}
	}
	return ""
}

func allowed(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-'
}
