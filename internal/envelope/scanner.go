package envelope

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"strconv"
)

// base64url is base64url without padding, whose unused last bits must be zero.
var base64url = base64.RawURLEncoding.Strict()

// scanner reads a text whose grammar leaves no choice. The first mistake stays in err and makes every later call do
// nothing, so that a parser reads top to bottom.
type scanner struct {
	what string // the text's name, for errors
	text []byte
	at   int
	err  error
}

// have consumes the literal where it comes next, and tells whether it did.
func (s *scanner) have(literal string) bool {
	if s.err != nil || !bytes.HasPrefix(s.text[s.at:], []byte(literal)) {
		return false
	}
	s.at += len(literal)
	return true
}

// want consumes the literal, which must come next.
func (s *scanner) want(literal string) {
	if s.err == nil && !s.have(literal) {
		s.fail("want `%s`, have %s", literal, s.next())
	}
}

// end requires that nothing is left.
func (s *scanner) end() {
	if s.err == nil && s.at != len(s.text) {
		s.fail("want the end, have %s", s.next())
	}
}

// name consumes up to MaxName bytes of a JSON string whose opening quote was consumed, and its closing quote. Only the
// bytes that names may hold are allowed: none of them can be escaped.
func (s *scanner) name(what string) string {
	return string(s.run(what, MaxName, isNameByte))
}

// base64 does the same with a string of base64url and returns the least to most bytes that it stands for.
func (s *scanner) base64(what string, least, most int) []byte {
	if decoded := s.fastBase64(least, most); decoded != nil {
		return decoded
	}
	encoded := s.run(what, base64url.EncodedLen(most), isBase64Byte)
	if s.err != nil {
		return nil
	}
	decoded := make([]byte, base64url.DecodedLen(len(encoded)))
	n, err := base64url.Decode(decoded, encoded)
	switch {
	case err != nil:
		s.fail("%s is not canonical base64url", what)
		return nil
	case n < least:
		s.fail("%s of %d bytes: want %d to %d", what, n, least, most)
		return nil
	}
	return decoded[:n]
}

// fastBase64 consumes a string of base64url that has nothing wrong, and consumes nothing where something is: what that is
// is said by base64, which looks at each byte.
func (s *scanner) fastBase64(least, most int) []byte {
	if s.err != nil {
		return nil
	}
	rest := s.text[s.at:]
	n := bytes.IndexByte(rest[:min(len(rest), base64url.EncodedLen(most)+1)], '"')
	if n < 0 {
		return nil
	}
	encoded := rest[:n]
	if bytes.IndexByte(encoded, '\n') >= 0 || bytes.IndexByte(encoded, '\r') >= 0 { // which Go's decoder overlooks
		return nil
	}
	decoded := make([]byte, base64url.DecodedLen(n))
	if _, err := base64url.Decode(decoded, encoded); err != nil || n < 1 || len(decoded) < least {
		return nil
	}
	s.at += n + len(`"`)
	return decoded
}

// number consumes a decimal number from 1 to most without leading zeros.
func (s *scanner) number(what string, most uint64) uint64 {
	if s.err != nil {
		return 0
	}
	digits := s.span(len("18446744073709551615"), func(c byte) bool { return '0' <= c && c <= '9' })
	n, err := strconv.ParseUint(string(digits), 10, 64)
	if err != nil || n < 1 || n > most || digits[0] == '0' {
		s.fail("want %s, a number from 1 to %d, have %s", what, most, s.next())
		return 0
	}
	s.at += len(digits)
	return n
}

// run consumes up to most bytes that are allowed, and the closing quote behind them.
func (s *scanner) run(what string, most int, allowed func(byte) bool) []byte {
	if s.err != nil {
		return nil
	}
	run := s.span(most, allowed)
	s.at += len(run)
	if !s.have(`"`) {
		s.fail("%s has more than %d characters, or one that is not allowed, at %s", what, most, s.next())
		return nil
	}
	return run
}

// span returns the bytes that come next and are allowed, up to most, without consuming them.
func (s *scanner) span(most int, allowed func(byte) bool) []byte {
	rest := s.text[s.at:]
	n := 0
	for n < len(rest) && n < most && allowed(rest[n]) {
		n++
	}
	return rest[:n]
}

// next describes what comes next, for errors. An envelope holds nothing secret, but what does not even begin like one may be
// the very secret, given by mistake.
func (s *scanner) next() string {
	const shown = 24
	rest := s.text[s.at:]
	switch {
	case len(rest) == 0:
		return "the end"
	case s.at == 0:
		return "something else"
	}
	return fmt.Sprintf("%q", rest[:min(shown, len(rest))])
}

func (s *scanner) fail(format string, args ...any) {
	if s.err == nil {
		s.err = fmt.Errorf("reading %s at byte %d: %s: %w", s.what, s.at, fmt.Sprintf(format, args...), ErrMalformed)
	}
}

func isBase64Byte(c byte) bool {
	return 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_'
}
