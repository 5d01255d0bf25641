package doctor

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

func TestClustersAreExamined(t *testing.T) {
	open := node.Status{Initialized: true, CertificateEnds: time.Now().Add(90 * 24 * time.Hour)}
	soon := open
	soon.CertificateEnds = time.Now().Add(time.Hour)
	sealed := node.Status{Initialized: true, Sealed: true}
	kept := custody.Metadata{State: custody.StateCurrent, Key: "office", Version: 1, LatestVersion: 1, Generation: 3}
	ahead := kept
	ahead.Version = 2
	away := fmt.Errorf("store etcd: %w", store.ErrUnavailable)
	for name, test := range map[string]struct {
		node     cluster.NodeStatus
		material []cluster.MaterialStatus
		check    string
		verdict  Verdict
		words    []string
	}{
		"all is well":                  {cluster.NodeStatus{Seal: open}, nil, "node a", OK, nil},
		"a drill says more":            {cluster.NodeStatus{Seal: open}, nil, "drill", Skipped, []string{"nitroseal drill prod"}},
		"a node that is sealed":        {cluster.NodeStatus{Seal: sealed}, nil, "node a", Problem, []string{"nitroseal unseal prod"}},
		"a node that is new":           {cluster.NodeStatus{}, nil, "node a", Warning, []string{"nitroseal init prod"}},
		"a node that is another":       {cluster.NodeStatus{Err: node.ErrIdentity}, nil, "node a", Problem, []string{"ca_cert_file"}},
		"a node that is away":          {cluster.NodeStatus{Err: node.ErrUnavailable}, nil, "node a", Problem, []string{"whether it runs"}},
		"a node that took our shares":  {cluster.NodeStatus{Seal: open, Alarm: &cluster.Alarm{Seen: "id"}}, nil, "node a", Problem, []string{"rekey", "--clear-alarm a"}},
		"a certificate that ends soon": {cluster.NodeStatus{Seal: soon}, nil, "certificate", Warning, []string{"node a", "ends in 0 days"}},
		"keys that are kept": {
			cluster.NodeStatus{Seal: open}, []cluster.MaterialStatus{{Item: "unseal", Metadata: kept}}, "material unseal", OK, nil,
		},
		"keys of a version that is not here": {
			cluster.NodeStatus{Seal: open},
			[]cluster.MaterialStatus{{Item: "unseal", Metadata: ahead}},
			"material unseal", Problem,
			[]string{"nitroseal key restore office"},
		},
		"keys that nobody has": {
			cluster.NodeStatus{Seal: open},
			[]cluster.MaterialStatus{{Item: "unseal", Err: custody.ErrNotFound}},
			"material unseal", Problem,
			[]string{"nitroseal import prod"},
		},
		"a store that is away is told of once": {
			cluster.NodeStatus{Seal: open}, []cluster.MaterialStatus{{Item: "unseal", Err: away}, {Item: "unseal", Err: away}}, "material unseal", Problem, nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			all := new(findings)
			d := &doctor{report: all.add, Patient: Patient{
				Config: &config.Config{Clusters: []config.Cluster{{Name: "prod"}}},
				Cluster: func(context.Context, string) (cluster.Status, error) {
					test.node.Address = "a"
					return cluster.Status{Nodes: []cluster.NodeStatus{test.node}, Material: test.material}, nil
				},
				Audit: func(context.Context) ([]audit.SinkStatus, error) {
					return []audit.SinkStatus{{Name: "file"}, {Name: "journal", Err: errors.New("full")}}, audit.ErrNoSink
				},
			}}
			d.clusters(t.Context())
			all.want(t, test.check, test.verdict, test.words...)
			all.want(t, "sink file", OK)
			all.want(t, "sink journal", Problem, "full")
			all.want(t, "any sink", Problem, "nothing is unsealed")
		})
	}
}
