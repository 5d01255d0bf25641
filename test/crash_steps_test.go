package test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// steps counts whatever a process does that outlives it, every write to a store and every call of Vault that changes
// something, and ends the process by SIGKILL at one of them. The names go to a file, one a line, each before its step is
// done: so the file tells where the process died.
type steps struct {
	log    *os.File
	at     int // the step that is the last one; 0: none is
	atName string
	before bool // it dies before that step is done, not after

	mu   sync.Mutex
	done int
}

// step does one step. What it did is done, and nobody learns of it, where the process dies after it.
func (s *steps) step(name string, do func()) {
	s.mu.Lock()
	s.done++
	last := s.done == s.at || s.atName != "" && strings.HasSuffix(name, s.atName)
	if _, err := s.log.WriteString(name + "\n"); err != nil {
		panic(err)
	}
	s.mu.Unlock()
	if last && s.before {
		die()
	}
	do()
	if last {
		die()
	}
}

// die ends this process as a power cut would: no deferred call runs, no buffer is written.
func die() {
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // the signal is on its way
}

// countedStore is a store whose writes are steps.
type countedStore struct {
	store.Store

	name  string
	steps *steps
}

// Put implements [store.Store].
func (c countedStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (revision store.Revision, err error) {
	c.steps.step(c.name+": put "+plain(name), func() { revision, err = c.Store.Put(ctx, name, value, expected) })
	return revision, err
}

// Delete implements [store.Store].
func (c countedStore) Delete(ctx context.Context, name string, expected store.Revision) (err error) {
	c.steps.step(c.name+": delete "+plain(name), func() { err = c.Store.Delete(ctx, name, expected) })
	return err
}

// lockable is a store with locks: a file store.
type lockable interface {
	store.Store
	Lock(ctx context.Context, name string) (unlock func(), err error)
}

// countedLocal is a lockable store whose writes are steps. A lock is none: it ends with its process.
type countedLocal struct {
	countedStore

	under lockable
}

// Lock implements cluster.Local.
func (c countedLocal) Lock(ctx context.Context, name string) (unlock func(), err error) {
	return c.under.Lock(ctx, name)
}

// countedStores are stores by name.
type countedStores map[string]store.Store

var _ custody.Stores = countedStores{}

// Store implements [custody.Stores].
func (c countedStores) Store(_ context.Context, name string) (store.Store, error) {
	if found := c[name]; found != nil {
		return found, nil
	}
	return nil, fmt.Errorf("store %q: %w", name, store.ErrNotFound)
}

// countedTransport is a way to a Vault whose changing calls are steps.
type countedTransport struct {
	http.RoundTripper

	nodes []string // addresses
	steps *steps
}

// RoundTrip implements [http.RoundTripper]. Vault has done its work when its answer begins.
func (c countedTransport) RoundTrip(request *http.Request) (response *http.Response, err error) {
	if request.Method == http.MethodGet || request.Method == http.MethodHead {
		return c.RoundTripper.RoundTrip(request)
	}
	node := slices.Index(c.nodes, "https://"+request.URL.Host)
	name := fmt.Sprintf("vault %d: %s %s", node, strings.ToLower(request.Method), plain(strings.TrimPrefix(request.URL.Path, "/v1/")))
	c.steps.step(name, func() { response, err = c.RoundTripper.RoundTrip(request) }) //nolint:bodyclose // who called closes it
	return response, err
}

// random matches what is another one in each run.
var random = regexp.MustCompile(`[0-9a-f]{8,}(-[0-9a-f]+)*`)

// plain is a name without what is random in it.
func plain(name string) string { return random.ReplaceAllString(name, "*") }

// poll asks until the answer is nil or time is up, and returns the last answer.
func poll(ctx context.Context, limit time.Duration, ask func() error) error {
	late := time.After(limit)
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-again.C:
		case <-late:
			return fmt.Errorf("not within %v: %w", limit, err)
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}
