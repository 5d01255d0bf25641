package nethsm

import (
	"context"
	"errors"
	"fmt"
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

// Which answers and silences send a request to the next node, and which of them let the node rest.
func TestWhatSendsARequestToTheNextNode(t *testing.T) {
	tests := []struct {
		name  string
		first func(s *scene) // makes the first node ill
		reads bool           // a request that changes nothing is served by the second node
		makes bool           // and so is one that creates
		maybe bool           // the error of one that creates says that it may have happened
		rests bool
	}{
		{"nobody listens", func(s *scene) { s.network.stop(s.peers[0].address) }, true, true, false, true},
		{"a black hole", func(s *scene) { s.network.swallow(s.peers[0].address, true) }, true, true, false, true},
		{"it takes the request and hangs", func(s *scene) { s.peers[0].answers(hanging) }, true, false, true, true},
		{"it takes the request and closes", func(s *scene) { s.peers[0].answers(aborting) }, true, false, true, true},
		{"500", func(s *scene) { s.peers[0].answers(saying(500)) }, true, false, true, true},
		{"501", func(s *scene) { s.peers[0].answers(saying(501)) }, true, true, false, true},
		{"502", func(s *scene) { s.peers[0].answers(saying(502)) }, true, false, true, true},
		{"503", func(s *scene) { s.peers[0].answers(saying(503)) }, true, false, true, true},
		{"Locked", func(s *scene) { s.peers[0].answers(inState(StateLocked)) }, true, true, false, true},
		{"Failed", func(s *scene) { s.peers[0].answers(inState(StateFailed)) }, true, true, false, true},
		{"Unprovisioned", func(s *scene) { s.peers[0].answers(inState(StateUnprovisioned)) }, true, true, false, true},
		{"412 of a node that has just become Operational", func(s *scene) { s.peers[0].answers(justReturned) }, true, true, false, false},
		{"412 of an Operational node", func(s *scene) { s.peers[0].answers(saying(412)) }, false, false, false, false},
		{"400", func(s *scene) { s.peers[0].answers(saying(400)) }, false, false, false, false},
		{"403", func(s *scene) { s.peers[0].answers(saying(403)) }, false, false, false, false},
		{"404", func(s *scene) { s.peers[0].answers(saying(404)) }, false, false, false, false},
		{"409", func(s *scene) { s.peers[0].answers(saying(409)) }, false, false, false, false},
		{"429", func(s *scene) { s.peers[0].answers(saying(429)) }, true, true, false, false},
		{"401", func(s *scene) { s.peers[0].answers(saying(401)) }, true, true, false, false},
		{"an answer of something else", func(s *scene) { s.peers[0].answers(portal) }, true, false, true, true},
		{"a redirect", func(s *scene) { s.peers[0].answers(redirecting(307)) }, true, true, false, true},
		{"a redirect to a result", func(s *scene) { s.peers[0].answers(redirecting(303)) }, true, false, true, true},
	}
	kinds := []struct {
		name    string
		send    func(context.Context, *Client) error
		creates bool
	}{{"GET", ask, false}, {"POST", post, false}, {"creating", create, true}}
	for _, test := range tests {
		for _, kind := range kinds {
			t.Run(test.name+", "+kind.name, func(t *testing.T) {
				within(t, Options{Timeout: 6 * time.Second}, handlers(healthy, healthy), func(s *scene) {
					t := s.T
					view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
					test.first(s)
					s.first()
					began := time.Now()
					err := kind.send(t.Context(), view)
					if took := time.Since(began); took > 6*time.Second {
						t.Errorf("it took %v", took)
					}
					served := test.reads
					if kind.creates {
						served = test.makes
					}
					if (err == nil) != served {
						t.Errorf("error = %v, want it served: %v", err, served)
					}
					if maybe := errors.Is(err, hsm.ErrMayHaveHappened); maybe != (kind.creates && test.maybe) {
						t.Errorf("error = %v; that it may have happened: %v", err, maybe)
					}
					if n := len(s.peers[1].saw("/keys")) + len(s.peers[1].saw("/keys/k/decrypt")) + len(s.peers[1].saw("/keys/generate")); (n == 1) != served {
						t.Errorf("the second node was asked %d times", n)
					}
					if _, rests := s.client.pool.nodes[0].resting(); rests != test.rests {
						t.Errorf("the first node rests: %v, want %v", rests, test.rests)
					}
				})
			})
		}
	}
}

// first makes the next request go to the first node.
func (s *scene) first() {
	p := s.client.pool
	p.choosing.Lock()
	defer p.choosing.Unlock()
	p.turn = len(p.nodes) - 1
}

// justReturned is out of service when it is asked for something, and Operational when it is asked for its state.
func justReturned(w http.ResponseWriter, r *http.Request) {
	if strings.Contains(r.URL.Path, "/health/") {
		healthy(w, r)
		return
	}
	inState(StateLocked)(w, r)
}

// aborting takes a request and closes the connection.
func aborting(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }

// portal answers like something that is no NetHSM at all.
func portal(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/html")
	_, _ = w.Write([]byte("<html>please log in, sesame</html>"))
}

func redirecting(status int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "https://user:secret@elsewhere.example/api/v1/keys?token=1")
		w.WriteHeader(status)
	}
}

