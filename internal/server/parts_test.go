package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/token"
)

func TestWhatWasSealedIsRememberedForAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecent(recentFor, time.Now)
		r.add([]byte("first"))
		<-time.After(recentFor - time.Second)
		r.add([]byte("second"))
		if !r.has([]byte("first")) || !r.has([]byte("second")) || r.has([]byte("third")) {
			t.Error("within a minute it is not as it was sealed")
		}
		<-time.After(2 * time.Second)
		r.add([]byte("third")) // turns the page
		if r.has([]byte("first")) || !r.has([]byte("second")) || !r.has([]byte("third")) {
			t.Error("after a minute it is not forgotten, or too much is")
		}
		<-time.After(time.Hour)
		if r.has([]byte("second")) || r.has([]byte("third")) {
			t.Error("after an hour it is not forgotten")
		}
	})
}

func TestTheMemoryOfWhatWasSealedIsBounded(t *testing.T) {
	r := newRecent(recentFor, time.Now)
	for i := range 5 * maxRecent {
		r.add(fmt.Appendf(nil, "envelope %d", i))
	}
	if n := len(r.young) + len(r.old); n > 2*maxRecent {
		t.Errorf("%d are remembered", n)
	}
	if !r.has(fmt.Appendf(nil, "envelope %d", 5*maxRecent-1)) {
		t.Error("the newest is not")
	}
}

func TestATokenHasItsOwnLimitAndItsOwnCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h holders
		grant := func(id string, limit *token.Limit) *token.Grant { return &token.Grant{ID: id, Limit: limit} }
		count := func(g *token.Grant) (passed int, wait time.Duration) {
			for range 1000 {
				if wait = h.ask(g, token.Limit{Rate: 10, Burst: 20}, time.Now()); wait > 0 {
					return passed, wait
				}
				passed++
			}
			return passed, 0
		}
		for _, test := range []struct {
			grant  *token.Grant
			passed int
			wait   time.Duration
		}{
			{grant("default", nil), 20, 100 * time.Millisecond},
			{grant("own", &token.Limit{Rate: 2, Burst: 5}), 5, 500 * time.Millisecond},
			{grant("none", &token.Limit{}), 1000, 0},
		} {
			if passed, wait := count(test.grant); passed != test.passed || wait != test.wait {
				t.Errorf("%s: %d passed, then %v; want %d, %v", test.grant.ID, passed, wait, test.passed, test.wait)
			}
		}
		<-time.After(time.Second)
		if passed, _ := count(grant("own", &token.Limit{Rate: 2, Burst: 5})); passed != 2 {
			t.Errorf("a second later %d passed", passed)
		}
		if passed, _ := count(grant("own", &token.Limit{Rate: 100, Burst: 50})); passed != 50 {
			t.Errorf("with another limit %d passed", passed)
		}
		if who := h.known("own"); who == nil || who.last.Load() != time.Now().Unix() || who.limited.Load() != 3 {
			t.Errorf("of the token is known: %+v", who)
		}
	})
}

// TestTheTimeOfAnOperationIsMeasuredAlsoWhereItWaited for others of the same HSM.
func TestTheTimeOfAnOperationIsMeasuredAlsoWhereItWaited(t *testing.T) {
	for name, test := range map[string]struct{ parallel, waiting int }{
		"alone": {1, 1}, "a card with a queue": {1, 2}, "eight at one time": {8, 8}, "eight with a queue": {8, 16}, "a long queue": {2, 50},
	} {
		t.Run(name, func(t *testing.T) {
			const each = 600 * time.Millisecond
			var o operations
			o.configure(map[string]int{"one": test.parallel})
			begun := time.Now()
			var ends []time.Time
			for i := range 400 { // each of the waiting asks again as soon as it has its answer
				asked := begun
				if i >= test.waiting {
					asked = ends[i-test.waiting]
				}
				started := asked
				if i >= test.parallel && ends[i-test.parallel].After(started) {
					started = ends[i-test.parallel]
				}
				ends = append(ends, started.Add(each))
				o.ended("one", ends[i], ends[i].Sub(asked))
			}
			if got := o.of("one"); got < each*95/100 || got > each*105/100 {
				t.Errorf("%v is measured for %v", got, each)
			}
			if o.of("two") != 0 {
				t.Error("another HSM has a time")
			}
			o.configure(map[string]int{"one": test.parallel, "two": 1})
			if got := o.of("one"); got < each*95/100 {
				t.Error("a reload forgets it")
			}
			o.configure(nil)
			if o.of("one") != 0 {
				t.Error("an HSM that is not configured any more has a time")
			}
		})
	}
}

func TestAChangedRecordIsSeenAndATemporaryFileIsNot(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	write("keys+prod", "1")
	first, err := fingerprint(dir)
	must(t, err)
	write(".writing-abc", "1")
	write("other", "1")
	if same, err := fingerprint(dir); err != nil || same != first {
		t.Errorf("files that are no records count: %v", err)
	}
	must(t, os.Chtimes(filepath.Join(dir, "keys+prod"), time.Time{}, time.Now().Add(time.Second)))
	second, err := fingerprint(dir)
	must(t, err)
	write("keys+other", "1")
	third, err := fingerprint(dir)
	must(t, err)
	if second == first || third == second {
		t.Error("a record that changed, or a new one, is not seen")
	}
	if _, err := fingerprint(filepath.Join(dir, "missing")); err == nil {
		t.Error("a folder that is not there can be read")
	}
}

