package frame_test

import (
	"bytes"
	"errors"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/internal/frame"
)

func TestDecodeGivesBackWhatWasEncoded(t *testing.T) {
	for _, value := range [][]byte{{}, {0}, []byte("nitroseal1 \n"), bytes.Repeat([]byte{0xff}, 1000)} {
		revision := frame.NewRevision()
		entry, err := frame.Decode(frame.Encode(revision, value))
		if err != nil || entry.Revision != revision || !bytes.Equal(entry.Value, value) {
			t.Errorf("Decode(Encode(%d bytes)) = %v, %v", len(value), entry, err)
		}
	}
}

// The format is on disks and cards: a change here makes existing stores unreadable.
func TestFormatIsFixed(t *testing.T) {
	const golden = "nitroseal1 ABCDEFGHIJKLMNOPQRSTUVWXYZ ba7816bf8f01cfea\nabc"
	if got := frame.Encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ", []byte("abc")); string(got) != golden {
		t.Errorf("Encode = %q, want %q", got, golden)
	}
}

func TestDamageIsNoticed(t *testing.T) {
	framed := frame.Encode(frame.NewRevision(), []byte("a value"))
	for i := range framed {
		if _, err := frame.Decode(framed[:i]); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("cut to %d bytes: %v, want ErrCorrupt", i, err)
		}
		if i >= 11 && i < 37 {
			continue // within the revision: another revision is a valid frame
		}
		damaged := bytes.Clone(framed)
		damaged[i] ^= 1
		if _, err := frame.Decode(damaged); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("bit flipped in byte %d: %v, want ErrCorrupt", i, err)
		}
	}
	if _, err := frame.Decode(append(framed, 0)); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("one byte appended: %v, want ErrCorrupt", err)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(frame.Encode("ABCDEFGHIJKLMNOPQRSTUVWXYZ", []byte("abc")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		entry, err := frame.Decode(raw)
		if err == nil && !bytes.Equal(frame.Encode(entry.Revision, entry.Value), raw) {
			t.Fatalf("Decode accepted a frame that Encode does not make: %q", raw)
		}
	})
}
