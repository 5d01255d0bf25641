package backend

import (
	"context"
	"fmt"
	"sync"
)

// turns lets the changes of one thing take turns, while those of others go on: a change may ask an HSM or a store, and
// one that hangs is to keep nobody else waiting. Unlike a mutex it is waited for no longer than a request may last. The
// zero value is ready.
type turns struct {
	mu    sync.Mutex
	names map[string]*turn
}

// turn is the lock of one name; the last of its users removes it.
type turn struct {
	taken chan struct{} // holds one token while somebody has the turn
	users int           // who has it and who waits
}

// take waits for the turn of a thing, "device \"prod\"" for example, until ctx ends. The caller calls done once.
func (t *turns) take(ctx context.Context, what string) (done func(), err error) {
	t.mu.Lock()
	if t.names == nil {
		t.names = map[string]*turn{}
	}
	mine := t.names[what]
	if mine == nil {
		mine = &turn{taken: make(chan struct{}, 1)}
		t.names[what] = mine
	}
	mine.users++
	t.mu.Unlock()

	select {
	case mine.taken <- struct{}{}:
		return func() {
			<-mine.taken
			t.leave(what, mine)
		}, nil
	case <-ctx.Done():
		t.leave(what, mine)
		return nil, fmt.Errorf("waiting for another change of %s to end: %w: try again", what, ctx.Err())
	}
}

func (t *turns) leave(what string, mine *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if mine.users--; mine.users == 0 {
		delete(t.names, what)
	}
}