func TestAListenerWithoutTLSIsOnlyForThisMachine(t *testing.T) {
	certificate := func() (chain, key []byte, err error) { return nil, nil, nil }
	ca := func() ([]byte, error) { return nil, nil }
	for name, test := range map[string]struct {
		listen Listen
		good   bool
	}{
		"TLS on all addresses":               {Listen{Address: ":8210", Certificate: certificate}, true},
		"TLS with client certificates":       {Listen{Address: ":8210", Certificate: certificate, ClientCA: ca, Required: true}, true},
		"plain on loopback":                  {Listen{Address: "127.0.0.1:8210", Plain: true}, true},
		"plain on localhost":                 {Listen{Address: "localhost:8210", Plain: true}, true},
		"plain on all addresses":             {Listen{Address: ":8210", Plain: true}, false},
		"plain on another address":           {Listen{Address: "192.0.2.1:8210", Plain: true}, false},
		"plain on a name":                    {Listen{Address: "seal:8210", Plain: true}, false},
		"neither plain nor TLS":              {Listen{Address: "127.0.0.1:8210"}, false},
		"both":                               {Listen{Address: "127.0.0.1:8210", Plain: true, Certificate: certificate}, false},
		"no address":                         {Listen{Certificate: certificate}, false},
		"no port":                            {Listen{Address: "192.0.2.1", Certificate: certificate}, false},
		"certificates required without a CA": {Listen{Address: ":8210", Certificate: certificate, Required: true}, false},
		"a CA without TLS":                   {Listen{Address: "127.0.0.1:8210", Plain: true, ClientCA: ca}, false},
	} {
		if err := test.listen.check(); (err == nil) != test.good {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestMemoryIsLimitedByWhatConnectionsNeed, and not at all where the operator did that.
func TestMemoryIsLimitedByWhatConnectionsNeed(t *testing.T) {
	const ask = -1
	limit := func() int64 { return debug.SetMemoryLimit(ask) }
	runtime.GC() // what other tests used counts until then
	synctest.Test(t, func(t *testing.T) {
		s := &server{timing: usual()}
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { s.saveMemory(ctx) })
		for _, step := range []struct{ connections, counted int64 }{{0, 0}, {1000, 1000}, {4000, 4000}, {4010, 4000}, {10, 10}} {
			s.conns.Store(step.connections)
			<-time.After(2 * time.Second)
			synctest.Wait()
			if got := limit(); got != memoryLimit(step.counted) {
				t.Errorf("%d connections: %d bytes", step.connections, got)
			}
		}
		stop()
		running.Wait()
	})
	if limit() != math.MaxInt64 {
		t.Errorf("afterwards: %d bytes", limit())
	}
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(1 << 40))
	(&server{timing: usual()}).saveMemory(t.Context()) // returns at once
	if limit() != 1<<40 {
		t.Errorf("the operator's limit became %d bytes", limit())
	}
}

// TestWhatIsWornIsWhatItsFilesHoldThen: a new configuration may wait for half a minute between reading them and its use.
func TestWhatIsWornIsWhatItsFilesHoldThen(t *testing.T) {
	a := newAuthority(t)
	chain, key := a.issue("seal.example", time.Hour)
	ca := a.pem()
	files := Listen{
		Certificate: func() ([]byte, []byte, error) { return chain, slices.Clone(key), nil },
		ClientCA:    func() ([]byte, error) { return ca, nil },
	}
	w := &wardrobe{logger: slog.New(slog.DiscardHandler), metrics: newMetrics()}
	before, err := load(files, nil)
	must(t, err)
	w.wear(files, before)
	first := w.current.Load().clients
	ca = newAuthority(t).pem()
	coming, err := load(files, w.current.Load())
	must(t, err)
	ca = newAuthority(t).pem()
	w.look() // while the new configuration waits
	second := w.current.Load().clients
	w.wear(files, coming)
	if worn := w.current.Load(); second == first || worn.clients != second || worn.caSum == coming.caSum {
		t.Errorf("the CAs are counted %d, %d, %d; those that were read earlier are in use: %v", first, second, worn.clients, worn.caSum == coming.caSum)
	}
	other := files
	other.Required = true
	w.wear(other, coming)
	w.look() // by whoever had no turn since the configuration before
	if worn := w.current.Load(); worn.clients != second+1 || worn.config.ClientAuth != tls.RequireAndVerifyClientCert {
		t.Errorf("after the next configuration: CAs counted %d, %v", worn.clients, worn.config.ClientAuth)
	}
}

// TestMemoryThatIsInUseIsNoReasonToCollectWithoutEnd.
func TestMemoryThatIsInUseIsNoReasonToCollectWithoutEnd(t *testing.T) {
	used := make([][]byte, 128)
	for i := range used {
		used[i] = make([]byte, 1<<20)
	}
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		s := &server{timing: usual()}
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { s.saveMemory(ctx) })
		<-time.After(2 * time.Second)
		synctest.Wait()
		if limit := debug.SetMemoryLimit(-1); limit < 128<<20*5/4 {
			t.Errorf("with 128 MiB in use the limit is %d MiB", limit>>20)
		}
		stop()
		running.Wait()
	})
	runtime.KeepAlive(used) // and no longer
	runtime.GC()            // other tests count what is in use as well
}

