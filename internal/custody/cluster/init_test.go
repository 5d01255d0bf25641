package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

func TestInitKeepsTheKeysAndUnsealsTheNode(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	h := s.host("one")
	result := h.mustInit()
	if !result.Initialized || !slices.Equal(result.Items, []string{"unseal"}) || !result.RootRevoked || len(result.Warnings) != 0 {
		t.Errorf("the result is %+v", result)
	}
	s.wantAllUnsealed()
	s.wantClean(h)
	if living := s.nodes[0].Tokens(); living != 0 {
		t.Errorf("%d root tokens live", living)
	}
	m := h.wantMaterial()
	if m.ClusterID != s.nodes[0].ClusterID() || m.SealType != "shamir" || m.StorageType == "" || m.active().Shares != 5 || m.active().Threshold != 3 {
		t.Errorf("the facts are %+v", m.Facts)
	}
	if again := h.mustInit(); again.Initialized || s.initialisations() != 1 {
		t.Errorf("the second one is %+v, after %d calls of sys/init", again, s.initialisations())
	}
}

// wantClean fails where something is left that nobody needs.
func (s *site) wantClean(hosts ...*host) {
	s.t.Helper()
	for _, h := range hosts {
		for _, name := range s.names(h.local) {
			if name != "host" {
				s.t.Errorf("the disk of %q still has %q", h.name, name)
			}
		}
	}
	for _, name := range s.names(s.main) {
		if !strings.HasPrefix(name, "material/prod/unseal") && !strings.HasPrefix(name, "material/prod/recovery") {
			s.t.Errorf("the store still has %q", name)
		}
	}
}

func (s *site) names(m *volatile) []string {
	names, err := m.List(s.t.Context(), "")
	if err != nil {
		s.t.Fatal(err)
	}
	return names
}

// wantMaterial opens the unseal keys and compares them with those that the first node takes.
func (h *host) wantMaterial() *material {
	h.t.Helper()
	m, err := h.process().loadMost(h.t.Context(), h.Cluster, KindUnseal)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(m.wipe)
	want := h.nodes[0].Shares()
	got := m.take(m.active(), len(want))
	if len(got)+len(h.People) != len(want) {
		h.t.Fatalf("%d of %d shares are in custody", len(got), len(want))
	}
	for i, share := range got {
		if string(share) != string(want[i]) {
			h.t.Errorf("share %d is not the node's", i)
		}
	}
	return m
}

func TestInitOfARaftClusterJoinsAndUnsealsTheOthers(t *testing.T) {
	s := newSite(t, nodetest.Raft, 3)
	h := s.host("one")
	before := s.operations()
	result := h.mustInit()
	s.wantAllUnsealed()
	for _, n := range result.Nodes {
		if n.Err != nil || n.Outcome.Action != ActionUnsealed {
			t.Errorf("node %s: %+v, %v", n.Address, n.Outcome, n.Err)
		}
	}
	if !result.Nodes[1].Outcome.Joined || !result.Nodes[2].Outcome.Joined {
		t.Errorf("the others did not join: %+v", result.Nodes)
	}
	// One for the rehearsal, one for the root token: the shares are in memory still.
	if spent := s.operations() - before; spent != 2 {
		t.Errorf("it cost %d HSM operations", spent)
	}
	s.wantClean(h)
	h.wantMaterial()
}

func TestInitOnAllHostsAtOnce(t *testing.T) {
	for _, kind := range []nodetest.Kind{nodetest.Alone, nodetest.Raft} {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			nodes := 1
			if kind == nodetest.Raft {
				nodes = 3
			}
			s := newSite(t, kind, nodes)
			var hosts []*host
			for i := range 3 {
				hosts = append(hosts, s.host(fmt.Sprintf("host%d", i)))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			results, errs := make([]InitResult, 6), make([]error, 6)
			var group sync.WaitGroup
			for i := range 6 { // two processes of each host
				k := hosts[i/2].process()
				group.Go(func() { results[i], errs[i] = k.Init(ctx, s.Cluster, InitOptions{By: "alice"}) })
			}
			group.Wait()
			won := 0
			for i, result := range results {
				if errs[i] != nil {
					t.Errorf("process %d: %v", i, errs[i])
				}
				if result.Initialized {
					won++
				}
			}
			if won != 1 {
				t.Errorf("%d processes say that they initialised it", won)
			}
			if calls := s.initialisations(); calls != 1 {
				t.Errorf("sys/init was called %d times", calls)
			}
			s.wantAllUnsealed()
			s.wantClean(hosts...)
			hosts[2].wantMaterial()
			if living := s.nodes[0].Tokens(); living != 0 {
				t.Errorf("%d root tokens live", living)
			}
		})
	}
}

