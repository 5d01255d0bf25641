package transit

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf16"
	"unicode/utf8"
)

// errRequest is wrapped by every error of [parseRequest].
var errRequest = errors.New("failed to parse JSON input")

// maxDepth is how deep a member that nobody looks at may be nested.
const maxDepth = 32

// unsupported are the members that change what Vault's transit does with a value. They are refused where they say
// something: whoever sends one and had it ignored would lose data, or believe in a protection that is not there. What a client
// may send besides is ignored, as Vault does.
var unsupported = []string{
	"associated_data", "batch_input", "context", "convergent_encryption", "key_version", "nonce", "padding_scheme",
}

// parseRequest returns the text of one member of the JSON object that a request's body is: what is to be sealed, or to be
// opened. It is nil where there is no such member, or null, or no body at all. The text lies in the body, which is
// changed where the text holds escaped characters.
//
// It reads JSON by hand, because that is a third of what a request costs otherwise, and because it knows a member that comes
// twice for what it is: two readers that disagree on what is meant.
func parseRequest(body []byte, wanted string) ([]byte, error) {
	p := &parser{text: body}
	p.space()
	if p.at == len(p.text) {
		return nil, nil
	}
	value, found := p.object(wanted)
	p.space()
	if p.err == nil && p.at != len(p.text) {
		p.fail("something follows the object")
	}
	if p.err != nil {
		return nil, p.err
	}
	if found && value == nil {
		value = []byte{}
	}
	return value, nil
}

// parser reads JSON. The first mistake stays in err and makes every later call do nothing.
type parser struct {
	text []byte
	at   int
	err  error
}

// object reads the whole object and returns the text of its wanted member.
func (p *parser) object(wanted string) (value []byte, found bool) {
	p.want('{')
	seen := false
	for first := true; p.more('}', first); first = false {
		name := p.string()
		p.space()
		p.want(':')
		p.space()
		switch {
		case p.err != nil:
		case string(name) == wanted:
			if seen {
				p.fail("the member %q comes twice", wanted)
			}
			seen = true
			switch {
			case p.have("null"):
			case p.next() == '"':
				value, found = p.string(), true
			default:
				p.fail("the member %q is not a string", wanted)
			}
		default:
			begun := p.at
			p.value(0)
			if p.err == nil && says(p.text[begun:p.at]) {
				p.refuse(string(name))
			}
		}
	}
	return value, found
}

// refuse fails where a member with that name must not be ignored.
func (p *parser) refuse(name string) {
	for _, refused := range unsupported {
		if name == refused {
			p.err = fmt.Errorf("%q is not supported here: a value is sealed as it is, with the newest version; leave it out", refused)
		}
	}
}

// says tells whether a value is more than a way to leave its member out.
func says(value []byte) bool {
	switch string(value) {
	case "null", `""`, "false", "0", "[]", "{}":
		return false
	}
	return true
}

// more moves on to the next member or element, and tells whether there is one.
func (p *parser) more(end byte, first bool) bool {
	p.space()
	if p.err != nil {
		return false
	}
	if p.next() == end {
		p.at++
		return false
	}
	if !first {
		p.want(',')
		p.space()
	}
	return p.err == nil
}

// value skips a value of any kind.
func (p *parser) value(depth int) {
	if p.err != nil {
		return
	}
	if depth > maxDepth {
		p.fail("it is nested too deep")
		return
	}
	switch c := p.next(); {
	case c == '"':
		p.skipString()
	case c == '{':
		p.at++
		for first := true; p.more('}', first); first = false {
			p.skipString()
			p.space()
			p.want(':')
			p.space()
			p.value(depth + 1)
		}
	case c == '[':
		p.at++
		for first := true; p.more(']', first); first = false {
			p.value(depth + 1)
		}
	case c == '-' || isDigit(c):
		p.number()
	default:
		if !p.have("true") && !p.have("false") && !p.have("null") {
			p.fail("a value is missing")
		}
	}
}

// number skips a number.
func (p *parser) number() {
	p.have("-")
	if !p.have("0") {
		p.digits()
	}
	if p.have(".") {
		p.digits()
	}
	if p.have("e") || p.have("E") {
		if !p.have("+") {
			p.have("-")
		}
		p.digits()
	}
}

func (p *parser) digits() {
	begun := p.at
	for isDigit(p.next()) {
		p.at++
	}
	if p.at == begun {
		p.fail("a digit is missing")
	}
}

