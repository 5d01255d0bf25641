package custody

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"slices"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// Fields are the secrets of an item by their names. Whoever made them wipes them.
type Fields map[string][]byte

// Limits of an item.
const (
	MaxFields    = 64
	MaxFieldName = 64 // bytes; letters, digits, ".", "_" and "-"
)

// Wipe overwrites all values.
func (f Fields) Wipe() {
	for _, value := range f {
		clear(value)
	}
}

// Names returns the names of the fields, sorted.
func (f Fields) Names() []string { return slices.Sorted(maps.Keys(f)) }

// check returns ErrInvalid where the fields cannot be one item.
func (f Fields) check() error {
	if len(f) == 0 || len(f) > MaxFields {
		return fmt.Errorf("%w: %d fields; an item has 1 to %d", ErrInvalid, len(f), MaxFields)
	}
	for name := range f {
		if !validFieldName(name) {
			return fmt.Errorf("%w: the field name %q; it has 1 to %d letters, digits, \".\", \"_\" and \"-\"", ErrInvalid, name, MaxFieldName)
		}
	}
	if size := f.size(); size > envelope.MaxPayload {
		return fmt.Errorf("%w: the fields take %d bytes, base64 and names included; at most %d are possible", ErrInvalid, size, envelope.MaxPayload)
	}
	return nil
}

func validFieldName(name string) bool {
	if name == "" || len(name) > MaxFieldName {
		return false
	}
	for i := range len(name) {
		c := name[i]
		if allowed := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-'; !allowed {
			return false
		}
	}
	return true
}

// size is the length of the encoding.
func (f Fields) size() int {
	size := len("{}") + len(f) - 1
	for name, value := range f {
		size += len(`"":""`) + len(name) + base64.StdEncoding.EncodedLen(len(value))
	}
	return size
}

// encode writes the fields as one payload: a JSON object, its members sorted, values in base64, no white space. It is
// written by hand because encoding/json keeps its buffers, and secrets in them, for later use. The caller wipes it.
func (f Fields) encode() []byte {
	payload := make([]byte, 0, f.size()) // never grows, which would leave a copy behind
	payload = append(payload, '{')
	for i, name := range f.Names() {
		if i > 0 {
			payload = append(payload, ',')
		}
		payload = append(payload, '"')
		payload = append(payload, name...)
		payload = append(payload, `":"`...)
		payload = base64.StdEncoding.AppendEncode(payload, f[name])
		payload = append(payload, '"')
	}
	return append(payload, '}')
}

// Encode writes the fields as the payload of an envelope, as an item's are. The caller wipes it.
func (f Fields) Encode() ([]byte, error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	return f.encode(), nil
}

// DecodeFields reads what Encode wrote, and nothing else. The caller wipes the fields. Errors quote nothing of them.
func DecodeFields(payload []byte) (Fields, error) { return decodeFields(payload) }

// errPayload: the payload is authentic and no encoding of fields.
var errPayload = errors.New("the envelope holds something else than fields")

// decodeFields reads what encode wrote, and nothing else. Errors quote nothing of it.
func decodeFields(payload []byte) (fields Fields, err error) {
	fields = Fields{}
	defer func() {
		if err != nil {
			fields.Wipe()
			fields = nil
		}
	}()
	rest, ok := bytes.CutPrefix(payload, []byte("{"))
	for previous := ""; ok; {
		var name, value []byte
		if name, rest, ok = cutQuoted(rest); !ok {
			break
		}
		if rest, ok = bytes.CutPrefix(rest, []byte(":")); !ok {
			break
		}
		if value, rest, ok = cutQuoted(rest); !ok {
			break
		}
		if !validFieldName(string(name)) || string(name) <= previous || len(fields) == MaxFields {
			break
		}
		previous = string(name)
		decoded := make([]byte, base64.StdEncoding.DecodedLen(len(value)))
		n, err := base64.StdEncoding.Strict().Decode(decoded, value)
		fields[previous] = decoded[:n]
		// Decode passes over line ends; no encoder of ours writes any.
		if err != nil || base64.StdEncoding.EncodedLen(n) != len(value) {
			break
		}
		if string(rest) == "}" {
			return fields, nil
		}
		rest, ok = bytes.CutPrefix(rest, []byte(","))
	}
	return fields, errPayload
}

// cutQuoted cuts a string without escapes off the front.
func cutQuoted(text []byte) (content, rest []byte, ok bool) {
	text, ok = bytes.CutPrefix(text, []byte(`"`))
	if !ok {
		return nil, nil, false
	}
	return bytes.Cut(text, []byte(`"`))
}
