package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// DrillOptions say how much is asked of Vault.
type DrillOptions struct {
	By string
	// WithoutProof leaves out the question to Vault whether it takes the shares, see [Custodian.Prove].
	WithoutProof bool
}

// DrillResult is what a restart of the cluster's nodes would bring.
type DrillResult struct {
	Cluster string
	Kind    Kind
	// Ready is true where every node would be unsealed: there is no problem.
	Ready bool
	// Opened is how long it took to open the envelopes that are needed, as the daemon does once for all nodes that it finds
	// sealed. Items counts them.
	Opened time.Duration
	Items  int
	Nodes  []DrillNode // in the order of the configuration
	// Proved is true where Vault said that it takes the shares. NotProved says why it could not be asked; that is no problem.
	Proved    bool
	NotProved string
	// Problems are sentences, each with what to do.
	Problems []string
}

// DrillNode is what a restart of one node would bring.
type DrillNode struct {
	NodeStatus

	Problem string // "" where it would be unsealed
	// RoundTrip is how long a call over a new connection took, as each share is given. Unsealed is how long after it is found
	// sealed the node would be unsealed: opening the envelopes, and as many calls as the threshold asks for. What Vault itself
	// takes after the last one is not in it.
	RoundTrip, Unsealed time.Duration
}

// Drill tells whether the nodes of a cluster would be unsealed after a restart, and how long that would take, while they run:
// it opens the envelopes that are needed, looks whether each node is the one that its shares go to, and asks Vault whether it
// takes them. No share goes to sys/unseal, and nothing changes.
func (k *Custodian) Drill(ctx context.Context, c *Cluster, options DrillOptions) (result DrillResult, err error) {
	if err := c.Check(); err != nil {
		return DrillResult{}, err
	}
	end, err := k.act(ctx, "drill", c, "", options.By, nil)
	if err != nil {
		return DrillResult{}, err
	}
	defer func() { end(err) }()
	result = DrillResult{Cluster: c.Name}
	if result.Kind, err = k.kindOf(ctx, c, ""); err != nil {
		return result, err
	}
	began := time.Now() // what a clock on the wall would show: not the records' clock
	m, opening := k.load(ctx, c, result.Kind)
	result.Opened = time.Since(began)
	defer func() { m.wipe() }()
	if opening != nil {
		result.Problems = append(result.Problems, fmt.Sprintf("The keys do not open: %v.", opening))
	} else {
		result.Items = len(m.items)
	}
	d := &drill{k: k, c: c, m: m, result: &result}
	for _, st := range k.lookAll(ctx, c) {
		d.node(ctx, st)
	}
	if m != nil {
		d.shares(ctx, options)
	}
	result.Ready = len(result.Problems) == 0
	return result, nil
}

// drill is one call of Drill.
type drill struct {
	k      *Custodian
	c      *Cluster
	m      *material // nil where it does not open
	result *DrillResult
}

func (d *drill) problem(format string, arguments ...any) {
	d.result.Problems = append(d.result.Problems, fmt.Sprintf(format, arguments...))
}

// node says what a restart of a node would bring.
func (d *drill) node(ctx context.Context, st NodeStatus) {
	n := DrillNode{NodeStatus: st}
	n.Problem = d.obstacle(st)
	if st.Err == nil {
		var err error
		if n.RoundTrip, err = d.roundTrip(ctx, st.Address); err != nil && n.Problem == "" {
			n.Problem = err.Error()
		}
	}
	if n.Problem != "" {
		d.problem("Node %s would not be unsealed: %s.", st.Address, n.Problem)
	} else if d.m != nil && d.result.Kind == KindUnseal && len(d.m.take(d.m.active(), d.m.active().Threshold)) == d.m.active().Threshold {
		n.Unsealed = d.result.Opened + time.Duration(d.m.active().Threshold)*n.RoundTrip
	}
	d.result.Nodes = append(d.result.Nodes, n)
}

// obstacle says why a node would get no share, "" where it would.
func (d *drill) obstacle(st NodeStatus) string {
	switch {
	case st.Alarm != nil:
		return st.Alarm.err().Error()
	case st.Err != nil:
		return st.Err.Error()
	case !st.Seal.Initialized:
		return "it is not initialised; it has to join its cluster"
	case st.Seal.Migration:
		return "a migration of its seal is under way; finish that with `vault operator unseal -migrate`"
	case d.m == nil:
		return ""
	}
	if _, sentence := d.m.fits(st.Seal); sentence != "" {
		return sentence + "; find out what is at that address, or rekey"
	}
	return ""
}

// roundTrip measures one call over a new connection.
func (d *drill) roundTrip(ctx context.Context, address string) (time.Duration, error) {
	n, err := node.New(node.Config{
		Address: address, TLS: d.c.TLS, Timeout: d.c.NodeTimeout, UserAgent: d.k.userAgent, Transport: d.k.transport,
	})
	if err != nil {
		return 0, err
	}
	defer n.Close()
	began := time.Now()
	_, err = n.Status(ctx)
	return time.Since(began), err
}

// shares says whether the shares would do.
func (d *drill) shares(ctx context.Context, options DrillOptions) {
	active := d.m.active()
	shares := d.m.take(active, active.Threshold)
	if len(shares) < active.Threshold {
		d.problem("The HSM holds %d of the %d shares that are needed: %s would have to give theirs.", len(shares), active.Threshold,
			people(active.Threshold-len(shares)))
		return
	}
	if options.WithoutProof {
		d.result.NotProved = "It was not asked for."
		return
	}
	err := d.k.proveMaterial(ctx, d.c, d.m, options.By)
	switch {
	case err == nil:
		d.result.Proved = true
	case errors.Is(err, ErrWrongShares):
		d.problem("Vault does not take the shares: %v. Whoever rekeyed the cluster has the new ones: import them with --replace.", err)
	default:
		d.result.NotProved = err.Error()
	}
}

// people counts people.
func people(count int) string {
	if count == 1 {
		return "one person"
	}
	return fmt.Sprintf("%d people", count)
}
