package nethsm

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// Many requests that meet a Locked node at one time ask it for its state once.
func TestStateIsAskedOnceForMany(t *testing.T) {
	var ready atomic.Bool
	slowly := func(w http.ResponseWriter, r *http.Request) {
		if ready.Load() {
			later(50 * time.Millisecond)
			inState(StateLocked)(w, r)
			return
		}
		healthy(w, r)
	}
	within(t, Options{}, handlers(slowly, healthy), func(s *scene) {
		t := s.T
		for range 2 {
			if err := ask(t.Context(), s.client); err != nil {
				t.Fatal(err)
			}
		}
		ready.Store(true)
		var all sync.WaitGroup
		for range 32 {
			all.Go(func() {
				if err := ask(t.Context(), s.client); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if n := len(s.peers[0].saw("/health/state")); n != 1 {
			t.Errorf("it was asked %d times", n)
		}
	})
}

// Probes come after 1, 2, 5, 10, 30, 60 s and a little more, and end when the node is ready.
func TestRestingNodeIsProbedWithGrowingPauses(t *testing.T) {
	within(t, Options{}, handlers(healthy, inState(StateFailed)), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for range 2 {
			if err := ask(t.Context(), view); err != nil {
				t.Fatal(err)
			}
		}
		began := time.Now()
		later(5 * time.Minute)
		at := began
		for i, probe := range s.peers[1].saw("/health/ready") {
			pause, want := probe.at.Sub(at), backoff[min(i, len(backoff)-1)]
			if pause < want || pause > want+want/5+time.Millisecond {
				t.Errorf("probe %d came after %v, want %v and up to a fifth more", i+1, pause, want)
			}
			at = probe.at
		}
		if n := len(s.peers[1].saw("/health/ready")); n < 7 || n > 9 {
			t.Errorf("in 5 minutes it was probed %d times", n)
		}
		if n := len(withStatus(s.peers[1].saw("/keys"), http.StatusPreconditionFailed)); n != 1 {
			t.Errorf("requests went to it %d times", n)
		}
		s.peers[1].answers(healthy)
		later(73 * time.Second)
		s.peers[1].forget()
		for range 4 {
			if err := ask(t.Context(), view); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(s.peers[1].saw("/keys")); n != 2 {
			t.Errorf("after it returned it served %d of 4 requests", n)
		}
		if n := len(s.peers[1].saw("/health/ready")); n != 0 {
			t.Errorf("it is still probed: %d times", n)
		}
		if text := s.log.String(); !strings.Contains(text, "rests") || !strings.Contains(text, "serves again") {
			t.Errorf("the log does not tell: %s", text)
		}
	})
}

// A node that says that it is ready and fails every request is not believed for ever: its rests grow, because only a served
// request counts as recovery.
func TestNodeThatOnlyClaimsToBeReadyRestsLongerAndLonger(t *testing.T) {
	within(t, Options{}, handlers(healthy, saying(500)), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for range 1800 {
			if err := ask(t.Context(), view); err != nil {
				t.Fatal(err)
			}
			later(100 * time.Millisecond)
		}
		if n := len(s.peers[1].saw("/keys")); n < 3 || n > 10 {
			t.Errorf("in 3 minutes %d requests were lost on it", n)
		}
	})
}

// While all nodes rest, requests wait for the one that finds out whether that is still so.
func TestRequestsWaitForTheOneThatTries(t *testing.T) {
	var slowly atomic.Bool
	handler := func(w http.ResponseWriter, r *http.Request) {
		if slowly.Load() {
			later(100 * time.Millisecond)
		}
		healthy(w, r)
	}
	within(t, Options{}, handlers(handler), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		if err := ask(t.Context(), view); err != nil {
			t.Fatal(err)
		}
		s.network.stop(s.peers[0].address)
		if err := ask(t.Context(), view); err == nil {
			t.Fatal("a node that is away served")
		}
		later(30 * time.Second)
		slowly.Store(true)
		s.network.start(s.peers[0].address, s.peers[0])
		later(1100 * time.Millisecond)
		var all sync.WaitGroup
		for range 32 {
			all.Go(func() {
				if err := ask(t.Context(), view); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	})
}

// A request that every node stumbles over must not take them away from the others.
func TestPoisonedRequestDoesNotStopTheOthers(t *testing.T) {
	poisoned := func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/decrypt") {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		healthy(w, r)
	}
	within(t, Options{}, handlers(poisoned, poisoned), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for range 5 {
			if err := post(t.Context(), view); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("error = %v, want ErrUnavailable", err)
			}
			if err := ask(t.Context(), view); err != nil {
				t.Errorf("another request: %v", err)
			}
		}
	})
}

// What needs no credentials is asked of nodes that rest as well.
func TestPublicRequestsReachRestingNodes(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		h.Node(0).SetState(nethsmtest.Locked)
		_ = ask(t.Context(), s.operator())
		for range 3 {
			if state, err := s.client.State(t.Context()); err != nil || state != StateLocked {
				t.Errorf("State = %v, %v", state, err)
			}
		}
		if err := s.client.Unlock(t.Context(), []byte(nethsmtest.UnlockPassphrase)); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if err := ask(t.Context(), s.operator()); err != nil {
			t.Errorf("after unlocking: %v", err)
		}
	})
}

// A node that fails and returns in turns while it is slow to say whether it is ready has one prober, not one for each turn.
func TestFlappingNodeHasOneProber(t *testing.T) {
	within(t, Options{}, handlers(healthy), func(s *scene) {
		t := s.T
		ill := func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/health/ready") {
				later(4 * time.Second)
			}
			inState(StateFailed)(w, r)
		}
		for range 6 {
			s.peers[0].answers(ill)
			_ = ask(t.Context(), s.client)
			later(1300 * time.Millisecond) // the prober waits for its answer
			s.peers[0].answers(healthy)
			if err := ask(t.Context(), s.client); err != nil {
				t.Fatal(err)
			}
		}
		s.peers[0].answers(inState(StateFailed))
		_ = ask(t.Context(), s.client)
		later(10 * time.Second) // what is on its way has come
		s.peers[0].forget()
		later(5 * time.Minute)
		if n := len(s.peers[0].saw("/health/ready")); n > 9 {
			t.Errorf("in 5 minutes it was probed %d times", n)
		}
	})
}

// Whoever asks a node for its state for all may leave; the others still learn it.
func TestStateIsLearntWhenTheOneWhoAskedLeaves(t *testing.T) {
	slowly := func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/health/state") {
			later(time.Second)
		}
		inState(StateLocked)(w, r)
	}
	within(t, Options{}, handlers(slowly), func(s *scene) {
		t := s.T
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		var all sync.WaitGroup
		all.Go(func() { _ = ask(ctx, s.client) })
		synctest.Wait()
		for range 8 {
			all.Go(func() {
				if err := s.client.Ready(t.Context()); !errors.Is(err, hsm.ErrLocked) {
					t.Errorf("error = %v, want ErrLocked", err)
				}
			})
		}
		all.Wait()
		if n := len(s.peers[0].saw("/health/state")); n > 2 {
			t.Errorf("it was asked %d times", n)
		}
	})
}

// A node that comes and goes ten times a second harms no request while another one is there.
func TestNodeThatFlaps(t *testing.T) {
	within(t, Options{}, handlers(healthy, healthy), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for i := range 600 {
			if i%2 == 0 {
				s.peers[0].answers(saying(503))
			} else {
				s.peers[0].answers(healthy)
			}
			for range 3 {
				if err := ask(t.Context(), view); err != nil {
					t.Fatal(err)
				}
			}
			later(100 * time.Millisecond)
		}
	})
}
