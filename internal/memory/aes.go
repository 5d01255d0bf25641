package memory

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"reflect"
	"sync"
	"unsafe"
)

// AES is an AES key in locked memory. It is safe for concurrent use, also while it is being wiped.
type AES struct {
	mu     sync.RWMutex
	block  cipher.Block // nil after Wipe
	buffer *Buffer      // holds block; nil where Go's cipher cannot be moved
}

// NewAES returns a cipher for a key of 16, 24 or 32 bytes. The key stays the caller's to wipe.
func NewAES(key []byte) (*AES, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("preparing AES: %w", err)
	}
	value := reflect.ValueOf(block)
	if value.Kind() != reflect.Pointer || !movable(value.Type().Elem()) {
		return &AES{block: block}, nil // another Go's cipher: it works, and Locked says what it is not
	}
	kind := value.Type().Elem()
	schedule := unsafe.Slice((*byte)(value.UnsafePointer()), kind.Size()) //nolint:gosec // the object that Go's cipher has on the heap
	defer clear(schedule)
	buffer, err := New(len(schedule))
	if err != nil {
		return nil, err
	}
	copy(buffer.Bytes(), schedule)
	moved, ok := reflect.NewAt(kind, unsafe.Pointer(unsafe.SliceData(buffer.Bytes()))).Interface().(cipher.Block) //nolint:gosec // pages begin aligned
	if !ok {
		buffer.Wipe()
		return nil, fmt.Errorf("preparing AES: a %v is no cipher in its new place", kind)
	}
	return &AES{block: moved, buffer: buffer}, nil
}

// movable tells whether a value of that type is nothing but numbers, which may lie where the collector does not look.
func movable(t reflect.Type) bool {
	switch t.Kind() { //nolint:exhaustive // all others hold pointers, or may
	case reflect.Bool, reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64,
		reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return true
	case reflect.Array:
		return movable(t.Elem())
	case reflect.Struct:
		for i := range t.NumField() {
			if !movable(t.Field(i).Type) {
				return false
			}
		}
		return true
	default:
		return false
	}
}

// Use lets do work with the cipher, unless the key was wiped: then it returns false. The cipher must not be kept. Wiping
// waits for do.
func (a *AES) Use(do func(cipher.Block)) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.block == nil {
		return false
	}
	do(a.block)
	return true
}

// Locked tells whether the key can never be written to swap space.
func (a *AES) Locked() bool { return a.buffer != nil && a.buffer.Locked() }

// Wipe overwrites the key as soon as nobody works with it. Wiping twice is fine.
func (a *AES) Wipe() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.block = nil
	if a.buffer != nil {
		a.buffer.Wipe()
	}
}
