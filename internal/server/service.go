package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/token"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// The pace of a service.
const (
	lookInterval  = time.Second      // between two looks at records, keys and leases
	lookLimit     = 10 * time.Second // of one
	auditInterval = 30 * time.Second
	firstPatience = time.Second     // for the store of the tokens, before requests are answered without it
	askAgain      = 3 * time.Second // of an HSM that does not answer; it costs it no key operation
	turnSlack     = time.Minute     // by which a loop may be late before it counts as stuck
)

// service is everything that works for one site.
type service struct {
	site     *Site
	hooks    *Hooks
	logger   *slog.Logger
	handler  http.Handler
	desk     *desk
	probes   map[string]*monitor.Probe
	parallel map[string]int // operations at one time, by device

	current  atomic.Pointer[[]*view]
	looked   atomic.Bool               // the keys were looked at since the tokens are known
	gates    map[string]*gate          // by devices; of the loop of looks alone
	records  uint64                    // fingerprint; of the loop of looks alone
	up       map[string]bool           // devices, as they were last seen; of the loop of looks alone
	unfit    map[string]string         // why a key is not fit for use, as the log was told; of the loop of looks alone
	blind    bool                      // the log was told that records cannot be looked at; of the loop of looks alone
	deadline atomic.Pointer[time.Time] // when the loop of looks must have turned, by a clock that nobody sets
	again    chan struct{}             // "look now"
	wake     chan struct{}             // "see whether there is something to warm"
	audit    atomic.Pointer[error]

	warmMu  sync.Mutex
	warmths map[string]*warmth // by key

	requests requests
	stop     context.CancelFunc
	running  sync.WaitGroup
}

// newService makes a service and begins its work; it serves as soon as somebody gives it requests.
func newService(site *Site, s *server) (*service, error) {
	w := &service{
		site: site, hooks: s.hooks, logger: s.logger, desk: newDesk(site.Keys, site.Names, s.metrics, s.logger),
		probes: map[string]*monitor.Probe{}, parallel: map[string]int{}, gates: map[string]*gate{},
		up: map[string]bool{}, again: make(chan struct{}, 1), wake: make(chan struct{}, 1), warmths: map[string]*warmth{},
		unfit: map[string]string{},
	}
	w.current.Store(&[]*view{})
	options := transit.HandlerOptions{
		Keys: w.desk, Tokens: doorkeeper{site.Tokens}, Mount: site.Mount, MaxBody: site.MaxBody, Logger: s.logger, Observe: s.metrics.request,
		Health: http.HandlerFunc(s.health),
		Limit: func(r *http.Request, grant *token.Grant) time.Duration {
			s.welcome(r)
			return s.holders.ask(grant, site.Limit, time.Now())
		},
	}
	if site.Audit != nil {
		options.Auditor = site.Audit
	}
	handler, err := transit.NewHandler(options)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrConfig, err)
	}
	w.handler = handler
	for _, d := range site.Devices {
		w.probes[d.HSM.Name()] = &monitor.Probe{Device: d.HSM, Last: s.hooks.lastOfDevice, Logger: s.logger, Again: askAgain}
		w.parallel[d.HSM.Name()] = max(1, d.Parallel)
	}
	s.hooks.operations.configure(w.parallel)
	return w, nil
}

// begin starts what a service does by itself. When it returns the keys were looked at and the tokens read, unless their store is
// slow: nobody is kept waiting for it without an answer.
func (s *service) begin(ctx context.Context) {
	running, stop := context.WithCancel(context.Background())
	s.stop = stop
	read := make(chan struct{})
	s.running.Go(func() {
		_ = s.site.Tokens.Refresh(running) // they say so themselves where it fails
		close(read)
		s.nudge()
		s.site.Tokens.Run(running)
	})
	patience := time.NewTimer(firstPatience)
	defer patience.Stop()
	select {
	case <-read:
	case <-patience.C:
	case <-ctx.Done():
	}
	s.look()
	s.running.Go(func() { s.lookOnAndOn(running) })
	s.running.Go(func() { s.warm(running) })
	for _, p := range s.probes {
		s.running.Go(func() { p.Run(running) })
	}
	if s.site.Audit != nil {
		s.running.Go(func() { s.checkAudit(running) })
	}
}

// end stops what a service does by itself, wipes its leases and closes its site. Nobody gives it requests any more.
func (s *service) end() error {
	s.stop()
	s.running.Wait()
	s.site.Keys.EndLeases()
	return s.site.close()
}

// lookOnAndOn looks at records, keys and leases every second.
func (s *service) lookOnAndOn(ctx context.Context) {
	tick := time.NewTicker(lookInterval)
	defer tick.Stop()
	for {
		due := time.Now().Add(lookLimit + turnSlack)
		s.deadline.Store(&due)
		s.look()
		select {
		case s.wake <- struct{}{}:
		default:
		}
		select {
		case <-tick.C:
		case <-s.again:
		case <-ctx.Done():
			return
		}
	}
}

