package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

func newStatusCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status [CLUSTER…]",
		Short: "Show how clusters are, and how well their keys are kept",
		Long: `Ask every node of the named clusters, or of all of the configuration, how it is, and look up how the cluster's keys are kept: which
generation, sealed with which version of which wrapping key, and how many HSMs open it. No HSM is asked, and nothing is changed.

Where the configuration has a block serve, and no cluster is named, the seal server of this machine is asked as well: what it serves, and for
how many Vaults that suffices ("nitroseal serve status").

The exit code is that of a health check: 0 where every node is unsealed and the keys are in order, 1 where a node is sealed or not
initialised, none is active, or something is wrong with the keys, 3 where nothing is wrong but a node, a store or the seal server does not answer. What was found is
printed in either case.`,
		Example: `  nitroseal status
  nitroseal status prod -o json`,
		ValidArgsFunction: a.completeClusters,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			view := clustersView{Clusters: []clusterView{}}
			var verdicts []verdict
			c, err := a.config()
			if err != nil {
				return err
			}
			serves := c.Serve != nil && len(args) == 0
			if !serves || len(c.Clusters) > 0 {
				if view.Clusters, verdicts, err = a.statusOfClusters(ctx, args); err != nil {
					return err
				}
			}
			if serves {
				view.SealServer = a.sealServer(ctx)
				verdicts = append(verdicts, view.SealServer.judge())
			}
			if err := ctx.Err(); errors.Is(err, context.Canceled) {
				return err
			}
			return errors.Join(a.print(view, view.rows), verdictOf(verdicts))
		},
	}
}

// statusOfClusters asks all at one time.
func (a *app) statusOfClusters(ctx context.Context, wanted []string) ([]clusterView, []verdict, error) {
	clusters, err := a.clusters(wanted)
	if err != nil {
		return nil, nil, err
	}
	custodian, err := a.custodian()
	if err != nil {
		return nil, nil, err
	}
	views, verdicts := make([]clusterView, len(clusters)), make([]verdict, len(clusters))
	var asked sync.WaitGroup
	for i, c := range clusters {
		asked.Go(func() {
			status, err := custodian.Status(ctx, c)
			views[i], verdicts[i] = newClusterView(c, &status, err), judge(c, &status, err)
		})
	}
	asked.Wait()
	return views, verdicts, nil
}

// verdict is what a health check makes of a cluster: sentences about what is wrong and about what does not answer.
type verdict struct{ wrong, silent []string }

// errSilent: a node or a store does not answer, and nothing is known to be wrong.
var errSilent = errors.New("without an answer")

func verdictOf(all []verdict) error {
	var wrong, silent []string
	for _, v := range all {
		wrong, silent = append(wrong, v.wrong...), append(silent, v.silent...)
	}
	switch {
	case wrong != nil:
		return errors.New(strings.Join(append(wrong, silent...), "\n  "))
	case silent != nil:
		return fmt.Errorf("%w: %s", errSilent, strings.Join(silent, "\n  "))
	}
	return nil
}