func TestTheKeyOfTheCertificateIsWipedOnceItIsRead(t *testing.T) {
	chain, key := newAuthority(t).issue("seal.example", time.Hour)
	_, err := load(Listen{Certificate: func() ([]byte, []byte, error) { return chain, key, nil }}, nil)
	must(t, err)
	if len(bytes.Trim(key, "\x00")) != 0 {
		t.Error("the key is still there")
	}
}

// TestAnHSMThatIsAwayBringsNobodyOn: what waits, waits for the other one.
func TestAnHSMThatIsAwayBringsNobodyOn(t *testing.T) {
	s := &service{hooks: newHooks(newMetrics()), parallel: map[string]int{"one": 1, "two": 1}, probes: map[string]*monitor.Probe{}}
	s.hooks.operations.configure(s.parallel)
	up := map[string]bool{"one": true, "two": true}
	for name := range s.parallel {
		s.hooks.operations.ended(name, time.Now(), time.Second)
		s.probes[name] = &monitor.Probe{Device: newUnit(name, 1), Last: func(name string) (time.Time, bool, bool) { return time.Now(), up[name], true }}
	}
	devices := []string{"one", "two"}
	if both := s.pace(devices); both != time.Second/2 {
		t.Errorf("both: %v", both)
	}
	up["two"] = false
	if one := s.pace(devices); one != time.Second {
		t.Errorf("one of them: %v", one)
	}
}

func TestWhatOnlyTheDevicesKnowIsSaidInWordsOfAll(t *testing.T) {
	for said, meant := range map[error]error{device.ErrClosed: hsm.ErrUnavailable, device.ErrConfig: hsm.ErrUnavailable, device.ErrRequest: hsm.ErrForbidden, hsm.ErrLocked: hsm.ErrLocked} {
		if err := plainly(fmt.Errorf("opening: %w", said)); !errors.Is(err, meant) || !errors.Is(err, said) {
			t.Errorf("%v became %v", said, err)
		}
	}
}

// TestAnHSMThatIsBackIsAskedAtOnce for what failed while it was away.
func TestAnHSMThatIsBackIsAskedAtOnce(t *testing.T) {
	s := &service{warmths: map[string]*warmth{"prod": {err: hsm.ErrUnavailable, tries: 5, next: time.Now().Add(time.Hour)}}}
	v := &view{health: KeyHealth{Name: "prod"}, record: "new"}
	if s.due(v) {
		t.Error("it is due before its time")
	}
	s.hurry()
	if !s.due(v) {
		t.Error("it still waits")
	}
}

// TestWhatIsOpenStaysSo while the version that seals is the same, whatever else of a record became another.
func TestWhatIsOpenStaysSo(t *testing.T) {
	s := &service{warmths: map[string]*warmth{"prod": {record: "old", version: 1, err: hsm.ErrUnavailable}}}
	if yes, err := s.warmed("prod", "new", 1); !yes || err != nil {
		t.Errorf("the same version: %v, %v", yes, err)
	}
	if yes, err := s.warmed("prod", "new", 2); yes || !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("a new version: %v, %v", yes, err)
	}
}

func TestALoopThatDoesNotTurnIsTold(t *testing.T) {
	s := &service{}
	if what := s.stuck(time.Now()); what != "" {
		t.Errorf("before it begins: %q", what)
	}
	due := time.Now().Add(time.Minute)
	s.deadline.Store(&due)
	if what := s.stuck(due.Add(-time.Second)); what != "" {
		t.Errorf("in time: %q", what)
	}
	if s.stuck(due.Add(time.Second)) == "" {
		t.Error("too late, and nobody is told")
	}
}

// TestAClientThatGoesAwaySaysNothingAboutTheHSM, and an HSM that does not answer does.
func TestAClientThatGoesAwaySaysNothingAboutTheHSM(t *testing.T) {
	h := newHooks(newMetrics())
	for _, step := range []struct {
		err error
		ok  bool
	}{{nil, true}, {context.Canceled, true}, {hsm.ErrUnavailable, false}, {context.Canceled, false}, {hsm.ErrCiphertext, true}, {hsm.ErrLocked, false}} {
		h.DeviceOperation("one", device.OperationDecrypt, time.Millisecond, step.err)
		if _, ok, known := h.lastOfDevice("one"); ok != step.ok || !known {
			t.Errorf("after %v: %v", step.err, ok)
		}
	}
}
