package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func newRewrapCommand(a *app) *cobra.Command {
	var in, out string
	var context callerContext
	var stored storedRewrap
	cmd := &cobra.Command{
		Use:   "rewrap (KEY | --stored)",
		Short: "Seal an envelope's value, or all that is in custody, anew: to the newest version of its key",
		Long: `Open an envelope and seal its value to the newest version of the same key, with the same context, after a rotation or a new
recipient. The value is not shown. An envelope that is up to date comes out as it went in, and no HSM is touched.

With --stored it does that to what is in custody, in the stores and on the local disk; what is kept of a cluster of the configuration
goes to the wrapping key that is named there. Each envelope that is not up to date costs one operation in an HSM. What fails stays as it is
and is reported. It may be stopped at any moment: run it again, and it goes on with what is left.`,
		Example: `  nitroseal rewrap prod --in unseal-keys.jwe --out unseal-keys.jwe
  nitroseal rewrap --stored
  nitroseal rewrap --stored --cluster prod`,
		Args:              stored.arguments,
		ValidArgsFunction: a.completeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
			if stored.wanted {
				return a.rewrapStored(cmd.Context(), &stored)
			}
			keys, err := a.keyring()
			if err != nil {
				return err
			}
			sealed, err := a.readEnvelope(cmd.Context(), in)
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			done, err := keys.Rewrap(ctx, args[0], sealed, envelope.Context{Use: envelope.UseWrap, Caller: context.bytes()})
			if err != nil {
				return err
			}
			return a.putEnvelope(out, done.Envelope, envelopeView{
				Key: args[0], Version: done.Version, Recipients: done.Recipients, FromVersion: done.FromVersion, Changed: &done.Changed,
			})
		},
	}
	cmd.Flags().StringVar(&in, "in", "", `file that holds the envelope (default "-": standard input)`)
	cmd.Flags().StringVar(&out, "out", "", `file for the new envelope; may be that of --in (default "-": standard output)`)
	context.add(cmd, "the context that the envelope was made with")
	stored.add(cmd, a)
	return cmd
}
