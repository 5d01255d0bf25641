package vault

import (
	"context"
	"fmt"
	"sync"
)

// Locks holds one lock for each name in use. All stores over the same mount share one: the backend keeps it. The zero
// value is ready.
type Locks struct {
	mu    sync.Mutex
	names map[string]*nameLock
}

// nameLock is a lock that can be waited for with a context. users counts holder and waiters; the last one removes it.
type nameLock struct {
	token chan struct{}
	users int
}

// lock waits for the lock of a storage path. The caller calls unlock once.
func (l *Locks) lock(ctx context.Context, path string) (unlock func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	l.mu.Lock()
	if l.names == nil {
		l.names = map[string]*nameLock{}
	}
	lock := l.names[path]
	if lock == nil {
		lock = &nameLock{token: make(chan struct{}, 1)}
		l.names[path] = lock
	}
	lock.users++
	l.mu.Unlock()

	select {
	case lock.token <- struct{}{}:
		return func() {
			<-lock.token
			l.leave(path, lock)
		}, nil
	case <-ctx.Done():
		l.leave(path, lock)
		return nil, fmt.Errorf("waiting for another request that writes it: %w", ctx.Err())
	}
}

func (l *Locks) leave(path string, lock *nameLock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lock.users--
	if lock.users == 0 {
		delete(l.names, path)
	}
}
