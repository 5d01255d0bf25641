package server

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/token"
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
		leave, err := v.gate.enter(ctx, patient, false, 1)
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
		leave, err := g.enter(t.Context(), false, false, 1)
		must(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		for range maxWaiting {
			running.Go(func() { _, _ = g.enter(ctx, true, false, 1) })
		}
		synctest.Wait()
		_, err = g.enter(t.Context(), false, false, 1)
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
					leave, err := v.gate.enter(ctx, one.patient, false, 1)
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

// TestOpeningsThatWaitTakeBoundedMemory: thousands of the largest envelopes there are would be a gigabyte.
func TestOpeningsThatWaitTakeBoundedMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, 0)
		leave, err := g.enter(t.Context(), false, false, maxWaitingBytes)
		must(t, err) // who is in does not wait
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		come := func(ctx context.Context, bytes int) {
			running.Go(func() {
				if leave, err := g.enter(ctx, false, false, bytes); err == nil {
					leave()
				}
			})
			synctest.Wait()
		}
		come(ctx, maxWaitingBytes/2)
		come(t.Context(), maxWaitingBytes/2)
		var busy *transit.BusyError
		if _, err := g.enter(t.Context(), false, false, 1); !errors.As(err, &busy) {
			t.Errorf("one more: %v", err)
		}
		stop() // one of them goes away
		synctest.Wait()
		come(t.Context(), maxWaitingBytes/2)
		if _, urgent, _ := g.load(); urgent != 2 {
			t.Errorf("%d wait", urgent)
		}
		leave()
		running.Wait()
		if g.bytes != 0 || g.inside != 0 {
			t.Errorf("left behind: %d bytes, %d inside", g.bytes, g.inside)
		}
		come(t.Context(), 1)
		running.Wait()
	})
}

// TestAnOverloadWastesNoOperation: whoever waits for as long as is possible would get his turn too late, and a server that is asked for
// more than its HSM can do would do nothing but such.
func TestAnOverloadWastesNoOperation(t *testing.T) {
	const operation, lasts = 600 * time.Millisecond, 10 * time.Minute
	for name, believed := range map[string]time.Duration{"as measured": operation, "a bit slower than measured": operation * 5 / 6} {
		t.Run(name, func(t *testing.T) { overload(t, believed, operation, lasts) })
	}
}

func overload(t *testing.T, believed, operation, lasts time.Duration) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		g := newGate(2, believed)
		card := make(chan struct{}, 1)
		var mu sync.Mutex
		done, wasted := 0, 0
		opening := func() {
			ctx, cancel := context.WithTimeout(t.Context(), openLimit)
			defer cancel()
			leave, err := g.enter(ctx, false, false, 1)
			if err != nil {
				return
			}
			defer leave()
			select {
			case card <- struct{}{}:
				defer func() { <-card }()
			case <-ctx.Done():
				return
			}
			<-time.After(operation) // a card does what it has begun
			mu.Lock()
			defer mu.Unlock()
			if done++; ctx.Err() != nil {
				wasted++
			}
		}
		var asking sync.WaitGroup
		begun := time.Now()
		for i := range 400 { // Vaults that ask again and again, as those do that stay sealed
			asking.Go(func() {
				<-time.After(time.Duration(i) * 10 * time.Millisecond)
				for time.Since(begun) < lasts {
					opening()
					<-time.After(5 * time.Second)
				}
			})
		}
		asking.Wait()
		if wasted*100 > done {
			t.Errorf("of %d operations %d were for nobody", done, wasted)
		}
	})
}

// TestAStormOfALeasedKeyIsNotTurnedAway: one operation is all that it takes, however many wait for it.
func TestAStormOfALeasedKeyIsNotTurnedAway(t *testing.T) {
	w := newWorld(t)
	w.lease("prod", time.Hour)
	w.units[0].places = make(chan struct{}, 1)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	eventually(t, "a lease is open", func() bool { return r.metric(`nitroseal_serve_lease_locked{key="prod",version="1"}`) != "" })
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	r.server.hooks.operations.configure(nil) // as with a slow HSM
	r.server.hooks.operations.configure(map[string]int{"one": 1})
	r.server.hooks.operations.ended("one", time.Now(), 20*time.Second)
	w.units[0].Delay(300 * time.Millisecond)
	r.seal <- syscall.SIGUSR1
	eventually(t, "no lease is open", func() bool { return r.logged.count("all leases were ended") == 1 })
	var running sync.WaitGroup
	for range 20 {
		running.Go(func() {
			if got, err := r.try(client, http.MethodPut, "/v1/transit/decrypt/prod", text, `{"ciphertext":"`+sealed+`"}`); err != nil || got.code != http.StatusOK {
				t.Errorf("%d %s, %v", got.code, got.raw, err)
			}
		})
	}
	running.Wait()
}

// TestALeaseIsNoReasonToWaitForWhatItDoesNotOpen: what was sealed before it takes an operation each, and to wait for longer than a
// client does would have the HSM do most of them for nobody.
func TestALeaseIsNoReasonToWaitForWhatItDoesNotOpen(t *testing.T) {
	w := newWorld(t)
	w.units[0].places = make(chan struct{}, 1)
	before, err := w.keys.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("a secret"), nil)
	must(t, err)
	w.lease("prod", time.Hour)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	r.server.hooks.operations.configure(nil) // as with a slow HSM
	r.server.hooks.operations.configure(map[string]int{"one": 1})
	r.server.hooks.operations.ended("one", time.Now(), 20*time.Second)
	giveBack := w.units[0].hold()
	codes := make(chan int, 10)
	var running sync.WaitGroup
	for range cap(codes) {
		running.Go(func() {
			got, err := r.try(client, http.MethodPut, "/v1/transit/decrypt/prod", text, `{"ciphertext":"`+transit.Format(before.Version, before.Envelope)+`"}`)
			if err != nil {
				t.Error(err)
			}
			codes <- got.code
		})
	}
	eventually(t, "all but those at the HSM are told to come again", func() bool { return len(codes) == 8 })
	giveBack()
	running.Wait()
	counts := map[int]int{}
	for range cap(codes) {
		counts[<-codes]++
	}
	if counts[http.StatusServiceUnavailable] != 8 || counts[http.StatusOK] != 2 {
		t.Errorf("answers: %v", counts)
	}
}
