package nethsmtest

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The original reads JSON with a lenient parser (names of members may go without quotes) and reports mistakes in its own
// words; both are copied here as far as requests of this API can show them.

// member is one member of a JSON object; objects keep their order.
type member struct {
	name  string
	value any // nil, bool, float64, string, []any or []member
}

// syntaxError is a mistake in the JSON itself, with its place.
type syntaxError struct{ text string }

func (e *syntaxError) Error() string { return "Invalid JSON: " + e.text + "." }

// schemaError names the type, or the field of a type, that the JSON did not fit.
type schemaError struct{ place string }

func (e *schemaError) Error() string { return "Invalid data for JSON schema: " + e.place + "." }

// parseJSON reads one JSON value.
func parseJSON(data []byte) (any, error) {
	p := &parser{data: data, line: 1}
	p.space()
	if p.done() {
		return nil, &syntaxError{"Blank input data"}
	}
	value, err := p.value()
	if err != nil {
		return nil, err
	}
	p.space()
	if !p.done() {
		return nil, p.unexpected("Junk after end of JSON value:")
	}
	return value, nil
}

// parser reads the text from at on.
type parser struct {
	data      []byte
	at        int
	depth     int
	line      int
	lineStart int
}

func (p *parser) done() bool { return p.at >= len(p.data) }

func (p *parser) space() {
	for ; !p.done(); p.at++ {
		switch p.data[p.at] {
		case '\n':
			p.line++
			p.lineStart = p.at + 1
		case ' ', '\t', '\r':
		default:
			return
		}
	}
}

// unexpected reports the token at hand.
func (p *parser) unexpected(what string) error {
	if p.done() {
		return &syntaxError{"Unexpected end of input"}
	}
	end := p.at
	for end < len(p.data) && strings.IndexByte(" \t\r\n{}[]:,\"", p.data[end]) < 0 {
		end++
	}
	end = max(end, p.at+1)
	from, to := p.at-p.lineStart, end-p.lineStart
	place := fmt.Sprintf("byte %d", from)
	if to > from+1 {
		place = fmt.Sprintf("bytes %d-%d", from, to)
	}
	return &syntaxError{fmt.Sprintf("Line %d, %s:\n%s '%s'", p.line, place, what, p.data[p.at:end])}
}

// take moves past c, if it is next.
func (p *parser) take(c byte) bool {
	p.space()
	if p.done() || p.data[p.at] != c {
		return false
	}
	p.at++
	return true
}

// maxDepth bounds how deep values lie within each other, as encoding/json does.
const maxDepth = 10_000

func (p *parser) value() (any, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, p.unexpected("Too deep:")
	}
	defer func() { p.depth-- }()
	p.space()
	if p.done() {
		return nil, p.unexpected("")
	}
	switch c := p.data[p.at]; {
	case c == '{':
		return p.object()
	case c == '[':
		return p.array()
	case c == '"':
		return p.text()
	case c == '-' || (c >= '0' && c <= '9'):
		return p.number()
	default:
		for word, value := range map[string]any{"null": nil, "true": true, "false": false} {
			if p.word() == word {
				p.at += len(word)
				return value, nil
			}
		}
		return nil, p.unexpected("Invalid token")
	}
}

// word is the identifier at hand; empty if there is none.
func (p *parser) word() string {
	end := p.at
	for end < len(p.data) {
		c := p.data[end]
		letter := c == '_' || (c|0x20 >= 'a' && c|0x20 <= 'z')
		if !letter && (end == p.at || c < '0' || c > '9') {
			break
		}
		end++
	}
	return string(p.data[p.at:end])
}

func (p *parser) object() (any, error) {
	p.at++
	members := []member{}
	if p.take('}') {
		return members, nil
	}
	for {
		p.space()
		var m member
		var err error
		switch word := p.word(); {
		case !p.done() && p.data[p.at] == '"':
			if m.name, err = p.text(); err != nil {
				return nil, err
			}
		case word != "":
			m.name = word
			p.at += len(word)
		default:
			return nil, p.unexpected("Expected string or identifier but found")
		}
		if !p.take(':') {
			return nil, p.unexpected("Expected ':' but found")
		}
		if m.value, err = p.value(); err != nil {
			return nil, err
		}
		members = append(members, m)
		if p.take('}') {
			return members, nil
		}
		if !p.take(',') {
			return nil, p.unexpected("Expected ',' or '}' but found")
		}
	}
}

func (p *parser) array() (any, error) {
	p.at++
	items := []any{}
	if p.take(']') {
		return items, nil
	}
	for {
		item, err := p.value()
		if err != nil {
			return nil, err
		}
		items = append(items, item)
		if p.take(']') {
			return items, nil
		}
		if !p.take(',') {
			return nil, p.unexpected("Expected ',' or ']' but found")
		}
	}
}

