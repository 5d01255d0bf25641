package envelope

import (
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
)

// AES key wrap (RFC 3394) of a content key, 2.2.1 and 2.2.2 with the initial value of 2.2.3.1. go-jose has it as well; this one
// leaves no piece of the key on the heap and takes half the time.

const (
	keyWrapBlock  = 8 // R[i] and A, in bytes
	keyWrapRounds = 6
	// keyWrapInitial is A6A6A6A6A6A6A6A6.
	keyWrapInitial uint64 = 0xA6A6A6A6A6A6A6A6
)

// wrapKey wraps a content key with the key of block.
func wrapKey(block cipher.Block, contentKey []byte) []byte {
	var work [2 * keyWrapBlock]byte // A ‖ R[i]
	defer clear(work[:])
	wrapped := make([]byte, keyWrapBlock+len(contentKey))
	r := wrapped[keyWrapBlock:]
	copy(r, contentKey)
	binary.BigEndian.PutUint64(work[:], keyWrapInitial)
	step := uint64(0)
	for range keyWrapRounds {
		for at := 0; at < len(r); at += keyWrapBlock {
			step++
			copy(work[keyWrapBlock:], r[at:])
			block.Encrypt(work[:], work[:])
			binary.BigEndian.PutUint64(work[:], binary.BigEndian.Uint64(work[:])^step)
			copy(r[at:], work[keyWrapBlock:])
		}
	}
	copy(wrapped, work[:keyWrapBlock])
	return wrapped
}

// unwrapKey returns the content key that was wrapped with the key of block, nil where it was not. The caller wipes it.
func unwrapKey(block cipher.Block, wrapped []byte) []byte {
	if len(wrapped) != wrappedKeySize {
		return nil
	}
	var work [2 * keyWrapBlock]byte
	defer clear(work[:])
	r := make([]byte, contentKeySize)
	copy(r, wrapped[keyWrapBlock:])
	copy(work[:keyWrapBlock], wrapped)
	step := uint64(keyWrapRounds * contentKeySize / keyWrapBlock)
	for range keyWrapRounds {
		for at := len(r) - keyWrapBlock; at >= 0; at -= keyWrapBlock {
			binary.BigEndian.PutUint64(work[:], binary.BigEndian.Uint64(work[:])^step)
			copy(work[keyWrapBlock:], r[at:at+keyWrapBlock])
			block.Decrypt(work[:], work[:])
			copy(r[at:], work[keyWrapBlock:])
			step--
		}
	}
	initial := binary.BigEndian.AppendUint64(nil, keyWrapInitial)
	if subtle.ConstantTimeCompare(work[:keyWrapBlock], initial) != 1 {
		clear(r)
		return nil
	}
	return r
}
