package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyShowCommand(a *app) *cobra.Command {
	return a.byName(&cobra.Command{
		Use:     "show KEY",
		Short:   "Show a wrapping key: its versions, its HSM keys, and what should be done",
		Example: "  nitroseal key show prod",
	}, func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error) {
		return keys.Get(cmd.Context(), name)
	})
}
