// Package wire is what the client of a module host and the host itself say to each other over two pipes.
//
// A message is one [Frame]: a length, a call's id, an operation, JSON that never holds a secret (Meta) and raw bytes
// that may be one (Data: a PIN, a ciphertext, a plaintext, an object's value). Secrets stay out of JSON because
// encoding/json keeps pooled copies that nobody can wipe. The client numbers its calls; the host answers each exactly
// once, in any order, with the same id. Either side treats a malformed or oversized frame as the end of the connection.
//
// The first exchange is OpHello in both directions; a host of another Version is refused, which can happen only where
// the host's binary was replaced under a running plugin.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// HostArgv0 is os.Args[0] of a module host. The plugin starts its own binary under this name.
const HostArgv0 = "nitroseal-module-host"

// Version of the protocol. Both sides must agree.
const Version = 1

// MaxFrame is the largest frame in bytes, its length field not counted. The largest message is a data object.
const MaxFrame = 1 << 20

// header is the size of a frame's fixed part in bytes: id 8, operation 1, failed 1, length of Meta 4.
const header = 14

// ErrMalformed is returned by ReadFrame for bytes that are no frame.
var ErrMalformed = errors.New("malformed frame")

// Op is an operation of the host.
type Op uint8

// Frame is one message.
type Frame struct {
	ID uint64
	Op Op
	// Failed marks an answer whose Meta is an [Error].
	Failed bool
	// Meta is JSON without secrets: the request's or the answer's type for that operation.
	Meta []byte
	// Data may be secret. Whoever made or received the frame wipes it.
	Data []byte
}

// WriteFrame writes the frame in one Write call, so that frames of several goroutines need only a lock around it, and
// wipes the buffer that it used. A frame longer than MaxFrame is an error and writes nothing.
func WriteFrame(w io.Writer, f Frame) error {
	return WriteFrameIn(w, f, nil)
}

// WriteFrameIn is [WriteFrame] with the caller's own buffer, which is used where the frame fits into it. A host that
// could not lock all its memory gives one that is locked.
func WriteFrameIn(w io.Writer, f Frame, scratch []byte) error {
	size := header + len(f.Meta) + len(f.Data)
	if size > MaxFrame {
		return fmt.Errorf("a message of %d bytes exceeds the limit of %d", size, MaxFrame)
	}
	var buf []byte
	if 4+size <= len(scratch) {
		buf = scratch[:4+size]
	} else {
		buf = make([]byte, 4+size)
	}
	defer clear(buf)
	binary.BigEndian.PutUint32(buf, uint32(size))
	binary.BigEndian.PutUint64(buf[4:], f.ID)
	buf[12] = byte(f.Op)
	if f.Failed {
		buf[13] = 1
	}
	binary.BigEndian.PutUint32(buf[14:], uint32(len(f.Meta))) //nolint:gosec // no longer than MaxFrame
	copy(buf[4+header:], f.Meta)
	copy(buf[4+header+len(f.Meta):], f.Data)
	_, err := w.Write(buf)
	return err
}

// ReadFrame reads one frame. The end of the stream between two frames is io.EOF; anything that is no frame, or is
// longer than MaxFrame, is ErrMalformed. A stream that fails with an error of its own gives that error, and one that
// ends within a frame io.ErrUnexpectedEOF as well.
func ReadFrame(r io.Reader) (Frame, error) {
	return ReadFrameIn(r, func(_ Op, size int) []byte { return make([]byte, size) })
}

// ReadFrameIn is [ReadFrame] with the caller's own memory: alloc returns the size bytes that Meta and Data of a frame
// of that operation are read into, before the first of them is read. alloc is called for well-formed frames only.
func ReadFrameIn(r io.Reader, alloc func(op Op, size int) []byte) (Frame, error) {
	var fixed [4 + header]byte
	if n, err := io.ReadFull(r, fixed[:]); err != nil {
		if n == 0 {
			return Frame{}, err
		}
		return Frame{}, fmt.Errorf("%w: cut short: %w", ErrMalformed, err)
	}
	size := binary.BigEndian.Uint32(fixed[:])
	if size < header || size > MaxFrame {
		return Frame{}, fmt.Errorf("%w: length %d", ErrMalformed, size)
	}
	body := int(size) - header
	meta := binary.BigEndian.Uint32(fixed[14:])
	if uint64(meta) > uint64(body) || fixed[13] > 1 {
		return Frame{}, fmt.Errorf("%w: header", ErrMalformed)
	}
	op := Op(fixed[12])
	buf := alloc(op, body)[:body]
	if _, err := io.ReadFull(r, buf); err != nil {
		clear(buf)
		return Frame{}, fmt.Errorf("%w: cut short: %w", ErrMalformed, noEOF(err))
	}
	return Frame{
		ID:     binary.BigEndian.Uint64(fixed[4:]),
		Op:     op,
		Failed: fixed[13] == 1,
		Meta:   buf[:meta:meta],
		Data:   buf[meta:],
	}, nil
}

// noEOF makes an end of the stream in the middle of a frame no ordinary end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Encode returns the JSON of a Meta value. The types of this package always encode.
func Encode(meta any) []byte {
	b, err := json.Marshal(meta)
	if err != nil {
		panic(fmt.Sprintf("wire: encoding %T: %v", meta, err)) // a field of a kind that JSON does not know: a bug here
	}
	return b
}

// Decode reads the JSON of a Meta value.
func Decode(b []byte, meta any) error {
	if err := json.Unmarshal(b, meta); err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return nil
}
