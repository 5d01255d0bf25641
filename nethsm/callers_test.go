package nethsm

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

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
