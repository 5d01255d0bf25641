package nethsm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"time"
	"unicode/utf8"
)

// secret is a member of a JSON body that must not stay in memory: a passphrase. Package json works on copies in buffers of
// its own, which nobody can wipe; [encodeJSON] writes the secrets of a struct straight into the body.
type secret []byte

// MarshalJSON implements json.Marshaler, for a secret in a place where encodeJSON does not look. It fails: better no request
// than a passphrase that stays in memory.
func (secret) MarshalJSON() ([]byte, error) {
	return nil, errors.New("a secret must be a direct member of the body")
}

// encodeJSON encodes a body. The caller wipes it.
func encodeJSON(value any) ([]byte, error) {
	object := reflect.ValueOf(value)
	if object.Kind() == reflect.Pointer {
		object = object.Elem()
	}
	if object.Kind() != reflect.Struct || !hasSecret(object.Type()) {
		return json.Marshal(value)
	}
	// As long as it can get, so that it never moves and leaves a copy behind.
	size := 2
	members := make([][]byte, object.NumField())
	for i := range object.NumField() {
		if text, is := object.Field(i).Interface().(secret); is {
			size += 6 * len(text) // \u0000
		} else {
			member, err := json.Marshal(object.Field(i).Interface())
			if err != nil {
				return nil, err
			}
			members[i] = member
			size += len(member)
		}
		size += len(object.Type().Field(i).Name) + len(object.Type().Field(i).Tag) + 6
	}
	body := append(make([]byte, 0, size), '{')
	for i := range object.NumField() {
		name, options, _ := strings.Cut(object.Type().Field(i).Tag.Get("json"), ",")
		if strings.HasPrefix(options, "omit") && object.Field(i).IsZero() {
			continue
		}
		if len(body) > 1 {
			body = append(body, ',')
		}
		body = append(append(append(body, '"'), name...), '"', ':')
		if text, is := object.Field(i).Interface().(secret); is {
			body = appendString(body, text)
		} else {
			body = append(body, members[i]...)
		}
	}
	return append(body, '}'), nil
}

// hasSecret is true for a struct with a secret among its members, whose names must all be in their tags.
func hasSecret(object reflect.Type) bool {
	for i := range object.NumField() {
		if object.Field(i).Type == reflect.TypeFor[secret]() {
			return true
		}
	}
	return false
}

// appendString appends a JSON string (RFC 8259, 7). Bytes that are no UTF-8 become U+FFFD, as package json does it.
func appendString(body, text []byte) []byte {
	body = append(body, '"')
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		switch {
		case r == '"' || r == '\\':
			body = append(body, '\\', byte(r))
		case r < 0x20:
			const digits = "0123456789abcdef"
			body = append(body, '\\', 'u', '0', '0', digits[r>>4], digits[r&0xF])
		default:
			body = utf8.AppendRune(body, r)
		}
		text = text[size:]
	}
	return append(body, '"')
}

// payload is the body of a call. Package net/http may go on reading it after it has given the answer or an error, so whoever
// wants to wipe the bytes must know when it has done. It is told by hooks, not by a reader of our own: only bytes that
// net/http knows to be in memory are sent together with the headers. A node that sees the headers alone may answer and close
// before the rest has come, and its answer would be lost.
type payload struct {
	bytes   []byte
	mu      sync.Mutex
	writing int           // requests that were begun and have not been written
	idle    chan struct{} // closed when there are none; nil: nobody waits
}

func (p *payload) begin() {
	p.mu.Lock()
	p.writing++
	p.mu.Unlock()
}

func (p *payload) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writing--; p.writing == 0 && p.idle != nil {
		close(p.idle)
		p.idle = nil
	}
}

// idler is closed when the bytes are read no more; nil where that is so already.
func (p *payload) idler() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.writing > 0 && p.idle == nil {
		p.idle = make(chan struct{})
	}
	return p.idle
}

const (
	writeTime = 100 * time.Millisecond // what a request that was given up, or whose connection was closed, gets to notice it
	wipeTime  = time.Minute            // when it surely has
)

// wipe clears a body of ours once it is read no more: nearly always that is at once.
func (p *pool) wipe(body *payload) {
	idle := body.idler()
	if idle == nil {
		clear(body.bytes)
		return
	}
	wipe := func() {
		if !p.sleep(p.ctx, wipeTime, idle) { // Close has ended the connections
			body.settle()
		}
		clear(body.bytes)
	}
	if !p.start(wipe) {
		wipe()
	}
}

// settle waits until a body whose request has ended is read no more.
func (p *payload) settle() {
	idle := p.idler()
	if idle == nil || len(p.bytes) == 0 {
		return
	}
	select {
	case <-idle:
	case <-time.After(writeTime):
	}
}

// errTooLarge says that an answer goes on beyond its limit.
var errTooLarge = errors.New("the answer is too large")

// readBody reads an answer of the announced length (-1: not announced), up to limit bytes. Buffers that it outgrows are wiped.
func readBody(from io.Reader, length, limit int64) ([]byte, error) {
	if length > limit {
		return nil, errTooLarge
	}
	size := length + 1 // one more, to see the end
	if length < 0 {
		size = min(4096, limit+1)
	}
	body := make([]byte, 0, size)
	for {
		n, err := from.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		switch {
		case int64(len(body)) > limit:
			clear(body)
			return nil, errTooLarge
		case errors.Is(err, io.EOF):
			return body, nil
		case err != nil:
			clear(body)
			return nil, err
		case len(body) == cap(body):
			grown := append(make([]byte, 0, min(2*int64(cap(body)), limit+1)), body...)
			clear(body)
			body = grown
		}
	}
}

// decodeJSON decodes the answer of a node. The error names what is wrong with it, never the bytes.
func decodeJSON(body []byte, header http.Header, into any) error {
	err := json.Unmarshal(body, into)
	switch {
	case err == nil:
		return nil
	case !json.Valid(body):
		kind, _, _ := mime.ParseMediaType(header.Get("Content-Type"))
		if kind == "" {
			kind = "nothing"
		}
		return fmt.Errorf("it is no JSON, it calls itself %s and has %d bytes", kind, len(body))
	default:
		return fmt.Errorf("it is JSON of another kind: %w", err)
	}
}

// message is the sentence of an error's body: {"message": "…"}. Many errors have none, whatever their content type says.
func message(body []byte) string {
	var said struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &said) != nil {
		return ""
	}
	return said.Message
}