// judge says what is wrong with a cluster.
func judge(c *cluster.Cluster, s *cluster.Status, err error) verdict {
	var v verdict
	add := func(format string, args ...any) {
		v.wrong = append(v.wrong, fmt.Sprintf("cluster %q: ", c.Name)+fmt.Sprintf(format, args...))
	}
	blame := func(err error) { // it names the cluster, or the node
		text := err.Error()
		if !strings.Contains(text, strconv.Quote(c.Name)) {
			text = fmt.Sprintf("cluster %q: %s", c.Name, text)
		}
		if unanswered(err) {
			v.silent = append(v.silent, text)
		} else {
			v.wrong = append(v.wrong, text)
		}
	}
	if err != nil {
		blame(err)
	}
	for i := range s.Nodes {
		n := &s.Nodes[i]
		switch {
		case n.Err != nil:
			blame(n.Err)
		case !n.Seal.Initialized:
			add("node %s is not initialised%s", n.Address, newbornAdvice(c, s))
		case n.Seal.Sealed:
			add("node %s is sealed", n.Address)
		}
		if n.Alarm != nil {
			add("ALARM: node %s took the shares and belongs to another cluster (%s, not %s); nitroseal rekey %s now, find out what is there, then: nitroseal "+
				"unseal %s --clear-alarm %s", n.Address, n.Alarm.Seen, n.Alarm.Recorded, c.Name, c.Name, n.Address)
		}
	}
	if leaderless(s) {
		add("its nodes are unsealed and no node is active, so it serves nobody: it is choosing one just now, or too many nodes are away")
	}
	away := false // the store, which is told of once
	for i := range s.Material {
		m := &s.Material[i]
		switch {
		case storeAway(m) && away:
		case storeAway(m):
			away = true
			v.silent = append(v.silent, fmt.Sprintf("cluster %q: store %q does not answer: %v", c.Name, c.Store, m.Err))
		case missing(m) && !initialized(s): // which is told of the nodes
		case missing(m):
			add("it is initialised and %q is not in custody; nitroseal import takes its keys over", m.Item)
		case m.Err != nil:
			blame(m.Err)
		case m.State == custody.StateStale, m.State == custody.StateVanished: // ahead: another machine wrote it, as it may
			add("material %q is %s; nitroseal material show %s %s", m.Item, m.State, c.Name, m.Item)
		}
		if m.Err == nil && m.Version > m.LatestVersion {
			add("%q is sealed with version %d of wrapping key %q, which this machine does not have, so it opens nothing; bring the key's newest record here: "+
				"nitroseal key restore %s", m.Item, m.Version, m.Key, m.Key)
		}
	}
	if s.Held != nil {
		add("held on the local disk, since the store did not take it: %s; nitroseal unseal %s stores it", strings.Join(s.Held, ", "), c.Name)
	}
	return v
}

// missing tells whether an item that should be there is not.
func missing(m *cluster.MaterialStatus) bool { return errors.Is(m.Err, custody.ErrNotFound) }

// storeAway tells whether an item is not known because its store does not answer.
func storeAway(m *cluster.MaterialStatus) bool {
	return errors.Is(m.Err, store.ErrUnavailable) && !errors.Is(m.Err, store.ErrDenied)
}

// newbornAdvice says what to do about a node that is not initialised.
func newbornAdvice(c *cluster.Cluster, s *cluster.Status) string {
	switch {
	case initialized(s):
		return "; nitroseal unseal " + c.Name + " joins it"
	case slices.ContainsFunc(s.Material, func(m cluster.MaterialStatus) bool { return m.Err == nil }):
		return fmt.Sprintf(", and its keys are in custody: was it wiped? nitroseal init %s says what there is to do", c.Name)
	case slices.ContainsFunc(s.Material, func(m cluster.MaterialStatus) bool { return !missing(&m) }):
		return "" // nobody knows whether there are keys
	}
	return "; nitroseal init " + c.Name
}

// initialized tells whether a node says that the cluster is.
func initialized(s *cluster.Status) bool {
	return slices.ContainsFunc(s.Nodes, func(n cluster.NodeStatus) bool { return n.Err == nil && n.Seal.Initialized })
}

// leaderless tells whether no node is active although some are unsealed, as far as they tell. A standby knows an active one, which
// may not be in the configuration.
func leaderless(s *cluster.Status) bool {
	none := false
	for i := range s.Nodes {
		switch s.Nodes[i].Role {
		case node.RoleActive, node.RoleStandby:
			return false
		case node.RoleNone:
			none = true
		}
	}
	return none
}

// unanswered tells whether an error says no more than that somebody does not answer.
func unanswered(err error) bool {
	return exitCode(err) == exitUnavailable && !errors.Is(err, node.ErrIdentity) && !errors.Is(err, store.ErrDenied)
}

