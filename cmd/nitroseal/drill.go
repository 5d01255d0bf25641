package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func newDrillCommand(a *app) *cobra.Command {
	var withoutProof bool
	cmd := &cobra.Command{
		Use:   "drill [CLUSTER…]",
		Short: "Prove on running clusters that a restart would be unsealed",
		Long: `Open the envelopes that unsealing the named clusters, or all of the configuration, would need; look whether each node is the one that the shares
would go to, by its certificate and its seal; ask Vault whether it takes them, by a rekey that is begun and cancelled; and say how long a
restart would take: opening the envelopes, and as many calls as the threshold asks for. Nothing is changed, and no share goes to sys/unseal.

The exit code is 1 where a restart would not be unsealed. It is meant for a timer: what fails here would have failed at night.`,
		Example: `  nitroseal drill
  nitroseal drill prod -o json`,
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			view := drillView{Clusters: []drilledView{}}
			return a.eachCluster(cmd.Context(), args, func(ctx context.Context, custodian *cluster.Custodian, c *cluster.Cluster) (int, error) {
				result, err := custodian.Drill(ctx, c, cluster.DrillOptions{By: by(), WithoutProof: withoutProof})
				shown := newDrilledView(c, &result, err)
				view.Clusters = append(view.Clusters, shown)
				return len(shown.Problems), err
			}, func() error { return a.print(view, view.rows) })
		},
	}
	cmd.Flags().BoolVar(&withoutProof, "without-proof", false, "do not ask Vault whether it takes the keys")
	return cmd
}

// drillView is a drill as JSON.
type drillView struct {
	Clusters []drilledView `json:"clusters"`
}

type drilledView struct {
	Cluster   string        `json:"cluster"`
	Kind      string        `json:"kind"`
	Ready     bool          `json:"ready"` // every node would be unsealed
	Items     int           `json:"items"` // that were opened
	OpenedMS  float64       `json:"opened_ms"`
	Proved    bool          `json:"proved"`
	NotProved string        `json:"not_proved"` // why Vault could not be asked
	Nodes     []drilledNode `json:"nodes"`
	Problems  []string      `json:"problems"`
}

type drilledNode struct {
	answeredNode

	RoundTripMS float64 `json:"round_trip_ms"`
	UnsealedMS  float64 `json:"unsealed_ms"` // after it was found sealed; 0 where it would not be
	Problem     string  `json:"problem"`
}

func newDrilledView(c *cluster.Cluster, result *cluster.DrillResult, err error) drilledView {
	view := drilledView{
		Cluster: c.Name, Kind: string(result.Kind), Ready: result.Ready, Items: result.Items, OpenedMS: milliseconds(result.Opened),
		Proved: result.Proved, NotProved: result.NotProved, Nodes: []drilledNode{}, Problems: list(result.Problems),
	}
	if err != nil {
		view.Problems = append(view.Problems, err.Error())
	}
	for i := range result.Nodes {
		n := &result.Nodes[i]
		view.Nodes = append(view.Nodes, drilledNode{newAnsweredNode(&n.NodeStatus), milliseconds(n.RoundTrip), milliseconds(n.Unsealed), n.Problem})
	}
	return view
}

func (v *drillView) rows(t *table) {
	for i := range v.Clusters {
		c := &v.Clusters[i]
		outcome := "a restart would be unsealed"
		if !c.Ready {
			outcome = "A RESTART WOULD NOT BE UNSEALED"
		} else if c.Kind == string(cluster.KindRecovery) {
			outcome = "it unseals itself, and its recovery keys open"
		}
		t.row("cluster "+c.Cluster, outcome)
		if c.Items > 0 {
			t.row("  keys", fmt.Sprintf("%s opened in %s", count(c.Items, "envelope"), span(c.OpenedMS)))
		}
		for i := range c.Nodes {
			n := &c.Nodes[i]
			switch {
			case n.Problem != "":
				t.row("  node "+n.Node, "would stay sealed")
			case n.UnsealedMS > 0:
				t.row("  node "+n.Node, fmt.Sprintf("unsealed in %s, of which %s is one call", span(n.UnsealedMS), span(n.RoundTripMS)))
			default:
				t.row("  node "+n.Node, "answers in "+span(n.RoundTripMS))
			}
		}
		switch {
		case c.Proved:
			t.row("  Vault", "takes the keys")
		case c.NotProved != "":
			t.row("  Vault", "was not asked whether it takes the keys: "+strings.TrimSuffix(c.NotProved, "."))
		}
		for _, problem := range c.Problems {
			t.row("  PROBLEM", problem)
		}
	}
}

// span is a time as people read it.
func span(ms float64) string {
	d := time.Duration(ms * float64(time.Millisecond))
	if d < 10*time.Millisecond {
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Millisecond).String()
}