// skipString skips a string and returns its text as it is written, and whether any of it is escaped.
func (p *parser) skipString() (written []byte, escaped bool) {
	p.want('"')
	begun := p.at
	for p.err == nil {
		p.at += plain(p.text[p.at:])
		switch p.next() {
		case '"':
			p.at++
			return p.text[begun : p.at-1], escaped
		case '\\':
			escaped = true
			p.at++
			p.escape()
		default:
			p.fail("a string does not end, or holds a control character")
		}
	}
	return nil, false
}

// plain returns how many bytes at the beginning mean themselves in a string. Nearly all of a request is one such run.
func plain(text []byte) int {
	if end := bytes.IndexByte(text, '"'); end >= 0 {
		text = text[:end]
	}
	if end := bytes.IndexByte(text, '\\'); end >= 0 {
		text = text[:end]
	}
	for i, c := range text {
		if c < ' ' {
			return i
		}
	}
	return len(text)
}

// escape skips what follows a backslash.
func (p *parser) escape() {
	switch c := p.next(); c {
	case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
		p.at++
	case 'u':
		p.at++
		for range 4 {
			if _, ok := hexDigit(p.next()); !ok {
				p.fail("a character is escaped in a wrong way")
				return
			}
			p.at++
		}
	default:
		p.fail("a character is escaped in a wrong way")
	}
}

// string reads a string. What it returns lies in the text that is read.
func (p *parser) string() []byte {
	written, escaped := p.skipString()
	if !escaped {
		return written
	}
	return unescape(written)
}

// unescape replaces escaped characters in place: none of them is longer than how it is escaped.
func unescape(written []byte) []byte {
	to := written[:0]
	for i := 0; i < len(written); i++ {
		c := written[i]
		if c != '\\' {
			to = append(to, c)
			continue
		}
		i++
		switch c = written[i]; c {
		case 'b':
			to = append(to, '\b')
		case 'f':
			to = append(to, '\f')
		case 'n':
			to = append(to, '\n')
		case 'r':
			to = append(to, '\r')
		case 't':
			to = append(to, '\t')
		case 'u':
			r := unit(written[i+1:])
			i += 4
			if utf16.IsSurrogate(r) {
				low := rune(-1)
				if rest := written[i+1:]; len(rest) >= 6 && rest[0] == '\\' && rest[1] == 'u' {
					low = unit(rest[2:])
				}
				if r = utf16.DecodeRune(r, low); r != utf8.RuneError {
					i += 6
				}
			}
			to = utf8.AppendRune(to, r)
		default:
			to = append(to, c)
		}
	}
	return to
}

// unit returns the UTF-16 code unit that four hexadecimal digits are.
func unit(digits []byte) rune {
	r := rune(0)
	for _, c := range digits[:4] {
		digit, _ := hexDigit(c) // escape has looked at them
		r = r<<4 | digit
	}
	return r
}

func hexDigit(c byte) (rune, bool) {
	switch {
	case isDigit(c):
		return rune(c - '0'), true
	case 'a' <= c && c <= 'f':
		return rune(c-'a') + 10, true
	case 'A' <= c && c <= 'F':
		return rune(c-'A') + 10, true
	}
	return 0, false
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func (p *parser) space() {
	for p.err == nil && p.at < len(p.text) {
		switch p.text[p.at] {
		case ' ', '\t', '\r', '\n':
			p.at++
		default:
			return
		}
	}
}

// next returns the byte that comes next, 0 at the end.
func (p *parser) next() byte {
	if p.err != nil || p.at >= len(p.text) {
		return 0
	}
	return p.text[p.at]
}

// have consumes the literal where it comes next, and tells whether it did.
func (p *parser) have(literal string) bool {
	if p.err != nil || !bytes.HasPrefix(p.text[p.at:], []byte(literal)) {
		return false
	}
	p.at += len(literal)
	return true
}

// want consumes the byte, which must come next.
func (p *parser) want(c byte) {
	if p.err != nil {
		return
	}
	if p.next() != c {
		p.fail("%q is missing", string(c))
		return
	}
	p.at++
}

// fail never quotes the text: it may be a secret.
func (p *parser) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf("%w: at byte %d: %s", errRequest, p.at, fmt.Sprintf(format, args...))
	}
}
