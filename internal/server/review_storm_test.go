package server

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

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
			leave, err := g.enter(ctx, false, 1)
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
