package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyDeleteCommand(a *app) *cobra.Command {
	var hsmKeys bool
	cmd := &cobra.Command{
		Use:   "delete KEY",
		Short: "Delete a wrapping key",
		Long: `Delete a wrapping key, where "key configure --deletion-allowed" said that it may be. Its HSM keys stay, and its key record brings
it back, unless --hsm-keys destroys them as well: then nothing that it sealed can ever be opened. Only HSM keys that were made
for this wrapping key are destroyed.`,
		Args:              arguments("KEY"),
		ValidArgsFunction: a.completeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := a.keyring()
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			if err := keys.Delete(ctx, args[0], keyring.DeleteRequest{DeleteHSMKeys: hsmKeys, By: by()}); err != nil {
				return err
			}
			return a.gone(args[0])
		},
	}
	cmd.Flags().BoolVar(&hsmKeys, "hsm-keys", false, "destroy its HSM keys as well: what it sealed can never be opened again")
	return cmd
}
