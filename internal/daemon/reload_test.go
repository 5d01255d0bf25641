package daemon

import (
	"log/slog"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// rotated is an audit sink that counts how often it began anew. One that carries copies only does so when it is told, not at
// each check.
type rotated struct {
	copies bool
	times  atomic.Int64
}

func (*rotated) Name() string             { return "rotated" }
func (*rotated) Write([]audit.Line) error { return nil }
func (r *rotated) Reopen() error          { r.times.Add(1); return nil }
func (*rotated) Close() error             { return nil }
func (r *rotated) Uncertain() bool        { return r.copies }

// TestAReloadOpensTheAuditLogAnewAlsoWhereItIsRefused: files were rotated, whatever became of the configuration.
func TestAReloadOpensTheAuditLogAnewAlsoWhereItIsRefused(t *testing.T) {
	y, sink := newYard(), &rotated{copies: true}
	a := y.cluster("a", 1)
	acts, err := audit.Open(audit.Options{Sinks: []audit.Sink{&rotated{}, sink}})
	must(t, err)
	s := serve(t, func(*Hooks) *Site {
		return &Site{Custodian: y, Clusters: []Cluster{a}, Audit: acts, Listen: Listen{Address: "127.0.0.1:0"}, Close: acts.Close}
	})
	<-s.ready
	must(t, acts.Check(t.Context()))
	before := sink.times.Load()
	must(t, acts.Check(t.Context()))
	if sink.times.Load() != before {
		t.Fatal("it is opened anew without a reason")
	}
	s.mu.Lock()
	s.site = func(*Hooks) *Site { return &Site{} }
	s.mu.Unlock()
	s.reload <- syscall.SIGHUP
	eventually(t, func() bool { return s.logged.count("the one in use stays") == 1 })
	must(t, acts.Check(t.Context()))
	if got := sink.times.Load(); got != before+1 {
		t.Errorf("it was opened anew %d times", got-before)
	}
}

// TestAReloadSaysNotAgainHowNodesFare: a hundred nodes that are well are a hundred lines otherwise.
func TestAReloadSaysNotAgainHowNodesFare(t *testing.T) {
	y := newYard()
	a := y.cluster("a", 1)
	site := func(*Hooks) *Site {
		return &Site{Custodian: y, Clusters: []Cluster{a}, Interval: 20 * time.Millisecond, Listen: Listen{Address: "127.0.0.1:0"}}
	}
	s := serve(t, site)
	<-s.ready
	eventually(t, func() bool { return s.logged.count("the node is unsealed") == 1 })
	s.build(t, site)
	y.forget()
	begun := time.Now()
	eventually(t, func() bool { looks, _ := y.since(begun, a.Nodes[0]); return looks > 3 })
	if got := s.logged.count("the node is unsealed"); got != 1 {
		t.Errorf("it was said %d times:\n%s", got, s.logged)
	}
}

// TestTheLatestWordAboutAnHSMCounts, of a probe and of an operation.
func TestTheLatestWordAboutAnHSMCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &fakeDevice{name: "one", device: flagged{info: hsm.Info{State: hsm.StateOperational}}}
		m := newMetrics()
		p := &monitor.Probe{Device: d, Last: m.lastOfDevice, Logger: slog.New(slog.DiscardHandler)}
		use := func(err error) func() {
			return func() { m.deviceOperation(d.name, "decrypt", time.Second, err) }
		}
		probe := func(err error) func() { return func() { d.err = err; p.Ask(t.Context()) } }
		for i, step := range []struct {
			do func()
			up bool
		}{
			{use(hsm.ErrUnavailable), false},
			{probe(nil), true},
			{use(hsm.ErrUnavailable), false},
			{use(nil), true},
			{probe(hsm.ErrUnavailable), false},
			{use(nil), true},
		} {
			pass(time.Second)
			step.do()
			if state, known := p.State(); !known || state.Up != step.up {
				t.Errorf("step %d: up is %v, want %v", i, state.Up, step.up)
			}
		}
	})
}
