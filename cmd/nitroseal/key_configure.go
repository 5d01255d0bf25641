package main

import (
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyConfigureCommand(a *app) *cobra.Command {
	var minimum int
	var deletion, backup, single bool
	var lease time.Duration
	cmd := a.byName(&cobra.Command{
		Use:   "configure KEY",
		Short: "Change the settings of a wrapping key, and confirm what only a person knows",
		Example: `  nitroseal key configure prod --backup-confirmed
  nitroseal key configure prod --deletion-allowed=false --min-decryption-version 2
  nitroseal key configure prod --lease 10m`,
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
		if given("lease") {
			settings.Lease = &lease
			changes++
		}
		if changes == 0 {
			return nil, usage(`nothing is to be changed; "%s --help" lists what can be`, cmd.CommandPath())
		}
		ctx, cancel := a.within(cmd.Context(), ordinaryTimeout) // a lease asks an HSM
		defer cancel()
		return keys.Configure(ctx, name, settings)
	})
	cmd.Flags().IntVar(&minimum, "min-decryption-version", 0, "the oldest version that opens")
	cmd.Flags().BoolVar(&deletion, "deletion-allowed", false, "the wrapping key may be deleted")
	cmd.Flags().BoolVar(&backup, "backup-confirmed", false, "the newest version's HSM keys are backed up, by DKEK shares or a NetHSM's backup")
	cmd.Flags().BoolVar(&single, "accept-single-hsm", false, "what is sealed may be lost with one HSM")
	cmd.Flags().DurationVar(&lease, "lease", 0, `how long an HSM's answer serves encrypt/ and decrypt/ from memory, "10s" to "24h"; 0: every decrypt is an `+
		"operation in an HSM")
	return cmd
}
