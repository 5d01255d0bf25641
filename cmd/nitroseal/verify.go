package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// openTimeout is how long opening everything of some clusters may take: a card needs most of a second for each envelope.
const openTimeout = 10 * time.Minute

// errProblems: a check found something. It was printed.
var errProblems = errors.New("problems were found")

func newVerifyCommand(a *app) *cobra.Command {
	var prove bool
	cmd := &cobra.Command{
		Use:   "verify [CLUSTER…]",
		Short: "Open everything that is kept of clusters, and compare it with them",
		Long: `Open all envelopes of the named clusters, or of all of the configuration, compare what is in them with the nodes and with the
configuration, and list every problem. Nothing is changed, and each envelope costs one operation in an HSM.

What Vault tells of its keys are their numbers. With --prove it is also asked whether it takes them: a rekey is begun with them, which
changes nothing before its new keys are verified, and cancelled. The exit code is 1 where there is a problem.`,
		Example: `  nitroseal verify
  nitroseal verify prod --prove -o json`,
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			view := verifyView{Clusters: []verifiedView{}}
			return a.eachCluster(cmd.Context(), args, func(ctx context.Context, custodian *cluster.Custodian, c *cluster.Cluster) (int, error) {
				result, err := custodian.Verify(ctx, c, cluster.VerifyOptions{By: by(), Prove: prove})
				shown := newVerifiedView(c, &result, err)
				view.Clusters = append(view.Clusters, shown)
				return len(shown.Problems), err
			}, func() error { return a.print(view, view.rows) })
		},
	}
	cmd.Flags().BoolVar(&prove, "prove", false, "ask Vault whether it takes the keys")
	return cmd
}

// eachCluster does something with each of the named clusters, or all, prints what came of it, and fails where there were
// problems or errors.
func (a *app) eachCluster(ctx context.Context, args []string, do func(context.Context, *cluster.Custodian, *cluster.Cluster) (problems int, err error), show func() error) error {
	clusters, err := a.clusters(args)
	if err != nil {
		return err
	}
	custodian, err := a.custodian()
	if err != nil {
		return err
	}
	ctx, cancel := a.within(ctx, openTimeout)
	defer cancel()
	all := 0
	var errs []error
	for _, c := range clusters {
		problems, err := do(ctx, custodian, c)
		all += problems
		errs = append(errs, err)
		if errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		}
	}
	errs = append(errs, show())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if all > 0 {
		return fmt.Errorf("%w: %d", errProblems, all)
	}
	return nil
}

// verifyView is a verification as JSON.
type verifyView struct {
	Clusters []verifiedView `json:"clusters"`
}

type verifiedView struct {
	Cluster  string         `json:"cluster"`
	Kind     string         `json:"kind"` // unseal or recovery; empty where nothing is kept
	Items    []openedItem   `json:"items"`
	Sets     []setView      `json:"sets"`
	Nodes    []answeredNode `json:"nodes"`
	Proved   bool           `json:"proved"`
	Problems []string       `json:"problems"`
	Warnings []string       `json:"warnings"`
}

type openedItem struct {
	Item       string  `json:"item"`
	Generation uint64  `json:"generation"`
	Key        string  `json:"key"`
	Version    int     `json:"version"`
	HSMs       int     `json:"hsms"`
	TookMS     float64 `json:"took_ms"`
	Error      string  `json:"error"`
}

type setView struct {
	State     string `json:"state"`
	Shares    int    `json:"shares"`
	Threshold int    `json:"threshold"`
	Held      int    `json:"held"` // in custody; people have the others
	Made      string `json:"made"`
}

type answeredNode struct {
	Node      string `json:"node"`
	Sealed    bool   `json:"sealed"`
	Shares    int    `json:"shares"`
	Threshold int    `json:"threshold"`
	Version   string `json:"version"`
	Error     string `json:"error"`
}

func newVerifiedView(c *cluster.Cluster, result *cluster.VerifyResult, err error) verifiedView {
	view := verifiedView{
		Cluster: c.Name, Kind: string(result.Kind), Items: []openedItem{}, Sets: []setView{}, Nodes: []answeredNode{}, Proved: result.Proved,
		Problems: list(result.Problems), Warnings: list(result.Warnings),
	}
	if err != nil {
		view.Problems = append(view.Problems, err.Error())
	}
	for i := range result.Items {
		item := &result.Items[i]
		view.Items = append(view.Items, openedItem{
			Item: item.Item, Generation: item.Generation, Key: item.Key, Version: item.Version, HSMs: item.HSMs, TookMS: milliseconds(item.Took),
			Error: text(item.Err),
		})
	}
	for i := range result.Sets {
		set := &result.Sets[i]
		view.Sets = append(view.Sets, setView{
			State: string(set.State), Shares: set.Shares, Threshold: set.Threshold, Held: len(set.Indices), Made: stamp(set.Made),
		})
	}
	for i := range result.Nodes {
		view.Nodes = append(view.Nodes, newAnsweredNode(&result.Nodes[i]))
	}
	return view
}

func newAnsweredNode(n *cluster.NodeStatus) answeredNode {
	return answeredNode{
		Node: n.Address, Sealed: n.Seal.Sealed, Shares: n.Seal.N, Threshold: n.Seal.T, Version: n.Seal.Version, Error: text(n.Err),
	}
}

func (v *verifyView) rows(t *table) {
	for i := range v.Clusters {
		c := &v.Clusters[i]
		outcome := "all is well"
		if len(c.Problems) > 0 {
			outcome = strings.ToUpper(count(len(c.Problems), "problem"))
		}
		t.row("cluster "+c.Cluster, outcome)
		for _, item := range c.Items {
			sentence := fmt.Sprintf("opens, generation %d, key %s version %d, in %.0f ms", item.Generation, item.Key, item.Version, item.TookMS)
			if item.Error != "" {
				sentence = "DOES NOT OPEN"
			}
			t.row("  "+item.Item, sentence)
		}
		for _, set := range c.Sets {
			t.row("  "+set.State+" "+c.Kind+" keys", fmt.Sprintf("%s, of which %d are needed and %d in custody, made %s", count(set.Shares, "share"),
				set.Threshold, set.Held, set.Made))
		}
		for _, n := range c.Nodes {
			t.row("  node "+n.Node, n.sentence())
		}
		if c.Proved {
			t.row("  Vault", "takes the keys")
		}
		for _, problem := range c.Problems {
			t.row("  PROBLEM", problem)
		}
		for _, warning := range c.Warnings {
			t.row("  warning", warning)
		}
	}
}

func (n *answeredNode) sentence() string {
	switch {
	case n.Error != "":
		return "NO ANSWER"
	case n.Sealed:
		return "SEALED"
	}
	return fmt.Sprintf("unsealed, %s, of which %d are needed", count(n.Shares, "share"), n.Threshold)
}
