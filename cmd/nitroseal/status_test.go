package main

import (
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
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
