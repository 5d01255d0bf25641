package main

import (
	"cmp"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
)

func newConfigCommand(a *app) *cobra.Command {
	return group("config", "Look at the configuration",
		"The configuration says which HSMs there are, how to log in to them, where envelopes lie, and which clusters are in custody.", newConfigCheckCommand(a))
}

func newConfigCheckCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Read the configuration and say what is wrong with it",
		Long: `Read the configuration and say all that is wrong with it at once, each with file, line and column. The secrets that devices
name are read as well, and not shown. No HSM, store or Vault is touched: "nitroseal doctor" does that.`,
		Example: "  nitroseal config check --config ./nitroseal.hcl",
		Args:    noArguments,
		RunE: func(*cobra.Command, []string) error {
			c, err := a.config()
			if err != nil {
				return err
			}
			if err := a.checkSecrets(c); err != nil {
				return err
			}
			view := showConfig(c)
			return a.print(view, func(t *table) {
				t.row(c.Path + " is in order")
				t.field("state_dir", c.StateDir)
				for _, d := range c.Devices {
					t.row("device", d.Name, d.Type)
				}
				for _, s := range c.Stores {
					t.row("store", s.Name, s.Type)
				}
				if c.Vault != nil {
					t.row("vault", c.Vault.Address)
				}
				for _, known := range view.Clusters {
					t.row("cluster", known.Name, known.OpensWith+", in store "+known.Store+": "+strings.Join(known.Nodes, ", "))
				}
				if s := view.Serve; s != nil {
					t.row("serve", s.Listen+"/v1/"+s.Mount, "tokens in "+s.tokens())
				}
				for _, kind := range view.Audit {
					t.row("audit", kind)
				}
				if c.Serve != nil && len(c.Audits) == 0 {
					t.row("", "(nitroseal serve: systemd's journal, where there is one)")
				}
			})
		},
	}
}

// configView is a configuration as JSON: what it names, not how.
type configView struct {
	Path     string              `json:"path"`
	StateDir string              `json:"state_dir"`
	Devices  []namedView         `json:"devices"`
	Stores   []namedView         `json:"stores"`
	Vault    string              `json:"vault"` // its address; empty for none
	Clusters []clusterConfigView `json:"clusters"`
	Listen   string              `json:"listen"` // of "nitroseal run"
	Serve    *serveConfigView    `json:"serve"`  // null for no seal server
	Audit    []string            `json:"audit"`  // where acts are written to
}

// serveConfigView is the seal server of the configuration.
type serveConfigView struct {
	Listen  string   `json:"listen"`
	Mount   string   `json:"mount"`
	Keys    []string `json:"keys"`   // empty for those that tokens name
	Tokens  string   `json:"tokens"` // their store; empty for a folder of state_dir
	Metrics string   `json:"metrics_listen"`
}

func (v *serveConfigView) tokens() string {
	if v.Tokens == "" {
		return "state_dir"
	}
	return "store " + v.Tokens
}

// clusterConfigView is a cluster of the configuration.
type clusterConfigView struct {
	Name      string   `json:"name"`
	Nodes     []string `json:"nodes"`
	Key       string   `json:"key"`    // empty with a spread
	Spread    string   `json:"spread"` // empty with a key
	Store     string   `json:"store"`
	OpensWith string   `json:"-"`
}

// namedView is a device or store.
type namedView struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

func showConfig(c *config.Config) configView {
	view := configView{Path: c.Path, StateDir: c.StateDir, Devices: []namedView{}, Stores: []namedView{}}
	for _, d := range c.Devices {
		view.Devices = append(view.Devices, namedView{d.Name, d.Type})
	}
	for _, s := range c.Stores {
		view.Stores = append(view.Stores, namedView{s.Name, s.Type})
	}
	if c.Vault != nil {
		view.Vault = c.Vault.Address
	}
	if s := c.Serve; s != nil {
		view.Serve = &serveConfigView{Listen: s.Listen, Mount: s.Mount, Keys: list(s.Keys), Tokens: s.Tokens, Metrics: s.MetricsListen}
	}
	view.Listen, view.Clusters, view.Audit = c.Run.Listen, []clusterConfigView{}, []string{}
	for i := range c.Clusters {
		known := clusterConfigView{
			Name: c.Clusters[i].Name, Nodes: c.Clusters[i].Nodes, Key: c.Clusters[i].Key, Spread: c.Clusters[i].Spread, Store: c.Clusters[i].Store,
			OpensWith: "key " + c.Clusters[i].Key,
		}
		if known.Spread != "" {
			known.OpensWith = known.Spread
		}
		view.Clusters = append(view.Clusters, known)
	}
	for _, configured := range auditsOf(c) {
		view.Audit = append(view.Audit, strings.TrimSpace(configured.Kind+" "+cmp.Or(configured.Path, configured.Address)))
	}
	return view
}
