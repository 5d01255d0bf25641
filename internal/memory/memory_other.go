//go:build !linux

package memory

import "errors"

// allocate has only the heap to offer.
func allocate(size int) (pages []byte, locked bool, err error) { return make([]byte, size), false, nil }

func release([]byte) {}

// LockAll is there on Linux only.
func LockAll() error { return errors.New("locking all memory: not done on this system") }