// nudge has the keys looked at now.
func (s *service) nudge() {
	select {
	case s.again <- struct{}{}:
	default:
	}
}

// look takes in what changed.
func (s *service) look() {
	ctx, cancel := context.WithTimeout(context.Background(), lookLimit)
	defer cancel()
	s.lookAtRecords()
	for name, p := range s.probes {
		if state, known := p.State(); known {
			if state.Up && !s.up[name] {
				s.hurry()
			}
			s.up[name] = state.Up
		}
	}
	s.refresh(ctx)
}

// lookAtRecords has the keyring read its records anew where somebody wrote one.
func (s *service) lookAtRecords() {
	if s.site.Records == "" {
		return
	}
	found, err := fingerprint(s.site.Records)
	if err != nil {
		if !s.blind {
			s.logger.Warn("the keys' records in use stay, because changes cannot be seen", "cause", err)
		}
		s.blind = true
		return
	}
	s.blind = false
	if found != s.records {
		s.site.Keys.Invalidate("")
		s.records = found
	}
}

// checkAudit finds out now and then whether an opening could be announced: not only when one is.
func (s *service) checkAudit(ctx context.Context) {
	for {
		limited, cancel := context.WithTimeout(ctx, lookLimit)
		err := s.site.Audit.Check(limited)
		cancel()
		if ctx.Err() == nil {
			s.audit.Store(&err)
		}
		if !monitor.Sleep(ctx, monitor.Jittered(auditInterval)) {
			return
		}
	}
}

// deaf returns why no opening could be announced; nil where one could.
func (s *service) deaf() error {
	if s.site.Audit == nil {
		return nil
	}
	var failing error
	sinks := s.site.Audit.Sinks()
	failed := 0
	for _, sink := range sinks {
		if sink.Err != nil {
			failing = sink.Err
			failed++
		}
	}
	known := s.audit.Load()
	if failing == nil || failed < len(sinks) && (known == nil || *known == nil) { // one that only has copies does not suffice
		return nil
	}
	return failing
}

// views tells how the served keys fare.
func (s *service) views() []*view { return *s.current.Load() }

// settled tells whether every key that can be ready without a person is. Before the tokens were read nobody knows which those are.
func (s *service) settled() bool {
	if !s.looked.Load() {
		return false
	}
	for _, v := range s.views() {
		if !v.health.Seals && v.patience {
			return false
		}
	}
	return true
}

// sealing is how many keys seal.
func (s *service) sealing() int {
	n := 0
	for _, v := range s.views() {
		if v.health.Seals {
			n++
		}
	}
	return n
}

// replaces tells whether a service can do what another one does. Where that waits for nothing, neither must this one; where it does,
// what it seals with is enough.
func (s *service) replaces(old *service) bool {
	if s.settled() {
		return true
	}
	if old.settled() || old.looked.Load() && !s.looked.Load() {
		return false
	}
	waits := map[string]bool{}
	for _, v := range s.views() {
		waits[v.health.Name] = !v.health.Seals && v.patience
	}
	return !slices.ContainsFunc(old.views(), func(v *view) bool { return v.health.Seals && waits[v.health.Name] })
}

// doorkeeper knows tokens, and whether anybody can know them.
type doorkeeper struct{ tokens Tokens }

// Authenticate implements [transit.Tokens]. Where the store of tokens has not answered since the start, and left no copy, nobody
// is refused for good: a good token is worth to come again with.
func (d doorkeeper) Authenticate(text string, peer token.Peer) (*token.Grant, error) {
	grant, err := d.tokens.Authenticate(text, peer)
	if err != nil && !d.knows() {
		return nil, &transit.BusyError{After: shortestPause, Cause: "the tokens were not read yet"}
	}
	return grant, err
}

func (d doorkeeper) knows() bool { return d.tokens.Status().Source != token.SourceNone }

// stuck tells whether a loop does not turn.
func (s *service) stuck(now time.Time) string {
	if due := s.deadline.Load(); due != nil && now.After(*due) {
		return "the look at the keys"
	}
	for name, p := range s.probes {
		if p.Stuck(now) {
			return fmt.Sprintf("the probe of device %q", name)
		}
	}
	return ""
}

// requests counts those that a service answers, so that it ends after the last of them.
type requests struct {
	mu     sync.Mutex
	under  int
	closed bool
	calm   chan struct{} // closed when the last one has ended
}

// begin counts a request; false where the service takes none any more.
func (r *requests) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.under++
	return true
}

func (r *requests) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.under--
	if r.closed && r.under == 0 {
		close(r.calm)
	}
}

// close lets no more requests begin, and returns what is closed when the last one has ended.
func (r *requests) close() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed, r.calm = true, make(chan struct{})
	if r.under == 0 {
		close(r.calm)
	}
	return r.calm
}
