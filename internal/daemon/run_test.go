package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/monitor"
)

func TestANodeThatIsWellIsLookedAtNowAndThenAndLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 2)
		r := start(t, y, nil, c)
		pass(time.Second)
		y.forget()
		pass(time.Hour * 3 / 4)
		for _, address := range c.Nodes {
			if looks, acts := y.since(time.Time{}, address); looks < 510 || looks > 570 || acts != 0 {
				t.Errorf("%s: %d looks and %d acts in three quarters of an hour", address, looks, acts)
			}
		}
		r.end(t)
	})
}

func TestASealedNodeIsUnsealedWheneverItIsFoundSealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		y.seal(c.Nodes...)
		r := start(t, y, nil, c)
		pass(time.Millisecond)
		if got := y.sealed(); got != nil {
			t.Errorf("sealed at the start, and still: %v", got)
		}
		for range 5 {
			pass(10 * time.Minute)
			y.forget()
			y.seal(c.Nodes...)
			pass(defaultInterval * 6 / 5)
			if _, acts := y.since(time.Time{}, c.Nodes[0]); len(y.sealed()) > 0 || acts != 1 {
				t.Errorf("sealed %v after %d acts", y.sealed(), acts)
			}
		}
		if n := r.logged.count("unsealed the node"); n != 6 {
			t.Errorf("the log tells of %d unsealings:\n%s", n, r.logged)
		}
		r.end(t)
	})
}

func TestANodeThatDoesNotAnswerIsTriedEverMoreSeldomAndFoundAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		r := start(t, y, nil, c)
		pass(time.Minute)
		y.set(func() { y.away[c.Nodes[0]] = errAway })
		pass(6 * time.Second) // it is noticed
		y.forget()
		pass(10 * time.Second)
		if looks, _ := y.since(time.Time{}, c.Nodes[0]); looks < 2 || looks > 10 {
			t.Errorf("%d looks in the first ten seconds", looks)
		}
		pass(time.Hour)
		y.forget()
		pass(time.Hour)
		if looks, acts := y.since(time.Time{}, c.Nodes[0]); looks < 100 || looks > 150 || acts != 0 {
			t.Errorf("%d looks and %d acts in an hour", looks, acts)
		}
		y.seal(c.Nodes...)
		y.set(func() { y.away[c.Nodes[0]] = nil })
		pass(longestPause * 6 / 5)
		if got := y.sealed(); got != nil {
			t.Errorf("it is back, and sealed: %v", got)
		}
		if n := r.logged.count("does not answer"); n != 1 {
			t.Errorf("the log complained %d times:\n%s", n, r.logged)
		}
		r.end(t)
	})
}

func TestWhatOnlyAPersonCanMendIsTriedSeldomAndSaidOnce(t *testing.T) {
	tests := map[string]struct {
		err   error
		alarm Alarm
	}{
		"shares that do not unseal":           {fmt.Errorf("node a: %w", cluster.ErrWrongShares), AlarmWrongShares},
		"shares that went to another cluster": {fmt.Errorf("node a: %w", cluster.ErrForeignCluster), AlarmForeignCluster},
		"a node that is not as recorded":      {fmt.Errorf("node a: %w", cluster.ErrMismatch), AlarmMismatch},
		"a refused PIN":                       {fmt.Errorf("opening: %w", &hsm.PINError{TriesLeft: 2, Wrong: true, Detail: "the PIN is wrong"}), AlarmPIN},
		"a node that TLS does not know":       {fmt.Errorf("node a: %w", node.ErrIdentity), AlarmIdentity},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				y := newYard()
				c := y.cluster("prod", 2)
				bad, good := c.Nodes[0], c.Nodes[1]
				y.refused[bad] = test.err
				y.seal(c.Nodes...)
				r := start(t, y, nil, c)
				pass(10 * time.Second)
				y.forget()
				begun := time.Now()
				for range 30 { // the other node of the cluster restarts every minute
					y.seal(good)
					pass(time.Minute)
				}
				if _, acts := y.since(begun, bad); acts < 2 || acts > 4 {
					t.Errorf("tended %d times in half an hour", acts)
				}
				if _, acts := y.since(begun, good); acts != 30 {
					t.Errorf("its sibling was tended %d times of 30", acts)
				}
				if n := r.logged.count("a person is needed"); n != 1 {
					t.Errorf("the log said %d times that a person is needed:\n%s", n, r.logged)
				}

				y.forget()
				r.hangUp()
				pass(time.Second)
				if _, acts := y.since(time.Time{}, bad); acts != 1 {
					t.Errorf("after a reload it was tended %d times", acts)
				}
				y.forget()
				y.set(func() { y.generation = "2"; delete(y.refused, bad) })
				pass(barLook + longestPause)
				if got := y.sealed(); got != nil {
					t.Errorf("with other material it is sealed still: %v", got)
				}
				r.end(t)
			})
		})
	}
}

