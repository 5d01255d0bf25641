package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newDevicePINUnbarCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "unbar NAME",
		Short: "Let a PIN be sent once more that is barred",
		Long: `Lift the bar of the PIN that the configuration has for a device, so that the next use of the device sends it once more. Do that
only where you know that the PIN is right: a wrong one costs the token another try. The last try is never given to a PIN that the
token rejected.`,
		Example: "  nitroseal device pin unbar stick",
		Args:    arguments("NAME"), ValidArgsFunction: a.completeDevice,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			changer, err := a.pinChanger(ctx, args[0])
			if err != nil {
				return err
			}
			if err := changer.Unbar(ctx); err != nil {
				return fmt.Errorf("device %q: %w", args[0], err)
			}
			return a.done(args[0], "unbarred")
		},
	}
}
