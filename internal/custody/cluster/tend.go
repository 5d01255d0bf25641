package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// Action is what [Custodian.Tend] found or did.
type Action string

// The actions.
const (
	ActionNone     Action = "none"      // the node is unsealed, nothing was to do
	ActionUnsealed Action = "unsealed"  // it was sealed and is not any more
	ActionWaiting  Action = "waiting"   // somebody else has to go on: another host, people, Vault itself; Note says who
	ActionAutoSeal Action = "auto-seal" // the cluster unseals itself
)

// Outcome is what [Custodian.Tend] has done for a node.
type Outcome struct {
	Node   NodeStatus // as it was found, or left
	Action Action
	Joined bool     // it was joined to its cluster
	Stored []string // items that were held on the local disk and are in the store now
	// RootRevoked is true where the root token that initialising made was revoked.
	RootRevoked bool
	// People is how many people must still give their share.
	People int
	// Note is a sentence on what happens next, "" for nothing.
	Note string
	Took time.Duration
}

// NodeOutcome is what [Custodian.TendAll] has done for one node.
type NodeOutcome struct {
	Address string
	Outcome Outcome
	Err     error
}

// Tend looks at one node and does what is due: stores what the local disk holds, joins the node to its cluster, unseals it. It
// opens nothing unless the node is sealed, at the cost of one HSM operation for each envelope that is needed. It never waits
// for long and never repeats what failed: the caller decides when it is called again. The error is the node's; Outcome says
// how the node is all the same.
func (k *Custodian) Tend(ctx context.Context, c *Cluster, address string) (Outcome, error) {
	stored, heldErr := k.tendHeld(ctx, c)
	o := k.opening(c)
	defer o.wipe()
	out, err := k.tend(ctx, c, address, o)
	k.learn(ctx, c, o)
	out.Stored = stored
	return out, join(err, heldErr)
}

// TendAll is Tend for all nodes at once: the keys are opened once for those that are sealed. Nodes that have to join wait for
// the others.
func (k *Custodian) TendAll(ctx context.Context, c *Cluster) []NodeOutcome {
	stored, heldErr := k.tendHeld(ctx, c)
	o := k.opening(c)
	defer o.wipe()
	all := k.tendAll(ctx, c, o)
	for i := range all {
		all[i].Outcome.Stored = stored
		all[i].Err = join(all[i].Err, heldErr)
	}
	return all
}

// tendAll tends all nodes with what is opened, in the order of the configuration.
func (k *Custodian) tendAll(ctx context.Context, c *Cluster, o *opening) []NodeOutcome {
	all := make([]NodeOutcome, len(c.Nodes))
	tend := func(due func(i int) bool) {
		var group sync.WaitGroup
		for i, address := range c.Nodes {
			if due(i) {
				group.Go(func() {
					out, err := k.tend(ctx, c, address, o)
					all[i] = NodeOutcome{address, out, err}
				})
			}
		}
		group.Wait()
	}
	tend(func(int) bool { return true })
	// What had nobody to join may have now.
	left := func(i int) bool {
		return errors.Is(all[i].Err, ErrNotInitialized) || errors.Is(all[i].Err, ErrBusy) && !all[i].Outcome.Node.Seal.Initialized
	}
	unsealed := slices.IndexFunc(all, func(n NodeOutcome) bool { return n.Err == nil && n.Outcome.Action == ActionUnsealed })
	if unsealed >= 0 && slices.ContainsFunc(indices(all), left) {
		if n, err := k.node(c, c.Nodes[unsealed]); err == nil {
			_ = k.awaitActive(ctx, n) // where it takes too long, the next call joins them
		}
		tend(left)
	}
	k.learn(ctx, c, o)
	return all
}

func indices[T any](all []T) []int {
	each := make([]int, len(all))
	for i := range each {
		each[i] = i
	}
	return each
}

// tendHeld stores what the local disk holds. Where another process of the host is at it, that is left to it.
func (k *Custodian) tendHeld(ctx context.Context, c *Cluster) ([]string, error) {
	names, err := k.heldNow(ctx, c)
	if err != nil || len(names) == 0 {
		return nil, err
	}
	unlock, err := k.tryLock(ctx, c)
	if err != nil || unlock == nil {
		return nil, err
	}
	defer unlock()
	return k.finishHeld(ctx, c)
}

// lockName is the lock under which the keys of a cluster are made or changed on a host.
func lockName(c *Cluster) string { return "clusters/" + c.Name }

// lock waits until no other process of the host makes or changes the keys of a cluster.
func (k *Custodian) lock(ctx context.Context, c *Cluster) (unlock func(), err error) {
	unlock, err = k.local.Lock(ctx, lockName(c))
	if err != nil {
		return nil, fmt.Errorf("waiting for other work on the keys of cluster %q: %w", c.Name, err)
	}
	return unlock, nil
}

