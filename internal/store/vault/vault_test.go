package vault_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/storetest"
	"vault-plugin-secrets-nitrokey/internal/store/vault"
)

func TestStore(t *testing.T) {
	storetest.TestStore(t, func(*testing.T) storetest.Place {
		storage, locks := &logical.InmemStorage{}, &vault.Locks{}
		return func() store.Store { return vault.New(storage, "store/default/", locks) }
	}, storetest.Capabilities{})
}

func TestPrefixesOfOneMountAreApart(t *testing.T) {
	storage, locks := &logical.InmemStorage{}, &vault.Locks{}
	one, two := vault.New(storage, "one/", locks), vault.New(storage, "two/", locks)
	if _, err := one.Put(t.Context(), "a", []byte("1"), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	if _, err := two.Put(t.Context(), "a", []byte("2"), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	entry, err := one.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "1" {
		t.Errorf("Get = %q, %v", entry.Value, err)
	}
}

// storage is logical.Storage with a switch: what every call returns, and when.
type storage struct {
	logical.InmemStorage
	err     error
	arrived chan struct{} // a Put tells that it arrived, and then
	proceed chan struct{} // waits for this
}

func (s *storage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if s.err != nil && !errors.Is(s.err, logical.ErrReadOnly) && s.err.Error() != logical.ErrReadOnly.Error() {
		return nil, s.err
	}
	return s.InmemStorage.Get(ctx, key)
}

func (s *storage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	if s.arrived != nil {
		s.arrived <- struct{}{}
		<-s.proceed
	}
	if s.err != nil {
		return s.err
	}
	return s.InmemStorage.Put(ctx, entry)
}

func TestReadOnlyStorageIsRecognised(t *testing.T) {
	for sentence, err := range map[string]error{
		"in the plugin's process":         logical.ErrReadOnly,
		"as text, through plugin's pipe":  errors.New(logical.ErrReadOnly.Error()),
		"wrapped by a storage in between": fmt.Errorf("view: %w", logical.ErrReadOnly),
	} {
		t.Run(sentence, func(t *testing.T) {
			s := vault.New(&storage{err: err}, "", &vault.Locks{})
			_, got := s.Put(t.Context(), "a", nil, store.NoRevision)
			if !errors.Is(got, logical.ErrReadOnly) || errors.Is(got, store.ErrUnavailable) {
				t.Errorf("Put = %v, want ErrReadOnly only", got)
			}
		})
	}
}

func TestFailingStorageIsUnavailable(t *testing.T) {
	cause := errors.New("raft: no leader")
	s := vault.New(&storage{err: cause}, "", &vault.Locks{})
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrUnavailable) || !errors.Is(err, cause) {
		t.Errorf("Get = %v, want ErrUnavailable and its cause", err)
	}
	if _, err := s.Put(t.Context(), "a", nil, store.NoRevision); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Put = %v, want ErrUnavailable", err)
	}
}

func TestForeignEntryIsCorrupt(t *testing.T) {
	under := &logical.InmemStorage{}
	s := vault.New(under, "p/", &vault.Locks{})
	for _, raw := range []string{"", "text", "{}", `{"value":"AA=="}`, `{"revision":"A","value":"%"}`} {
		if err := under.Put(t.Context(), &logical.StorageEntry{Key: "p/a", Value: []byte(raw)}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("Get of %q = %v, want ErrCorrupt", raw, err)
		}
		if _, err := s.Put(t.Context(), "a", nil, store.NoRevision); !errors.Is(err, store.ErrCorrupt) {
			t.Errorf("Put over %q = %v, want ErrCorrupt", raw, err)
		}
	}
}

func TestWaitingForAnotherRequestEndsWithTheContext(t *testing.T) {
	under := &storage{arrived: make(chan struct{}), proceed: make(chan struct{})}
	locks := &vault.Locks{}
	slow, quick := vault.New(under, "", locks), vault.New(under, "", locks)
	done := make(chan error)
	go func() {
		_, err := slow.Put(t.Context(), "a", nil, store.NoRevision)
		done <- err
	}()
	<-under.arrived
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := quick.Put(ctx, "a", nil, store.NoRevision); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Put beside a slow one = %v, want DeadlineExceeded", err)
	}
	close(under.proceed)
	if err := <-done; err != nil {
		t.Errorf("the slow Put = %v", err)
	}
}
