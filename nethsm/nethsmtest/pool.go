package nethsmtest

import (
	"crypto/rand"
	"crypto/rsa"
	"sync"
)

// Generating RSA keys is most of what a test with a NetHSM would wait for. So the doubles of one process share a pool:
// a double borrows keys and gives them back when it closes. They are real keys, and no two doubles that are open at one
// time have the same; a double that closed and one that opens later may. Keys that go into a directory are never shared.
var shared = struct {
	mu   sync.Mutex
	free map[int][]*rsa.PrivateKey
}{free: map[int][]*rsa.PrivateKey{}}

// loan is what one double borrowed.
type loan struct {
	fresh bool // borrows nothing

	mu   sync.Mutex
	keys []*rsa.PrivateKey
}

func (l *loan) take(bits int) (*rsa.PrivateKey, error) {
	if l.fresh {
		return rsa.GenerateKey(rand.Reader, bits)
	}
	shared.mu.Lock()
	var key *rsa.PrivateKey
	if free := shared.free[bits]; len(free) > 0 {
		key = free[len(free)-1]
		shared.free[bits] = free[:len(free)-1]
	}
	shared.mu.Unlock()
	if key == nil {
		var err error
		if key, err = rsa.GenerateKey(rand.Reader, bits); err != nil {
			return nil, err
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.keys = append(l.keys, key)
	return key, nil
}

func (l *loan) giveBack() {
	l.mu.Lock()
	defer l.mu.Unlock()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	for _, key := range l.keys {
		shared.free[key.N.BitLen()] = append(shared.free[key.N.BitLen()], key)
	}
	l.keys = nil
}