// tryLock is lock without waiting; unlock is nil where another process is at work.
func (k *Custodian) tryLock(ctx context.Context, c *Cluster) (unlock func(), err error) {
	short, cancel := context.WithTimeout(ctx, k.pauses.lock)
	defer cancel()
	unlock, err = k.local.Lock(short, lockName(c))
	if err != nil && short.Err() != nil {
		return nil, ctx.Err()
	}
	return unlock, err
}

// tend does what is due for one node.
func (k *Custodian) tend(ctx context.Context, c *Cluster, address string, o *opening) (out Outcome, err error) {
	begun := time.Now()
	out = Outcome{Node: NodeStatus{Address: address}, Action: ActionNone}
	defer func() { out.Took = time.Since(begun) }()
	n, err := k.node(c, address)
	if err != nil {
		return out, err
	}
	st, err := n.Status(ctx)
	out.Node.Seal, out.Node.Err, out.Node.Took = st, err, time.Since(begun)
	if err != nil {
		return out, err
	}
	alarm, err := k.alarm(ctx, c, address, false)
	if err != nil {
		return out, err
	}
	if out.Node.Alarm = alarm; alarm != nil {
		return out, alarm.err()
	}
	if !st.Initialized {
		st, out.Joined, err = k.join(ctx, c, n, st)
		out.Node.Seal = st
		if err != nil {
			return out, err
		}
	}
	switch {
	case !st.Initialized, st.T == 0 && st.Type == sealShamir:
		out.Action, out.Note = ActionWaiting, "It is being initialised, or is about to join its cluster."
		return out, nil
	case st.Type != sealShamir || st.RecoverySeal:
		out.Action, out.Note = ActionAutoSeal, fmt.Sprintf("Its seal is %q: it unseals itself.", st.Type)
	case st.Sealed:
		if err := k.unseal(ctx, c, n, st, o, &out); err != nil {
			return out, k.whyNone(ctx, c, err)
		}
		st = out.Node.Seal
	default:
		if err := k.knownID(c, address, st.ClusterID); err != nil {
			return out, err
		}
	}
	if !st.Sealed {
		out.RootRevoked, err = k.revokeDue(ctx, c, n, st)
		if err != nil {
			out.Note = "The root token that initialising made still lives; it is revoked as soon as that works: " + err.Error()
		}
	}
	return out, nil
}

// whyNone says, where a sealed node has no keys in custody, what became of them.
func (k *Custodian) whyNone(ctx context.Context, c *Cluster, err error) error {
	if !errors.Is(err, ErrNoMaterial) {
		return err
	}
	unlock, lockErr := k.tryLock(ctx, c)
	if lockErr != nil {
		return join(err, lockErr)
	}
	if unlock == nil {
		return fmt.Errorf("cluster %q: %w: another process of this host is initialising it, or changing its keys; look again", c.Name, ErrBusy)
	}
	defer unlock()
	return k.diagnose(ctx, c)
}

// kinds are the kinds of keys that are in custody. No HSM is touched.
func (k *Custodian) kinds(ctx context.Context, c *Cluster) ([]Kind, error) {
	var kinds []Kind
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		for _, item := range k.items(ctx, c, kind) {
			if item.Err == nil {
				kinds = append(kinds, kind)
				break
			}
			if !errors.Is(item.Err, custody.ErrNotFound) {
				return nil, item.Err
			}
		}
	}
	return kinds, nil
}

// items are the items of a kind as the store has them, in the order of the wrapping keys. Where the configuration names one that
// is not there, those that another configuration dealt shares to follow. No HSM is touched.
func (k *Custodian) items(ctx context.Context, c *Cluster, kind Kind) []MaterialStatus {
	var all []MaterialStatus
	for _, key := range c.keys() {
		item := MaterialStatus{Item: c.item(kind, key), Kind: kind}
		item.Metadata, item.Err = k.keeper.Get(ctx, c.Name, item.Item, custody.ReadOptions{Store: c.Store})
		all = append(all, item)
	}
	if !slices.ContainsFunc(all, func(item MaterialStatus) bool { return errors.Is(item.Err, custody.ErrNotFound) }) {
		return all
	}
	foreign, err := k.foreignItems(ctx, c, kind)
	if err != nil {
		return append(all, MaterialStatus{Item: string(kind), Kind: kind, Err: err})
	}
	for _, named := range foreign {
		item := MaterialStatus{Item: named.name, Kind: kind}
		if item.Metadata, item.Err = k.keeper.Get(ctx, c.Name, item.Item, custody.ReadOptions{Store: c.Store}); item.Err == nil {
			all = append(all, item)
		}
	}
	return all
}

// awaitActive waits until a node serves requests, for as long as that may take.
func (k *Custodian) awaitActive(ctx context.Context, n *node.Node) error {
	ctx, cancel := context.WithTimeout(ctx, k.pauses.settle)
	defer cancel()
	for pause := k.pauses.poll; ; pause = min(2*pause, k.pauses.pollLast) {
		role, err := n.Role(ctx)
		if err == nil && role != node.RoleNone {
			return nil
		}
		k.pause(ctx, pause)
		if ctx.Err() != nil {
			return join(err, ctx.Err())
		}
	}
}
