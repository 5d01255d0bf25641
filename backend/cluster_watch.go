package backend

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// watch is what the mount knows of the nodes from looking at them, about once a minute.
type watch struct {
	mu       sync.Mutex
	clusters map[string]*watched
	// slots bounds how many clusters are looked at at one moment: each may open an envelope, and an HSM opens one at a time.
	slots chan struct{}
}

// watched is one cluster of them.
type watched struct {
	looked time.Time           // when the last look ended
	nodes  map[string]nodeLook // by address; "" for the cluster as a whole
}

// nodeLook is what the last look at a node brought.
type nodeLook struct {
	outcome  cluster.Outcome
	err      error
	since    time.Time // it is so
	failures int       // in a row, of those that do not pass by themselves
	next     time.Time // not looked at before
}

const (
	// watchParallel is how many clusters are looked at at one moment.
	watchParallel = 8
	// watchPause is the longest pause after failures that do not pass by themselves: shares that are wrong stay wrong, and
	// every try costs an operation in an HSM.
	watchPause = 10 * time.Minute
	// watchSlack makes up for a tick that comes a little early.
	watchSlack = 10 * time.Second
	// watchLimit is how long one look at a cluster may take. A node that joins a raft cluster takes some seconds.
	watchLimit = 5 * time.Minute
	// watchAgain is how soon, and watchRounds how often between two ticks, a cluster is looked at that is on its way: one
	// whose node waits for another one to be active, for example.
	watchAgain  = 10 * time.Second
	watchRounds = 4
)

// tick is called by Vault about once a minute. It begins to look at the clusters and returns: Vault waits for nobody's HSM.
// A cluster that is still being looked at is left alone.
func (b *backend) tick(ctx context.Context, _ *logical.Request) error {
	if !b.WriteSafeReplicationState() {
		return nil
	}
	b.resumeWaiting(ctx)
	names, err := b.storage.List(ctx, clustersPrefix)
	if err != nil {
		b.logger.Warn("listing the clusters that are watched", "error", err)
		return nil // the rest of what Vault does here goes on
	}
	for _, name := range names {
		job := "watch " + name
		if b.clusters.acts.busy(name) || b.jobs.isRunning(job) {
			continue
		}
		b.jobs.start(b.closing, job, func(ctx context.Context) { b.look(ctx, name) })
	}
	return nil
}

// look tends a cluster that is watched.
func (b *backend) look(ctx context.Context, name string) {
	again := time.NewTicker(watchAgain)
	defer again.Stop()
	for range watchRounds {
		if !b.lookInTurn(ctx, name) {
			return
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return
		}
	}
}

// lookInTurn looks at a cluster once it has a slot, which it gives back before it is looked at again: others wait for it.
func (b *backend) lookInTurn(ctx context.Context, name string) (onItsWay bool) {
	select {
	case b.clusters.watch.slots <- struct{}{}:
		defer func() { <-b.clusters.watch.slots }()
	case <-ctx.Done():
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, watchLimit)
	defer cancel()
	onItsWay, err := b.lookOnce(ctx, name)
	if err != nil && b.closing.Err() == nil {
		b.clusters.watch.note(b.logger, name, []cluster.NodeOutcome{{Err: err}}, time.Now())
	}
	return onItsWay
}

// lookOnce tends those nodes of a watched cluster that are due, and tells whether one of them is on its way.
func (b *backend) lookOnce(ctx context.Context, name string) (onItsWay bool, err error) {
	record, err := b.readCluster(ctx, name)
	if err != nil || record == nil || !record.Watch {
		return false, err
	}
	c, err := record.cluster(name)
	if err != nil {
		return false, err
	}
	if c.Nodes = b.clusters.watch.due(name, c.Nodes, time.Now()); len(c.Nodes) == 0 {
		return false, nil
	}
	outcomes, err := b.tend(ctx, c)
	return slices.ContainsFunc(outcomes, func(one cluster.NodeOutcome) bool {
		waits := one.Err == nil && one.Outcome.Action == cluster.ActionWaiting && one.Outcome.People == 0
		return waits || errors.Is(one.Err, cluster.ErrBusy)
	}), err
}

// tend unseals the nodes of a cluster that are sealed, and notes what it found. One at a time tends a cluster: two would
// mix their shares in one attempt.
func (b *backend) tend(ctx context.Context, c *cluster.Cluster) ([]cluster.NodeOutcome, error) {
	done, err := b.clusters.tending.take(ctx, "cluster "+c.Name)
	if err != nil {
		return nil, err
	}
	defer done()
	outcomes := b.clusters.custodian.TendAll(ctx, c)
	b.clusters.watch.note(b.logger, c.Name, outcomes, time.Now())
	return outcomes, nil
}

// due returns those nodes of a cluster that may be looked at again.
func (w *watch) due(name string, nodes []string, now time.Time) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	known := w.clusters[name]
	return slices.DeleteFunc(slices.Clone(nodes), func(address string) bool {
		return known != nil && now.Before(known.nodes[address].next)
	})
}

// forget makes the next look at a cluster the first one.
func (w *watch) forget(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.clusters, name)
}

