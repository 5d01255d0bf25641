package nethsm

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

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