// The window that nobody can close lies between Vault's part and our first durable write: these are its calls.
func inTheWindow(call string, how mode) bool {
	switch {
	case strings.HasPrefix(call, "node PUT sys/init"):
		return how == lost || how == crashAfter
	case strings.HasPrefix(call, "seal held."):
		return how == crashBefore || how == crashAfter
	case strings.HasPrefix(call, "local put held/"):
		return how == crashBefore
	default:
		return false
	}
}

// After a fault at any call of Init the next run ends with an unsealed node and with all of its keys in the store, or says that
// nobody has them where that is true; and then a wiped Vault is initialised.
func TestInitSurvivesAFaultAtEveryCall(t *testing.T) {
	base := newSite(t, nodetest.Alone, 1)
	for _, how := range []mode{refused, lost, crashBefore, crashAfter} {
		t.Run(string(how), func(t *testing.T) {
			t.Parallel()
			for at := 1; initWithFault(t, base.again(t), at, how); at++ {
			}
		})
	}
}

func TestInitOfASpreadSurvivesAFaultAtEveryCall(t *testing.T) {
	base := newSite(t, nodetest.Alone, 1)
	for _, how := range []mode{refused, crashAfter} {
		t.Run(string(how), func(t *testing.T) {
			t.Parallel()
			spread := func() *site {
				s := base.again(t)
				s.Cluster.Key, s.Cluster.Spread = "", &Spread{Needed: 2, Keys: []string{"office", "bunker", "bank"}}
				return s
			}
			for at := 1; initWithFault(t, spread(), at, how); at++ {
			}
		})
	}
}

// initWithFault returns false where there was no such call.
func initWithFault(t *testing.T, s *site, at int, how mode) (struck bool) {
	t.Helper()
	h := s.host("one")
	n := s.nodes[0]
	h.fault.at, h.fault.mode = at, how
	var result InitResult
	err, survived := h.fault.in(func() (err error) {
		result, err = h.process().Init(t.Context(), s.Cluster, InitOptions{By: "alice"})
		return err
	})
	calls, call := h.fault.reset()
	if call == "" {
		if err != nil || !survived {
			t.Fatalf("without a fault: %v", err)
		}
		if how == refused && s.Spread == nil {
			compareGolden(t, "init_calls.golden", strings.Join(calls, "\n")+"\n")
		}
		return false
	}
	fail := func(format string, arguments ...any) {
		t.Helper()
		t.Fatalf("call %d, %q, %s, after which Init said %v: %s", at, call, how, err, fmt.Sprintf(format, arguments...))
	}
	if survived && err == nil && !result.Initialized {
		fail("it says nothing of it")
	}
	again, err2 := h.process().Init(t.Context(), s.Cluster, InitOptions{By: "alice"})
	switch {
	case errors.Is(err2, ErrEmpty):
		if !inTheWindow(call, how) {
			fail("the next run says %v", err2)
		}
		if !strings.Contains(err2.Error(), `host "one"`) || !strings.Contains(err2.Error(), "ipe the storage") {
			fail("the diagnosis is %v", err2)
		}
		if _, err := h.process().Init(t.Context(), s.Cluster, InitOptions{}); !errors.Is(err, ErrEmpty) {
			fail("the diagnosis does not stay: %v", err)
		}
		if out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); !errors.Is(err, ErrEmpty) {
			fail("Tend = %+v, %v", out, err)
		}
		n.Wipe()
		if again, err2 = h.process().Init(t.Context(), s.Cluster, InitOptions{By: "alice"}); err2 != nil || !again.Initialized {
			fail("after a wipe: %+v, %v", again, err2)
		}
	case err2 != nil:
		fail("the next run says %v", err2)
	case inTheWindow(call, how):
		fail("the keys are lost, and the next run says %+v", again)
	case result.Initialized && again.Initialized, survived && err == nil && again.Initialized:
		fail("it was initialised twice")
	}
	if n.Sealed() {
		fail("the node is sealed afterwards")
	}
	h.clock.advance(2 * time.Hour) // whatever is to be tried again
	if out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); err != nil || out.Action != ActionNone {
		fail("Tend afterwards = %+v, %v", out, err)
	}
	if n.Tokens() != 0 {
		fail("%d root tokens live", n.Tokens())
	}
	h.wantMaterial()
	s.wantClean(h)
	if t.Failed() {
		fail("see above")
	}
	return true
}

