package main

import (
	"errors"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyAbandonCommand(a *app) *cobra.Command {
	var withoutHSM bool
	cmd := &cobra.Command{
		Use:   "abandon KEY",
		Short: "Undo an HSM key that is being made",
		Long: `Undo what "key generate" or "key rotate" began and did not end: the HSM key is destroyed if it was made, and no version ever had
it. A wrapping key without a version goes altogether.`,
		Args:              arguments("KEY"),
		ValidArgsFunction: a.completeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := a.keyring()
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			if _, err := keys.Get(ctx, args[0]); err != nil { // there is nothing to undo, and perhaps a slip in the name
				return err
			}
			abandon := keys.Abandon
			if withoutHSM {
				abandon = keys.AbandonWithoutHSM
			}
			if err := abandon(ctx, args[0]); err != nil {
				return err
			}
			key, err := keys.Get(ctx, args[0])
			if errors.Is(err, keyring.ErrKeyNotFound) {
				return a.gone(args[0])
			}
			if err != nil {
				return err
			}
			return a.printKey(key)
		},
	}
	cmd.Flags().BoolVar(&withoutHSM, "without-hsm", false, "the device will not come back: leave the HSM key on it, if it was made")
	return cmd
}

// goneView is a wrapping key that is no more.
type goneView struct {
	Name  string `json:"name"`
	State string `json:"state"`
}

func (a *app) gone(name string) error {
	return a.print(goneView{name, "deleted"}, func(t *table) { t.row(name, "deleted") })
}