// note takes down what a look at some nodes of a cluster brought, and logs what is different from the look before.
func (w *watch) note(logger *slog.Logger, name string, outcomes []cluster.NodeOutcome, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	known := w.clusters[name]
	if known == nil {
		known = &watched{nodes: map[string]nodeLook{}}
		if w.clusters == nil {
			w.clusters = map[string]*watched{}
		}
		w.clusters[name] = known
	}
	known.looked = now
	delete(known.nodes, "")
	for _, one := range outcomes {
		look := nodeLook{outcome: one.Outcome, err: one.Err, since: now}
		before, seen := known.nodes[one.Address]
		if seen && look.same(before) {
			look.since = before.since
		} else {
			look.log(logger, name, one.Address, seen)
		}
		if lasts(look.err) {
			look.failures = before.failures + 1
			look.next = now.Add(min(time.Minute<<min(look.failures, 4), watchPause) - watchSlack)
		}
		known.nodes[one.Address] = look
	}
}

// same tells whether a node is as it was. The text of an error may tell the time, so what it is counts.
func (l nodeLook) same(before nodeLook) bool {
	switch {
	case l.err != nil || before.err != nil:
		return l.err != nil && before.err != nil && kind(l.err) == kind(before.err)
	case l.outcome.Action == cluster.ActionUnsealed:
		return false // it happened again
	case l.outcome.Action == cluster.ActionNone:
		return before.outcome.Action == cluster.ActionNone || before.outcome.Action == cluster.ActionUnsealed
	default:
		return l.outcome.Action == before.outcome.Action
	}
}

// kind is what an error is, apart from its words.
func kind(err error) string {
	for _, group := range statuses {
		for _, sentinel := range group.errors {
			if errors.Is(err, sentinel) {
				return sentinel.Error()
			}
		}
	}
	return err.Error()
}

// log tells that a node is not as it was.
func (l nodeLook) log(logger *slog.Logger, name, address string, seen bool) {
	logger = logger.With("cluster", name, "node", address)
	switch {
	case errors.Is(l.err, cluster.ErrForeignCluster):
		logger.Error("ALARM: shares of the cluster in custody went to another one; rekey it now", "error", l.err)
	case l.err != nil:
		logger.Warn("the node of a cluster in custody is not served", "error", l.err)
	case l.outcome.Action == cluster.ActionNone && seen: // the custodian tells what it unseals itself
		logger.Info("the node of a cluster in custody is unsealed")
	default:
		logger.Debug("the node of a cluster in custody was looked at", "action", string(l.outcome.Action), "note", l.outcome.Note)
	}
}

// lasting are failures to unseal that are there until somebody does something: trying again costs operations in an HSM.
var lasting = []error{
	cluster.ErrForeignCluster, cluster.ErrWrongShares, cluster.ErrMismatch, cluster.ErrEmpty, cluster.ErrFacts, cluster.ErrInvalid,
	node.ErrWrongShares,
}

func lasts(err error) bool {
	pin := (*hsm.PINError)(nil)
	return errors.As(err, &pin) || slices.ContainsFunc(lasting, func(sentinel error) bool { return errors.Is(err, sentinel) })
}

// show describes what was found by looking at a cluster that has these nodes.
func (w *watch) show(name string, on bool, nodes []string) map[string]any {
	w.mu.Lock()
	defer w.mu.Unlock()
	shown, looks := map[string]any{"on": on, "looked": "", "error": ""}, map[string]any{}
	shown["nodes"] = looks
	known := w.clusters[name]
	if known == nil {
		return shown
	}
	shown["looked"], shown["error"] = stamp(known.looked), message(known.nodes[""].err)
	for _, address := range nodes {
		if look, seen := known.nodes[address]; seen {
			looks[address] = map[string]any{
				"action": string(look.outcome.Action), "note": look.outcome.Note, "error": message(look.err), "since": stamp(look.since), "next": stamp(look.next),
			}
		}
	}
	return shown
}

// troubled counts the nodes of a cluster that a look found sealed or could not serve.
func (w *watch) troubled(name string, nodes []string) (looked time.Time, troubled []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	known := w.clusters[name]
	if known == nil {
		return time.Time{}, nil
	}
	for _, address := range nodes {
		if look, seen := known.nodes[address]; seen && (look.err != nil || look.outcome.Node.Seal.Sealed) {
			troubled = append(troubled, address)
		}
	}
	return known.looked, troubled
}

// actLog writes acts of custody into the server's log. Those of requests are in Vault's audit log before they begin; the watch
// acts by itself.
type actLog struct{ logger *slog.Logger }

// Begin implements cluster.Auditor.
func (l actLog) Begin(_ context.Context, act audit.Act) (end func(error), err error) {
	attributes := []any{"verb", act.Verb, "cluster", act.Cluster, "node", act.Node, "by", act.By}
	for _, detail := range slices.Sorted(maps.Keys(act.Detail)) {
		attributes = append(attributes, detail, act.Detail[detail])
	}
	l.logger.Info("custody begins", attributes...)
	return func(err error) {
		if err != nil {
			l.logger.Warn("custody failed", append(attributes, "error", err)...)
			return
		}
		l.logger.Info("custody done", attributes...)
	}, nil
}
