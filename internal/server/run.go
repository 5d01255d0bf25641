package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// The pace of the server itself.
const (
	// firstLook is how often it is looked whether the served keys are ready, before they are.
	firstLook = 100 * time.Millisecond
	// patience is how often systemd is asked for more of it meanwhile.
	patience = 10 * time.Second
)

// server is a running seal server.
type server struct {
	options  Options
	timing   timing
	logger   *slog.Logger
	metrics  *metrics
	hooks    *Hooks
	holders  holders
	regulars *recent // addresses
	notify   *monitor.Notifier
	monitor  *monitor.Server
	wardrobe wardrobe

	service     atomic.Pointer[service]
	working     sync.Map       // of *service: those that have begun and not ended, also what a reload waits for or replaced
	front       *front         // of the loop alone
	address     string         // that was asked for; of the loop alone
	most, conns atomic.Int64   // connections
	refused     error          // why the newest configuration is not in use, nil where it is; of the loop alone
	leaving     sync.WaitGroup // services whose site was replaced
	fronts      sync.WaitGroup // goroutines that serve
	failed      chan error     // of a front
}

// Run serves until ctx ends, and returns nil after a clean stop. It fails where the first site cannot be built, or its address not
// be had: an error that wraps syscall.EADDRINUSE where somebody else has it.
func Run(ctx context.Context, options Options) error {
	s := &server{options: options, logger: options.Logger, metrics: newMetrics(), notify: options.notify, failed: make(chan error, 1)}
	s.timing = usual()
	if options.timing != nil {
		s.timing = *options.timing
	}
	if options.running != nil {
		options.running(s)
	}
	if s.notify == nil {
		s.notify = monitor.NewNotifier()
	}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	s.hooks = newHooks(s.metrics)
	s.regulars = newRecent(regularFor, time.Now)
	s.metrics.registry.MustRegister(&collector{s})
	s.wardrobe.logger, s.wardrobe.metrics = s.logger, s.metrics
	reload, stopReload := signals(options.Reload, syscall.SIGHUP)
	defer stopReload()
	seal, stopSeal := signals(options.Seal, syscall.SIGUSR1)
	defer stopSeal()

	first, worn, err := s.build(ctx)
	if err != nil {
		return err
	}
	s.wardrobe.wear(first.site.Listen, worn)
	if s.front, err = s.open(ctx, first.site.Listen); err != nil {
		return errors.Join(err, first.site.close())
	}
	s.monitor = newMonitor(s)
	s.monitor.Begin(first.site.Monitor)
	defer s.monitor.Close()
	s.metrics.read()
	s.begin(ctx, first)
	s.service.Store(first)
	s.serve(s.front)

	loops, stopLoops := context.WithCancel(context.Background())
	var looping sync.WaitGroup
	looping.Go(func() { s.notify.Watchdog(loops, s.healthy) })
	looping.Go(func() { s.sealOnDemand(loops, seal) })
	looping.Go(func() { s.renewCertificates(loops) })
	looping.Go(func() { s.saveMemory(loops) })
	err = s.loop(ctx, reload)
	stopping := s.end()
	stopLoops()
	looping.Wait()
	return errors.Join(err, stopping)
}

// signals returns what delivers a signal, unless the caller brought something else.
func signals(given <-chan os.Signal, of os.Signal) (<-chan os.Signal, func()) {
	if given != nil {
		return given, func() {}
	}
	own := make(chan os.Signal, 1) // as many as are waiting ask for the same
	signal.Notify(own, of)
	return own, func() { signal.Stop(own) }
}

// build makes a service of a new site, and what its listener is to wear.
func (s *server) build(ctx context.Context) (*service, *armour, error) {
	site, err := s.options.Build(ctx, s.hooks)
	if err != nil {
		return nil, nil, err
	}
	worn, made := (*armour)(nil), (*service)(nil)
	if err = site.check(); err == nil {
		worn, err = load(site.Listen, s.wardrobe.current.Load())
	}
	if err == nil {
		made, err = newService(site, s)
	}
	if err != nil {
		return nil, nil, errors.Join(err, site.close())
	}
	return made, worn, nil
}

// open begins to listen for seals.
func (s *server) open(ctx context.Context, l Listen) (*front, error) {
	f, err := newFront(ctx, l.Address, s, s.timing, s.logger)
	if err != nil {
		return nil, err
	}
	s.limitConnections(l)
	s.address = l.Address
	return f, nil
}