// clustersView is the status of clusters as JSON.
type clustersView struct {
	Clusters   []clusterView   `json:"clusters"`
	SealServer *sealServerView `json:"seal_server"` // null where none is configured, or clusters were named
}

// clusterView is the status of one.
type clusterView struct {
	Cluster  string            `json:"cluster"`
	Checked  string            `json:"checked"`
	Healthy  bool              `json:"healthy"`
	Nodes    []clusterNodeView `json:"nodes"`
	Material []materialOfView  `json:"material"`
	Spread   string            `json:"spread"` // "2 of office, bunker, bank"; empty where each envelope has all shares
	Held     []string          `json:"held"`   // items that the store has not taken yet
	Intent   *intentView       `json:"intent"` // an initialisation under way, or cut short
	Warnings []string          `json:"warnings"`
	Error    string            `json:"error"`
}

// clusterNodeView is a node.
type clusterNodeView struct {
	Address     string     `json:"address"`
	Reachable   bool       `json:"reachable"`
	Error       string     `json:"error"`
	Initialized bool       `json:"initialized"`
	Sealed      bool       `json:"sealed"`
	Role        string     `json:"role"` // active or standby; empty where it is sealed
	Leader      string     `json:"leader"`
	Version     string     `json:"version"`
	SealType    string     `json:"seal_type"`
	Shares      int        `json:"shares"`
	Threshold   int        `json:"threshold"`
	Progress    int        `json:"progress"`
	StorageType string     `json:"storage_type"`
	ClusterID   string     `json:"cluster_id"`
	Alarm       *alarmView `json:"alarm"`
	TookMS      float64    `json:"took_ms"`
}

// alarmView: the node took shares and belongs to another cluster.
type alarmView struct {
	At       string `json:"at"`
	Recorded string `json:"recorded_cluster_id"`
	Seen     string `json:"seen_cluster_id"`
}

// intentView is who is initialising.
type intentView struct {
	Host string `json:"host"`
	By   string `json:"by"`
	Node string `json:"node"`
	At   string `json:"at"`
}

// materialOfView is an item of a cluster.
type materialOfView struct {
	Item          string   `json:"item"`
	State         string   `json:"state"`
	Store         string   `json:"store"`
	Key           string   `json:"key"`
	KeyVersion    int      `json:"key_version"`
	LatestVersion int      `json:"latest_key_version"`
	Generation    uint64   `json:"generation"`
	Expected      uint64   `json:"expected_generation"`
	HSMs          int      `json:"hsms"`
	Updated       string   `json:"updated"`
	Warnings      []string `json:"warnings"`
	Missing       bool     `json:"missing"` // it should be there and is not
	Error         string   `json:"error"`

	away bool // the store does not answer
}

func materialOf(s *cluster.Status) []materialOfView {
	shown := []materialOfView{}
	for i := range s.Material {
		m := &s.Material[i]
		shown = append(shown, materialOfView{
			Item: m.Item, State: string(m.State), Store: m.Store, Key: m.Key, KeyVersion: m.Version, LatestVersion: m.LatestVersion,
			Generation: m.Generation, Expected: m.Expected, HSMs: m.HSMs, Updated: stamp(m.Updated), Warnings: list(m.Warnings), Missing: missing(m), Error: text(m.Err),
			away: storeAway(m),
		})
	}
	return shown
}

// sentence says how an item is kept.
func (m *materialOfView) sentence() string {
	switch {
	case m.Missing:
		return "none in custody"
	case m.Error != "":
		return "NOT KNOWN: " + m.Error
	}
	text := fmt.Sprintf("generation %s, key %s, opens on %s, store %s", generationOf(m.Generation, m.Expected), versionOf(m.Key, m.KeyVersion, m.LatestVersion),
		countHSMs(m.HSMs), m.Store)
	if m.State != "" && m.State != string(custody.StateCurrent) {
		text += ", " + m.State
	}
	return text
}

