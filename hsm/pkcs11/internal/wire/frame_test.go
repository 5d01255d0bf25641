package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// raw builds the bytes of a frame by hand, so that a test can lie in each field.
func raw(length uint32, id uint64, op, failed byte, metaLen uint32, body string) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = binary.BigEndian.AppendUint64(b, id)
	b = append(b, op, failed)
	b = binary.BigEndian.AppendUint32(b, metaLen)
	return append(b, body...)
}

func TestFrameSurvivesTheWire(t *testing.T) {
	for name, frame := range map[string]Frame{
		"no meta and no data":   {ID: 1, Op: OpSlots},
		"meta only":             {ID: 2, Op: OpHello, Meta: []byte(`{}`)},
		"data only":             {ID: 3, Op: OpRandom, Data: []byte{0, 1, 2}},
		"a failed answer":       {ID: 1<<64 - 1, Op: OpLogin, Failed: true, Meta: Encode(&Error{Function: "C_Login", Code: 0xA0})},
		"as large as it may be": {ID: 4, Op: OpReadObject, Data: bytes.Repeat([]byte{7}, MaxFrame-header)},
	} {
		t.Run(name, func(t *testing.T) {
			var pipe bytes.Buffer
			if err := WriteFrame(&pipe, frame); err != nil {
				t.Fatal(err)
			}
			got, err := ReadFrame(iotest.OneByteReader(&pipe))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(frame, got, cmp.Comparer(bytes.Equal)); diff != "" {
				t.Errorf("the frame changed on its way (-sent +got):\n%s", diff)
			}
			if _, err := ReadFrame(&pipe); !errors.Is(err, io.EOF) || errors.Is(err, ErrMalformed) {
				t.Errorf("after the last frame: %v, want io.EOF alone", err)
			}
		})
	}
}

func TestFrameBytes(t *testing.T) {
	var pipe bytes.Buffer
	if err := WriteFrame(&pipe, Frame{ID: 0x0102030405060708, Op: 9, Failed: true, Meta: []byte("{}"), Data: []byte("xyz")}); err != nil {
		t.Fatal(err)
	}
	want := append([]byte{0, 0, 0, 19, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 0, 0, 0, 2}, "{}xyz"...)
	if !bytes.Equal(pipe.Bytes(), want) {
		t.Errorf("got  %x\nwant %x", pipe.Bytes(), want)
	}
}

func TestReadFrameRefusesWhatIsNoFrame(t *testing.T) {
	for name, b := range map[string][]byte{
		"shorter than its header":         raw(header-1, 1, 1, 0, 0, ""),
		"longer than the limit":           raw(MaxFrame+1, 1, 1, 0, 0, ""),
		"a length of all ones":            raw(1<<32-1, 1, 1, 0, 0, ""),
		"meta longer than the frame":      raw(header+2, 1, 1, 0, 3, "{}"),
		"meta of all ones":                raw(header+2, 1, 1, 0, 1<<32-1, "{}"),
		"failed is neither 0 nor 1":       raw(header, 1, 1, 2, 0, ""),
		"ends within the length":          {0, 0},
		"ends within the header":          raw(header, 1, 1, 0, 0, "")[:10],
		"ends before the body":            raw(header+2, 1, 1, 0, 2, ""),
		"ends within the body":            raw(header+2, 1, 1, 0, 2, "{"),
		"text that a library has printed": []byte("Assertion failed: something in some vendor's library\n"),
	} {
		t.Run(name, func(t *testing.T) {
			if frame, err := ReadFrame(bytes.NewReader(b)); !errors.Is(err, ErrMalformed) {
				t.Errorf("got %+v, %v; want ErrMalformed", frame, err)
			}
		})
	}
}

func TestReadFrameKeepsTheErrorOfTheStream(t *testing.T) {
	broken := errors.New("the pipe is broken")
	for name, already := range map[string][]byte{
		"before a frame":  nil,
		"within a header": raw(header, 1, 1, 0, 0, "")[:9],
		"within a body":   raw(header+4, 1, 1, 0, 2, "{"),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadFrame(io.MultiReader(bytes.NewReader(already), iotest.ErrReader(broken)))
			if !errors.Is(err, broken) {
				t.Errorf("got %v, want %v in it", err, broken)
			}
		})
	}
}

func TestWriteFrameRefusesWhatIsTooLong(t *testing.T) {
	var pipe bytes.Buffer
	if err := WriteFrame(&pipe, Frame{Data: make([]byte, MaxFrame)}); err == nil || pipe.Len() != 0 {
		t.Errorf("got %v after %d bytes, want an error and nothing written", err, pipe.Len())
	}
}

// keeper holds the slice given to Write, which io.Writer forbids and a thief would do.
type keeper struct{ kept []byte }

func (k *keeper) Write(b []byte) (int, error) { k.kept = b; return len(b), nil }

func TestWriteFrameWipesItsBuffer(t *testing.T) {
	secret := []byte("the plaintext")
	for name, scratch := range map[string][]byte{"of its own": nil, "of its caller": make([]byte, 64), "too small": make([]byte, 8)} {
		t.Run(name, func(t *testing.T) {
			var w keeper
			if err := WriteFrameIn(&w, Frame{Data: secret}, scratch); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(w.kept, make([]byte, len(w.kept))) {
				t.Errorf("the buffer still holds %q", w.kept)
			}
			if len(scratch) == 64 && &w.kept[0] != &scratch[0] {
				t.Error("the caller's buffer was not used")
			}
		})
	}
}

func TestReadFrameInUsesTheCallersMemory(t *testing.T) {
	var pipe bytes.Buffer
	if err := WriteFrame(&pipe, Frame{Op: OpLogin, Meta: []byte("{}"), Data: []byte("1234")}); err != nil {
		t.Fatal(err)
	}
	memory := make([]byte, 16)
	frame, err := ReadFrameIn(&pipe, func(op Op, size int) []byte {
		if op != OpLogin || size != 6 {
			t.Errorf("asked for %d bytes for operation %d", size, op)
		}
		return memory
	})
	if err != nil {
		t.Fatal(err)
	}
	if &frame.Data[0] != &memory[2] || len(frame.Data) != 4 {
		t.Error("the PIN is somewhere else")
	}
}

func TestDecodeRefusesWhatIsNoMeta(t *testing.T) {
	var slot SlotRequest
	for _, meta := range []string{"", "{", `{"Slot":-1}`, `{"Slot":"1"}`, "[]"} {
		if err := Decode([]byte(meta), &slot); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v, want ErrMalformed", meta, err)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add(raw(header, 1, 1, 0, 0, ""))
	f.Add(raw(header+5, 7, 4, 1, 2, "{}pin"))
	f.Add(raw(MaxFrame, 1, 1, 0, 0, "cut"))
	f.Add(raw(3, 1, 1, 0, 0, ""))
	f.Fuzz(func(t *testing.T, b []byte) {
		frame, err := ReadFrame(bytes.NewReader(b))
		if err != nil {
			if end := errors.Is(err, io.EOF) && len(b) == 0; !end && !errors.Is(err, ErrMalformed) {
				t.Fatalf("an error of its own kind: %v", err)
			}
			return
		}
		// What was read is what was written: every frame has one spelling.
		var again bytes.Buffer
		if err := WriteFrame(&again, frame); err != nil {
			t.Fatal(err)
		}
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Errorf("read  %x\nwrote %x", b, again.Bytes())
		}
	})
}
