package nethsm

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

func TestLockedNodeIsUnlockedByItself(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		var tries atomic.Int32
		s.client.pool.setUnlocker(func(ctx context.Context, at *Client) error {
			tries.Add(1)
			later(2 * time.Second) // as scrypt takes
			return at.Unlock(ctx, []byte(nethsmtest.UnlockPassphrase))
		})
		if err := ask(t.Context(), s.operator()); err != nil {
			t.Fatal(err)
		}
		h.Node(0).SetState(nethsmtest.Locked)
		// Those who come while it is unlocked wait for it, and cause one try between them.
		var all sync.WaitGroup
		for range 20 {
			all.Go(func() {
				if err := ask(t.Context(), s.operator()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if n := tries.Load(); n != 1 {
			t.Errorf("it was unlocked %d times", n)
		}
		// A caller with less time than that gets its deadline.
		h.Node(0).SetState(nethsmtest.Locked)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := ask(ctx, s.operator()); !errors.Is(err, hsm.ErrLocked) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error = %v, want ErrLocked and the deadline", err)
		}
		later(3 * time.Second)
		if err := ask(t.Context(), s.operator()); err != nil {
			t.Errorf("later: %v", err)
		}
	})
}

func TestWrongUnlockPassphraseIsSentOnce(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		passphrase := func(text string) unlocker {
			return func(ctx context.Context, at *Client) error { return at.Unlock(ctx, []byte(text)) }
		}
		s.client.pool.setUnlocker(passphrase("not the passphrase"))
		h.Node(0).SetState(nethsmtest.Locked)
		for range 200 {
			err := ask(t.Context(), s.operator())
			if !errors.Is(err, hsm.ErrLocked) || !strings.Contains(err.Error(), "unlocking it by itself did not work") {
				t.Fatalf("error = %v, want ErrLocked that tells of the passphrase", err)
			}
			if errors.As(err, new(*hsm.PINError)) {
				t.Fatalf("error = %v: it takes the unlock passphrase for the user's", err)
			}
			later(time.Second)
		}
		if n := len(s.peers[0].saw("/unlock")); n != 1 {
			t.Errorf("the wrong passphrase was sent %d times", n)
		}
		s.client.pool.setUnlocker(passphrase(nethsmtest.UnlockPassphrase))
		later(5 * time.Second)
		if err := ask(t.Context(), s.operator()); err != nil {
			t.Errorf("with the right passphrase: %v", err)
		}
	})
}

// Unlocking that fails for another reason is tried again, never more than once a second.
func TestUnlockingIsTriedAgain(t *testing.T) {
	within(t, Options{}, handlers(inState(StateLocked)), func(s *scene) {
		t := s.T
		var mu sync.Mutex
		var tries []seen
		s.client.pool.setUnlocker(func(context.Context, *Client) error {
			mu.Lock()
			defer mu.Unlock()
			tries = append(tries, seen{at: time.Now()})
			if len(tries) < 3 {
				return fmt.Errorf("it hangs: %w", hsm.ErrUnavailable)
			}
			s.peers[0].answers(healthy)
			return nil
		})
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for ask(t.Context(), view) != nil {
			later(100 * time.Millisecond)
		}
		if len(tries) != 3 {
			t.Errorf("%d tries, want 3", len(tries))
		}
		for _, gap := range gaps(tries) {
			if gap < time.Second {
				t.Errorf("two tries %v apart", gap)
			}
		}
	})
}

// A node that was away for long and comes back Locked is unlocked as soon as a request finds it.
func TestNodeThatReturnsLockedIsUnlockedAtOnce(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		s.client.pool.setUnlocker(func(ctx context.Context, at *Client) error {
			return at.Unlock(ctx, []byte(nethsmtest.UnlockPassphrase))
		})
		s.network.stop(s.peers[0].address)
		_ = ask(t.Context(), s.operator())
		later(5 * time.Minute)
		h.Node(0).SetState(nethsmtest.Locked)
		s.network.start(s.peers[0].address, s.peers[0])
		began := time.Now()
		if err := ask(t.Context(), s.operator()); err != nil || time.Since(began) > time.Second {
			t.Errorf("error %v after %v", err, time.Since(began))
		}
	})
}

// Who takes the passphrase back does not leave callers waiting for an unlocking that never comes.
func TestUnlockingThatIsCalledOff(t *testing.T) {
	within(t, Options{Timeout: time.Minute}, handlers(inState(StateLocked)), func(s *scene) {
		t := s.T
		s.client.pool.setUnlocker(func(context.Context, *Client) error { return hsm.ErrUnavailable })
		_ = ask(t.Context(), s.client)
		s.client.pool.setUnlocker(func(context.Context, *Client) error { return nil }) // announced, and due in a second
		time.AfterFunc(100*time.Millisecond, func() { s.client.pool.setUnlocker(nil) })
		began := time.Now()
		if err := ask(t.Context(), s.client); !errors.Is(err, hsm.ErrLocked) || time.Since(began) > time.Second {
			t.Errorf("error %v after %v", err, time.Since(began))
		}
	})
}

// Unlocking takes longer than the pause between two tries; still there is one at a time.
func TestNodeIsUnlockedByOneAtATime(t *testing.T) {
	within(t, Options{}, handlers(inState(StateLocked)), func(s *scene) {
		t := s.T
		var now, most atomic.Int32
		s.client.pool.setUnlocker(func(context.Context, *Client) error {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			later(3 * time.Second)
			return hsm.ErrUnavailable
		})
		for range 10 {
			s.peers[0].answers(inState(StateLocked))
			ctx, cancel := context.WithTimeout(t.Context(), 1300*time.Millisecond)
			_ = ask(ctx, s.client)
			cancel()
			later(time.Second)
			s.peers[0].answers(healthy)
			_ = ask(t.Context(), s.client)
		}
		later(10 * time.Second)
		if most.Load() != 1 {
			t.Errorf("%d unlocked it at one time", most.Load())
		}
	})
}
