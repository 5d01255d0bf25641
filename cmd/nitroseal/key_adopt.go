package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// hsmKey are the flags that name an HSM key which is there already.
type hsmKey struct {
	device, label, id string
	acceptWeak        bool
}

func (h *hsmKey) add(a *app, cmd *cobra.Command) {
	cmd.Flags().StringVarP(&h.device, "device", "d", "", "the device that holds the HSM key")
	cmd.Flags().StringVar(&h.label, "label", "", "the label of the HSM key")
	cmd.Flags().StringVar(&h.id, "id", "", "the id of the HSM key; with --label, both must match")
	cmd.Flags().BoolVar(&h.acceptWeak, "accept-weak-key", false, "take a key that can leave the HSM, or that is also for other uses")
	_ = cmd.RegisterFlagCompletionFunc("device", a.completeDevices)
}

func (h *hsmKey) request() keyring.AdoptRequest {
	return keyring.AdoptRequest{Device: h.device, Label: h.label, ID: h.id, AcceptWeak: h.acceptWeak, By: by()}
}

func newKeyAdoptCommand(a *app) *cobra.Command {
	var from hsmKey
	cmd := a.byName(&cobra.Command{
		Use:   "adopt KEY --device DEVICE (--label LABEL | --id ID)",
		Short: "Make a wrapping key of an HSM key that is there already",
		Long: `Make a wrapping key of an HSM key that is there already, after a round trip has proved what it can do. "nitroseal device keys"
lists what is there. Where another wrapping key of that name exists, nothing is changed; the same request again is no error.`,
		Example:           "  nitroseal key adopt prod --device stick --label unseal",
		ValidArgsFunction: cobra.NoFileCompletions,
	}, func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error) {
		ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
		defer cancel()
		return keys.Adopt(ctx, name, from.request())
	})
	from.add(a, cmd)
	return cmd
}
