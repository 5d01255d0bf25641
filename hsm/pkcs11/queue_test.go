package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/hsm"
)

// waiters counts what a queue holds, and fails the test where its own count differs.
func waiters(t testing.TB, q *queue) (waiting, free int) {
	t.Helper()
	q.mu.Lock()
	defer q.mu.Unlock()
	owners := map[string]bool{}
	for _, l := range q.lines {
		if len(l.waiters) == 0 || owners[l.owner] {
			t.Errorf("the line of %q is empty or there twice", l.owner)
		}
		owners[l.owner] = true
		waiting += len(l.waiters)
	}
	if waiting != q.waiting {
		t.Errorf("%d wait and the queue counts %d", waiting, q.waiting)
	}
	return waiting, q.free
}

func TestAFreePlaceIsTakenAtOnce(t *testing.T) {
	q := newQueue(2, 0)
	first, err := q.acquire(t.Context(), "a")
	must(t, err)
	second, err := q.acquire(t.Context(), "a")
	must(t, err)
	if _, err := q.acquire(t.Context(), "b"); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("a third gives %v, want ErrUnavailable: nobody may wait", err)
	}
	first()
	first() // does nothing
	third, err := q.acquire(t.Context(), "b")
	must(t, err)
	if _, err := q.acquire(t.Context(), "b"); err == nil {
		t.Error("giving a place back twice made two")
	}
	second()
	third()
	if waiting, free := waiters(t, q); waiting != 0 || free != 2 {
		t.Errorf("%d wait and %d places are free, want 0 and 2", waiting, free)
	}
}

func TestOwnersTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(1, 100)
		release, err := q.acquire(t.Context(), "a")
		must(t, err)
		var mu sync.Mutex
		var served []string
		wait := func(owner string) {
			go func() {
				release, err := q.acquire(t.Context(), owner)
				if err != nil {
					t.Errorf("%s: %v", owner, err)
					return
				}
				mu.Lock()
				served = append(served, owner)
				mu.Unlock()
				release()
			}()
			synctest.Wait()
		}
		for range 5 {
			wait("a")
		}
		wait("b")
		wait("b")
		wait("c")
		release()
		synctest.Wait()
		if got, want := strings.Join(served, ""), "abcabaaa"; got != want {
			t.Errorf("served %s, want %s", got, want)
		}
	})
}

func TestAFullQueueTurnsAwayWhoeverHasTheMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(1, 3)
		release, err := q.acquire(t.Context(), "greedy")
		must(t, err)
		refused := make(chan string, 10)
		var wg sync.WaitGroup
		wait := func(name, owner string) {
			wg.Go(func() {
				release, err := q.acquire(t.Context(), owner)
				if err == nil {
					release()
					return
				}
				if !errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("%s: %v", name, err)
				}
				refused <- name
			})
			synctest.Wait()
		}
		wait("greedy 1", "greedy")
		wait("greedy 2", "greedy")
		wait("greedy 3", "greedy")
		wait("greedy 4", "greedy") // itself
		wait("modest 1", "modest") // instead of greedy 3
		wait("modest 2", "modest") // itself: it would have as many as greedy
		release()
		wg.Wait()
		close(refused)
		var names []string
		for name := range refused {
			names = append(names, name)
		}
		if want := []string{"greedy 4", "greedy 3", "modest 2"}; !slices.Equal(names, want) {
			t.Errorf("turned away were %q, want %q", names, want)
		}
	})
}

func TestWhoeverGivesUpLeavesTheQueueAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(1, 10)
		release, err := q.acquire(t.Context(), "a")
		must(t, err)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := q.acquire(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waiting in vain gives %v", err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("it took %v, want 1s", took)
		}
		if waiting, _ := waiters(t, q); waiting != 0 {
			t.Errorf("%d wait", waiting)
		}
		if _, err := q.acquire(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an ended context gives %v", err)
		}
		release()
		if _, err := q.acquire(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("an ended context gets a place: %v", err)
		}
	})
}

// TestAPlaceIsNeverLost plays callers that come, leave, give up and give up at the moment they are served.
func TestAPlaceIsNeverLost(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		parallel := rapid.IntRange(1, 3).Draw(r, "parallel")
		bound := rapid.IntRange(0, 6).Draw(r, "bound")
		q := newQueue(parallel, bound)
		type waiting struct {
			*waiter
			owner string
		}
		var inside int
		var queued []waiting
		for range rapid.IntRange(1, 60).Draw(r, "steps") {
			switch step := rapid.SampledFrom([]string{"come", "come", "go", "give up"}).Draw(r, "step"); {
			case step == "come":
				owner := rapid.SampledFrom([]string{"a", "b", "c"}).Draw(r, "owner")
				if w, err := q.join(owner); err == nil {
					queued = append(queued, waiting{w, owner})
				} else if waiting, _ := waiters(t, q); waiting < bound {
					r.Fatalf("turned away although only %d of %d wait", waiting, bound)
				}
			case step == "go" && inside > 0:
				inside--
				q.release()
			case step == "give up" && len(queued) > 0:
				i := rapid.IntRange(0, len(queued)-1).Draw(r, "who")
				q.leave(queued[i].waiter, queued[i].owner)
				queued = slices.Delete(queued, i, i+1)
			}
			// Some of those that got a place notice; the others may still give up.
			queued = slices.DeleteFunc(queued, func(w waiting) bool {
				select {
				case <-w.ready:
				default:
					return false
				}
				if w.err != nil {
					return true
				}
				if rapid.Bool().Draw(r, "notices") {
					inside++
					return true
				}
				return false
			})
			served := 0
			for _, w := range queued {
				select {
				case <-w.ready:
					served++
				default:
				}
			}
			number, free := waiters(t, q)
			if inside+served+free != parallel {
				r.Fatalf("%d places of %d: %d inside, %d served, %d free", inside+served+free, parallel, inside, served, free)
			}
			if number > bound || (free > 0 && number > 0) || number != len(queued)-served {
				r.Fatalf("%d wait, of %d allowed, with %d free places and %d callers", number, bound, free, len(queued))
			}
		}
	})
}

func TestManyCallersShareAQueue(t *testing.T) {
	const parallel = 3
	q := newQueue(parallel, 1000)
	var mu sync.Mutex
	inside, most, done := 0, 0, 0
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			ctx := t.Context()
			if i%5 == 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, time.Duration(i)*10*time.Microsecond)
				defer cancel()
			}
			release, err := q.acquire(ctx, fmt.Sprint(i%7))
			if err != nil {
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			inside++
			most = max(most, inside)
			done++
			mu.Unlock()
			mu.Lock()
			inside--
			mu.Unlock()
			release()
		})
	}
	wg.Wait()
	if most > parallel || done < 160 {
		t.Errorf("%d were inside at a time, want at most %d; %d were served", most, parallel, done)
	}
	if waiting, free := waiters(t, q); waiting != 0 || free != parallel {
		t.Errorf("%d wait and %d places are free", waiting, free)
	}
}
