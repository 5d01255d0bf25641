package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/server"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// A health check that says that all is well, and is not believed at 3 a.m., is worse than none.
func TestTheVerdictOfAStatus(t *testing.T) {
	open := func(roles ...node.Role) (nodes []cluster.NodeStatus) {
		for _, role := range roles {
			nodes = append(nodes, cluster.NodeStatus{Address: "https://vault", Role: role, Seal: node.Status{Initialized: true}})
		}
		return nodes
	}
	kept := func(version, latest int) []cluster.MaterialStatus {
		return []cluster.MaterialStatus{{Item: "unseal", Metadata: custody.Metadata{
			State: custody.StateCurrent, Key: "office", Version: version, LatestVersion: latest, Generation: 1, HSMs: 1,
		}}}
	}
	of := func(state custody.State) []cluster.MaterialStatus {
		items := kept(1, 1)
		items[0].State = state
		return items
	}
	none := []cluster.MaterialStatus{{Item: "unseal", Err: custody.ErrNotFound}}
	for name, test := range map[string]struct {
		nodes    []cluster.NodeStatus
		material []cluster.MaterialStatus
		wrong    []string // in the one sentence; nil where all is well
	}{
		"an active node and standbys":                {open(node.RoleActive, node.RoleStandby), kept(1, 1), nil},
		"the active node is not in the file":         {open(node.RoleStandby, node.RoleNone), kept(1, 1), nil},
		"no node told its role":                      {open("", ""), kept(1, 1), nil},
		"all nodes are unsealed and none is active":  {open(node.RoleNone, node.RoleNone, ""), kept(1, 1), []string{"no node is active"}},
		"an older version of the wrapping key":       {open(node.RoleActive), kept(1, 2), nil},
		"another machine has written the keys since": {open(node.RoleActive), of(custody.StateAhead), nil},
		"an older state of the keys lies there":      {open(node.RoleActive), of(custody.StateStale), []string{"stale"}},
		"a new cluster":                              {[]cluster.NodeStatus{{Address: "https://vault"}}, none, []string{"is not initialised; nitroseal init prod"}},
		"a node of a cluster that is there": {
			append(open(node.RoleActive), cluster.NodeStatus{Address: "https://new"}), kept(1, 1),
			[]string{"https://new is not initialised; nitroseal unseal prod"},
		},
		"all nodes were wiped":                       {[]cluster.NodeStatus{{Address: "https://vault"}}, kept(1, 1), []string{"is not initialised, and its keys are in custody"}},
		"this machine does not have the key":         {open(node.RoleActive), kept(1, 0), []string{`"office"`, "nitroseal key restore office"}},
		"this machine has an older state of the key": {open(node.RoleActive), kept(3, 2), []string{`"office"`, "version 3", "here: nitroseal key restore office"}},
	} {
		t.Run(name, func(t *testing.T) {
			v := judge(&cluster.Cluster{Name: "prod", Key: "office"}, &cluster.Status{Nodes: test.nodes, Material: test.material}, nil)
			if len(v.silent) > 0 || len(v.wrong) != min(1, len(test.wrong)) {
				t.Fatalf("wrong: %q, silent: %q, want %q", v.wrong, v.silent, test.wrong)
			}
			for _, part := range test.wrong {
				if !strings.Contains(v.wrong[0], part) {
					t.Errorf("%q does not say %q", v.wrong[0], part)
				}
			}
		})
	}
}

func TestAStoreThatIsAwayIsToldOfOnce(t *testing.T) {
	away := fmt.Errorf("reading material: store \"etcd\": %w: no connection", store.ErrUnavailable)
	s := &cluster.Status{
		Nodes: []cluster.NodeStatus{{Address: "https://vault", Role: node.RoleActive, Seal: node.Status{Initialized: true}}},
		Material: []cluster.MaterialStatus{
			{Item: "unseal.a", Err: fmt.Errorf("item unseal.a: %w", away)}, {Item: "unseal.b", Err: fmt.Errorf("item unseal.b: %w", away)},
		},
	}
	c := &cluster.Cluster{Name: "prod", Key: "office", Store: "etcd"}
	if v := judge(c, s, nil); len(v.wrong) > 0 || len(v.silent) != 1 || !strings.Contains(v.silent[0], `cluster "prod": store "etcd" does not answer`) {
		t.Errorf("wrong: %q, silent: %q", v.wrong, v.silent)
	}
	view := newClusterView(c, s, nil)
	var told strings.Builder
	view.rows(&table{w: &told})
	if n := strings.Count(told.String(), "no connection"); n != 1 {
		t.Errorf("it is told %d times:\n%s", n, told.String())
	}
}

// A seal server that answers no Vault is not well, whatever the reason: a token for a key of another machine, or no token at all.
func TestTheVerdictOfTheSealServer(t *testing.T) {
	good := server.KeyHealth{Name: "prod", Version: 1, Seals: true, Opens: true}
	ill, none := server.KeyHealth{Name: "prod", Version: 1, Seals: true}, server.KeyHealth{Name: "prd"}
	for name, test := range map[string]struct {
		view sealServerView
		want string // in the one sentence; "" where all is well
	}{
		"a key that seals and opens":              {sealServerView{Keys: []server.KeyHealth{good}}, ""},
		"a token for a key that is not there":     {sealServerView{Keys: []server.KeyHealth{good, none}}, ""},
		"a key whose HSM is away":                 {sealServerView{Keys: []server.KeyHealth{ill, none}}, "DOES NOT OPEN"},
		"a configured key that is not there":      {sealServerView{Keys: []server.KeyHealth{none}, named: []string{"prd"}}, "NEITHER SEALS NOR OPENS"},
		"tokens for keys that are not there only": {sealServerView{Keys: []server.KeyHealth{none}}, "no key that is fit for use"},
		"no token": {sealServerView{}, "no key that is fit for use"},
	} {
		t.Run(name, func(t *testing.T) {
			v := test.view.judge()
			if len(v.silent) > 0 || len(v.wrong) != min(1, len(test.want)) || test.want != "" && !strings.Contains(v.wrong[0], test.want) {
				t.Errorf("wrong: %q, silent: %q, want %q", v.wrong, v.silent, test.want)
			}
		})
	}
	if v := (&sealServerView{err: errSilent}).judge(); len(v.wrong) > 0 || len(v.silent) != 1 {
		t.Errorf("a server that does not answer: %+v", v)
	}
}

func TestAServerThatAsksForCertificatesIsAskedWhereItDoesNot(t *testing.T) {
	c := &config.Config{Serve: &config.Serve{Listen: "127.0.0.1:1", TLSCertFile: "none", ClientCertificates: config.CertificatesRequired}}
	if _, _, err := sealHealth(t.Context(), c); !errors.Is(err, errSilent) || !strings.Contains(err.Error(), "set metrics_listen") {
		t.Errorf("without a listener for the metrics: %v", err)
	}
	c.Serve.MetricsListen = "127.0.0.1:1"
	if _, _, err := sealHealth(t.Context(), c); !errors.Is(err, errSilent) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("with one: %v", err)
	}
}
