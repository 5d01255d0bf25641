package main

import (
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyPublicCommand(a *app) *cobra.Command {
	var number int
	cmd := &cobra.Command{
		Use:               "public KEY",
		Short:             "Print the public keys of a version, as PEM",
		Long:              "Print the public keys of a version's recipients as PEM, the newest version's unless --version says otherwise.",
		Example:           "  nitroseal key public prod > prod.pem",
		Args:              arguments("KEY"),
		ValidArgsFunction: a.completeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := a.keyring()
			if err != nil {
				return err
			}
			key, err := keys.Get(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if number == 0 {
				number = key.LatestVersion
			}
			if number < 1 || number > key.LatestVersion {
				return usage("key %q has versions 1 to %d", args[0], key.LatestVersion)
			}
			version := key.Versions[number-1]
			view := publicView{Name: args[0], Version: number, Recipients: []publicKeyView{}}
			for _, r := range version.Recipients {
				shown, err := showPublic(r)
				if err != nil {
					return err
				}
				view.Recipients = append(view.Recipients, shown)
			}
			return a.print(view, func(t *table) {
				for _, r := range view.Recipients {
					for line := range strings.Lines(r.PublicKey) {
						t.row(strings.TrimRight(line, "\n"))
					}
				}
			})
		},
	}
	cmd.Flags().IntVar(&number, "version", 0, "the version (default: the newest)")
	return cmd
}

type publicView struct {
	Name       string          `json:"name"`
	Version    int             `json:"version"`
	Recipients []publicKeyView `json:"recipients"`
}

type publicKeyView struct {
	Device    string `json:"device"`
	KID       string `json:"kid"`
	Algorithm string `json:"algorithm"`
	PublicKey string `json:"public_key"`
}

func showPublic(r keyring.Recipient) (publicKeyView, error) {
	public, err := encodePEM(r)
	return publicKeyView{Device: r.Device, KID: r.KID, Algorithm: string(r.Algorithm), PublicKey: public}, err
}
