package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// Alarm is a kind of trouble that only a person can mend. It is the value of a label, so there are few.
type Alarm string

// The alarms.
const (
	AlarmNone           Alarm = ""
	AlarmForeignCluster Alarm = "foreign_cluster" // shares were given away: rekey
	AlarmWrongShares    Alarm = "wrong_shares"
	AlarmMismatch       Alarm = "mismatch"
	AlarmIdentity       Alarm = "identity" // by TLS it is not the node that we know
	AlarmPIN            Alarm = "pin"
)

// alarms lists them, the gravest first.
var alarms = []Alarm{AlarmForeignCluster, AlarmWrongShares, AlarmMismatch, AlarmIdentity, AlarmPIN}

// alarmOf returns what only a person can mend about an error.
func alarmOf(err error) Alarm {
	var pin *hsm.PINError
	switch {
	case err == nil:
	case errors.Is(err, cluster.ErrForeignCluster):
		return AlarmForeignCluster
	case errors.Is(err, cluster.ErrWrongShares), errors.Is(err, node.ErrWrongShares):
		return AlarmWrongShares
	case errors.Is(err, cluster.ErrMismatch):
		return AlarmMismatch
	case errors.Is(err, node.ErrIdentity):
		return AlarmIdentity
	case errors.As(err, &pin):
		return AlarmPIN
	}
	return AlarmNone
}

// retryAfter returns how long a node asked to be left alone, longestPause at most.
func retryAfter(err error) time.Duration {
	var refused *node.Error
	if errors.As(err, &refused) {
		return min(refused.RetryAfter, longestPause)
	}
	return 0
}

// verbs are those of *cluster.Custodian that the daemon uses.
type verbs interface {
	Look(ctx context.Context, c *cluster.Cluster, address string) (cluster.NodeStatus, error)
	Tend(ctx context.Context, c *cluster.Cluster, address string) (cluster.Outcome, error)
	TendAll(ctx context.Context, c *cluster.Cluster) []cluster.NodeOutcome
	Status(ctx context.Context, c *cluster.Cluster) (cluster.Status, error)
}

// keeping is a [Custodian] made of the verbs on clusters.
type keeping struct {
	verbs    verbs
	clusters []*cluster.Cluster
}

var _ verbs = (*cluster.Custodian)(nil)

// Custody returns the custodian of these clusters. The first argument is a *cluster.Custodian.
func Custody(custodian verbs, clusters []*cluster.Cluster) Custodian {
	return &keeping{custodian, clusters}
}

// Watched returns what a [Site] says of these clusters.
func Watched(clusters []*cluster.Cluster) []Cluster {
	watched := make([]Cluster, len(clusters))
	for i, c := range clusters {
		watched[i] = Cluster{Name: c.Name, Nodes: c.Nodes, Store: c.Store}
	}
	return watched
}

func (c *keeping) cluster(name string) (*cluster.Cluster, error) {
	at := slices.IndexFunc(c.clusters, func(known *cluster.Cluster) bool { return known.Name == name })
	if at < 0 {
		return nil, fmt.Errorf("%w: there is no cluster %q", ErrConfig, name)
	}
	return c.clusters[at], nil
}

// Look implements [Custodian].
func (c *keeping) Look(ctx context.Context, name, address string) (State, error) {
	known, err := c.cluster(name)
	if err != nil {
		return State{}, err
	}
	status, err := c.verbs.Look(ctx, known, address)
	if err == nil {
		err = status.Err
	}
	if err != nil {
		return State{}, err
	}
	return stateOf(status), nil
}

// Tend implements [Custodian].
func (c *keeping) Tend(ctx context.Context, name string, addresses []string) []Result {
	known, err := c.cluster(name)
	if err != nil {
		return nil
	}
	outcomes := c.tend(ctx, known, addresses)
	results := make([]Result, len(outcomes))
	for i, o := range outcomes {
		results[i] = Result{
			Address: o.Address, State: stateOf(o.Outcome.Node), Unsealed: o.Outcome.Action == cluster.ActionUnsealed,
			Note: o.Outcome.Note, Err: o.Err,
		}
	}
	return results
}

// tend tends some nodes of a cluster and leaves the others alone: one that does not answer would only be waited for, and one that
// took the shares of another cluster gets no more. The shares are opened once.
func (c *keeping) tend(ctx context.Context, known *cluster.Cluster, addresses []string) []cluster.NodeOutcome {
	one := func(address string) cluster.NodeOutcome {
		outcome, err := c.verbs.Tend(ctx, known, address)
		return cluster.NodeOutcome{Address: address, Outcome: outcome, Err: err}
	}
	if len(addresses) == 1 {
		return []cluster.NodeOutcome{one(addresses[0])}
	}
	some := *known
	some.Nodes = addresses
	outcomes := c.verbs.TendAll(ctx, &some)
	for i, o := range outcomes {
		if errors.Is(o.Err, cluster.ErrNotInitialized) && len(addresses) < len(known.Nodes) {
			outcomes[i] = one(o.Address) // the one that it is to join may be among the others
		}
	}
	return outcomes
}

// Generation implements [Custodian].
func (c *keeping) Generation(ctx context.Context, name string) (string, error) {
	known, err := c.cluster(name)
	if err != nil {
		return "", err
	}
	status, err := c.verbs.Status(ctx, known)
	if err != nil {
		return "", err
	}
	var items []string
	for _, m := range status.Material {
		if m.Err != nil {
			return "", m.Err
		}
		items = append(items, fmt.Sprintf("%s %d", m.Item, m.Generation))
	}
	return strings.Join(items, ", "), nil
}

func stateOf(s cluster.NodeStatus) State {
	state := State{
		Initialized: s.Seal.Initialized, Sealed: s.Seal.Sealed, Version: s.Seal.Version, CertificateEnds: s.Seal.CertificateEnds,
	}
	if s.Alarm != nil {
		state.Alarm = AlarmForeignCluster
	}
	return state
}
