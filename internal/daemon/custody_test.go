package daemon

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

var someday = time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)

// fakeVerbs note what is asked of them.
type fakeVerbs struct {
	asked []string
	alarm *cluster.Alarm
	fail  map[string]error // by address, of TendAll
}

func (v *fakeVerbs) Look(_ context.Context, c *cluster.Cluster, address string) (cluster.NodeStatus, error) {
	v.asked = append(v.asked, "look "+c.Name+" "+address)
	return cluster.NodeStatus{Address: address, Alarm: v.alarm, Seal: node.Status{Initialized: true, Sealed: true, Version: "1.21.0", CertificateEnds: someday}}, v.fail[address]
}

func (v *fakeVerbs) Tend(_ context.Context, c *cluster.Cluster, address string) (cluster.Outcome, error) {
	v.asked = append(v.asked, "tend "+strings.Join(c.Nodes, ",")+" "+address)
	return cluster.Outcome{Action: cluster.ActionUnsealed, Node: cluster.NodeStatus{Seal: node.Status{Initialized: true}}}, nil
}

func (v *fakeVerbs) TendAll(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
	v.asked = append(v.asked, "all "+strings.Join(c.Nodes, ","))
	var all []cluster.NodeOutcome
	for _, address := range c.Nodes {
		all = append(all, cluster.NodeOutcome{Address: address, Err: v.fail[address], Outcome: cluster.Outcome{Note: "waits"}})
	}
	return all
}

func (v *fakeVerbs) Status(context.Context, *cluster.Cluster) (cluster.Status, error) {
	return cluster.Status{Material: []cluster.MaterialStatus{
		{Item: "unseal.office", Metadata: custody.Metadata{Generation: 3}}, {Item: "unseal.bank", Metadata: custody.Metadata{Generation: 4}, Err: v.fail["store"]},
	}}, nil
}

func TestOnlyTheNodesThatWantItAreTended(t *testing.T) {
	v := &fakeVerbs{fail: map[string]error{}}
	prod := &cluster.Cluster{Name: "prod", Nodes: []string{"a", "b", "c"}}
	c := Custody(v, []*cluster.Cluster{{Name: "other"}, prod})
	if got := Watched([]*cluster.Cluster{prod}); len(got) != 1 || got[0].Name != "prod" || len(got[0].Nodes) != 3 {
		t.Errorf("watched: %+v", got)
	}
	tests := map[string]struct {
		addresses string
		fail      map[string]error
		want      string
	}{
		"one node goes by itself": {"b", nil, "tend a,b,c b"},
		"two share an opening":    {"a c", nil, "all a,c"},
		"all are all":             {"a b c", nil, "all a,b,c"},
		"who has nobody to join among them is tried alone": {"a c", map[string]error{"c": cluster.ErrNotInitialized}, "all a,c; tend a,b,c c"},
		"a cluster that is not initialised is tried once":  {"a b c", map[string]error{"a": cluster.ErrNotInitialized}, "all a,b,c"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			v.asked, v.fail = nil, test.fail
			results := c.Tend(t.Context(), "prod", strings.Fields(test.addresses))
			if got := strings.Join(v.asked, "; "); got != test.want {
				t.Errorf("asked %q, want %q", got, test.want)
			}
			for i, address := range strings.Fields(test.addresses) {
				if results[i].Address != address {
					t.Errorf("result %d is of %s", i, results[i].Address)
				}
			}
			if strings.Join(prod.Nodes, "") != "abc" {
				t.Errorf("the cluster has the nodes %v now", prod.Nodes)
			}
		})
	}
}

func TestWhatTheVerbsSayIsWhatTheDaemonKnows(t *testing.T) {
	v := &fakeVerbs{fail: map[string]error{}}
	c := Custody(v, []*cluster.Cluster{{Name: "prod", Nodes: []string{"a"}}})
	state, err := c.Look(t.Context(), "prod", "a")
	if err != nil || state != (State{Initialized: true, Sealed: true, Version: "1.21.0", CertificateEnds: someday}) {
		t.Errorf("got %+v, %v", state, err)
	}
	v.alarm = &cluster.Alarm{}
	if state, _ := c.Look(t.Context(), "prod", "a"); state.Alarm != AlarmForeignCluster {
		t.Errorf("with an alarm: %+v", state)
	}
	v.fail["a"] = errAway
	if _, err := c.Look(t.Context(), "prod", "a"); !errors.Is(err, errAway) {
		t.Errorf("got %v", err)
	}
	if got, err := c.Generation(t.Context(), "prod"); err != nil || got != "unseal.office 3, unseal.bank 4" {
		t.Errorf("got %q, %v", got, err)
	}
	v.fail["store"] = store.ErrUnavailable
	if _, err := c.Generation(t.Context(), "prod"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	for _, err := range []error{
		func() error { _, err := c.Look(t.Context(), "x", "a"); return err }(),
		func() error { _, err := c.Generation(t.Context(), "x"); return err }(),
	} {
		if !errors.Is(err, ErrConfig) {
			t.Errorf("of a cluster that is not there: %v", err)
		}
	}
}