func TestAForeignCertificateIsLookedAtAgainAndNotTended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		y.seal(c.Nodes...)
		y.away[c.Nodes[0]] = fmt.Errorf("reading the seal status: %w", node.ErrIdentity)
		r := start(t, y, nil, c)
		pass(time.Hour)
		if looks, acts := y.since(time.Time{}, c.Nodes[0]); acts != 0 || looks > 160 {
			t.Errorf("%d looks and %d acts", looks, acts)
		}
		y.set(func() { delete(y.away, c.Nodes[0]) }) // the right certificate is back
		pass(longestPause * 6 / 5)
		if got := y.sealed(); got != nil {
			t.Errorf("sealed: %v\n%s", got, r.logged)
		}
		r.end(t)
	})
}

func TestNodesThatAreSealedAtOneMomentShareOneOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		y.operation = 600 * time.Millisecond
		c, other := y.cluster("prod", 3), y.cluster("test", 3)
		y.seal(c.Nodes...)
		r := start(t, y, nil, c, other)
		pass(time.Minute)
		for _, a := range y.acts {
			if a.cluster == "prod" && a.at.Equal(y.acts[0].at) && len(strings.Fields(a.addresses)) != 3 {
				t.Errorf("at the start: %+v", a)
			}
		}
		y.set(func() { y.away[other.Nodes[0]] = errAway }) // who is out of reach is not waited for
		pass(time.Minute)
		y.forget()
		y.seal(c.Nodes...)
		y.seal(other.Nodes...)
		pass(longestPause)
		y.mu.Lock()
		for name, want := range map[string]int{"prod": 3, "test": 2} {
			acts := 0
			for _, a := range y.acts {
				if a.cluster == name {
					acts++
					if got := len(strings.Fields(a.addresses)); got != want {
						t.Errorf("%s: %d nodes in one act: %s", name, got, a.addresses)
					}
				}
			}
			if acts != 1 {
				t.Errorf("%s: %d acts", name, acts)
			}
		}
		y.mu.Unlock()
		r.end(t)
	})
}

func TestAHundredSealedClustersCostAHundredOperationsOfTheHSM(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		y.operation = 600 * time.Millisecond
		var clusters []Cluster
		for i := range 100 {
			clusters = append(clusters, y.cluster(fmt.Sprintf("c%d", i), 1))
			y.seal(clusters[i].Nodes...)
		}
		begun := time.Now()
		r := start(t, y, nil, clusters...)
		for len(y.sealed()) > 0 {
			pass(100 * time.Millisecond)
			if time.Since(begun) > 100*y.operation*6/5 {
				t.Fatalf("after %v %d are sealed", time.Since(begun), len(y.sealed()))
			}
		}
		if len(y.acts) != 100 || y.most > maxActs {
			t.Errorf("%d acts, %d at one time", len(y.acts), y.most)
		}
		r.end(t)
	})
}

func TestAHSMThatIsAwayIsNotHammeredAndUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		y.seal(c.Nodes...)
		y.refused[c.Nodes[0]] = fmt.Errorf("opening the shares: %w", hsm.ErrUnavailable)
		r := start(t, y, nil, c)
		pass(time.Hour)
		if _, acts := y.since(time.Time{}, c.Nodes[0]); acts < 100 || acts > 160 {
			t.Errorf("%d acts in an hour", acts)
		}
		y.set(func() { delete(y.refused, c.Nodes[0]) })
		pass(longestPause * 6 / 5)
		if got := y.sealed(); got != nil {
			t.Errorf("sealed: %v", got)
		}
		r.end(t)
	})
}

func TestANodeThatAsksForPatienceGetsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		y.away[c.Nodes[0]] = fmt.Errorf("looking: %w", &node.Error{Status: 429, RetryAfter: 20 * time.Second})
		r := start(t, y, nil, c)
		pass(65 * time.Second)
		if looks, _ := y.since(time.Time{}, c.Nodes[0]); looks != 4 {
			t.Errorf("%d looks", looks)
		}
		r.end(t)
	})
}