// What a host left behind at any point, another one finishes, waits for, or knows to be lost; it never says so while the first
// one still holds the keys and can bring them.
func TestAnotherHostAfterACrashAtEveryCall(t *testing.T) {
	base := newSite(t, nodetest.Alone, 1)
	for _, how := range []mode{crashBefore, crashAfter} {
		t.Run(string(how), func(t *testing.T) {
			t.Parallel()
			for at := 1; anotherHost(t, base.again(t), at, how); at++ {
			}
		})
	}
}

func anotherHost(t *testing.T, s *site, at int, how mode) (struck bool) {
	t.Helper()
	first, second := s.host("one"), s.host("two")
	first.fault.at, first.fault.mode = at, how
	_, _ = first.fault.in(func() error {
		_, err := first.process().Init(t.Context(), s.Cluster, InitOptions{})
		return err
	})
	_, call := first.fault.reset()
	if call == "" {
		return false
	}
	fail := func(format string, arguments ...any) {
		t.Helper()
		t.Fatalf("call %d, %q, %s: %s", at, call, how, fmt.Sprintf(format, arguments...))
	}
	held := slices.ContainsFunc(s.names(first.local), func(name string) bool { return strings.HasPrefix(name, "held/") })
	stored := slices.Contains(s.names(s.main), "material/prod/unseal")
	done, err := second.process().initOnce(t.Context(), s.Cluster, InitOptions{}, &InitResult{})
	if done != (err == nil) || err != nil && !errors.Is(err, ErrIntentElsewhere) {
		fail("at once, the other host says %v", err)
	}
	if err != nil {
		s.clock.advance(intentLife + time.Second)
		_, err = second.process().Init(t.Context(), s.Cluster, InitOptions{})
	}
	switch {
	case errors.Is(err, ErrEmpty) && held && !stored:
		if !strings.Contains(err.Error(), `host "one"`) {
			fail("it does not say who may hold the keys: %v", err)
		}
		if out, err := first.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); err != nil || len(out.Stored) == 0 || out.Action != ActionUnsealed {
			fail("Tend of the first host = %+v, %v", out, err)
		}
		_, err = second.process().Init(t.Context(), s.Cluster, InitOptions{})
	case errors.Is(err, ErrEmpty) && inTheWindow(call, how):
		s.nodes[0].Wipe()
		_, err = second.process().Init(t.Context(), s.Cluster, InitOptions{})
	}
	if err != nil {
		fail("the other host says %v", err)
	}
	if s.nodes[0].Sealed() {
		fail("the node is sealed")
	}
	if _, err := first.process().Init(t.Context(), s.Cluster, InitOptions{}); err != nil { // it comes back
		fail("the first host says %v", err)
	}
	h := second
	h.clock.advance(2 * time.Hour)
	if out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); err != nil {
		fail("Tend = %+v, %v", out, err)
	}
	h.wantMaterial()
	s.wantClean(first, second)
	if s.nodes[0].Tokens() != 0 || t.Failed() {
		fail("%d root tokens live", s.nodes[0].Tokens())
	}
	return true
}