func (s *server) limitConnections(l Listen) {
	most := l.MaxConnections
	if most == 0 {
		most = defaultConns
	}
	s.most.Store(int64(most))
}

// serve answers at a front from now on.
func (s *server) serve(f *front) {
	s.fronts.Go(func() {
		defer close(f.ended)
		err := f.http.Serve(&gatekeeper{
			Listener: f.listener, wardrobe: &s.wardrobe, most: &s.most, open: &s.conns, regulars: s.regulars, refused: s.metrics.refusedConns.Inc,
		})
		if !errors.Is(err, http.ErrServerClosed) {
			select {
			case s.failed <- fmt.Errorf("serving at %s: %w", f.listener.Addr(), err):
			default:
			}
		}
	})
	s.logger.Info("listening for seals", "address", f.listener.Addr().String(), "tls", s.wardrobe.current.Load() != nil)
	if s.options.Listening != nil {
		s.options.Listening("seal", f.listener.Addr().String())
	}
}

// ServeHTTP implements [http.Handler] by the service in use.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if worn := s.wardrobe.current.Load(); stale(r, worn) {
		w.Header().Set("Connection", "close")
		if worn.matters(r) {
			turnAway(w, "whom the server trusts has changed: connect again")
			return
		}
	}
	for {
		in := s.service.Load()
		if in.requests.begin() {
			defer in.requests.end()
			in.handler.ServeHTTP(w, r)
			return
		}
		if s.service.Load() == in { // nothing comes after it
			turnAway(w, "the server is stopping")
			return
		}
	}
}

// turnAway has whoever asks come again, most often over another connection.
func turnAway(w http.ResponseWriter, why string) {
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Retry-After", "1")
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = fmt.Fprintf(w, `{"errors":[%q]}`+"\n", why) // whoever went away does not read it
}