func (p *parser) number() (any, error) {
	end := p.at
	for end < len(p.data) && strings.IndexByte("+-.eE0123456789", p.data[end]) >= 0 {
		end++
	}
	n, err := strconv.ParseFloat(string(p.data[p.at:end]), 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return nil, p.unexpected("Invalid token")
	}
	p.at = end
	return n, nil
}

// text reads a quoted string.
func (p *parser) text() (string, error) {
	end := p.at + 1
	for end < len(p.data) && p.data[end] != '"' {
		if p.data[end] == '\\' {
			end++
		}
		end++
	}
	if end >= len(p.data) {
		p.at = len(p.data)
		return "", p.unexpected("")
	}
	s, err := unquote(p.data[p.at+1 : end])
	if err != nil {
		return "", p.unexpected("Invalid escape sequence")
	}
	p.at = end + 1
	return s, nil
}

// unquote resolves the escapes of a JSON string.
func unquote(raw []byte) (string, error) {
	var b strings.Builder
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			b.WriteByte(raw[i])
			continue
		}
		i++
		if i < len(raw) && raw[i] == 'u' && i+4 < len(raw) {
			n, err := strconv.ParseUint(string(raw[i+1:i+5]), 16, 16)
			if err != nil {
				return "", err
			}
			b.WriteRune(rune(n))
			i += 4
			continue
		}
		at := -1
		if i < len(raw) {
			at = strings.IndexByte(`"\/bfnrt`, raw[i])
		}
		if at < 0 {
			return "", strconv.ErrSyntax
		}
		b.WriteByte("\"\\/\b\f\n\r\t"[at])
	}
	return b.String(), nil
}

// field is one field of a request: where to put its value, and whether it may be missing.
type field struct {
	name     string
	optional bool
	// set takes the value. It returns the place to report where the value does not fit, "" where it does, and "." for the
	// field itself.
	set func(any) string
}

// decode reads a JSON object into fields. Of several mistakes the one in the field declared last is reported, because
// that is the one that the original's generated code finds first; an unknown member comes before all.
func decode(schema string, body []byte, fields ...field) error {
	value, err := parseJSON(body)
	if err != nil {
		return err
	}
	return fit("Json."+schema, value, fields)
}

func fit(place string, value any, fields []field) error {
	members, ok := value.([]member)
	if !ok {
		return &schemaError{place}
	}
	wrong := map[string]string{}
	seen := map[string]bool{}
	for _, m := range members {
		i := slices.IndexFunc(fields, func(f field) bool { return f.name == m.name })
		if i < 0 {
			return &schemaError{place}
		}
		seen[m.name] = true
		wrong[m.name] = fields[i].set(m.value)
	}
	for _, f := range slices.Backward(fields) {
		switch {
		case !seen[f.name] && !f.optional, wrong[f.name] == ".":
			return &schemaError{place + "." + f.name}
		case wrong[f.name] != "":
			return &schemaError{wrong[f.name]}
		}
	}
	return nil
}

func text(name string, into *string) field {
	return field{name: name, set: func(v any) string {
		s, ok := v.(string)
		if !ok || !utf8.ValidString(s) {
			return "."
		}
		*into = s
		return ""
	}}
}

func integer(name string, into *int) field {
	return field{name: name, set: func(v any) string {
		n, ok := v.(float64)
		if !ok || n != math.Trunc(n) || math.Abs(n) > 1<<40 {
			return "."
		}
		*into = int(n)
		return ""
	}}
}

// choice is a text out of a closed set; the original reports the type's name where it is none of them.
func choice(name, typeName string, into *string, allowed []string) field {
	return field{name: name, set: func(v any) string {
		s, ok := v.(string)
		if !ok || !slices.Contains(allowed, s) {
			return "Json." + typeName
		}
		*into = s
		return ""
	}}
}

// list is an array of texts; allowed may be nil for any.
func list(name, typeName string, into *[]string, allowed []string) field {
	return field{name: name, set: func(v any) string {
		items, ok := v.([]any)
		if !ok {
			return "."
		}
		*into = []string{}
		for _, item := range items {
			s, ok := item.(string)
			if !ok || (allowed != nil && !slices.Contains(allowed, s)) {
				return "Json." + typeName
			}
			*into = append(*into, s)
		}
		return ""
	}}
}

// object is a nested object.
func object(name, typeName string, fields ...field) field {
	return field{name: name, set: func(v any) string {
		if err := fit("Json."+typeName, v, fields); err != nil {
			return strings.TrimSuffix(strings.TrimPrefix(err.Error(), "Invalid data for JSON schema: "), ".")
		}
		return ""
	}}
}

func optional(f field) field {
	f.optional = true
	return f
}
