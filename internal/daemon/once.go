package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"
)

// ErrSealed says that not every node is unsealed.
var ErrSealed = errors.New("not every node is unsealed")

// OnceOptions are what [Once] is told.
type OnceOptions struct {
	// Clusters are the names of those that it is about; none for all.
	Clusters []string
	// Wait is how long to wait for nodes that do not answer yet, are not initialised or stay sealed; 0 for one try.
	Wait   time.Duration
	Logger *slog.Logger // nil for none
}

// Report is what [Once] found and did.
type Report struct {
	Nodes []NodeReport // in the order of the configuration
}

// NodeReport is one node of a [Report].
type NodeReport struct {
	Cluster, Address string
	Reachable        bool
	State            State // where it is or was reachable
	Unsealed         bool  // by this run
	Err              error // why it is not unsealed; nil where it is
}

// Once looks at every node, has those unsealed that are sealed, and returns when all are unsealed, when the wait is over, or
// when only a person could help. That is what cron and an init container want. The error wraps [ErrSealed], and with it the
// errors of the nodes, where one of them is not unsealed. It waits for acts that are under way, and the site stays the caller's.
func Once(ctx context.Context, site *Site, options OnceOptions) (Report, error) {
	logger := options.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	some, err := choose(site, options.Clusters)
	if err != nil {
		return Report{}, err
	}
	enough := func(v view) bool {
		return options.Wait <= 0 || v.well() || v.alarm != AlarmNone && v.alarm != AlarmIdentity // a certificate may come yet
	}
	c := newCrew(some, newLanes(), newHooks(newMetrics()), logger, nil, enough)
	ended := make(chan struct{})
	go func() { c.running.Wait(); close(ended) }() // which end waits for as well
	var late <-chan time.Time
	if options.Wait > 0 {
		wait := time.NewTimer(options.Wait)
		defer wait.Stop()
		late = wait.C
	}
	select {
	case <-ended:
	case <-late:
	case <-ctx.Done():
	}
	c.end()
	report := Report{}
	var failed []nodesError
	for _, v := range c.views() {
		n := NodeReport{Cluster: v.cluster, Address: v.address, Reachable: v.up, State: v.state, Unsealed: !v.unsealed.IsZero(), Err: v.err}
		if n.Err == nil && !v.well() {
			n.Err = fmt.Errorf("the node is %s", v.condition())
			if v.note != "" {
				n.Err = fmt.Errorf("the node is %s: %s", v.condition(), v.note)
			}
		}
		if n.Err != nil {
			failed = gather(failed, n)
		}
		report.Nodes = append(report.Nodes, n)
	}
	errs := []error{ErrSealed}
	for _, f := range failed {
		errs = append(errs, f)
	}
	switch {
	case len(errs) == 1:
		return report, nil
	case ctx.Err() != nil:
		return report, errors.Join(append(errs, ctx.Err())...)
	default:
		return report, errors.Join(errs...)
	}
}

// choose returns the site with the named clusters only.
func choose(site *Site, names []string) (*Site, error) {
	if len(names) == 0 {
		return site, site.check()
	}
	some := *site
	some.Clusters = nil
	for _, name := range names {
		at := slices.IndexFunc(site.Clusters, func(c Cluster) bool { return c.Name == name })
		if at < 0 {
			return nil, fmt.Errorf("%w: there is no cluster %q", ErrConfig, name)
		}
		some.Clusters = append(some.Clusters, site.Clusters[at])
	}
	return &some, some.check()
}
