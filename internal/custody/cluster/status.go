package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// NodeStatus is how a node is. No secret was touched to find out.
type NodeStatus struct {
	Address string
	// Err is why the node could not be asked; nil where it answered. Seal, Role and Leader are set then.
	Err  error
	Seal node.Status
	// Role is that of an unsealed node, "" where it is sealed or did not tell.
	Role   node.Role
	Leader string // address of the active node, where a standby told it
	// Alarm is set where the node took shares that were not its own.
	Alarm *Alarm
	Took  time.Duration // to ask it
}

// Alarm says that a node of another cluster took the shares of this one.
type Alarm struct {
	Format  int       `json:"format"`
	Cluster string    `json:"cluster"`
	Node    string    `json:"node"`
	At      time.Time `json:"at"`
	// Recorded is the cluster id that was expected, Seen the one that the node showed once it was unsealed.
	Recorded string `json:"recorded"`
	Seen     string `json:"seen"`
}

// Status is how a cluster is, and how well its keys are kept. No HSM was touched to find out.
type Status struct {
	Cluster  string
	At       time.Time
	Nodes    []NodeStatus // in the order of the configuration
	Material []MaterialStatus
	// Spread is how the shares are dealt to wrapping keys, as [Spread.String] says it; "" where each envelope has all.
	Spread string
	// Held are the items on the local disk that the store has not taken yet.
	Held []string
	// Intent is an initialisation that is under way, or was cut off; nil for none.
	Intent *Intent
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// MaterialStatus is how an item of the cluster is kept.
type MaterialStatus struct {
	Item string // "unseal", "recovery", "root", "unseal.<key>", …
	Kind Kind   // "" for "root"
	// Err is why nothing more is known of it; custody.ErrNotFound for an item that should be there and is not.
	Err error
	custody.Metadata
}

// Look asks a node how it is. No secret is touched. The error is that of NodeStatus, too.
func (k *Custodian) Look(ctx context.Context, c *Cluster, address string) (NodeStatus, error) {
	begun := time.Now()
	status := NodeStatus{Address: address}
	n, err := k.node(c, address)
	if err == nil {
		status.Seal, err = n.Status(ctx)
	}
	status.Took = time.Since(begun)
	if err == nil && status.Seal.Initialized && !status.Seal.Sealed {
		if leader, err := n.Leader(ctx); err == nil { // that it does not tell is no failure of the node
			status.Role, status.Leader = leader.Role, leader.Address
		}
	}
	alarm, alarmErr := k.alarm(ctx, c, address, true)
	status.Alarm, status.Err = alarm, join(err, alarmErr)
	return status, status.Err
}

// Status tells how all nodes of a cluster are, and how its keys are kept. No HSM is touched, and a node or store that does not
// answer is part of the answer.
func (k *Custodian) Status(ctx context.Context, c *Cluster) (Status, error) {
	if err := c.Check(); err != nil {
		return Status{}, err
	}
	s := Status{Cluster: c.Name, At: k.now(), Nodes: make([]NodeStatus, len(c.Nodes))}
	if c.Spread != nil {
		s.Spread = c.Spread.String()
	}
	var group sync.WaitGroup
	for i, address := range c.Nodes {
		group.Go(func() { s.Nodes[i], _ = k.Look(ctx, c, address) }) // it is in the status
	}
	group.Wait()
	for _, n := range s.Nodes {
		if n.Alarm != nil {
			s.Warnings = append(s.Warnings, n.Alarm.err().Error())
		}
	}
	k.materialStatus(ctx, c, &s)
	var err error
	if s.Held, err = k.heldItems(ctx, c); err != nil {
		s.Warnings = append(s.Warnings, err.Error())
	}
	if len(s.Held) > 0 {
		s.Warnings = append(s.Warnings, fmt.Sprintf("%s held on the local disk, sealed, because store %q did not take them; %s stores them.",
			strings.Join(s.Held, ", "), c.Store, k.do("unseal", c.Name)))
	}
	k.intentStatus(ctx, c, &s)
	return s, nil
}

// materialStatus adds how the keys are kept: the items of each kind that is there, those of the unseal keys where none is.
func (k *Custodian) materialStatus(ctx context.Context, c *Cluster, s *Status) {
	absent := func(item MaterialStatus) bool { return errors.Is(item.Err, custody.ErrNotFound) }
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		if items := k.items(ctx, c, kind); slices.ContainsFunc(items, func(item MaterialStatus) bool { return !absent(item) }) {
			s.Material = append(s.Material, items...)
		}
	}
	if len(s.Material) == 0 {
		s.Material = k.items(ctx, c, KindUnseal)
	}
	root := MaterialStatus{Item: itemRoot}
	root.Metadata, root.Err = k.keeper.Get(ctx, c.Name, itemRoot, custody.ReadOptions{Store: c.Store})
	if !absent(root) {
		s.Material = append(s.Material, root)
	}
	k.formerStatus(ctx, c, s)
	for _, item := range s.Material {
		for _, warning := range item.Warnings {
			s.Warnings = append(s.Warnings, item.Item+": "+warning)
		}
	}
}

// intentStatus adds an initialisation that is under way, or was cut off.
func (k *Custodian) intentStatus(ctx context.Context, c *Cluster, s *Status) {
	opened, err := k.store(ctx, c)
	var found foundIntent
	if err == nil {
		found, err = readIntent(ctx, opened, c.Name)
	}
	if err != nil {
		s.Warnings = append(s.Warnings, err.Error())
		return
	}
	s.Intent = found.Intent
}