func TestInitHoldsTheKeysWhileTheStoreIsAway(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	h := s.host("one")
	h.fault.set(func(call string) bool { return call == "store put material/prod/unseal" })
	result, err := h.process().Init(t.Context(), s.Cluster, InitOptions{})
	if !errors.Is(err, ErrHeld) || !strings.Contains(err.Error(), "main") {
		t.Fatalf("Init = %+v, %v, want ErrHeld", result, err)
	}
	status, err := h.process().Status(t.Context(), s.Cluster)
	if err != nil || !slices.Equal(status.Held, []string{"unseal", "root"}) || len(status.Warnings) == 0 || status.Intent == nil {
		t.Errorf("Status = %+v, %v", status, err)
	}
	if out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); !errors.Is(err, ErrHeld) {
		t.Errorf("Tend while the store is away = %+v, %v", out, err)
	}
	h.fault.set(nil)
	out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0])
	if err != nil || out.Action != ActionUnsealed || !slices.Equal(out.Stored, []string{"unseal", "root"}) {
		t.Errorf("Tend when it is back = %+v, %v", out, err)
	}
	h.wantMaterial()
	h.clock.advance(2 * time.Hour)
	if _, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); err != nil {
		t.Error(err)
	}
	s.wantClean(h)
}

// Where neither the disk nor the store takes the keys, the process goes on trying whoever has gone, and says so to those who
// would end it.
func TestInitNeverDropsTheKeys(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	h := s.host("one")
	tries := 0
	ctx, cancel := context.WithCancel(t.Context())
	k := h.process()
	inside := false
	k.critical = func(string) func() {
		inside = true
		return func() { inside = false }
	}
	h.fault.set(func(call string) bool {
		if call != "store put material/prod/unseal" && call != "local put held/prod/<id>" {
			return false
		}
		if !inside {
			t.Error("it is not said that the process must not end")
		}
		cancel()
		tries++
		return tries < 20
	})
	_, err := k.Init(ctx, s.Cluster, InitOptions{})
	if tries < 20 || inside {
		t.Errorf("it tried %d times, critical %t: %v", tries, inside, err)
	}
	h.fault.set(nil)
	h.mustInit()
	h.wantMaterial()
	s.wantAllUnsealed()
}

func TestNothingIsInitialisedBeforeTheRehearsalSucceeds(t *testing.T) {
	for name, call := range map[string]string{
		"the store is full":              "store put material/prod/rehearsal",
		"the store forgets":              "store get material/prod/rehearsal",
		"the store does not delete":      "store delete material/prod/rehearsal",
		"the HSM is away":                "hsm open rehearsal",
		"the local disk is full":         "local put rehearsal/prod",
		"no audit sink takes the intent": "audit init",
		"no intent can be written":       "store put clusters/prod/intent",
		"no copy of it can be written":   "local put clusters/prod/intent",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, nodetest.Alone, 1)
			h := s.host("one")
			h.fault.set(func(made string) bool { return made == call })
			if _, err := h.process().Init(t.Context(), s.Cluster, InitOptions{}); !errors.Is(err, errFault) {
				t.Errorf("Init = %v", err)
			}
			if s.initialisations() != 0 {
				t.Error("sys/init was called")
			}
			h.fault.set(nil)
			if other := s.host("two"); other.mustInit().Initialized != true {
				t.Error("the other host cannot initialise it afterwards")
			}
		})
	}
}

func TestInitWaitsWhileVaultInitialises(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	first, second := s.host("one"), s.host("two")
	var waited error
	s.nodes[0].DuringInit(func() {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var looks atomic.Int32
		s.nodes[0].Break("sys/seal-status", -1, nodetest.Then(func() {
			if looks.Add(1) == 3 {
				cancel() // it has waited, and would wait on
			}
		}))
		_, waited = second.process().Init(ctx, s.Cluster, InitOptions{})
		s.nodes[0].Mend()
		out, err := second.process().Tend(context.Background(), s.Cluster, s.Nodes[0])
		if err != nil || out.Action != ActionWaiting {
			t.Errorf("Tend meanwhile = %+v, %v", out, err)
		}
	})
	first.mustInit()
	if !errors.Is(waited, ErrBusy) {
		t.Errorf("Init meanwhile = %v, want ErrBusy", waited)
	}
	if result := second.mustInit(); result.Initialized {
		t.Error("the second one initialised it again")
	}
}

