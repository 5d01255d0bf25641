package server

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/internal/transit"
)

func newGate(width int, pace time.Duration) *gate {
	return &gate{width: func() int { return width }, pace: func() time.Duration { return pace }, now: time.Now}
}

// visits go through a gate one after the other and stay for a while; order is that in which they were let in.
type visits struct {
	gate    *gate
	running sync.WaitGroup

	mu    sync.Mutex
	order []string
	most  int
	in    int
	errs  map[string]error
	took  map[string]time.Duration
}

func (v *visits) visit(ctx context.Context, name string, patient bool, stay time.Duration) {
	v.running.Go(func() {
		begun := time.Now()
		leave, err := v.gate.enter(ctx, patient, 1)
		v.mu.Lock()
		if v.errs == nil {
			v.errs, v.took = map[string]error{}, map[string]time.Duration{}
		}
		v.errs[name], v.took[name] = err, time.Since(begun)
		if err == nil {
			v.order = append(v.order, name)
			v.in++
			v.most = max(v.most, v.in)
		}
		v.mu.Unlock()
		if err != nil {
			return
		}
		<-time.After(stay)
		v.mu.Lock()
		v.in--
		v.mu.Unlock()
		leave()
	})
	synctest.Wait() // so that they come in the order of the calls
}

func TestAGateLetsInAsManyAsItIsWideInTheOrderInWhichTheyCame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &visits{gate: newGate(2, 0)}
		names := []string{"a", "b", "c", "d", "e", "f"}
		for _, name := range names {
			v.visit(t.Context(), name, false, time.Second)
		}
		v.running.Wait()
		slices.Sort(v.order[:2]) // who came together
		slices.Sort(v.order[2:4])
		slices.Sort(v.order[4:])
		if !slices.Equal(v.order, names) || v.most != 2 {
			t.Errorf("let in %v, %d at most at one time", v.order, v.most)
		}
		if inside, urgent, patient := v.gate.load(); inside+urgent+patient != 0 {
			t.Errorf("left behind: %d inside, %d and %d waiting", inside, urgent, patient)
		}
	})
}

func TestAnUnsealGoesBeforeHealthChecksThatCameEarlier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &visits{gate: newGate(1, 0)}
		v.visit(t.Context(), "running", false, time.Second)
		v.visit(t.Context(), "check 1", true, time.Second)
		v.visit(t.Context(), "check 2", true, time.Second)
		v.visit(t.Context(), "unseal 1", false, time.Second)
		v.visit(t.Context(), "unseal 2", false, time.Second)
		v.running.Wait()
		if want := []string{"running", "unseal 1", "unseal 2", "check 1", "check 2"}; !slices.Equal(v.order, want) {
			t.Errorf("let in %v, want %v", v.order, want)
		}
	})
}

// TestNobodyStarves: unseals without end, twice as many as there are places for, and health checks among them.
func TestNobodyStarves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &visits{gate: newGate(2, 500*time.Millisecond)}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		checks := 0
		for i := range 400 {
			limited, end := context.WithTimeout(ctx, openLimit)
			defer end()
			v.visit(limited, "unseal", false, time.Second)
			if i%20 == 0 {
				checks++
				limited, end := context.WithTimeout(ctx, openLimit)
				defer end()
				v.visit(limited, "check", true, time.Second)
			}
			<-time.After(400 * time.Millisecond) // 2.5 a second come, 2 are done
		}
		v.running.Wait()
		in := 0
		for _, name := range v.order {
			if name == "check" {
				in++
			}
		}
		if in < checks*3/4 {
			t.Errorf("%d of %d health checks were let in", in, checks)
		}
	})
}

func TestWhoeverWouldWaitTooLongIsToldSoAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &visits{gate: newGate(2, time.Second)}
		ctx, cancel := context.WithTimeout(t.Context(), openLimit)
		defer cancel()
		for i := range 60 {
			v.visit(ctx, string(rune('0'+i)), false, 2*time.Second)
		}
		turnedAway := 0
		v.mu.Lock()
		for _, err := range v.errs {
			if busy := (*transit.BusyError)(nil); errors.As(err, &busy) {
				turnedAway++
				if busy.After < shortestPause || busy.After > longestPause {
					t.Errorf("it is to come again after %v", busy.After)
				}
			}
		}
		v.mu.Unlock()
		const inTime = 44 // the last one begins when 43 s are over and ends a second later
		if turnedAway != 60-inTime {
			t.Errorf("%d were turned away at once, want those who are not done in 45 s", turnedAway)
		}
		v.running.Wait()
		if len(v.order) != inTime {
			t.Errorf("%d were let in", len(v.order))
		}
	})
}

