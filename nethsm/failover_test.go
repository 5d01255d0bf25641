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
