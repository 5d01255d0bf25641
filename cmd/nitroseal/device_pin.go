package main

import (
	"context"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
)

func newDevicePINCommand(a *app) *cobra.Command {
	return group("pin", "Look after a token's PIN", `A token locks after three wrong PINs, so a wrong one is sent once only: the PIN ledger in the state directory remembers it, for
all programs of ours on this machine. These verbs are for what only a person can decide.`,
		newDevicePINChangeCommand(a), newDevicePINTryCommand(a), newDevicePINUnbarCommand(a))
}

// pinChanger opens a device that has a PIN.
func (a *app) pinChanger(ctx context.Context, name string) (hsm.PINChanger, error) {
	opened, err := a.device(ctx, name)
	if err != nil {
		return nil, err
	}
	changer, ok := opened.(hsm.PINChanger)
	if !ok {
		return nil, usage(`device %q has no PIN; the passphrases of a NetHSM's users are changed by "nitroseal nethsm"`, name)
	}
	return changer, nil
}
