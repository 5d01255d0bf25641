package keyring

import (
	"context"
	"fmt"
	"sync"
)

// turn waits for the turn to change a key slowly: in this keyring, and among processes. The caller calls unlock once.
func (k *Keyring) turn(ctx context.Context, name string) (unlock func(), err error) {
	leave, err := k.locks.lock(ctx, name)
	if err != nil || k.lock == nil {
		return leave, err
	}
	release, err := k.lock(ctx, name)
	if err != nil {
		leave()
		return nil, fmt.Errorf("waiting for another process to end its change of key %q: %w: try again", name, err)
	}
	return func() {
		release()
		leave()
	}, nil
}

// nameLocks lets the slow changes of one key take turns. The zero value is ready.
type nameLocks struct {
	mu   sync.Mutex
	held map[string]*nameLock
}

type nameLock struct {
	turn  chan struct{} // holds one token while nobody has the lock
	users int           // holder and waiters; the entry goes with the last
}

// lock waits for its turn until ctx ends. The caller calls unlock once.
func (l *nameLocks) lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]*nameLock{}
	}
	lock := l.held[name]
	if lock == nil {
		lock = &nameLock{turn: make(chan struct{}, 1)}
		lock.turn <- struct{}{}
		l.held[name] = lock
	}
	lock.users++
	l.mu.Unlock()

	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if lock.users--; lock.users == 0 {
			delete(l.held, name)
		}
	}
	select {
	case <-lock.turn:
		return func() {
			lock.turn <- struct{}{}
			leave()
		}, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("waiting for another change of key %q to end: %w: try again", name, ctx.Err())
	}
}
