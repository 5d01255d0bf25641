package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyAddRecipientCommand(a *app) *cobra.Command {
	var from hsmKey
	cmd := a.byName(&cobra.Command{
		Use:   "add-recipient KEY --device DEVICE (--label LABEL | --id ID)",
		Short: "Let one more HSM open what a wrapping key seals",
		Long: `Let one more HSM key open what the newest version seals from now on, so that the loss of one HSM loses nothing. What was sealed
before needs a rewrap; a Vault whose seal the key is seals anew for a new version only, so for it rotate the key, add the HSM and back the key
up, in this order. The key record changes, so read and keep it again.`,
		Example: "  nitroseal key add-recipient prod --device rack --label unseal",
	}, func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error) {
		ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
		defer cancel()
		return keys.AddRecipient(ctx, name, from.request())
	})
	from.add(a, cmd)
	return cmd
}
