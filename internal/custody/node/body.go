package node

import (
	"encoding/base64"
	"errors"
	"io"
	"strconv"
	"sync"
	"unicode/utf8"
)

// body is what a request sends. It can be wiped while net/http still holds it: a request that was given up may be read from
// for a moment longer.
type body struct {
	mu    sync.Mutex
	bytes []byte
	at    int
}

// Read implements io.Reader.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at >= len(b.bytes) {
		return 0, io.EOF
	}
	n := copy(p, b.bytes[b.at:])
	b.at += n
	return n, nil
}

// Close implements io.Closer.
func (b *body) Close() error { return nil }

func (b *body) wipe() {
	b.mu.Lock()
	defer b.mu.Unlock()
	clear(b.bytes)
	b.bytes = nil
}

var errTooLarge = errors.New("the answer is too large")

// readAnswer reads a body into one buffer, which the caller wipes, also where there is an error. Buffers it grew out of are
// wiped here. announced is the length that the node announced, -1 for none.
func readAnswer(from io.Reader, announced int64) ([]byte, error) {
	size := int64(1 << 10)
	if announced > MaxAnswer {
		return nil, errTooLarge
	}
	if announced >= 0 {
		size = announced + 1 // one more, to see the end without growing
	}
	buffer := make([]byte, 0, size)
	for {
		if len(buffer) == cap(buffer) {
			larger := make([]byte, len(buffer), 4*cap(buffer))
			copy(larger, buffer)
			clear(buffer)
			buffer = larger
		}
		n, err := from.Read(buffer[len(buffer):cap(buffer)])
		buffer = buffer[:len(buffer)+n]
		switch {
		case len(buffer) > MaxAnswer:
			return buffer, errTooLarge
		case errors.Is(err, io.EOF):
			return buffer, nil
		case err != nil:
			return buffer, err
		}
	}
}

// writer builds a JSON object in one buffer, of which no copies stay behind: what it grows out of is wiped.
type writer struct{ bytes []byte }

func (w *writer) grow(n int) {
	if len(w.bytes)+n <= cap(w.bytes) {
		return
	}
	larger := make([]byte, len(w.bytes), 2*cap(w.bytes)+n+64)
	copy(larger, w.bytes)
	clear(w.bytes)
	w.bytes = larger
}

// name begins a member.
func (w *writer) name(name string) {
	w.grow(len(name) + len(`{"":`))
	if len(w.bytes) == 0 {
		w.bytes = append(w.bytes, '{')
	} else {
		w.bytes = append(w.bytes, ',')
	}
	w.bytes = append(append(append(w.bytes, '"'), name...), '"', ':')
}

// end returns the object, which the caller wipes.
func (w *writer) end() []byte {
	w.grow(len("{}"))
	if len(w.bytes) == 0 {
		w.bytes = append(w.bytes, '{')
	}
	w.bytes = append(w.bytes, '}')
	return w.bytes
}

// share adds the member "key" with a share in base64.
func (w *writer) share(raw []byte) {
	w.name("key")
	w.grow(base64.StdEncoding.EncodedLen(len(raw)) + len(`""`))
	w.bytes = append(w.bytes, '"')
	w.bytes = base64.StdEncoding.AppendEncode(w.bytes, raw)
	w.bytes = append(w.bytes, '"')
}

// text adds a member that is no secret.
func (w *writer) text(name, value string) {
	w.name(name)
	w.quoted(value)
}

// texts adds a list that is no secret; an empty one is left out.
func (w *writer) texts(name string, values []string) {
	if len(values) == 0 {
		return
	}
	w.name(name)
	for i, value := range values {
		w.grow(1)
		w.bytes = append(w.bytes, "[,"[min(i, 1)])
		w.quoted(value)
	}
	w.grow(1)
	w.bytes = append(w.bytes, ']')
}

func (w *writer) quoted(value string) {
	const longest = 6 // \u001f
	w.grow(longest*len(value) + len(`""`))
	w.bytes = append(w.bytes, '"')
	for _, r := range value {
		switch {
		case r == '"' || r == '\\':
			w.bytes = append(w.bytes, '\\', byte(r))
		case r < ' ':
			w.bytes = append(w.bytes, '\\', 'u', '0', '0', "01"[r>>4], "0123456789abcdef"[r&0xf])
		default:
			w.bytes = utf8.AppendRune(w.bytes, r)
		}
	}
	w.bytes = append(w.bytes, '"')
}

// count adds a number; 0 is left out, as Vault then takes its own default or refuses.
func (w *writer) count(name string, value int) {
	if value == 0 {
		return
	}
	w.name(name)
	w.grow(20)
	w.bytes = strconv.AppendInt(w.bytes, int64(value), 10)
}

// flag adds true; false is left out.
func (w *writer) flag(name string, value bool) {
	if !value {
		return
	}
	w.name(name)
	w.grow(len("true"))
	w.bytes = append(w.bytes, "true"...)
}
