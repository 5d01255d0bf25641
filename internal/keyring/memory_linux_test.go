package keyring

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// What a lease held is nowhere in the process once it is over: neither in its buffer nor on Go's heap.
func TestNothingOfAKEKIsLeftInMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("it reads all memory of the process")
	}
	f := newLeased(t)
	f.openLease()
	f.decrypts(f.encrypt("x").Envelope, "x")
	wanted := f.learnKEK()
	if wanted.found(t) == 0 {
		t.Fatal("the search does not find the key while the lease is open")
	}
	f.EndLeases()
	if places := wanted.found(t); places != 0 {
		t.Errorf("after the lease the key is still at %d places", places)
	}
}

// needle is the beginning of a key, kept so that it is not found itself: each byte beside its mask.
type needle struct{ masked, mask [16]byte }

func (n *needle) at(i int) byte { return n.masked[i] ^ n.mask[i] }

// learnKEK opens the KEK of "prod" once more.
func (f *fixture) learnKEK() *needle {
	f.t.Helper()
	rec, _, err := f.load(f.t.Context(), "prod")
	if err != nil {
		f.t.Fatal(err)
	}
	v := rec.newest()
	auth, err := f.authKey(f.t.Context(), rec, v.Number)
	if err != nil {
		f.t.Fatal(err)
	}
	key, _, err := f.openAnywhere(f.t.Context(), v.kek.Envelope(), v.kek.Envelope().Context(), v, auth)
	if err != nil || len(key) != envelope.KEKSize {
		f.t.Fatalf("opening the KEK gave %d bytes: %v", len(key), err)
	}
	defer clear(key)
	var n needle
	for i := range n.masked {
		n.mask[i] = byte(37*i + 11)
		n.masked[i] = key[i] ^ n.mask[i]
	}
	return &n
}

// found returns at how many places of the process's memory the key begins: as it is, and as the words of a key schedule.
func (n *needle) found(t *testing.T) (places int) {
	t.Helper()
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	memory, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	const most = 256 << 20 // a larger region is the race detector's own
	piece := make([]byte, 1<<20)
	defer clear(piece)
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		var begin, end uint64
		var rights string
		if _, err := fmt.Sscanf(lines.Text(), "%x-%x %s", &begin, &end, &rights); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(rights, "rw") || begin>>63 != 0 || end-begin > most {
			continue
		}
		for at := begin; at < end; at += uint64(len(piece) - len(n.mask)) {
			clear(piece) // or it is found here
			read, _ := memory.ReadAt(piece[:min(uint64(len(piece)), end-at)], int64(at))
			places += n.count(piece[:read])
		}
	}
	return places
}

// count looks for the first word alone, which the library does fast, and compares the rest where that is.
func (n *needle) count(memory []byte) (places int) {
	const word = 4
	same := func(at []byte, index func(int) int) bool {
		for i := range n.mask {
			if at[i] != n.at(index(i)) {
				return false
			}
		}
		return true
	}
	for _, index := range []func(int) int{
		func(i int) int { return i },
		func(i int) int { return i/word*word + word - 1 - i%word },
	} {
		first := make([]byte, word)
		for i := range first {
			first[i] = n.at(index(i))
		}
		for at := 0; at+len(n.mask) <= len(memory); at++ {
			next := bytes.Index(memory[at:len(memory)-len(n.mask)+word], first)
			if next < 0 {
				break
			}
			if at += next; same(memory[at:], index) {
				places++
			}
		}
	}
	return places
}