func TestWhatAnEarlierRunLeftIsFinishedAlsoWhereAllNodesAreWell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 3)
		for _, address := range c.Nodes {
			y.refused[address] = cluster.ErrHeld
		}
		r := start(t, y, nil, c)
		pass(10 * time.Minute)
		y.mu.Lock()
		acts := len(y.acts)
		y.refused = map[string]error{}
		y.mu.Unlock()
		if acts < 8 || acts > 12 {
			t.Errorf("%d acts in ten minutes", acts)
		}
		if n := r.logged.count("could not be tended"); n > 3 {
			t.Errorf("complained %d times:\n%s", n, r.logged)
		}
		pass(2 * time.Minute)
		y.forget()
		pass(10 * time.Hour)
		if n := len(y.acts); n < 8 || n > 12 {
			t.Errorf("finished, and %d acts in ten hours", n)
		}
		r.end(t)
	})
}

func TestACleanStopWaitsForActsAndWithoutLimitForWhatIsCritical(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		y.seal(c.Nodes...)
		y.operation = 5 * time.Second
		r := start(t, y, nil, c)
		pass(time.Second)
		begun := time.Now()
		r.end(t)
		if took := time.Since(begun); took < 3*time.Second || took > 6*time.Second || y.sealed() != nil {
			t.Errorf("stopped in %v, sealed: %v", took, y.sealed())
		}

		y.operation = time.Hour // an act that hangs is asked to give up
		y.seal(c.Nodes...)
		r = start(t, y, nil, c)
		pass(time.Second)
		begun = time.Now()
		r.end(t)
		if took := time.Since(begun); took != stopGrace {
			t.Errorf("stopped in %v", took)
		}

		y.operation = 0
		var hooks *Hooks
		y.during = func(context.Context, string) {
			leave := hooks.Critical("storing the keys of prod")
			<-time.After(10 * time.Minute)
			leave()
		}
		r = start(t, y, func(_ context.Context, h *Hooks) (*Site, error) {
			hooks = h
			return &Site{Custodian: y, Clusters: []Cluster{c}}, nil
		})
		pass(time.Second)
		begun = time.Now()
		r.end(t)
		if took := time.Since(begun); took < 9*time.Minute || took > 10*time.Minute {
			t.Errorf("stopped in %v", took)
		}
		if r.logged.count("storing the keys of prod") != 1 || r.told.count("EXTEND_TIMEOUT_USEC=") < 500 {
			t.Errorf("log:\n%s", r.logged)
		}
	})
}

func TestAReloadTakesTheNewSiteAndKeepsTheOldOneUntilItsActsHaveEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		first, second := y.cluster("first", 1), y.cluster("second", 1)
		y.seal(first.Nodes...)
		release := make(chan struct{})
		y.during = func(_ context.Context, cluster string) {
			if cluster == "first" {
				<-release
			}
		}
		var closed []string
		builds := 0
		r := start(t, y, func(context.Context, *Hooks) (*Site, error) {
			builds++
			if builds == 2 {
				return nil, errors.New("line 3: a brace is missing")
			}
			name, clusters := "one", []Cluster{first}
			if builds > 2 {
				name, clusters = "two", []Cluster{second, first}
			}
			return &Site{Custodian: y, Clusters: clusters, Close: func() error { closed = append(closed, name); return nil }}, nil
		})
		pass(time.Second)

		r.hangUp() // the file is broken
		pass(time.Minute)
		if r.logged.count("the one in use stays") != 1 || r.logged.count("a brace is missing") != 1 || closed != nil {
			t.Errorf("closed %v, log:\n%s", closed, r.logged)
		}
		if !strings.Contains(r.told.String(), "refused: line 3: a brace is missing") {
			t.Errorf("systemd was told:\n%s", r.told)
		}

		y.forget()
		r.hangUp()
		pass(time.Minute)
		if _, acts := y.since(time.Time{}, second.Nodes[0]); acts != 1 {
			t.Errorf("the new cluster was tended %d times", acts)
		}
		if _, acts := y.since(time.Time{}, first.Nodes[0]); acts != 0 || closed != nil {
			t.Errorf("the act of the old site is under way; tended %d times, closed %v", acts, closed)
		}
		close(release)
		pass(time.Minute)
		if got := strings.Join(closed, " "); got != "one" {
			t.Errorf("closed %q", got)
		}
		if got := y.sealed(); got != nil {
			t.Errorf("sealed: %v", got)
		}
		r.end(t)
		if got := strings.Join(closed, " "); got != "one two" {
			t.Errorf("closed %q at the end", got)
		}
		if n := r.logged.count("the node is unsealed\""); n > 2 {
			t.Errorf("a reload tells anew what did not change:\n%s", r.logged)
		}
	})
}