// One of three nodes is down: nobody notices, and it costs no time.
func TestOneOfThreeDown(t *testing.T) {
	withDouble(t, 3, func(s *scene, _ *nethsmtest.HSM) {
		t := s.T
		operator := s.operator()
		s.network.stop(s.peers[1].address)
		began := time.Now()
		var all sync.WaitGroup
		for range 90 {
			all.Go(func() {
				if err := ask(t.Context(), operator); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v", took)
		}
		// The load is shared by those that are up, the one that is faster at the moment getting more.
		if a, b := len(s.peers[0].saw("/keys")), len(s.peers[2].saw("/keys")); a < 15 || b < 15 {
			t.Errorf("the nodes that are up served %d and %d", a, b)
		}
	})
}

func TestAllNodesDown(t *testing.T) {
	within(t, Options{}, handlers(healthy, healthy, healthy), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for _, p := range s.peers {
			s.network.stop(p.address)
		}
		began := time.Now()
		for _, send := range []func(context.Context, *Client) error{ask, post, create} {
			err := send(t.Context(), view)
			if !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrMayHaveHappened) {
				t.Errorf("error = %v, want ErrUnavailable", err)
			}
			for _, p := range s.peers {
				if !strings.Contains(err.Error(), p.address) {
					t.Errorf("the error does not tell of %s: %v", p.address, err)
				}
			}
			if !strings.Contains(err.Error(), "connection refused") {
				t.Errorf("the error does not tell the cause: %v", err)
			}
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v to say so", took)
		}
		// Within a second nobody is asked again; after it the nodes are, and one that has returned serves at once.
		for _, p := range s.peers {
			if n := s.network.dialled(p.address); n != 1 {
				t.Errorf("%s was dialled %d times within a second", p.address, n)
			}
		}
		later(40 * time.Second) // the pauses between probes are long by now
		s.network.start(s.peers[2].address, s.peers[2])
		later(1100 * time.Millisecond)
		at := time.Now()
		if err := ask(t.Context(), view); err != nil || time.Since(at) > 0 {
			t.Errorf("after one returned: %v, after %v", err, time.Since(at))
		}
	})
}