// TestAWaitThatNobodyForesawEndsInTime: the HSM became slow, or hangs.
func TestAWaitThatNobodyForesawEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &visits{gate: newGate(1, 0)}
		v.visit(t.Context(), "hangs", false, time.Hour)
		ctx, cancel := context.WithTimeout(t.Context(), openLimit)
		defer cancel()
		v.visit(ctx, "waits", false, 0)
		v.visit(ctx, "checks", true, 0)
		v.running.Wait()
		for _, name := range []string{"waits", "checks"} {
			if busy := (*transit.BusyError)(nil); !errors.As(v.errs[name], &busy) || v.took[name] != openLimit {
				t.Errorf("%s: %v after %v", name, v.errs[name], v.took[name])
			}
		}
		if inside, urgent, patient := v.gate.load(); inside+urgent+patient != 0 {
			t.Errorf("left behind: %d inside, %d and %d waiting", inside, urgent, patient)
		}
	})
}

func TestAQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, 0)
		leave, err := g.enter(t.Context(), false, 1)
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for range maxWaiting {
			running.Go(func() { _, _ = g.enter(ctx, true, 1) })
		}
		synctest.Wait()
		_, err = g.enter(t.Context(), false, 1)
		if busy := (*transit.BusyError)(nil); !errors.As(err, &busy) {
			t.Errorf("one more: %v", err)
		}
		cancel()
		running.Wait()
		leave()
		if inside, urgent, patient := g.load(); inside+urgent+patient != 0 {
			t.Errorf("left behind: %d inside, %d and %d waiting", inside, urgent, patient)
		}
	})
}

func TestAGateThatClosesTurnsAwayAllButThoseInside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &visits{gate: newGate(1, 0)}
		v.visit(t.Context(), "inside", false, time.Second)
		v.visit(t.Context(), "unseal", false, time.Second)
		v.visit(t.Context(), "check", true, time.Second)
		v.gate.close()
		v.visit(t.Context(), "late", false, time.Second)
		v.running.Wait()
		for _, name := range []string{"unseal", "check", "late"} {
			if busy := (*transit.BusyError)(nil); !errors.As(v.errs[name], &busy) || v.took[name] != 0 {
				t.Errorf("%s: %v after %v", name, v.errs[name], v.took[name])
			}
		}
		if v.errs["inside"] != nil {
			t.Errorf("inside: %v", v.errs["inside"])
		}
	})
}

// TestAGateKeepsItsPromisesWhateverHappens: visitors come, stay, give up and are told no, in any order.
func TestAGateKeepsItsPromisesWhateverHappens(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		width := rapid.IntRange(1, 4).Draw(r, "width")
		type visitor struct {
			at, stay, gives int
			patient         bool
		}
		all := rapid.SliceOfN(rapid.Custom(func(r *rapid.T) visitor {
			return visitor{
				rapid.IntRange(0, 50).Draw(r, "at"), rapid.IntRange(0, 10).Draw(r, "stay"), rapid.IntRange(1, 60).Draw(r, "gives up after"),
				rapid.Bool().Draw(r, "patient"),
			}
		}), 1, 60).Draw(r, "visitors")
		synctest.Test(t, func(t *testing.T) {
			v := &visits{gate: newGate(width, 0)}
			var coming sync.WaitGroup
			for i, one := range all {
				coming.Go(func() {
					<-time.After(time.Duration(one.at) * time.Second)
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(one.gives)*time.Second)
					defer cancel()
					leave, err := v.gate.enter(ctx, one.patient, 1)
					if err != nil {
						return
					}
					v.mu.Lock()
					v.in++
					v.most = max(v.most, v.in)
					v.mu.Unlock()
					<-time.After(time.Duration(one.stay) * time.Second)
					v.mu.Lock()
					v.in--
					v.mu.Unlock()
					leave()
				})
				_ = i
			}
			coming.Wait()
			if inside, urgent, patient := v.gate.load(); inside+urgent+patient != 0 || v.most > width {
				t.Errorf("left behind: %d inside, %d and %d waiting; %d at most at one time", inside, urgent, patient, v.most)
			}
		})
	})
}

func TestCapacityIsTheFormulaOfTheDocuments(t *testing.T) {
	for _, test := range []struct {
		operation time.Duration
		parallel  int
		want      int
	}{
		{600 * time.Millisecond, 1, 150},
		{5 * time.Millisecond, 8, 144000},
		{time.Second, 1, 90},
		{0, 8, 0},
	} {
		if got := capacity(test.operation, test.parallel); got != test.want {
			t.Errorf("%v, %d at one time: %d, want %d", test.operation, test.parallel, got, test.want)
		}
	}
}
