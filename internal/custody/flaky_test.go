package custody_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// dice decide over the calls of everybody: most take place, some do not, and of some the answer is lost.
type dice struct {
	mu  sync.Mutex
	rnd *rand.Rand
}

func (d *dice) roll() (happens bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch d.rnd.IntN(12) {
	case 0:
		return false, errFault
	case 1:
		return true, errFault
	default:
		return true, nil
	}
}

// flaky is a store whose calls the dice decide over.
type flaky struct {
	store.Store

	*dice
}

func (s flaky) Get(ctx context.Context, name string) (store.Entry, error) {
	if _, err := s.roll(); err != nil {
		return store.Entry{}, err
	}
	return s.Store.Get(ctx, name)
}

func (s flaky) Put(ctx context.Context, name string, value []byte, expected store.Revision) (revision store.Revision, err error) {
	happens, fault := s.roll()
	if happens {
		revision, err = s.Store.Put(ctx, name, value, expected)
	}
	if fault != nil {
		return store.NoRevision, fault
	}
	return revision, err
}

func (s flaky) Delete(ctx context.Context, name string, expected store.Revision) (err error) {
	happens, fault := s.roll()
	if happens {
		err = s.Store.Delete(ctx, name, expected)
	}
	if fault != nil {
		return fault
	}
	return err
}

type flakyStores struct {
	*house

	dice *dice
}

func (s flakyStores) Store(ctx context.Context, name string) (store.Store, error) {
	under, err := s.house.Store(ctx, name)
	return flaky{under, s.dice}, err
}

// Several processes write, open and delete one item over stores that lose calls and answers. None of them may ever be
// told that somebody tampered with it, and afterwards it opens or is not there.
func TestManyAtOnceOverFlakyStores(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			h := newHouse(t)
			h.put("prod", "unseal", "start")
			d := &dice{rnd: rand.New(rand.NewPCG(seed, 1))}
			allowed := func(err error) bool {
				return err == nil || errors.Is(err, custody.ErrNotFound) || errors.Is(err, custody.ErrConflict) || errors.Is(err, errFault)
			}
			var group sync.WaitGroup
			for worker := range 5 {
				keeper := h.keeper(flaky{h.records, d}, flakyStores{h, d})
				group.Go(func() {
					for i := range 12 {
						var err error
						switch {
						case worker < 3:
							_, err = keeper.Put(t.Context(), "prod", "unseal", text(fmt.Sprint(worker, i)), custody.PutOptions{Key: "prod"})
						case worker == 3 && i%4 == 3:
							err = keeper.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{})
						default:
							_, _, err = keeper.Open(t.Context(), "prod", "unseal", custody.ReadOptions{})
						}
						if !allowed(err) {
							t.Errorf("worker %d: %v", worker, err)
						}
					}
				})
			}
			group.Wait()
			if _, _, err := h.Open(t.Context(), "prod", "unseal", custody.ReadOptions{}); err != nil && !errors.Is(err, custody.ErrNotFound) {
				t.Errorf("Open afterwards = %v", err)
			}
			h.put("prod", "unseal", "end")
			h.wantOpen("prod", "unseal", "end")
		})
	}
}
