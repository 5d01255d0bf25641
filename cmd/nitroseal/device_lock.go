package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
)

func newDeviceLockCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "lock NAME",
		Short: "Lock all nodes of a NetHSM",
		Long: `Lock all nodes of a NetHSM: nothing can be opened with it until somebody unlocks it. The device's Administrator does that, so the
configuration must name one.`,
		Args:              arguments("NAME"),
		ValidArgsFunction: a.completeDevice,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			unlocker, err := a.unlocker(ctx, args[0])
			if err != nil {
				return err
			}
			if err := unlocker.Lock(ctx); err != nil {
				return fmt.Errorf("device %q: locking it: %w", args[0], err)
			}
			return a.done(args[0], "locked")
		},
	}
}

// unlocker opens a device that can be locked and unlocked.
func (a *app) unlocker(ctx context.Context, name string) (hsm.Unlocker, error) {
	opened, err := a.device(ctx, name)
	if err != nil {
		return nil, err
	}
	unlocker, ok := opened.(hsm.Unlocker)
	if !ok {
		return nil, usage("device %q is no NetHSM: it has a PIN instead of a passphrase, and is logged in to when it is needed", name)
	}
	return unlocker, nil
}

// doneView is the answer of a verb that only does something.
type doneView struct {
	Device string `json:"device"`
	State  string `json:"state"`
}

func (a *app) done(name, state string) error {
	return a.print(doneView{name, state}, func(t *table) { t.row(name, state) })
}
