package modhost

import (
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// secrets hands out buffers for PINs and plaintexts that are never swapped out. Where the whole process is locked they
// are ordinary memory; otherwise each has pages of its own, because locks do not nest and a page shared by two buffers
// would be unlocked with the first.
type secrets struct {
	everything bool // the whole process is locked

	mu    sync.Mutex
	pages map[*byte][]byte // by their first byte: mapped and locked
}

// alloc returns n zero bytes. An error is CodeLockMemory.
func (s *secrets) alloc(n int) ([]byte, error) {
	if s.everything || n == 0 {
		return make([]byte, n), nil
	}
	page := os.Getpagesize()
	pages, err := unix.Mmap(-1, 0, (n+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil, cannotLock("mapping", n, err)
	}
	if err := unix.Mlock(pages); err != nil {
		_ = unix.Munmap(pages)
		return nil, cannotLock("locking", n, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pages == nil {
		s.pages = make(map[*byte][]byte)
	}
	s.pages[&pages[0]] = pages
	return pages[:n], nil
}

func cannotLock(doing string, n int, err error) error {
	return &wire.Error{Function: "mlock", Code: wire.CodeLockMemory, Detail: fmt.Sprintf("%s %d bytes for a secret: %v; "+
		"raise RLIMIT_MEMLOCK (LimitMEMLOCK= of systemd, --ulimit memlock of a container) or give CAP_IPC_LOCK", doing, n, err)}
}

// free wipes b and gives back the pages that alloc made for it. b is what alloc returned, or any other memory.
func (s *secrets) free(b []byte) {
	clear(b)
	if s.everything || len(b) == 0 {
		return
	}
	s.mu.Lock()
	pages, mine := s.pages[&b[0]]
	delete(s.pages, &b[0])
	s.mu.Unlock()
	if mine {
		_ = unix.Munmap(pages) // fails for what is not mapped only, and this is
	}
}
