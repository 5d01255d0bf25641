package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// crew is everything that works for one site: a watch for each node, a tender for each cluster, probes of devices and stores.
type crew struct {
	site    *Site
	watches []*watch
	devices []*monitor.Probe

	stop    context.CancelFunc // of watches and probes
	acts    context.CancelFunc // of acts
	running sync.WaitGroup     // all of them
	looked  chan struct{}      // closed when every node was looked at
	audit   atomic.Pointer[error]
}

// newCrew starts working for a site. What is remembered of nodes is taken over from the crew before, nil for none; what barred
// them is not. With done, a watch ends when it says so, and there are no probes.
func newCrew(site *Site, shared *lanes, hooks *Hooks, logger *slog.Logger, before *crew, done func(view) bool) *crew {
	stop, cancelStop := context.WithCancel(context.Background())
	acts, cancelActs := context.WithCancel(context.Background())
	c := &crew{site: site, stop: cancelStop, acts: cancelActs, looked: make(chan struct{})}
	known := map[[2]string]view{}
	if before != nil {
		for _, v := range before.views() {
			known[[2]string{v.cluster, v.address}] = v
		}
	}
	interval := site.Interval
	if interval == 0 {
		interval = defaultInterval
	}
	var once *sync.Map
	if done != nil {
		once = &sync.Map{}
	}
	for _, configured := range site.Clusters {
		t := &tender{
			cluster: configured.Name, custodian: site.Custodian, lanes: shared, stop: stop, acts: acts, running: &c.running,
		}
		for _, address := range configured.Nodes {
			old := known[[2]string{configured.Name, address}]
			w := &watch{
				cluster: configured.Name, address: address, custodian: site.Custodian, tender: t, interval: interval,
				logger: logger.With("cluster", configured.Name, "node", address), kicks: make(chan func(), 1),
				notes: notes{condition: old.told, once: once},
				view: view{
					cluster: configured.Name, address: address, state: old.state, seen: old.seen, unsealed: old.unsealed, attempts: old.attempts,
				},
			}
			t.watches = append(t.watches, w)
			c.watches = append(c.watches, w)
		}
	}
	var first sync.WaitGroup // of looks
	for _, w := range c.watches {
		first.Add(1)
		w.first = sync.OnceFunc(first.Done)
		c.running.Go(func() { defer w.first(); w.run(stop, done) })
	}
	c.running.Go(func() { first.Wait(); close(c.looked) })
	if done != nil {
		return c
	}
	for _, d := range site.Devices {
		p := &monitor.Probe{Device: d, Last: hooks.metrics.lastOfDevice, Logger: logger}
		c.devices = append(c.devices, p)
		c.running.Go(func() { p.Run(stop) })
	}
	if site.Audit != nil {
		c.running.Go(func() { c.checkAudit(stop) })
	}
	if site.Warm != nil {
		c.running.Go(func() {
			if err := site.Warm(stop); err != nil && stop.Err() == nil {
				logger.Warn("what unsealing needs is not ready ahead of time; the first one takes longer", "cause", err)
			}
		})
	}
	for _, s := range site.Stores {
		if s.Probe {
			c.running.Go(func() { probeStore(stop, s.Store) })
		}
	}
	return c
}

// end stops the crew and waits for the acts that are under way. For a while they may go on as they like; then they are asked
// to give up, which those in a critical window do not.
func (c *crew) end() {
	c.stop()
	grace := time.AfterFunc(stopGrace, c.acts)
	defer grace.Stop()
	c.running.Wait()
	c.acts()
}

// checkAudit finds out now and then whether an act could be announced: not only when one is due.
func (c *crew) checkAudit(ctx context.Context) {
	for {
		limited, cancel := context.WithTimeout(ctx, probeLimit)
		err := c.site.Audit.Check(limited)
		cancel()
		if ctx.Err() == nil {
			c.audit.Store(&err)
		}
		if !monitor.Sleep(ctx, monitor.Jittered(storeInterval)) {
			return
		}
	}
}

// storeOf names the store of a cluster.
func (c *crew) storeOf(cluster string) string {
	at := slices.IndexFunc(c.site.Clusters, func(known Cluster) bool { return known.Name == cluster })
	return c.site.Clusters[at].Store
}

// auditError is why no act could be announced when that was last looked at; nil where one could, or nobody knows.
func (c *crew) auditError() error {
	if known := c.audit.Load(); known != nil {
		return *known
	}
	return nil
}

// views tells what is known of every node, in the order of the configuration.
func (c *crew) views() []view {
	all := make([]view, len(c.watches))
	for i, w := range c.watches {
		all[i] = w.snapshot()
	}
	return all
}

// stuck names a loop that does not turn, "" for none.
func (c *crew) stuck(now time.Time) string {
	for _, w := range c.watches {
		if w.stuck(now) {
			return fmt.Sprintf("the watch of node %s of cluster %q", w.address, w.cluster)
		}
	}
	for _, d := range c.devices {
		if d.Stuck(now) {
			return fmt.Sprintf("the probe of device %q", d.Device.Name())
		}
	}
	return ""
}