// A node that hangs leaves time for the others, and the deadline holds in any case.
func TestHangingNodesLeaveTimeForTheOthers(t *testing.T) {
	tests := []struct {
		name    string
		nodes   []http.HandlerFunc
		caller  time.Duration // deadline; 0: none
		timeout time.Duration // of the client
		fails   bool
		max     time.Duration
	}{
		{"one of three, the caller has 3 s", []http.HandlerFunc{hanging, healthy, healthy}, 3 * time.Second, 0, false, time.Second},
		{"two of three, the caller has 3 s", []http.HandlerFunc{hanging, hanging, healthy}, 3 * time.Second, 0, false, 2 * time.Second},
		{"two of three, no deadline but the call's", []http.HandlerFunc{hanging, hanging, healthy}, 0, 3 * time.Second, false, 2 * time.Second},
		{"all, the caller has 3 s", []http.HandlerFunc{hanging, hanging, hanging}, 3 * time.Second, 0, true, 3 * time.Second},
		{"all, no deadline but the call's", []http.HandlerFunc{hanging, hanging, hanging}, 0, 2 * time.Second, true, 2 * time.Second},
		{"the only one", []http.HandlerFunc{hanging}, 0, 2 * time.Second, true, 2 * time.Second},
		{"all, and the caller has more time than the call", []http.HandlerFunc{hanging, hanging}, time.Minute, 2 * time.Second, true, 2 * time.Second},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			within(t, Options{Timeout: test.timeout}, handlers(test.nodes...), func(s *scene) {
				t := s.T
				view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
				s.first()
				ctx := t.Context()
				if test.caller > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, test.caller)
					defer cancel()
				}
				began := time.Now()
				err := post(ctx, view)
				if took := time.Since(began); took > test.max {
					t.Errorf("it took %v, want %v at most", took, test.max)
				}
				if (err != nil) != test.fails {
					t.Errorf("error = %v", err)
				}
				if !test.fails {
					return
				}
				if !errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("error = %v, want ErrUnavailable", err)
				}
				if own := errors.Is(err, context.DeadlineExceeded); own != (test.caller > 0 && ctx.Err() != nil) {
					t.Errorf("error = %v; that the caller's time is up: %v", err, own)
				}
			})
		})
	}
}

// A caller who leaves gets its ctx error at once, and the node is not blamed.
func TestCallerThatLeavesDoesNotHarmTheNode(t *testing.T) {
	within(t, Options{}, handlers(hanging), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(2*time.Second, cancel)
		began := time.Now()
		err := create(ctx, view)
		if !errors.Is(err, context.Canceled) || !errors.Is(err, hsm.ErrMayHaveHappened) || time.Since(began) != 2*time.Second {
			t.Errorf("error = %v after %v", err, time.Since(began))
		}
		if _, rests := s.client.pool.nodes[0].resting(); rests {
			t.Error("the node rests")
		}
	})
}

// A long creation is not cut short because there are other nodes: nobody else may be asked.
func TestCreationGetsTheWholeTimeOnceItIsSent(t *testing.T) {
	slow := func(w http.ResponseWriter, r *http.Request) {
		later(8 * time.Second)
		healthy(w, r)
	}
	within(t, Options{}, handlers(slow, slow, slow), func(s *scene) {
		t := s.T
		if err := create(t.Context(), s.client.As(Credentials{Username: "u", Password: []byte("p")})); err != nil {
			t.Error(err)
		}
	})
}

// Errors tell each node's own cause, and what they are together.
func TestErrorsOfSeveralNodes(t *testing.T) {
	tests := []struct {
		name   string
		nodes  []http.HandlerFunc
		down   []int
		is     []error
		isNot  []error
		speaks []string
	}{
		{
			"all are Locked",
			[]http.HandlerFunc{inState(StateLocked), inState(StateLocked)},
			nil,
			[]error{hsm.ErrLocked},
			[]error{hsm.ErrUnavailable},
			[]string{"127.0.0.1:1", "127.0.0.1:2", "Locked"},
		},
		{
			"one is Locked and one is away",
			[]http.HandlerFunc{inState(StateLocked), healthy},
			[]int{1},
			[]error{hsm.ErrUnavailable},
			[]error{hsm.ErrLocked},
			[]string{"Locked", "connection refused"},
		},
		{
			"one is Failed and one is Unprovisioned",
			[]http.HandlerFunc{inState(StateFailed), inState(StateUnprovisioned)},
			nil,
			[]error{hsm.ErrUnavailable, ErrState},
			[]error{hsm.ErrLocked},
			[]string{"Failed", "Unprovisioned"},
		},
		{
			"the only one is Locked",
			[]http.HandlerFunc{inState(StateLocked)},
			nil,
			[]error{hsm.ErrLocked},
			[]error{hsm.ErrUnavailable},
			[]string{"Locked"},
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			within(t, Options{}, handlers(test.nodes...), func(s *scene) {
				t := s.T
				view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
				for _, i := range test.down {
					s.network.stop(s.peers[i].address)
				}
				for _, when := range []string{"the first time", "while they rest"} {
					err := ask(t.Context(), view)
					for _, target := range test.is {
						if !errors.Is(err, target) {
							t.Errorf("%s: %v is not %v", when, err, target)
						}
					}
					for _, target := range test.isNot {
						if errors.Is(err, target) {
							t.Errorf("%s: %v is %v", when, err, target)
						}
					}
					for _, part := range append(test.speaks, "listing the keys") {
						if !strings.Contains(err.Error(), part) {
							t.Errorf("%s: %v does not say %q", when, err, part)
						}
					}
				}
			})
		})
	}
}

