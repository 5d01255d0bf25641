package monitor

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// fake is an HSM that is asked how it fares.
type fake struct {
	mu    sync.Mutex
	err   error
	asked int
	used  time.Time // when an operation failed
}

func (f *fake) Name() string { return "one" }

func (f *fake) Device(context.Context) (hsm.Device, error) { return answering{fake: f}, nil }

// answering is the open HSM.
type answering struct {
	hsm.Device

	fake *fake
}

// Info implements [hsm.Device].
func (a answering) Info(context.Context) (hsm.Info, error) {
	f := a.fake
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked++
	return hsm.Info{State: hsm.StateOperational}, f.err
}

func (f *fake) last(string) (at time.Time, ok, known bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.used, false, !f.used.IsZero()
}

func (f *fake) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// TestAnHSMThatDoesNotAnswerIsAskedAgainSoon, one that does seldom.
func TestAnHSMThatDoesNotAnswerIsAskedAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		p := &Probe{Device: f, Last: f.last, Logger: slog.New(slog.DiscardHandler), Again: 3 * time.Second}
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { p.Run(ctx) })
		asked := func(d time.Duration) int {
			f.set(func() { f.asked = 0 })
			<-time.After(d)
			synctest.Wait()
			n := 0
			f.set(func() { n = f.asked })
			return n
		}
		up := func() bool {
			state, known := p.State()
			return known && state.Up
		}
		if n := asked(10 * time.Minute); n < 15 || n > 26 || !up() {
			t.Errorf("one that answers was asked %d times in ten minutes; up: %v", n, up())
		}
		f.set(func() { f.err, f.used = hsm.ErrUnavailable, time.Now() })
		if n := asked(time.Minute); n < 17 || n > 21 || up() {
			t.Errorf("one that does not was asked %d times in a minute; up: %v", n, up())
		}
		f.set(func() { f.err = nil })
		if n := asked(4 * time.Second); n < 1 || !up() {
			t.Errorf("one that is back was asked %d times; up: %v", n, up())
		}
		<-time.After(time.Second)
		f.set(func() { f.used = time.Now() }) // an operation failed, whatever the probe said
		if n := asked(4 * time.Second); n < 1 || !up() {
			t.Errorf("one that failed was asked %d times; up: %v", n, up())
		}
		stop()
		running.Wait()
	})
}
