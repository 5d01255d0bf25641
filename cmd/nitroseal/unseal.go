package main

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/daemon"
)

func newUnsealCommand(a *app) *cobra.Command {
	var alarm string
	cmd := &cobra.Command{
		Use:   "unseal [CLUSTER…]",
		Short: "Unseal every node of clusters that is sealed, and end",
		Long: `Unseal every node that is sealed, of the named clusters or of all of the configuration, and wait until all are unsealed. Nodes that
are not joined to their cluster yet are joined, and what an earlier run left unfinished is finished. The shares of a cluster are opened
once for all its nodes, with one operation in one HSM, and only where a node is sealed.

It ends when all nodes are unsealed, when only a person can help the rest, or when --timeout is up (1m): then with exit code 3. It is
made for cron, init containers and by hand; "nitroseal run" is the one that stays. --once says so in a unit file, and changes nothing.

A node that took shares and then showed another cluster's id gets no more of them until the alarm is cleared: rekey, find out what is at
that address, and give --clear-alarm with it.`,
		Example: `  nitroseal unseal
  nitroseal unseal prod --once --timeout 10m     in an init container
  nitroseal unseal prod --clear-alarm https://vault-2.example.org:8200`,
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			a.steps = isTerminal(a.stderr)
			ctx := cmd.Context()
			if alarm != "" {
				if err := a.clearAlarm(ctx, args, alarm); err != nil {
					return err
				}
			}
			site, err := a.site(ctx, args)
			if err != nil {
				return err
			}
			wait := ordinaryTimeout
			if a.timeout > 0 {
				wait = a.timeout
			}
			report, err := daemon.Once(ctx, site, daemon.OnceOptions{Wait: wait, Logger: a.logger()})
			view := newUnsealView(&report)
			printing := a.print(view, view.rows)
			return errors.Join(err, printing)
		},
	}
	cmd.Flags().Bool("once", true, "end when it is done; it always does")
	cmd.Flags().StringVar(&alarm, "clear-alarm", "", "let the node of this address have shares again, although it belonged to another cluster")
	return cmd
}

// clearAlarm takes an alarm back, at the word of a person.
func (a *app) clearAlarm(ctx context.Context, clusters []string, address string) error {
	if len(clusters) != 1 {
		return usage("--clear-alarm is about a node of one cluster; name that cluster, and no other")
	}
	c, err := a.cluster(clusters[0])
	if err != nil {
		return err
	}
	if !slices.Contains(c.Nodes, address) {
		return usage("--clear-alarm: %s is none of the nodes of cluster %q, which are %s", address, c.Name, strings.Join(c.Nodes, ", "))
	}
	custodian, err := a.custodian()
	if err != nil {
		return err
	}
	return a.act(ctx, audit.Act{Verb: "clear alarm", Cluster: c.Name, Node: address}, func() error {
		return custodian.ClearAlarm(ctx, c, address)
	})
}

// unsealView is what unsealing found and did, as JSON.
type unsealView struct {
	Nodes []unsealedView `json:"nodes"`
}

// unsealedView is one node.
type unsealedView struct {
	Cluster     string `json:"cluster"`
	Address     string `json:"address"`
	Reachable   bool   `json:"reachable"`
	Initialized bool   `json:"initialized"`
	Sealed      bool   `json:"sealed"`
	Unsealed    bool   `json:"unsealed"` // by this run
	Version     string `json:"version"`
	Error       string `json:"error"`
}

func newUnsealView(report *daemon.Report) *unsealView {
	view := &unsealView{Nodes: []unsealedView{}}
	for i := range report.Nodes {
		n := &report.Nodes[i]
		view.Nodes = append(view.Nodes, unsealedView{
			Cluster: n.Cluster, Address: n.Address, Reachable: n.Reachable, Initialized: n.State.Initialized, Sealed: n.State.Sealed,
			Unsealed: n.Unsealed, Version: n.State.Version, Error: text(n.Err),
		})
	}
	return view
}

func (v *unsealView) rows(t *table) {
	t.row("CLUSTER", "NODE", "OUTCOME")
	for i := range v.Nodes {
		t.row(v.Nodes[i].Cluster, v.Nodes[i].Address, v.Nodes[i].outcome())
	}
}

func (v *unsealedView) outcome() string {
	switch {
	case v.Error != "" && !v.Reachable:
		return "NO ANSWER"
	case v.Error != "" && !v.Initialized:
		return "NOT INITIALISED"
	case v.Error != "":
		return "SEALED"
	case v.Unsealed:
		return "unsealed now"
	default:
		return "was unsealed"
	}
}