// The Locked node is one of three: the others serve, and nobody hears of it.
func TestLockedNodeDoesNotHideTheOthers(t *testing.T) {
	withDouble(t, 3, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		h.Node(1).SetState(nethsmtest.Locked)
		for range 30 {
			if err := ask(t.Context(), s.operator()); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(withStatus(s.peers[1].saw("/keys"), http.StatusPreconditionFailed)); n != 1 {
			t.Errorf("the Locked node was asked %d times", n)
		}
	})
}

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

// A condition that does not hold is 412 as well, and says nothing about the node.
func TestConditionThatDoesNotHold(t *testing.T) {
	withDouble(t, 2, func(s *scene, _ *nethsmtest.HSM) {
		t := s.T
		admin := s.client.As(Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)})
		_, err := admin.do(t.Context(), call{
			op: "reading the keys", method: http.MethodGet, path: "/keys", ifMatch: `"something else"`,
		})
		refused, is := errors.AsType[*Error](err)
		if !is || refused.Status != http.StatusPreconditionFailed || refused.State != StateOperational {
			t.Errorf("error = %#v, want a 412 of an Operational node", err)
		}
		for _, n := range s.client.pool.nodes {
			if _, rests := n.resting(); rests {
				t.Errorf("%s rests", n.host)
			}
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

// A view of one node asks that one, whatever is known about it.
func TestViewOfOneNodeHasNoFailover(t *testing.T) {
	withDouble(t, 2, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		h.Node(0).SetState(nethsmtest.Locked)
		for range 4 {
			if err := ask(t.Context(), s.operator()); err != nil {
				t.Fatal(err)
			}
		}
		locked, err := s.client.At(s.client.URLs()[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := ask(t.Context(), locked.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})); !errors.Is(err, hsm.ErrLocked) {
			t.Errorf("error = %v, want ErrLocked", err)
		}
		if state, err := locked.State(t.Context()); err != nil || state != StateLocked {
			t.Errorf("State = %v, %v", state, err)
		}
		// Unlocking it brings it back at once.
		if err := locked.Unlock(t.Context(), []byte(nethsmtest.UnlockPassphrase)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if _, rests := s.client.pool.nodes[0].resting(); rests {
			t.Error("the node still rests after it was unlocked")
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

func TestFewestRequestsInFlightIsChosen(t *testing.T) {
	var release chan struct{} // of the bubble
	var held atomic.Int32
	holding := func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/decrypt") {
			held.Add(1)
			<-release
		}
		healthy(w, r)
	}
	within(t, Options{}, handlers(holding, healthy, healthy), func(s *scene) {
		t := s.T
		release = make(chan struct{})
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for range 6 { // equals take turns
			if err := ask(t.Context(), view); err != nil {
				t.Fatal(err)
			}
		}
		for i, p := range s.peers {
			if n := len(p.saw("/keys")); n != 2 {
				t.Errorf("node %d served %d of 6 requests", i, n)
			}
		}
		s.first()
		var all sync.WaitGroup
		all.Go(func() { _ = post(t.Context(), view) })
		synctest.Wait()
		if held.Load() != 1 {
			t.Fatal("the request that should be held is not")
		}
		for range 10 {
			if err := ask(t.Context(), view); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(s.peers[0].saw("/keys")); n != 2 {
			t.Errorf("the busy node served %d more requests", n-2)
		}
		close(release)
		all.Wait()
	})
}

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

// More requests than connections: who waits too long for one is told so, and no node is blamed.
func TestBusyConnectionsAreNoFaultOfTheNode(t *testing.T) {
	slow := func(w http.ResponseWriter, r *http.Request) {
		later(500 * time.Millisecond)
		healthy(w, r)
	}
	within(t, Options{Connections: 1, Timeout: 4 * time.Second}, handlers(slow, slow), func(s *scene) {
		t := s.T
		var all sync.WaitGroup
		var served atomic.Int32
		for range 24 {
			all.Go(func() {
				switch err := post(t.Context(), s.client); {
				case err == nil:
					served.Add(1)
				case !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "in use"):
					t.Errorf("error = %v, want one that tells of the connections", err)
				}
			})
		}
		all.Wait()
		later(time.Second)
		if n := served.Load(); n < 8 {
			t.Errorf("%d were served, want 8 at least", n)
		}
		if text := s.log.String(); strings.Contains(text, "rests") {
			t.Errorf("a node is blamed: %s", text)
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

// broken is a sink that takes nothing.
type broken struct{ err error }

func (b broken) Write([]byte) (int, error) { return 0, b.err }

// What cannot be written down here is no trouble of the node.
func TestSinkThatFailsIsNoFaultOfTheNode(t *testing.T) {
	within(t, Options{}, handlers(healthy, healthy), func(s *scene) {
		t := s.T
		full := errors.New("the disk is full")
		_, err := s.client.do(t.Context(), call{op: "making a backup", method: http.MethodPost, path: "/x", sink: broken{full}})
		if !errors.Is(err, full) || errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("error = %v, want that of the sink alone", err)
		}
		if text := s.log.String(); strings.Contains(text, "rests") {
			t.Errorf("a node is blamed: %s", text)
		}
	})
}

// An answer that is on its way to the sink has all the time there is: no other node can replace it.
func TestSinkGetsTheWholeTimeOnceItGetsSomething(t *testing.T) {
	slow := func(w http.ResponseWriter, _ *http.Request) {
		for range 8 {
			_, _ = w.Write([]byte("piece"))
			_ = http.NewResponseController(w).Flush()
			later(time.Second)
		}
	}
	within(t, Options{}, handlers(slow, slow), func(s *scene) {
		t := s.T
		var sink strings.Builder
		_, err := s.client.do(t.Context(), call{op: "making a backup", method: http.MethodPost, path: "/x", sink: &sink})
		if err != nil || sink.Len() != 40 {
			t.Errorf("%d bytes, error %v", sink.Len(), err)
		}
	})
}

// A cause that several nodes share is told once, and so is what was tried.
func TestErrorOfSeveralNodesRepeatsNothing(t *testing.T) {
	within(t, Options{}, handlers(inState(StateLocked), healthy, healthy, inState(StateLocked)), func(s *scene) {
		t := s.T
		s.network.stop(s.peers[1].address)
		s.network.stop(s.peers[2].address)
		for range 2 {
			err := ask(t.Context(), s.client)
			const want = `listing the keys: no node of the NetHSM serves: at 127.0.0.1:1 and 127.0.0.1:4: the NetHSM is Locked; unlock it ` +
				`with its unlock passphrase (HTTP 412 "Service not available"); at 127.0.0.1:2 and 127.0.0.1:3: no connection: connection refused`
			if err == nil || err.Error() != want {
				t.Errorf("error = %v\nwant    %s", err, want)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := ask(ctx, s.client); !errors.Is(err, context.Canceled) || strings.Count(err.Error(), "canceled") != 1 {
			t.Errorf("error = %v, want one that tells once that it was canceled", err)
		}
	})
}

// Whenever a caller leaves it gets its ctx error at once, and nothing stays behind: the bubble would not end.
func TestCallerMayLeaveAtAnyTime(t *testing.T) {
	for _, state := range []string{"serves", "trickles", "refuses", "limits", "is Locked", "is away", "is a hole"} {
		for name, send := range map[string]func(context.Context, *Client) error{"GET": ask, "POST": post, "creating": create} {
			t.Run(state+", "+name, func(t *testing.T) {
				slow := func(handler http.HandlerFunc) http.HandlerFunc {
					return func(w http.ResponseWriter, r *http.Request) {
						later(30 * time.Millisecond)
						handler(w, r)
					}
				}
				handler := map[string]http.HandlerFunc{
					"serves": slow(healthy), "refuses": slow(saying(401)), "limits": slow(saying(429)), "is Locked": slow(inState(StateLocked)),
					"is away": healthy, "is a hole": healthy, "trickles": func(w http.ResponseWriter, r *http.Request) {
						for r.Context().Err() == nil {
							_, _ = w.Write([]byte(" "))
							_ = http.NewResponseController(w).Flush()
							later(10 * time.Millisecond)
						}
					},
				}[state]
				within(t, Options{}, handlers(handler, handler), func(s *scene) {
					t := s.T
					for _, p := range s.peers {
						switch state {
						case "is away":
							s.network.stop(p.address)
						case "is a hole":
							s.network.swallow(p.address, true)
						}
					}
					view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
					for after := time.Duration(0); after < 1500*time.Millisecond; after += 37 * time.Millisecond {
						for _, limit := range []func(context.Context, time.Duration) (context.Context, context.CancelFunc){
							context.WithTimeout,
							func(ctx context.Context, after time.Duration) (context.Context, context.CancelFunc) {
								ctx, cancel := context.WithCancel(ctx)
								time.AfterFunc(after, cancel)
								return ctx, cancel
							},
						} {
							ctx, cancel := limit(t.Context(), after)
							began := time.Now()
							err := send(ctx, view)
							if took := time.Since(began); took > after {
								t.Errorf("leaving after %v took %v", after, took)
							}
							if ctx.Err() != nil && err != nil && !errors.Is(err, ctx.Err()) {
								t.Errorf("after %v: error = %v, want it to be %v", after, err, ctx.Err())
							}
							cancel()
						}
					}
					if err := s.client.Close(); err != nil {
						t.Error(err)
					}
					later(time.Second) // the nodes end what they are at
				})
			})
		}
	}
}

// A crowd that finds all nodes away costs each of them a knock a second, and nobody waits.
func TestCrowdWithAllNodesDown(t *testing.T) {
	within(t, Options{}, handlers(healthy, healthy, healthy), func(s *scene) {
		t := s.T
		for _, p := range s.peers {
			s.network.stop(p.address)
		}
		_ = ask(t.Context(), s.client)
		began := time.Now()
		var all sync.WaitGroup
		for range 10_000 {
			all.Go(func() {
				for range 3 {
					if err := ask(t.Context(), s.client); !errors.Is(err, hsm.ErrUnavailable) {
						t.Errorf("error = %v, want ErrUnavailable", err)
					}
				}
			})
		}
		all.Wait()
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v", took)
		}
		for _, p := range s.peers {
			if n := s.network.dialled(p.address); n != 1 {
				t.Errorf("%s was dialled %d times", p.address, n)
			}
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

// Close may come at any time: calls end at once, unavailable, and nothing stays behind.
func TestCloseAtAnyTime(t *testing.T) {
	for after := time.Duration(0); after < 4*time.Second; after += 133 * time.Millisecond {
		within(t, Options{}, handlers(saying(401), inState(StateLocked), hanging), func(s *scene) {
			t := s.T
			view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
			var all sync.WaitGroup
			for range 12 {
				for _, send := range []func(context.Context, *Client) error{ask, post, create} {
					all.Go(func() {
						if err := send(t.Context(), view); !errors.Is(err, hsm.ErrUnavailable) {
							t.Errorf("error = %v, want ErrUnavailable", err)
						}
					})
				}
			}
			later(after)
			began := time.Now()
			if err := s.client.Close(); err != nil {
				t.Error(err)
			}
			all.Wait()
			if took := time.Since(began); took > 200*time.Millisecond {
				t.Errorf("it took %v", took)
			}
			later(time.Second)
		})
	}
}
