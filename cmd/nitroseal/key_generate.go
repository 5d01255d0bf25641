package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// newHSMKey are the flags that describe an HSM key to be made.
type newHSMKey struct{ algorithm string }

func (n *newHSMKey) add(cmd *cobra.Command) {
	var known []cobra.Completion
	for _, algorithm := range hsm.Algorithms() {
		known = append(known, string(algorithm))
	}
	cmd.Flags().StringVar(&n.algorithm, "algorithm", "", "the kind of HSM key: "+strings.Join(known, ", "))
	_ = cmd.RegisterFlagCompletionFunc("algorithm", cobra.FixedCompletions(known, cobra.ShellCompDirectiveNoFileComp))
}

func newKeyGenerateCommand(a *app) *cobra.Command {
	var device, label string
	var made newHSMKey
	cmd := a.byName(&cobra.Command{
		Use:   "generate KEY --device DEVICE --algorithm ALGORITHM",
		Short: "Make an HSM key, and a wrapping key of it",
		Long: `Make an HSM key that can do nothing but open envelopes and never leaves its HSM, and a wrapping key of it. A card takes half a
minute and more. Where that is interrupted, the same command again goes on with the HSM key that was begun; "key abandon" undoes
it. Where the HSM's answer was lost and its key is not there yet, another one is made, and a warning names the first, which may
still appear.`,
		Example:           "  nitroseal key generate prod --device rack --algorithm rsa-3072",
		ValidArgsFunction: cobra.NoFileCompletions,
	}, func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error) {
		ctx, cancel := a.within(cmd.Context(), generateTimeout)
		defer cancel()
		begun, err := keys.Begin(ctx, name, keyring.GenerateRequest{
			Device: device, Algorithm: hsm.Algorithm(made.algorithm), Label: label, By: by(),
			RequestID: strings.Join([]string{"generate", device, made.algorithm, label}, " "), // so that the same command again is known
		})
		if err != nil {
			return nil, err
		}
		return a.finish(ctx, keys, begun)
	})
	cmd.Flags().StringVarP(&device, "device", "d", "", "the device that makes the HSM key")
	cmd.Flags().StringVar(&label, "label", "", "the label of the HSM key (default nitroseal-KEY-v1)")
	_ = cmd.RegisterFlagCompletionFunc("device", a.completeDevices)
	made.add(cmd)
	return cmd
}

// finish makes the HSM key that was begun, and tells a waiting person so.
func (a *app) finish(ctx context.Context, keys *keyring.Keyring, begun *keyring.Key) (*keyring.Key, error) {
	if p := begun.Pending; p != nil {
		a.progress("making an %s key on device %q; a card takes half a minute and more", p.Algorithm, p.Device)
	}
	return keys.Finish(ctx, begun.Name)
}