func newClusterView(c *cluster.Cluster, s *cluster.Status, err error) clusterView {
	v := judge(c, s, err)
	view := clusterView{
		Cluster: c.Name, Checked: stamp(s.At), Healthy: v.wrong == nil && v.silent == nil, Nodes: []clusterNodeView{}, Material: materialOf(s),
		Spread: s.Spread, Held: list(s.Held), Warnings: list(s.Warnings), Error: text(err),
	}
	for i := range s.Nodes {
		n := &s.Nodes[i]
		shown := clusterNodeView{
			Address: n.Address, Reachable: n.Err == nil, Error: text(n.Err), Initialized: n.Seal.Initialized, Sealed: n.Seal.Sealed,
			Role: string(n.Role), Leader: n.Leader, Version: n.Seal.Version, SealType: n.Seal.Type, Shares: n.Seal.N, Threshold: n.Seal.T,
			Progress: n.Seal.Progress, StorageType: n.Seal.StorageType, ClusterID: n.Seal.ClusterID, TookMS: milliseconds(n.Took),
		}
		if n.Alarm != nil {
			shown.Alarm = &alarmView{At: stamp(n.Alarm.At), Recorded: n.Alarm.Recorded, Seen: n.Alarm.Seen}
		}
		view.Nodes = append(view.Nodes, shown)
	}
	if s.Intent != nil {
		view.Intent = &intentView{Host: s.Intent.Host, By: s.Intent.By, Node: s.Intent.Node, At: stamp(s.Intent.At)}
	}
	return view
}

func (v *clustersView) rows(t *table) {
	if len(v.Clusters) > 0 {
		v.nodeRows(t)
	}
	for i := range v.Clusters {
		t.row("")
		v.Clusters[i].rows(t)
	}
	if v.SealServer != nil {
		if len(v.Clusters) > 0 {
			t.row("")
		}
		v.SealServer.rows(t)
	}
}

func (v *clustersView) nodeRows(t *table) {
	t.row("CLUSTER", "NODE", "REACHABLE", "INITIALISED", "SEALED", "ROLE", "VERSION")
	for i := range v.Clusters {
		for j := range v.Clusters[i].Nodes {
			n := &v.Clusters[i].Nodes[j]
			if !n.Reachable {
				t.row(v.Clusters[i].Cluster, n.Address, "NO", "-", "-", "-", "-")
				continue
			}
			sealed := "no"
			if n.Sealed {
				sealed = "SEALED"
			}
			t.row(v.Clusters[i].Cluster, n.Address, "yes", yes(n.Initialized), sealed, cmp.Or(n.Role, "-"), n.Version)
		}
	}
}

func yes(is bool) string {
	if is {
		return "yes"
	}
	return "NO"
}

// rows tells what a cluster's keys are like.
func (v *clusterView) rows(t *table) {
	t.row("cluster " + v.Cluster)
	away := false
	for i := range v.Material {
		sentence := v.Material[i].sentence()
		if v.Material[i].away {
			if away {
				sentence = "NOT KNOWN either"
			}
			away = true
		}
		t.row("  "+v.Material[i].Item, sentence)
	}
	if v.Spread != "" {
		t.row("  opens with", v.Spread)
	}
	for _, held := range v.Held {
		t.row("  held", held+" lies on the local disk, sealed: the store did not take it yet")
	}
	if v.Intent != nil {
		t.row("  initialisation", fmt.Sprintf("begun on %s by %s at %s, for node %s", v.Intent.Host, v.Intent.By, v.Intent.At, v.Intent.Node))
	}
	for i := range v.Nodes {
		if v.Nodes[i].Alarm != nil {
			t.row("  ALARM", fmt.Sprintf("node %s took the shares at %s and belongs to another cluster, %s; rekey now", v.Nodes[i].Address,
				v.Nodes[i].Alarm.At, v.Nodes[i].Alarm.Seen))
		}
	}
	for _, warning := range v.Warnings {
		t.row("  warning", warning)
	}
	t.field("  error", v.Error)
}
