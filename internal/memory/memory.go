// Package memory keeps secrets that live longer than a request out of swap space, core dumps and forked processes, and
// overwrites them when their time is over.
//
// A [Buffer] is a page of its own outside Go's heap: locked in memory, left out of core dumps, empty in a child that
// was forked. Where locking is not permitted (RLIMIT_MEMLOCK) it works all the same, and [Buffer.Locked] says so, for
// people who are to know. An [AES] is a key in such a buffer, ready for use: Go's cipher keeps the key's schedule,
// from which the key itself can be read, in an object on the heap that nobody could wipe; here it is moved into the
// buffer. [LockAll] locks the whole process.
//
// The collector never sees a buffer: whoever makes one wipes it, once.
package memory

import "fmt"

// Buffer is memory for a secret. It is not safe for use while it is being wiped: see [AES] for one that is.
type Buffer struct {
	pages  []byte // what the system gave; nil after Wipe
	size   int
	locked bool
}

// New returns an empty buffer of some bytes. That locking is not permitted is no error.
func New(size int) (*Buffer, error) {
	if size < 1 {
		return nil, fmt.Errorf("making a buffer of %d bytes: it needs one at least", size)
	}
	pages, locked, err := allocate(size)
	if err != nil {
		return nil, fmt.Errorf("making a buffer of %d bytes outside the heap: %w", size, err)
	}
	return &Buffer{pages: pages, size: size, locked: locked}, nil
}

// Bytes returns the buffer's memory, nil after Wipe. Nobody may use it any more once the buffer is being wiped.
func (b *Buffer) Bytes() []byte {
	if b.pages == nil {
		return nil
	}
	return b.pages[:b.size:b.size]
}

// Locked tells whether the buffer can never be written to swap space.
func (b *Buffer) Locked() bool { return b.locked }

// Wipe overwrites the buffer and gives its memory back. Wiping twice is fine.
func (b *Buffer) Wipe() {
	if b.pages == nil {
		return
	}
	clear(b.pages)
	release(b.pages)
	b.pages = nil
}
