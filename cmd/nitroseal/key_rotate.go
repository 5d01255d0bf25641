package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyRotateCommand(a *app) *cobra.Command {
	var from hsmKey
	var made newHSMKey
	var generate bool
	cmd := a.byName(&cobra.Command{
		Use:   "rotate KEY --device DEVICE (--label LABEL | --id ID | --generate --algorithm ALGORITHM)",
		Short: "Give a wrapping key its next version",
		Long: `Give a wrapping key its next version, of an HSM key that is there already or, with --generate, of one that is made. What older
versions sealed opens as before; "nitroseal rewrap" seals it anew. The new version's key record has to be read and kept again.`,
		Example: `  nitroseal key rotate prod --device stick --label unseal-2027
  nitroseal key rotate prod --device rack --generate --algorithm rsa-3072`,
	}, func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error) {
		if !generate && made.algorithm != "" {
			return nil, usage("--algorithm belongs to --generate; leave it out, or add that")
		}
		if generate {
			if from.id != "" || from.acceptWeak {
				return nil, usage("--id and --accept-weak-key belong to an HSM key that is there already; leave them out, or leave out --generate")
			}
			ctx, cancel := a.within(cmd.Context(), generateTimeout)
			defer cancel()
			begun, err := keys.Rotate(ctx, name, keyring.RotateRequest{Generate: &keyring.GenerateRequest{
				Device: from.device, Algorithm: hsm.Algorithm(made.algorithm), Label: from.label, By: by(),
			}})
			if err != nil {
				return nil, err
			}
			return a.finish(ctx, keys, begun)
		}
		ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
		defer cancel()
		request := from.request()
		return keys.Rotate(ctx, name, keyring.RotateRequest{Adopt: &request})
	})
	from.add(a, cmd)
	made.add(cmd)
	cmd.Flags().BoolVar(&generate, "generate", false, "make the HSM key; --label is what it is called then")
	return cmd
}