// loop serves until ctx ends or the listener fails.
func (s *server) loop(ctx context.Context, reload <-chan os.Signal) error {
	look := time.NewTicker(firstLook)
	defer look.Stop()
	more := time.NewTicker(patience)
	defer more.Stop()
	relisten := time.NewTimer(monitor.Jittered(monitor.RetryPause))
	defer relisten.Stop()
	ready := false
	for {
		if !ready && s.service.Load().settled() {
			ready = true
			look.Stop()
			more.Stop()
			s.logger.Info("serving", "keys", len(s.views()))
			s.notify.Ready(s.status())
			if s.options.Ready != nil {
				s.options.Ready()
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.failed:
			return err
		case <-look.C:
		case <-more.C:
			s.notify.Extend()
			s.notify.Send("STATUS=waiting until keys can seal: " + s.status())
		case <-relisten.C:
			s.monitor.Retry()
			relisten.Reset(monitor.Jittered(monitor.RetryPause))
		case <-reload:
			if !ready { // systemd waits for the first time, and starts Vaults when it hears of readiness
				s.reload(ctx)
				continue
			}
			s.notify.Reloading()
			s.reload(ctx)
			s.notify.Ready(s.status())
		}
	}
}

// status is one line for "systemctl status".
func (s *server) status() string {
	views := s.views()
	seal, open := 0, 0
	for _, v := range views {
		if v.health.Seals {
			seal++
		}
		if v.health.Opens {
			open++
		}
	}
	text := fmt.Sprintf("of %d keys, %d can seal and %d can open", len(views), seal, open)
	if s.refused != nil {
		text += "; the newest configuration was refused: " + strings.ReplaceAll(s.refused.Error(), "\n", "; ")
	}
	return text
}

func (s *server) views() []*view {
	if in := s.service.Load(); in != nil {
		return in.views()
	}
	return nil
}

// reload takes a new configuration into use, or says why the old one stays.
func (s *server) reload(ctx context.Context) {
	s.logger.Info("reading the configuration anew")
	old := s.service.Load()
	if old.site.Audit != nil {
		old.site.Audit.Reopen() // also where the new configuration is refused: log files were rotated
	}
	s.wardrobe.look()
	err := s.replace(ctx, old)
	if ctx.Err() != nil && err != nil {
		return // the server stops
	}
	s.metrics.reload(err)
	s.refused = err
	if err != nil {
		s.logger.Error("the new configuration is refused; the one in use stays", "cause", err)
		return
	}
	s.logger.Info("the new configuration is in use", "keys", len(s.views()))
}

// replace puts a new service in the place of the old one, which ends when its requests have.
func (s *server) replace(ctx context.Context, old *service) (err error) {
	next, worn, err := s.build(ctx)
	if err != nil {
		return err
	}
	opened := (*front)(nil)
	begun := false
	defer func() {
		if err == nil {
			return
		}
		if opened != nil {
			_ = opened.listener.Close() // nothing was served there
		}
		s.hooks.operations.configure(old.parallel)
		if begun {
			err = errors.Join(err, s.finish(next))
		} else {
			err = errors.Join(err, next.site.close())
		}
	}()
	if next.site.Listen.Address != s.address {
		if opened, err = newFront(ctx, next.site.Listen.Address, s, s.timing, s.logger); err != nil {
			return err
		}
	}
	begun = true
	s.begin(ctx, next)
	if err = s.await(ctx, next, old); err != nil {
		return err
	}
	if err = s.monitor.Listen(next.site.Monitor); err != nil {
		return err
	}
	s.wardrobe.wear(next.site.Listen, worn)
	s.limitConnections(next.site.Listen)
	s.service.Store(next)
	if opened != nil {
		before := s.front
		s.front, s.address = opened, next.site.Listen.Address
		s.serve(opened)
		s.leaving.Go(before.stop)
	}
	s.leaving.Go(func() {
		<-old.requests.close()
		if err := s.finish(old); err != nil {
			s.logger.Warn("closing what the configuration before had opened", "cause", err)
		}
	})
	return nil
}

// await waits until a new service can do what the old one does, for as long as one key after the other gets there. An HSM that is
// away now keeps the one in use: that can seal without it, the new one cannot.
func (s *server) await(ctx context.Context, next, old *service) error {
	limit := time.NewTimer(s.timing.settle)
	defer limit.Stop()
	look := time.NewTicker(firstLook)
	defer look.Stop()
	for sealing := 0; !next.replaces(old); {
		select {
		case <-look.C:
			if now := next.sealing(); now > sealing {
				sealing = now
				limit.Reset(s.timing.settle)
			}
		case <-limit.C:
			if !(doorkeeper{next.site.Tokens}).knows() {
				return errors.New("the store of its tokens does not tell them, and there is no copy: reload again when it does")
			}
			return errors.New("its keys need an HSM once before they can seal, and it does not answer: reload again when it does")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// sealOnDemand wipes all leases whenever somebody asks for it.
func (s *server) sealOnDemand(ctx context.Context, demand <-chan os.Signal) {
	for {
		select {
		case <-demand:
		case <-ctx.Done():
			return
		}
		ended := 0
		s.each(func(in *service) {
			ended += len(in.site.Keys.Leases())
			in.site.Keys.EndLeases()
			in.nudge()
		})
		s.logger.Info("sealed: all leases were ended", "leases", ended)
	}
}

// renewCertificates takes a renewed certificate into use.
func (s *server) renewCertificates(ctx context.Context) {
	for monitor.Sleep(ctx, s.timing.certificates) {
		s.wardrobe.look()
	}
}

// end stops the server when what runs has ended: openings that wait are turned away, so that their seals ask another server.
func (s *server) end() error {
	s.logger.Info("stopping")
	s.notify.Stopping()
	last := s.service.Load()
	s.each(func(in *service) { in.desk.close() })
	s.front.stop()
	s.leaving.Wait()
	s.fronts.Wait()
	<-last.requests.close()
	return s.finish(last)
}

// begin starts a service.
func (s *server) begin(ctx context.Context, in *service) {
	s.working.Store(in, nil)
	in.begin(ctx)
}

// finish ends a service that nobody gives requests any more.
func (s *server) finish(in *service) error {
	defer s.working.Delete(in)
	return in.end()
}

// each does something with every service that works.
func (s *server) each(do func(*service)) {
	s.working.Range(func(in, _ any) bool {
		do(in.(*service)) //nolint:forcetypeassert // nothing else is in it
		return true
	})
}

// healthy returns nil while the loops turn.
func (s *server) healthy() error {
	if in := s.service.Load(); in != nil {
		if what := in.stuck(time.Now()); what != "" {
			return fmt.Errorf("%s does not turn", what)
		}
	}
	return nil
}
