package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

func newKeyRestoreCommand(a *app) *cobra.Command {
	var in, sum string
	var devices map[string]string
	cmd := a.byName(&cobra.Command{
		Use:   "restore KEY --in FILE --sha256 HEX",
		Short: "Bring a wrapping key back from its key record",
		Long: `Bring a wrapping key back from its key record, with one of its HSMs attached. Its SHA-256 must be the one that was noted down when
the record was made.

Where the key is here already, because another machine rotated it or added a recipient, it takes on what is new. Nothing is taken away from it: a
record that has not all that is here is refused. What was set and confirmed here stays.`,
		Example: `  nitroseal key restore prod --in prod.key-record.json --sha256 51f9…
  nitroseal key restore prod --in prod.key-record.json --sha256 51f9… --rename old-stick=stick`,
		ValidArgsFunction: cobra.NoFileCompletions,
	}, func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error) {
		if sum == "" {
			return nil, usage("--sha256 is missing; give the SHA-256 that was printed when the key record was made")
		}
		record, err := a.input(cmd.Context(), in, store.MaxValueSize, "the key record")
		if err != nil {
			return nil, err
		}
		ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
		defer cancel()
		return keys.Restore(ctx, name, keyring.RestoreRequest{Record: record, SHA256: sum, Devices: devices, AcceptRecipients: true, By: by()})
	})
	cmd.Flags().StringVar(&in, "in", "", `file that holds the key record (default "-": standard input)`)
	cmd.Flags().StringVar(&sum, "sha256", "", "the SHA-256 of the key record, in hexadecimal, as it was noted down")
	cmd.Flags().StringToStringVar(&devices, "rename", nil, "a device of the record, and what it is called here: OLD=NEW")
	return cmd
}
