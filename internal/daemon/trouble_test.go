package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// TestAnAlarmOfANodeThatIsWellStands: what is left to be finished there fails and is not tried again for a while; the alarm
// shows for as long, or nobody would be called.
func TestAnAlarmOfANodeThatIsWellStands(t *testing.T) {
	now := time.Now()
	v := view{}
	v.afterLook(State{Initialized: true}, nil, now)
	v.afterTend(Result{State: State{Initialized: true}, Err: fmt.Errorf("revoking: %w", &hsm.PINError{Wrong: true})}, "1", now)
	v.afterLook(State{Initialized: true}, nil, now.Add(5*time.Second))
	if v.alarm != AlarmPIN || v.err == nil || v.barred.IsZero() {
		t.Errorf("five seconds later the alarm is %q, the error %v, barred until %v", v.alarm, v.err, v.barred)
	}
	v.afterLook(State{Initialized: true}, nil, now.Add(barTime))
	if v.alarm != AlarmNone || v.err != nil {
		t.Errorf("when it is tried again, the alarm is %q, the error %v", v.alarm, v.err)
	}
}

// TestANodeThatSealsItselfAgainAndAgainTakesNotTheHSM: it crashes at every start, or somebody plays with us. One that restarts
// now and then is not kept waiting.
func TestANodeThatSealsItselfAgainAndAgainTakesNotTheHSM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		r := start(t, y, nil, c)
		pass(10 * time.Second)
		y.forget()
		for range 30 * 60 {
			y.seal(c.Nodes...)
			pass(time.Second)
		}
		if _, acts := y.since(time.Time{}, c.Nodes[0]); acts < 40 || acts > 100 {
			t.Errorf("%d acts in half an hour", acts)
		}
		pass(10 * time.Minute)
		y.forget()
		y.seal(c.Nodes...)
		pass(defaultInterval * 6 / 5)
		if _, acts := y.since(time.Time{}, c.Nodes[0]); acts != 1 {
			t.Errorf("%d acts after ten quiet minutes", acts)
		}
		r.end(t)
	})
}

// TestTheWatchdogFindsAnActThatNeverEnds: also one that a reload left behind, because its cluster waits for it.
func TestTheWatchdogFindsAnActThatNeverEnds(t *testing.T) {
	for name, reload := range map[string]bool{"of the site in use": false, "of a site that was replaced": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				y := newYard()
				c := y.cluster("prod", 1)
				y.seal(c.Nodes...)
				release := make(chan struct{})
				y.during = func(context.Context, string) { <-release }
				r := start(t, y, nil, c)
				pass(time.Second)
				if reload {
					r.hangUp()
				}
				pass(actLimit)
				if n := r.told.count("WATCHDOG=1"); n < 85 {
					t.Errorf("fed %d times while it may still end", n)
				}
				pass(turnSlack + stopGrace)
				before := r.told.count("WATCHDOG=1")
				pass(10 * time.Minute)
				if n := r.told.count("WATCHDOG=1") - before; n > 0 || r.told.count(`an act on cluster "prod" does not turn`) == 0 {
					t.Errorf("fed %d times while stuck", n)
				}
				close(release)
				r.end(t)
			})
		})
	}
}

// TestTwoCriticalWindowsAreLoggedOnce: their order is that of a map.
func TestTwoCriticalWindowsAreLoggedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		a, b := y.cluster("a", 1), y.cluster("b", 1)
		y.seal(a.Nodes[0], b.Nodes[0])
		var hooks *Hooks
		y.during = func(_ context.Context, cluster string) {
			defer hooks.Critical("the keys of " + cluster)()
			<-time.After(10*time.Minute + 500*time.Millisecond) // between two looks of the daemon that waits for it
		}
		r := start(t, y, func(_ context.Context, h *Hooks) (*Site, error) {
			hooks = h
			return &Site{Custodian: y, Clusters: []Cluster{a, b}}, nil
		})
		pass(time.Second)
		r.end(t)
		if n := r.logged.count("do not kill this process"); n != 1 {
			t.Errorf("logged %d times", n)
		}
	})
}

