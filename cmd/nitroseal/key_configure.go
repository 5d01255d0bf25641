package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyConfigureCommand(a *app) *cobra.Command {
	var minimum int
	var deletion, backup, single bool
	cmd := a.byName(&cobra.Command{
		Use:   "configure KEY",
		Short: "Change the settings of a wrapping key, and confirm what only a person knows",
		Example: `  nitroseal key configure prod --backup-confirmed
  nitroseal key configure prod --deletion-allowed=false --min-decryption-version 2`,
	}, func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error) {
		settings := keyring.Settings{By: by()}
		given := cmd.Flags().Changed
		changes := 0
		for _, flag := range []struct {
			name  string
			value *bool
			into  **bool
		}{
			{"deletion-allowed", &deletion, &settings.DeletionAllowed},
			{"backup-confirmed", &backup, &settings.BackupConfirmed},
			{"accept-single-hsm", &single, &settings.AcceptSingleHSM},
		} {
			if given(flag.name) {
				*flag.into = flag.value
				changes++
			}
		}
		if given("min-decryption-version") {
			settings.MinDecryptionVersion = &minimum
			changes++
		}
		if changes == 0 {
			return nil, usage(`nothing is to be changed; "%s --help" lists what can be`, cmd.CommandPath())
		}
		return keys.Configure(cmd.Context(), name, settings)
	})
	cmd.Flags().IntVar(&minimum, "min-decryption-version", 0, "the oldest version that opens")
	cmd.Flags().BoolVar(&deletion, "deletion-allowed", false, "the wrapping key may be deleted")
	cmd.Flags().BoolVar(&backup, "backup-confirmed", false, "the newest version's HSM keys are backed up, by DKEK shares or a NetHSM's backup")
	cmd.Flags().BoolVar(&single, "accept-single-hsm", false, "what is sealed may be lost with one HSM")
	return cmd
}
