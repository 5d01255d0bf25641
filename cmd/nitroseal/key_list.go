package main

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the wrapping keys",
		Args:  noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			keys, err := a.keyring()
			if err != nil {
				return err
			}
			known, err := keys.List(cmd.Context())
			if err != nil {
				return err
			}
			view := keyListView{Keys: []keySummary{}}
			for _, name := range known {
				key, err := keys.Get(cmd.Context(), name)
				if errors.Is(err, keyring.ErrKeyNotFound) {
					continue // deleted meanwhile
				}
				if err != nil {
					return err
				}
				view.Keys = append(view.Keys, summary(key))
			}
			return a.print(view, func(t *table) {
				t.row("NAME", "STATE", "VERSION", "HSMS", "DEVICES", "WARNINGS")
				for _, k := range view.Keys {
					t.row(k.Name, k.State, k.LatestVersion, k.HSMs, strings.Join(k.Devices, ","), k.Warnings)
				}
			})
		},
	}
}

type keyListView struct {
	Keys []keySummary `json:"keys"`
}

// keySummary is a wrapping key in a list.
type keySummary struct {
	Name          string   `json:"name"`
	State         string   `json:"state"`
	LatestVersion int      `json:"latest_version"`
	HSMs          int      `json:"hsms"`     // on how many the newest version opens
	Devices       []string `json:"devices"`  // of the newest version
	Warnings      int      `json:"warnings"` // how many "key show" prints
}

func summary(key *keyring.Key) keySummary {
	short := keySummary{
		Name: key.Name, State: string(key.State), LatestVersion: key.LatestVersion, Devices: []string{}, Warnings: len(key.Warnings),
	}
	if len(key.Versions) > 0 {
		newest := key.Versions[len(key.Versions)-1]
		short.HSMs = keyring.CountHSMs(newest.Recipients)
		for _, r := range newest.Recipients {
			short.Devices = append(short.Devices, r.Device)
		}
	}
	return short
}
