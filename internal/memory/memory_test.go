package memory

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"reflect"
	"sync"
	"testing"
	"unsafe"
)

func TestABufferHoldsWhatIsPutInAndForgetsIt(t *testing.T) {
	for _, size := range []int{1, 32, 4096, 4097, 1 << 20} {
		b, err := New(size)
		if err != nil {
			t.Fatal(err)
		}
		bytesOf := b.Bytes()
		if len(bytesOf) != size || cap(bytesOf) != size || !bytes.Equal(bytesOf, make([]byte, size)) {
			t.Errorf("a new buffer of %d bytes has %d with room for %d", size, len(bytesOf), cap(bytesOf))
		}
		rand.Read(bytesOf)
		b.Wipe()
		b.Wipe()
		if b.Bytes() != nil {
			t.Errorf("a wiped buffer of %d bytes has memory", size)
		}
	}
	for _, size := range []int{0, -1} {
		if _, err := New(size); err == nil {
			t.Errorf("a buffer of %d bytes was made", size)
		}
	}
}

func newKey(t testing.TB, size int) []byte {
	t.Helper()
	key := make([]byte, size)
	rand.Read(key)
	return key
}

func TestAESInABufferIsAES(t *testing.T) {
	for _, size := range []int{16, 24, 32} {
		key := newKey(t, size)
		own, err := NewAES(key)
		if err != nil {
			t.Fatal(err)
		}
		standard, err := aes.NewCipher(key)
		if err != nil {
			t.Fatal(err)
		}
		for range 100 {
			text, got, want := newKey(t, aes.BlockSize), make([]byte, aes.BlockSize), make([]byte, aes.BlockSize)
			standard.Encrypt(want, text)
			if !own.Use(func(block cipher.Block) { block.Encrypt(got, text) }) || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes of key: encrypted %x, want %x", size, got, want)
			}
			if own.Use(func(block cipher.Block) { block.Decrypt(got, got) }); !bytes.Equal(got, text) {
				t.Fatalf("%d bytes of key: decrypted %x, want %x", size, got, text)
			}
			if own.Use(func(block cipher.Block) {
				aead, err := cipher.NewGCM(block)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := aead.Open(nil, make([]byte, 12), aead.Seal(nil, make([]byte, 12), text, nil), nil); err != nil {
					t.Error(err)
				}
			}); t.Failed() {
				t.FailNow()
			}
		}
		own.Wipe()
		if own.Use(func(cipher.Block) { t.Error("a wiped key was used") }) {
			t.Error("a wiped key says that it was used")
		}
		own.Wipe()
	}
	if _, err := NewAES(make([]byte, 31)); err == nil {
		t.Error("a key of 31 bytes was taken")
	}
}

// The cipher of the Go that builds this must be one that can be moved, or keys would stay on the heap.
func TestTheKeyLiesInTheBufferAndIsWipedWithIt(t *testing.T) {
	a, err := NewAES(newKey(t, 32))
	if err != nil {
		t.Fatal(err)
	}
	if a.buffer == nil {
		t.Fatal("this Go's AES cannot be moved off its heap")
	}
	inside := func(block cipher.Block) bool {
		at := uintptr(reflect.ValueOf(block).UnsafePointer())
		begin := uintptr(unsafe.Pointer(unsafe.SliceData(a.buffer.pages)))
		return begin <= at && at < begin+uintptr(len(a.buffer.pages))
	}
	a.Use(func(block cipher.Block) {
		if !inside(block) {
			t.Error("the cipher is not in the buffer")
		}
	})
	a.Wipe()
	if a.buffer.pages != nil || a.block != nil {
		t.Error("something is left of it")
	}
}

func TestAKeyIsWipedWhileItIsUsed(t *testing.T) {
	for range 50 {
		a, err := NewAES(newKey(t, 32))
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				var text [aes.BlockSize]byte
				for a.Use(func(block cipher.Block) { block.Encrypt(text[:], text[:]) }) { //nolint:revive // until it is wiped
				}
			})
		}
		all.Go(a.Wipe)
		all.Wait()
	}
}

func TestOnlyNumbersAreMoved(t *testing.T) {
	for _, test := range []struct {
		value any
		want  bool
	}{
		{struct {
			rounds int
			enc    [60]uint32
		}{}, true},
		{[16]byte{}, true},
		{struct{ key []byte }{}, false},
		{struct{ next *int }{}, false},
		{struct{ name string }{}, false},
		{[2]any{}, false},
		{struct{ do func() }{}, false},
	} {
		if got := movable(reflect.TypeOf(test.value)); got != test.want {
			t.Errorf("%T: %v", test.value, got)
		}
	}
}

func BenchmarkUse(b *testing.B) {
	a, err := NewAES(newKey(b, 32))
	if err != nil {
		b.Fatal(err)
	}
	defer a.Wipe()
	b.RunParallel(func(pb *testing.PB) {
		var text [aes.BlockSize]byte
		for pb.Next() {
			a.Use(func(block cipher.Block) { block.Encrypt(text[:], text[:]) })
		}
	})
}
