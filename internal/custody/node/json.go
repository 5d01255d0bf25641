package node

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// scanner reads JSON where it lies. Package encoding/json would leave copies of secrets behind that nobody can wipe: here
// strings are undone in place and returned as parts of the buffer. Its errors name positions, never content.
type scanner struct {
	buffer []byte
	at     int
	depth  int
}

// maxDepth is how deep an answer may be nested. Vault's are nested three deep.
const maxDepth = 32

var errTruncated = errors.New("it ends in the middle")

func (s *scanner) bad(want string) error {
	if s.at >= len(s.buffer) {
		return errTruncated
	}
	return fmt.Errorf("at byte %d there is no %s", s.at, want)
}

// scanObject reads an object that is all of the buffer. field reads or skips one value.
func scanObject(buffer []byte, field func(name string, s *scanner) error) error {
	s := &scanner{buffer: buffer}
	if err := s.object(field); err != nil {
		return err
	}
	s.blank()
	if s.at != len(buffer) {
		return fmt.Errorf("at byte %d something follows its end", s.at)
	}
	return nil
}

func (s *scanner) blank() {
	for s.at < len(s.buffer) {
		switch s.buffer[s.at] {
		case ' ', '\t', '\r', '\n':
			s.at++
		default:
			return
		}
	}
}

// take skips blanks and consumes c if it comes next.
func (s *scanner) take(c byte) bool {
	s.blank()
	if s.at < len(s.buffer) && s.buffer[s.at] == c {
		s.at++
		return true
	}
	return false
}

func (s *scanner) word(word string) bool {
	s.blank()
	if bytes.HasPrefix(s.buffer[s.at:], []byte(word)) {
		s.at += len(word)
		return true
	}
	return false
}

// null consumes a null, which stands for an absent value.
func (s *scanner) null() bool { return s.word("null") }

func (s *scanner) object(field func(name string, s *scanner) error) error {
	if !s.take('{') {
		return s.bad("object")
	}
	if s.take('}') {
		return nil
	}
	for {
		name, err := s.text()
		if err != nil {
			return err
		}
		if !s.take(':') {
			return s.bad("colon")
		}
		if err := field(string(name), s); err != nil {
			return err
		}
		if s.take('}') {
			return nil
		}
		if !s.take(',') {
			return s.bad("comma or end of an object")
		}
	}
}

func (s *scanner) array(element func() error) error {
	if !s.take('[') {
		return s.bad("array")
	}
	if s.take(']') {
		return nil
	}
	for {
		if err := element(); err != nil {
			return err
		}
		if s.take(']') {
			return nil
		}
		if !s.take(',') {
			return s.bad("comma or end of an array")
		}
	}
}

// text reads a string, undoes its escapes in place and returns that part of the buffer.
func (s *scanner) text() ([]byte, error) {
	if !s.take('"') {
		return nil, s.bad("string")
	}
	start, end := s.at, s.at
	for s.at < len(s.buffer) {
		switch c := s.buffer[s.at]; {
		case c == '"':
			s.at++
			return s.buffer[start:end:end], nil
		case c < ' ':
			return nil, s.bad("valid string")
		case c == '\\':
			r, err := s.escape()
			if err != nil {
				return nil, err
			}
			end = len(utf8.AppendRune(s.buffer[:end], r)) // never longer than the escape: what follows is untouched
		default:
			s.buffer[end] = c
			end++
			s.at++
		}
	}
	return nil, errTruncated
}

var escapes = map[byte]rune{'"': '"', '\\': '\\', '/': '/', 'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t'}

// escape consumes an escape sequence.
func (s *scanner) escape() (rune, error) {
	if s.at+1 >= len(s.buffer) {
		return 0, errTruncated
	}
	c := s.buffer[s.at+1]
	if c != 'u' {
		r, known := escapes[c]
		if !known {
			return 0, s.bad("valid escape")
		}
		s.at += 2
		return r, nil
	}
	r, err := s.unit()
	if err != nil || !utf16.IsSurrogate(r) {
		return r, err
	}
	if s.at+1 < len(s.buffer) && s.buffer[s.at] == '\\' && s.buffer[s.at+1] == 'u' {
		before := s.at
		second, err := s.unit()
		if err != nil {
			return 0, err
		}
		if whole := utf16.DecodeRune(r, second); whole != utf8.RuneError {
			return whole, nil
		}
		s.at = before
	}
	return utf8.RuneError, nil
}

// unit consumes \uXXXX.
func (s *scanner) unit() (rune, error) {
	const length = 6
	if s.at+length > len(s.buffer) {
		return 0, errTruncated
	}
	var r rune
	for _, c := range s.buffer[s.at+2 : s.at+length] {
		switch {
		case '0' <= c && c <= '9':
			r = r<<4 | rune(c-'0')
		case 'a' <= c && c <= 'f':
			r = r<<4 | rune(c-'a'+10)
		case 'A' <= c && c <= 'F':
			r = r<<4 | rune(c-'A'+10)
		default:
			return 0, s.bad("valid escape")
		}
	}
	s.at += length
	return r, nil
}

// texts reads an array of strings, or null, and calls each with a part of the buffer.
func (s *scanner) texts(each func([]byte) error) error {
	if s.null() {
		return nil
	}
	return s.array(func() error {
		text, err := s.text()
		if err != nil {
			return err
		}
		return each(text)
	})
}

// into reads a string that is no secret, and makes it fit for a line of a log or a terminal: nobody knows who answers.
func (s *scanner) into(out *string) error {
	if s.null() {
		return nil
	}
	text, err := s.text()
	if err == nil {
		*out = printable(string(text))
	}
	return err
}

// boolean reads true or false.
func (s *scanner) boolean(out *bool) error {
	switch {
	case s.word("true"):
		*out = true
	case s.word("false"):
		*out = false
	case s.null():
	default:
		return s.bad("true or false")
	}
	return nil
}

// count reads a number of shares: an integer from 0 on.
func (s *scanner) count(out *int) error {
	if s.null() {
		return nil
	}
	start := s.at
	number := s.number()
	value, err := strconv.ParseUint(string(number), 10, 31)
	if err != nil {
		s.at = start
		return s.bad("count")
	}
	*out = int(value)
	return nil
}

// number consumes what a number may consist of.
func (s *scanner) number() []byte {
	s.blank()
	start := s.at
	for s.at < len(s.buffer) && strings.IndexByte("+-.eE0123456789", s.buffer[s.at]) >= 0 {
		s.at++
	}
	return s.buffer[start:s.at]
}

// skip reads over a value of any kind.
func (s *scanner) skip() error {
	if s.depth++; s.depth > maxDepth {
		return fmt.Errorf("at byte %d it is nested too deep", s.at)
	}
	defer func() { s.depth-- }()
	s.blank()
	if s.at >= len(s.buffer) {
		return errTruncated
	}
	switch s.buffer[s.at] {
	case '{':
		return s.object(func(string, *scanner) error { return s.skip() })
	case '[':
		return s.array(s.skip)
	case '"':
		_, err := s.text()
		return err
	case 't', 'f':
		return s.boolean(new(bool))
	case 'n':
		if !s.null() {
			return s.bad("value")
		}
		return nil
	default:
		if len(s.number()) == 0 {
			return s.bad("value")
		}
		return nil
	}
}

// optional reads a string or null, which is nil.
func (s *scanner) optional() ([]byte, error) {
	if s.null() {
		return nil, nil
	}
	return s.text()
}