// TestAReloadForgetsNotThatANodeWasSealed: it does not answer now, and whoever is called because it is sealed must not be told
// that it is over.
func TestAReloadForgetsNotThatANodeWasSealed(t *testing.T) {
	y := newYard()
	a := y.cluster("a", 1)
	y.refused[a.Nodes[0]] = hsm.ErrUnavailable
	y.seal(a.Nodes...)
	site := func(*Hooks) *Site {
		return &Site{Custodian: y, Clusters: []Cluster{a}, Listen: Listen{Address: "127.0.0.1:0"}}
	}
	s := serve(t, site)
	<-s.ready
	y.set(func() { y.away[a.Nodes[0]] = errAway })
	s.build(t, site)
	eventually(t, func() bool {
		_, body := s.get(t, "http", "/metrics")
		return strings.Contains(body, `nitroseal_node_up{cluster="a",node="https://a-0:8200"} 0`)
	})
	if _, body := s.get(t, "http", "/metrics"); !strings.Contains(body, `nitroseal_node_sealed{cluster="a",node="https://a-0:8200"} 1`) {
		t.Errorf("nobody knows that it was sealed:\n%s", body)
	}
}

// TestTheListenerMovesToAllAddressesAndBack: the port is the same, so its own listener is in the way.
func TestTheListenerMovesToAllAddressesAndBack(t *testing.T) {
	y := newYard()
	a := y.cluster("a", 1)
	site := func(address string) func(*Hooks) *Site {
		return func(*Hooks) *Site {
			return &Site{Custodian: y, Clusters: []Cluster{a}, Listen: Listen{Address: address, Plain: true}}
		}
	}
	free, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	_, port, err := net.SplitHostPort(free.Addr().String())
	must(t, err)
	must(t, free.Close())
	s := serve(t, site("127.0.0.1:"+port))
	for _, host := range []string{"0.0.0.0:", "127.0.0.1:"} {
		s.build(t, site(host+port))
		s.mu.Lock()
		s.address = "127.0.0.1:" + port
		s.mu.Unlock()
		if code, body := s.get(t, "http", "/healthz"); code != 200 {
			t.Errorf("at %s: %d %s", host, code, body)
		}
	}
	s.mu.Lock()
	s.site = site("192.0.2.1:" + port) // no address of this machine
	s.mu.Unlock()
	s.reload <- syscall.SIGHUP
	eventually(t, func() bool { return s.logged.count("the one in use stays") == 1 })
	if code, body := s.get(t, "http", "/healthz"); code != 200 {
		t.Errorf("after a move that failed: %d %s", code, body)
	}
}

// TestWhoeverOpensConnectionsTakesNotTheMemoryOfTheDaemon: it has better things to do than to serve them.
func TestWhoeverOpensConnectionsTakesNotTheMemoryOfTheDaemon(t *testing.T) {
	y := newYard()
	a := y.cluster("a", 1)
	s := serve(t, func(*Hooks) *Site {
		return &Site{Custodian: y, Clusters: []Cluster{a}, Listen: Listen{Address: "127.0.0.1:0"}}
	})
	var held []net.Conn
	defer func() {
		for _, conn := range held {
			conn.Close()
		}
	}()
	closed := func(conn net.Conn) bool {
		must(t, conn.SetReadDeadline(time.Now().Add(5*time.Second)))
		_, err := conn.Read(make([]byte, 1))
		return !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err)
	}
	for range 257 {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", s.address)
		must(t, err)
		held = append(held, conn)
	}
	if !closed(held[256]) {
		t.Error("connection 257 is served")
	}
	held[0].Close()
	eventually(t, func() bool { code, _ := s.get(t, "http", "/healthz"); return code == 200 })
}

func isTimeout(err error) bool {
	timeout, is := errors.AsType[net.Error](err)
	return is && timeout.Timeout()
}

// TestNotReadyWhereTheStoreOfASealedNodeIsAway: its keys are there.
func TestNotReadyWhereTheStoreOfASealedNodeIsAway(t *testing.T) {
	y := newYard()
	a := y.cluster("a", 1)
	a.Store = "etcd"
	y.refused[a.Nodes[0]] = store.ErrUnavailable
	s := serve(t, func(hooks *Hooks) *Site {
		away := hooks.Store("etcd", awayStore{})
		return &Site{
			Custodian: y, Clusters: []Cluster{a}, Listen: Listen{Address: "127.0.0.1:0"}, Stores: []Store{{Name: "etcd", Store: away, Probe: true}},
		}
	})
	<-s.ready
	if code, body := s.get(t, "http", "/readyz"); code != 200 {
		t.Errorf("nobody needs the store: %d %s", code, body)
	}
	y.seal(a.Nodes...)
	eventually(t, func() bool {
		code, body := s.get(t, "http", "/readyz")
		return code == 503 && strings.Contains(body, `the store \"etcd\" does not answer`)
	})
}

// awayStore is a store that does not answer.
type awayStore struct{ store.Store }

func (awayStore) Get(context.Context, string) (store.Entry, error) {
	return store.Entry{}, store.ErrUnavailable
}