func TestClusterThatSomebodyElseInitialised(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	h := s.host("one")
	other := s.host("two")
	other.main = newStore()
	other.site = &site{t: t, hsms: s.hsms, keys: s.keys, main: newStore(), nodes: s.nodes, clock: s.clock, Cluster: s.Cluster}
	other.mustInit()
	if _, err := h.process().Init(t.Context(), s.Cluster, InitOptions{}); !errors.Is(err, ErrNoMaterial) {
		t.Errorf("Init = %v, want ErrNoMaterial", err)
	}
	s.nodes[0].Restart()
	if _, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); !errors.Is(err, ErrNoMaterial) {
		t.Errorf("Tend = %v, want ErrNoMaterial", err)
	}
}

func TestWipedVaultIsNotInitialisedOverKeysInCustody(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	h := s.host("one")
	h.mustInit()
	s.nodes[0].Wipe()
	if _, err := h.process().Init(t.Context(), s.Cluster, InitOptions{}); !errors.Is(err, ErrExists) {
		t.Errorf("Init = %v, want ErrExists", err)
	}
	if out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0]); !errors.Is(err, ErrNotInitialized) {
		t.Errorf("Tend = %+v, %v, want ErrNotInitialized", out, err)
	}
	if calls := s.nodes[0].Count(http.MethodPut, "sys/init"); calls != 1 {
		t.Errorf("sys/init was called %d times", calls)
	}
}

func TestAutoSealKeepsRecoveryKeys(t *testing.T) {
	s := newSite(t, nodetest.Auto, 1)
	s.RecoveryShares, s.RecoveryThreshold = 3, 2
	h := s.host("one")
	result := h.mustInit()
	if result.Kind != KindRecovery || result.Shares != 3 || !slices.Equal(result.Items, []string{"recovery"}) || !result.RootRevoked {
		t.Errorf("the result is %+v", result)
	}
	s.nodes[0].Restart()
	before := s.operations()
	out, err := h.process().Tend(t.Context(), s.Cluster, s.Nodes[0])
	if err != nil || out.Action != ActionAutoSeal || s.operations() != before {
		t.Errorf("Tend = %+v, %v, with %d HSM operations", out, err, s.operations()-before)
	}
	m, err := h.process().loadMost(t.Context(), s.Cluster, KindRecovery)
	if err != nil {
		t.Fatal(err)
	}
	defer m.wipe()
	if want := s.nodes[0].Shares(); len(m.take(m.active(), 9)) != 3 || string(m.take(m.active(), 1)[0]) != string(want[0]) {
		t.Error("the recovery keys in custody are not the node's")
	}
	if m.ClusterID != s.nodes[0].ClusterID() {
		t.Errorf("the cluster id is %q", m.ClusterID)
	}
	s.wantClean(h)
}