func TestADaemonThatCannotBeginFailsAndClosesWhatItOpened(t *testing.T) {
	closed := 0
	shut := func() error { closed++; return nil }
	y := newYard()
	c := y.cluster("prod", 1)
	tests := map[string]struct {
		site *Site
		err  error
		want error
	}{
		"the configuration is broken":         {nil, errAway, errAway},
		"there is no cluster":                 {&Site{Close: shut}, nil, ErrConfig},
		"others could reach it in plain HTTP": {&Site{Custodian: y, Clusters: []Cluster{c}, Listen: Listen{Address: "0.0.0.0:0"}, Close: shut}, nil, ErrConfig},
		"the port is none":                    {&Site{Custodian: y, Clusters: []Cluster{c}, Listen: Listen{Address: "127.0.0.1:99999"}, Close: shut}, nil, ErrConfig},
		"the address is none":                 {&Site{Custodian: y, Clusters: []Cluster{c}, Listen: Listen{Address: "here"}, Close: shut}, nil, ErrConfig},
	}
	want := 0
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := Run(t.Context(), Options{Build: func(context.Context, *Hooks) (*Site, error) { return test.site, test.err }})
			if !errors.Is(err, test.want) {
				t.Errorf("got %v", err)
			}
			if test.site != nil {
				want++
			}
			if closed != want {
				t.Errorf("closed %d of %d sites", closed, want)
			}
		})
	}
}

func TestSystemdIsToldHowTheDaemonFares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 2)
		r := start(t, y, nil, c)
		pass(time.Second)
		if got := r.told.String(); got != "READY=1 STATUS=2 of 2 nodes unsealed\n" {
			t.Errorf("after the first round: %q", got)
		}
		pass(30 * time.Second)
		if n := r.told.count("WATCHDOG=1"); n != 3 {
			t.Errorf("fed the watchdog %d times in half a minute, of which it has 20 seconds", n)
		}
		r.hangUp()
		if got := r.told.String(); !strings.Contains(got, "RELOADING=1 MONOTONIC_USEC=") || strings.LastIndex(got, "READY=1") < strings.Index(got, "RELOADING=1") {
			t.Errorf("at a reload: %q", got)
		}
		r.end(t)
		if got := r.told.String(); !strings.HasSuffix(got, "STOPPING=1\n") {
			t.Errorf("at the end: %q", got)
		}
	})
}

// stuckYard looks for ever.
type stuckYard struct{ *yard }

func (y stuckYard) Look(context.Context, string, string) (State, error) {
	<-time.After(time.Hour) // whatever its ctx says
	return State{}, errAway
}

func TestTheWatchdogIsNotFedWhileALoopIsStuckUnlessSomethingIsCritical(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		c := y.cluster("prod", 1)
		r := start(t, y, func(context.Context, *Hooks) (*Site, error) {
			return &Site{Custodian: stuckYard{y}, Clusters: []Cluster{c}}, nil
		})
		pass(firstRound)
		if r.told.count("READY=1") != 1 {
			t.Errorf("not ready after %v: %s", firstRound, r.told)
		}
		pass(lookLimit + turnSlack)
		before := r.told.count("WATCHDOG=1")
		pass(10 * time.Minute)
		if n := r.told.count("WATCHDOG=1") - before; n > 1 {
			t.Errorf("fed %d times while stuck", n)
		}
		leave := r.hooks.Critical("storing the keys of prod")
		before = r.told.count("WATCHDOG=1")
		pass(10 * time.Minute)
		if n := r.told.count("WATCHDOG=1") - before; n < 59 {
			t.Errorf("fed %d times while something was critical", n)
		}
		leave()
		leave() // twice does no harm
		if open, calm := r.hooks.windows(); open != nil || calm != nil {
			t.Errorf("windows %v", open)
		}
		r.end(t)
	})
}

func TestPausesGrowAndVaryWithinBounds(t *testing.T) {
	last := time.Duration(0)
	for n := range 1000 {
		p := pause(n)
		if p < last || p < firstPause || p > longestPause {
			t.Fatalf("pause %d is %v after %v", n, p, last)
		}
		if got := monitor.Jittered(p); got < p*4/5-1 || got > p*6/5+1 {
			t.Fatalf("about %v is %v", p, got)
		}
		last = p
	}
	if pause(0) != firstPause || last != longestPause {
		t.Errorf("from %v to %v", pause(0), last)
	}
}
