package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// cluster returns a cluster of the configuration.
func (a *app) cluster(name string) (*cluster.Cluster, error) {
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	found, ok := c.Cluster(name)
	if !ok {
		return nil, fmt.Errorf("cluster %q: %w; %s has %s", name, errNotFound, c.Path, names("cluster", clusterNames(c)))
	}
	return newCluster(found)
}

// clusters returns the named clusters, or all of the configuration, of which there must be one.
func (a *app) clusters(wanted []string) ([]*cluster.Cluster, error) {
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	if len(wanted) == 0 {
		wanted = clusterNames(c)
	}
	if len(wanted) == 0 {
		return nil, fmt.Errorf("%w: %s has no cluster; write one: cluster \"NAME\" { nodes = […] … }", config.ErrInvalid, c.Path)
	}
	var all []*cluster.Cluster
	for i, name := range wanted {
		if slices.Contains(wanted[:i], name) {
			continue
		}
		found, err := a.cluster(name)
		if err != nil {
			return nil, err
		}
		all = append(all, found)
	}
	return all, nil
}

// newCluster is a cluster as the custodian wants it. What the file cannot be complained about, a person's key that is none for
// example, is told here.
func newCluster(c config.Cluster) (*cluster.Cluster, error) {
	made := &cluster.Cluster{
		Name: c.Name, Nodes: c.Nodes,
		TLS: node.TLS{CA: c.CACert, ServerName: c.TLSServerName, Pins: c.TLSPins, PlainHTTP: c.PlainHTTP},
		Key: c.Key, Store: c.Store,
		Shares: c.Shares, Threshold: c.Threshold, RecoveryShares: c.RecoveryShares, RecoveryThreshold: c.RecoveryThreshold,
		RootToken: cluster.RootToken(c.RootToken), RootPGPKey: c.RootPGPKey,
		RaftLeaderCA: c.RaftLeaderCACert, NodeTimeout: c.Timeout,
	}
	for _, p := range c.Persons {
		made.People = append(made.People, cluster.Person{Name: p.Name, PGPKey: p.PGPKey})
	}
	if c.Spread != "" {
		spread, err := cluster.ParseSpread(c.Spread)
		if err != nil {
			return nil, wrongCluster(c.Name, err)
		}
		made.Spread = &spread
	}
	if err := made.Check(); err != nil {
		return nil, wrongCluster("", err)
	}
	return made, nil
}

// wrongCluster makes a mistake in a cluster one of the configuration.
func wrongCluster(name string, err error) error {
	if name != "" {
		err = fmt.Errorf("cluster %q: %w", name, err)
	}
	return fmt.Errorf("%w: %w", config.ErrInvalid, err)
}

func clusterNames(c *config.Config) []string {
	all := make([]string, len(c.Clusters))
	for i := range c.Clusters {
		all[i] = c.Clusters[i].Name
	}
	return all
}

// completeClusters completes arguments with the names of clusters that are not among them yet.
func (a *app) completeClusters(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	c, err := a.config()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var known []cobra.Completion
	for _, found := range c.Clusters {
		if !slices.Contains(args, found.Name) {
			known = append(known, cobra.CompletionWithDesc(found.Name, strings.Join(found.Nodes, ", ")))
		}
	}
	return known, cobra.ShellCompDirectiveNoFileComp
}

// completeCluster completes the first argument only.
func (a *app) completeCluster(cmd *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeClusters(cmd, args, begun)
}
