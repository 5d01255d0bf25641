package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// firstRound is how long the daemon waits for the first look at every node before it calls itself ready.
const firstRound = 20 * time.Second

// daemon is a running daemon.
type daemon struct {
	options Options
	logger  *slog.Logger
	metrics *metrics
	hooks   *Hooks
	lanes   *lanes
	notify  *monitor.Notifier
	server  *monitor.Server

	crew    atomic.Pointer[crew]
	refused error          // why the newest configuration is not in use, nil where it is; of the loop alone
	leaving sync.WaitGroup // crews whose site was replaced
}

// Run is the daemon: it works until ctx ends, and returns nil after a clean stop. It fails where the first site cannot be
// built or asks for what is never right. A listener's address that is taken is tried again, and keeps no node sealed.
func Run(ctx context.Context, options Options) error {
	d := &daemon{options: options, logger: options.Logger, metrics: newMetrics(), lanes: newLanes(), notify: options.notify}
	if d.notify == nil {
		d.notify = monitor.NewNotifier()
	}
	if d.logger == nil {
		d.logger = slog.New(slog.DiscardHandler)
	}
	d.hooks = newHooks(d.metrics)
	d.metrics.registry.MustRegister(&collector{version: options.Version, crew: d.crew.Load, hooks: d.hooks})
	reload := options.Reload
	if reload == nil {
		signals := make(chan os.Signal, 1) // as many as are waiting ask for the same
		signal.Notify(signals, syscall.SIGHUP)
		defer signal.Stop(signals)
		reload = signals
	}
	site, err := d.build(ctx)
	if err != nil {
		return err
	}
	d.server = newServer(d)
	d.server.Begin(site.Listen)
	defer d.server.Close()
	d.metrics.read()
	d.crew.Store(newCrew(site, d.lanes, d.hooks, d.logger, nil, nil))

	watchdog, stopWatchdog := context.WithCancel(context.Background())
	var watching sync.WaitGroup
	watching.Go(func() { d.notify.Watchdog(watchdog, d.healthy) })
	defer func() { stopWatchdog(); watching.Wait() }()

	d.loop(ctx, reload)
	return d.stop()
}

// loop serves until ctx ends.
func (d *daemon) loop(ctx context.Context, reload <-chan os.Signal) {
	patience := time.NewTimer(firstRound)
	defer patience.Stop()
	ready, late := d.crew.Load().looked, patience.C
	again := d.options.listenPause
	if again == 0 {
		again = monitor.RetryPause
	}
	relisten := time.NewTimer(monitor.Jittered(again))
	defer relisten.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ready:
			ready, late = nil, nil
			d.ready()
		case <-late:
			ready, late = nil, nil
			d.ready()
		case <-relisten.C:
			d.server.Retry()
			relisten.Reset(monitor.Jittered(again))
		case <-reload:
			d.notify.Reloading()
			d.reload(ctx)
			d.notify.Ready(d.status())
		}
	}
}

func (d *daemon) ready() {
	d.logger.Info("watching", "clusters", len(d.crew.Load().site.Clusters), "nodes", len(d.crew.Load().watches))
	d.notify.Ready(d.status())
	if d.options.Ready != nil {
		d.options.Ready()
	}
}

// status is one line for "systemctl status".
func (d *daemon) status() string {
	views := d.crew.Load().views()
	well := 0
	for _, v := range views {
		if v.well() {
			well++
		}
	}
	text := fmt.Sprintf("%d of %d nodes unsealed", well, len(views))
	if d.refused != nil {
		text += "; the newest configuration was refused: " + strings.ReplaceAll(d.refused.Error(), "\n", "; ")
	}
	return text
}

// build makes a site and checks it.
func (d *daemon) build(ctx context.Context) (*Site, error) {
	site, err := d.options.Build(ctx, d.hooks)
	if err != nil {
		return nil, err
	}
	if err := site.check(); err != nil {
		return nil, errors.Join(err, closeSite(site))
	}
	return site, nil
}

// reload takes a new configuration into use, or says why the old one stays.
func (d *daemon) reload(ctx context.Context) {
	d.logger.Info("reading the configuration anew")
	old := d.crew.Load()
	if old.site.Audit != nil {
		old.site.Audit.Reopen() // also where the new configuration is refused: log files were rotated
	}
	site, err := d.build(ctx)
	if err == nil {
		if err = d.server.Listen(site.Listen); err != nil {
			err = errors.Join(err, closeSite(site))
		}
	}
	if ctx.Err() != nil && err != nil {
		return // the daemon stops
	}
	d.metrics.reload(err)
	d.refused = err
	if err != nil {
		d.logger.Error("the new configuration is refused; the one in use stays", "cause", err)
		return
	}
	old.stop() // before the new watches begin: a node is tended by one of both
	d.crew.Store(newCrew(site, d.lanes, d.hooks, d.logger, old, nil))
	d.metrics.keep(site.names())
	d.leaving.Go(func() {
		old.end()
		if err := closeSite(old.site); err != nil {
			d.logger.Warn("closing what the configuration before had opened", "cause", err)
		}
	})
	d.logger.Info("the new configuration is in use", "clusters", len(site.Clusters))
}

// stop ends the daemon when all acts have ended.
func (d *daemon) stop() error {
	d.logger.Info("stopping")
	d.notify.Stopping()
	last := d.crew.Load()
	ended := make(chan struct{})
	go func() { last.end(); d.leaving.Wait(); close(ended) }() // waited for below
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for told := ""; ; {
		select {
		case <-ended:
			return closeSite(last.site)
		case <-tick.C:
		}
		open, _ := d.hooks.windows()
		if len(open) > 0 {
			d.notify.Extend()
		}
		if now := strings.Join(open, ", "); now != told {
			told = now
			if now != "" {
				d.logger.Warn("waiting for what must not be cut off; do not kill this process, it holds the only copy of keys", "what", now)
			}
		}
	}
}

// healthy returns nil while the loops turn. A critical window is more important than any loop: whoever restarts the process
// because of a stuck one would lose keys.
func (d *daemon) healthy() error {
	if open, _ := d.hooks.windows(); len(open) > 0 {
		return nil
	}
	if cluster := d.lanes.stuck(time.Now()); cluster != "" {
		return fmt.Errorf("an act on cluster %q does not turn", cluster)
	}
	if c := d.crew.Load(); c != nil {
		if what := c.stuck(time.Now()); what != "" {
			return fmt.Errorf("%s does not turn", what)
		}
	}
	return nil
}

// check says what is wrong with a site that cannot be watched.
func (s *Site) check() error {
	if len(s.Clusters) == 0 {
		return fmt.Errorf("%w: there is no cluster to be watched", ErrConfig)
	}
	if s.Interval < 0 {
		return fmt.Errorf("%w: the interval %v is negative", ErrConfig, s.Interval)
	}
	if err := s.Listen.Check(); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return nil
}

// names lists devices and stores.
func (s *Site) names() (devices, stores []string) {
	for _, d := range s.Devices {
		devices = append(devices, d.Name())
	}
	for _, configured := range s.Stores {
		stores = append(stores, configured.Name)
	}
	return devices, stores
}

func closeSite(site *Site) error {
	if site.Close == nil {
		return nil
	}
	return site.Close()
}
