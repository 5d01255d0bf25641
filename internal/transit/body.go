package transit

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
)

// buffer is memory that requests use one after the other. What it held is wiped before the next one gets it.
type buffer struct{ bytes []byte }

// Sizes of buffers in bytes: what one begins with holds most requests and answers of a seal, and one that grew beyond what is kept
// goes to the garbage collector, so that a few large requests do not stay in memory.
const (
	firstBuffer = 4 << 10
	keptBuffer  = 16 << 10
	frame       = 512 // around the data of an answer
)

// pool keeps buffers.
type pool struct{ sync.Pool }

var buffers = pool{sync.Pool{New: func() any { return &buffer{make([]byte, 0, firstBuffer)} }}}

// get returns an empty buffer.
func (p *pool) get() *buffer {
	b, ok := p.Get().(*buffer)
	if !ok { // there is nothing else in it
		return &buffer{}
	}
	return b
}

// free wipes the buffer and gives it back.
func (b *buffer) free() {
	clear(b.bytes[:cap(b.bytes)])
	if cap(b.bytes) > keptBuffer {
		return
	}
	b.bytes = b.bytes[:0]
	buffers.Put(b)
}

// body reads the body of a request. The caller frees it.
func (h *handler) body(c *call) (*buffer, error) {
	if c.r.ContentLength > int64(h.MaxBody) {
		return nil, h.oversized()
	}
	b := buffers.get()
	if err := b.read(http.MaxBytesReader(c.w, c.r.Body, int64(h.MaxBody)), int(c.r.ContentLength)); err != nil {
		b.free()
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			return nil, h.oversized()
		}
		return nil, mistake("reading the body of the request failed before its end") // by whoever sends it, who may be gone
	}
	return b, nil
}

func (h *handler) oversized() error {
	return &statusError{http.StatusRequestEntityTooLarge, fmt.Errorf("http: request body too large: at most %d bytes are read", h.MaxBody)}
}

// read reads to the end; expected is the number of bytes to come, -1 where nobody knows.
func (b *buffer) read(from io.Reader, expected int) error {
	if expected >= cap(b.bytes) { // one byte more lets the end be seen without growing
		b.grow(expected + 1)
	}
	for {
		if len(b.bytes) == cap(b.bytes) {
			b.grow(2 * cap(b.bytes))
		}
		n, err := from.Read(b.bytes[len(b.bytes):cap(b.bytes)])
		b.bytes = b.bytes[:len(b.bytes)+n]
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// grow moves the bytes to a larger place and wipes the old one.
func (b *buffer) grow(size int) {
	larger := make([]byte, len(b.bytes), max(size, firstBuffer))
	copy(larger, b.bytes)
	clear(b.bytes[:cap(b.bytes)])
	b.bytes = larger
}

// reserve makes room for an answer with so many bytes in it, before they come: what grows later leaves a copy behind.
func (b *buffer) reserve(n int) {
	if size := base64.StdEncoding.EncodedLen(n) + frame; size > cap(b.bytes) {
		b.grow(size)
	}
}

// trim cuts off the white space that editors and shells add.
func trim(text []byte) []byte { return bytes.TrimSpace(text) }
