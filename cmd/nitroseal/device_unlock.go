package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newDeviceUnlockCommand(a *app) *cobra.Command {
	passphrase := secretFlag{name: "passphrase", prompt: "Unlock passphrase of the NetHSM"}
	cmd := &cobra.Command{
		Use:   "unlock NAME",
		Short: "Unlock all nodes of a NetHSM",
		Long: `Unlock all nodes of a NetHSM that are locked, with its unlock passphrase: from a file or an environment variable, else the one of
the configuration, else asked for at the terminal.`,
		Example: "  nitroseal device unlock rack\n  nitroseal device unlock rack --passphrase-file /run/credentials/unlock",
		Args:    arguments("NAME"), ValidArgsFunction: a.completeDevice,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			set, err := a.devices()
			if err != nil {
				return err
			}
			handle, err := set.handle(name)
			if err != nil {
				return err
			}
			unlocker, err := a.unlocker(cmd.Context(), name) // before somebody types the passphrase
			if err != nil {
				return err
			}
			var secret []byte
			if !passphrase.given() {
				if secret, err = handle.UnlockPassphrase(); err != nil {
					return err
				}
			}
			if len(secret) == 0 {
				if secret, err = a.secret(cmd.Context(), &passphrase); err != nil {
					return err
				}
			}
			defer clear(secret)
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			if err := unlocker.Unlock(ctx, secret); err != nil {
				return fmt.Errorf("device %q: unlocking it: %w", name, err)
			}
			return a.done(name, "unlocked")
		},
	}
	passphrase.add(cmd, "the unlock passphrase")
	return cmd
}
