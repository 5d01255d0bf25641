package modhost

import (
	"bytes"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSecrets(t *testing.T) {
	for name, s := range map[string]*secrets{"all memory locked": {everything: true}, "one by one": {}} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{0, 1, 6, 4096, 4097, 20000} {
				b, err := s.alloc(size)
				if err != nil {
					t.Fatal(err)
				}
				if len(b) != size || !bytes.Equal(b, make([]byte, size)) {
					t.Errorf("%d bytes: got %d, or not zero", size, len(b))
				}
				for i := range b {
					b[i] = 1
				}
				s.free(b)
			}
			if len(s.pages) != 0 {
				t.Errorf("%d mappings are left", len(s.pages))
			}
			s.free(nil)
			other := []byte("memory of somebody else's")
			s.free(other)
			if !bytes.Equal(other, make([]byte, len(other))) {
				t.Errorf("not wiped: %q", other)
			}
		})
	}
}

func TestSecretsLieInLockedPagesOfTheirOwn(t *testing.T) {
	s := &secrets{}
	first, err := s.alloc(6)
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.alloc(6)
	if err != nil {
		t.Fatal(err)
	}
	s.free(first)
	// mincore and munlock tell nothing of locks; a page that is mapped twice over tells by failing with EFAULT once gone.
	pages := s.pages[&second[0]]
	if len(pages) != os.Getpagesize() {
		t.Fatalf("%d bytes of pages", len(pages))
	}
	if err := unix.Munlock(pages); err != nil {
		t.Errorf("the pages of the second went with the first: %v", err)
	}
	s.free(second)
}
