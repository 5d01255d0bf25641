package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
)

func newConfigCommand(a *app) *cobra.Command {
	return group("config", "Look at the configuration",
		"The configuration says which HSMs there are, how to log in to them, and where envelopes lie.", newConfigCheckCommand(a))
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
			return a.print(showConfig(c), func(t *table) {
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
			})
		},
	}
}

// configView is a configuration as JSON: what it names, not how.
type configView struct {
	Path     string      `json:"path"`
	StateDir string      `json:"state_dir"`
	Devices  []namedView `json:"devices"`
	Stores   []namedView `json:"stores"`
	Vault    string      `json:"vault"` // its address; empty for none
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
	return view
}
