package memory

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// allocate returns whole pages of zeros for so many bytes, and whether they are locked.
func allocate(size int) (pages []byte, locked bool, err error) {
	page := os.Getpagesize()
	pages, err = unix.Mmap(-1, 0, (size+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, false, fmt.Errorf("mapping pages: %w", err)
	}
	locked = unix.Mlock(pages) == nil
	// Kernels before 3.4 and 4.14 do not know them. What they are for is said to be best effort.
	_ = unix.Madvise(pages, unix.MADV_DONTDUMP)
	_ = unix.Madvise(pages, unix.MADV_WIPEONFORK)
	return pages, locked, nil
}

// release gives pages back, which unlocks them.
func release(pages []byte) { _ = unix.Munmap(pages) }

// LockAll locks all memory of the process, now and later, as it is used: nothing of it reaches swap space. It needs
// CAP_IPC_LOCK or an RLIMIT_MEMLOCK that is large enough for the whole process, or memory that is wanted later is refused.
func LockAll() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("locking all memory: %w; allow it with LimitMEMLOCK=infinity or CAP_IPC_LOCK", err)
	}
	return nil
}