// A host that stalls in front of Vault for longer than an intent lives is taken over from. Whoever comes second at Vault changes
// nothing, and both end with the keys of the first.
func TestTakeoverFromAHostThatOnlyStalled(t *testing.T) {
	for name, stalledWins := range map[string]bool{"and comes second": false, "and comes first": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, nodetest.Alone, 1)
			first, second := s.host("one"), s.host("two")
			n := s.nodes[0]
			arrived, go1, done1 := make(chan struct{}), make(chan struct{}), make(chan struct{})
			n.Break("sys/init", 1, func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
				close(arrived)
				<-go1
				serve.ServeHTTP(w, r)
				close(done1)
			})
			n.Break("sys/init", 1, nodetest.Then(func() {
				if stalledWins {
					close(go1)
					<-done1
				}
			}))
			var group sync.WaitGroup
			var results [2]InitResult
			var errs [2]error
			group.Go(func() { results[0], errs[0] = first.process().Init(t.Context(), s.Cluster, InitOptions{}) })
			<-arrived
			s.clock.advance(intentLife + time.Second)
			group.Go(func() {
				results[1], errs[1] = second.process().Init(t.Context(), s.Cluster, InitOptions{})
				if !stalledWins {
					close(go1)
				}
			})
			group.Wait()
			if errs[0] != nil || errs[1] != nil || results[0].Initialized != stalledWins || results[1].Initialized == stalledWins {
				t.Errorf("the first: %+v, %v; the second: %+v, %v", results[0], errs[0], results[1], errs[1])
			}
			s.wantAllUnsealed()
			second.wantMaterial()
			first.mustInit()
			second.mustInit()
			s.wantClean(first, second)
		})
	}
}

func TestEveryActIsAnnouncedBeforeIt(t *testing.T) {
	s := newSite(t, nodetest.Raft, 2)
	h := s.host("one")
	h.mustInit()
	calls, _ := h.fault.reset()
	for call, announced := range map[string]string{
		"node PUT sys/init": "audit init", "node PUT sys/unseal": "audit unseal", "node PUT sys/storage/raft/join": "audit join",
		"node PUT auth/token/revoke-self": "audit revoke-root", "store put material/prod/unseal": "audit store", "store put material/prod/root": "audit store",
	} {
		done, intent := slices.Index(calls, call), slices.Index(calls, announced)
		if done < 0 || intent < 0 || intent > done {
			t.Errorf("%q is call %d, %q is call %d", call, done, announced, intent)
		}
	}
	open := map[string]int{}
	for _, line := range h.acts.all() {
		words := strings.Fields(line)
		if words[0] == "intent" {
			open[words[1]]++
		} else {
			open[words[1]]--
		}
	}
	for verb, left := range open {
		if left != 0 {
			t.Errorf("%d acts %q have no outcome", left, verb)
		}
	}
}

// An answer that breaks off is read as far as it goes: the keys in it are the only ones.
func TestAnswerOfInitThatBreaksOff(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	h := s.host("one")
	s.nodes[0].Break("sys/init", 1, nodetest.TornAt(`"root_token"`))
	_, err := h.process().Init(t.Context(), s.Cluster, InitOptions{})
	if err == nil || !strings.Contains(err.Error(), "root token") {
		t.Fatalf("Init = %v", err)
	}
	if result := h.mustInit(); result.Initialized || result.RootRevoked {
		t.Errorf("the next Init = %+v", result)
	}
	s.wantAllUnsealed()
	h.wantMaterial()
	s.wantClean(h)
}

func TestInitLetsAFirstNodeThatLostItsStorageJoin(t *testing.T) {
	for name, sealed := range map[string]bool{"the others are unsealed": false, "the others are sealed": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, nodetest.Raft, 3)
			h := s.host("one")
			h.mustInit()
			s.wantAllUnsealed()
			s.nodes[0].Wipe()
			if sealed {
				s.nodes[1].Restart()
				s.nodes[2].Restart()
			}
			result := h.mustInit()
			s.wantAllUnsealed()
			if result.Initialized || !result.Nodes[0].Outcome.Joined || s.initialisations() != 1 {
				t.Errorf("Init = %+v", result)
			}
		})
	}
}

func TestInitGivesUpOnAVaultThatNeverEndsInitialising(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	h := s.host("one")
	s.nodes[0].Break("sys/seal-status", -1, func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		s.clock.advance(time.Minute)
		nodetest.Body(`{"type":"shamir","initialized":true,"sealed":true,"t":0,"n":0,"progress":0,"migration":false,"recovery_seal":false,`+
			`"storage_type":"inmem","version":"1.21.0"}`)(w, r, serve)
	})
	if _, err := h.process().Init(t.Context(), s.Cluster, InitOptions{}); !errors.Is(err, ErrBusy) {
		t.Errorf("Init = %v, want ErrBusy", err)
	}
}
