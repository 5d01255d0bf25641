package daemon

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Hooks are what the parts of a site report to.
type Hooks struct {
	metrics *metrics

	mu       sync.Mutex // guards what follows
	critical map[int]string
	next     int
	calm     chan struct{} // closed when the last critical window is left; nil while there is none
}

var _ device.Observer = (*Hooks)(nil)

func newHooks(m *metrics) *Hooks { return &Hooks{metrics: m, critical: map[int]string{}} }

// Critical begins a window in which the process must not end, and returns the function that ends it. It is what
// cluster.Config.Critical wants.
func (h *Hooks) Critical(what string) (leave func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	id := h.next
	h.next++
	h.critical[id] = what
	if h.calm == nil {
		h.calm = make(chan struct{})
	}
	return sync.OnceFunc(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.critical, id)
		if len(h.critical) == 0 {
			close(h.calm)
			h.calm = nil
		}
	})
}

// windows names the critical windows that are open; calmed is closed when there is none any more, nil where there is none.
func (h *Hooks) windows() (open []string, calmed <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, what := range h.critical {
		open = append(open, what)
	}
	slices.Sort(open) // or the log would see a change in every order of the map
	return open, h.calm
}

// DeviceOperation implements [device.Observer]. It is what device.Options.Observer wants.
func (h *Hooks) DeviceOperation(name, operation string, took time.Duration, err error) {
	h.metrics.deviceOperation(name, operation, took, err)
}

// Store returns a store that does what s does and counts it under the name. Closing it closes s.
func (h *Hooks) Store(name string, s store.Store) store.Store {
	return &observedStore{Store: s, name: name, metrics: h.metrics}
}

// observedStore counts what a store does.
type observedStore struct {
	store.Store

	name    string
	metrics *metrics
}

// Get implements [store.Store].
func (s *observedStore) Get(ctx context.Context, name string) (_ store.Entry, err error) {
	defer s.observe("get", time.Now(), &err)
	return s.Store.Get(ctx, name)
}

// Put implements [store.Store].
func (s *observedStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (_ store.Revision, err error) {
	defer s.observe("put", time.Now(), &err)
	return s.Store.Put(ctx, name, value, expected)
}

// List implements [store.Store].
func (s *observedStore) List(ctx context.Context, prefix string) (_ []string, err error) {
	defer s.observe("list", time.Now(), &err)
	return s.Store.List(ctx, prefix)
}

// Delete implements [store.Store].
func (s *observedStore) Delete(ctx context.Context, name string, expected store.Revision) (err error) {
	defer s.observe("delete", time.Now(), &err)
	return s.Store.Delete(ctx, name, expected)
}

func (s *observedStore) observe(operation string, begun time.Time, err *error) {
	s.metrics.storeOperation(s.name, operation, time.Since(begun), *err)
}

// storeAnswered tells whether a store did its work, whatever it had to say.
func storeAnswered(err error) bool {
	return err == nil || errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrConflict)
}
