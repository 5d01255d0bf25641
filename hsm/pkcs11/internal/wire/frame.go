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
// wipes the buffer that it used.
func WriteFrame(w io.Writer, f Frame) error {
	size := header + len(f.Meta) + len(f.Data)
	if size > MaxFrame {
		return fmt.Errorf("a message of %d bytes exceeds the limit of %d", size, MaxFrame)
	}
	buf := make([]byte, 4+size)
	defer clear(buf)
	binary.BigEndian.PutUint32(buf, uint32(size))
	binary.BigEndian.PutUint64(buf[4:], f.ID)
	buf[12] = byte(f.Op)
	if f.Failed {
		buf[13] = 1
	}
	binary.BigEndian.PutUint32(buf[14:], uint32(len(f.Meta)))
	copy(buf[4+header:], f.Meta)
	copy(buf[4+header+len(f.Meta):], f.Data)
	_, err := w.Write(buf)
	return err
}

// ReadFrame reads one frame. The end of the stream between two frames is io.EOF; anything that is no frame, or is
// longer than MaxFrame, is ErrMalformed.
func ReadFrame(r io.Reader) (Frame, error) {
	var length [4]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return Frame{}, err
	}
	size := binary.BigEndian.Uint32(length[:])
	if size < header || size > MaxFrame {
		return Frame{}, fmt.Errorf("%w: length %d", ErrMalformed, size)
	}
	buf := make([]byte, size)
	if _, err := io.ReadFull(r, buf); err != nil {
		clear(buf)
		return Frame{}, fmt.Errorf("%w: cut short: %w", ErrMalformed, err)
	}
	meta := binary.BigEndian.Uint32(buf[10:])
	if meta > size-header || buf[9] > 1 {
		clear(buf)
		return Frame{}, fmt.Errorf("%w: header", ErrMalformed)
	}
	split := header + int(meta)
	return Frame{
		ID:     binary.BigEndian.Uint64(buf),
		Op:     Op(buf[8]),
		Failed: buf[9] == 1,
		Meta:   buf[header:split:split],
		Data:   buf[split:],
	}, nil
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
