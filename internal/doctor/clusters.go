package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// clusters examines the clusters in custody: their nodes, where their keys lie, and the log without which nothing is done to them.
// No key is opened: whether they fit is what a drill proves.
func (d *doctor) clusters(ctx context.Context) {
	for _, configured := range d.Config.Clusters {
		if ctx.Err() != nil {
			return
		}
		d.oneCluster(ctx, configured.Name)
	}
	if len(d.Config.Clusters) > 0 {
		d.audit(ctx)
	}
}

func (d *doctor) oneCluster(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	f := d.about("cluster %q", name)
	status, err := d.Cluster(ctx, name)
	if err != nil {
		f.problem("configuration", "the error says what to write", "%v", err)
		return
	}
	initialized := slices.ContainsFunc(status.Nodes, func(n cluster.NodeStatus) bool { return n.Err == nil && n.Seal.Initialized })
	for i := range status.Nodes {
		clusterNode(f, name, &status.Nodes[i], initialized)
	}
	away := false
	for i := range status.Material {
		m := &status.Material[i]
		if errors.Is(m.Err, store.ErrUnavailable) && away {
			continue // said once
		}
		away = away || errors.Is(m.Err, store.ErrUnavailable)
		clusterMaterial(f, name, m, initialized)
	}
	for _, item := range status.Held {
		f.problem("material "+item, "nitroseal unseal "+name, "it is held on the local disk, because the store did not take it")
	}
	f.skipped("drill", "nobody looked whether the keys open and fit: nitroseal drill %s proves it", name)
}

func clusterNode(f chart, name string, n *cluster.NodeStatus, initialized bool) {
	check := "node " + n.Address
	unseal := "nitroseal unseal " + name
	switch {
	case n.Alarm != nil:
		f.problem(check, fmt.Sprintf("nitroseal rekey %s now, find out what is at that address, then: %s --clear-alarm %s", name, unseal, n.Address),
			"it took the shares and belongs to another cluster, %s", n.Alarm.Seen)
	case errors.Is(n.Err, node.ErrIdentity):
		f.problem(check, "it gets no shares like this: compare its certificate with ca_cert_file, tls_server_name and tls_pins", "%v", n.Err)
	case n.Err != nil:
		f.problem(check, "see whether it runs, and whether the address is right", "%v", n.Err)
	case !n.Seal.Initialized && initialized:
		f.warning(check, unseal+" joins it", "it is not initialised, and others of the cluster are")
	case !n.Seal.Initialized:
		f.warning(check, "nitroseal init "+name, "it is not initialised")
	case n.Seal.Sealed:
		f.problem(check, unseal, "it is sealed")
	default:
		f.ok(check, "it is the node that we know, and unsealed")
	}
	if ends := n.Seal.CertificateEnds; n.Err == nil && !ends.IsZero() {
		f.certificate("node "+n.Address, ends, "issue a new one by the same authority; the node gets no shares with one that has ended")
	}
}

func clusterMaterial(f chart, name string, m *cluster.MaterialStatus, initialized bool) {
	check := "material " + m.Item
	switch {
	case errors.Is(m.Err, custody.ErrNotFound) && !initialized:
		f.skipped(check, "there is none yet")
		return
	case errors.Is(m.Err, custody.ErrNotFound):
		f.problem(check, "nitroseal import "+name, "the cluster is initialised, and its keys are not in custody")
		return
	case m.Err != nil:
		f.problem(check, "without it no node is unsealed; see what the store has", "%v", m.Err)
		return
	case m.Version > m.LatestVersion:
		f.problem(check, "bring the newest record of the key here: nitroseal key restore "+m.Key,
			"it is sealed with version %d of the wrapping key %q, which this machine does not have", m.Version, m.Key)
		return
	case m.State == custody.StateStale, m.State == custody.StateVanished:
		f.problem(check, fmt.Sprintf("nitroseal material show %s %s", name, m.Item), "it is %s", m.State)
		return
	}
	f.ok(check, "generation %d, sealed with version %d of the wrapping key %q", m.Generation, m.Version, m.Key)
	for _, warning := range m.Warnings {
		f.warning(check, "", "%s", warning)
	}
}

// audit examines the log of what is done to clusters.
func (d *doctor) audit(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	f := d.about("audit log")
	sinks, err := d.Audit(ctx)
	for _, sink := range sinks {
		if sink.Err != nil {
			f.problem("sink "+sink.Name, "it loses lines; acts go on while another sink takes them", "%v", sink.Err)
		} else {
			f.ok("sink "+sink.Name, "it takes lines")
		}
	}
	if err != nil {
		f.problem("any sink", "nothing is unsealed before one takes a line: make room, or name another one", "%v", err)
	}
}
