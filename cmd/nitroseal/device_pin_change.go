package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
)

func newDevicePINChangeCommand(a *app) *cobra.Command {
	pin := secretFlag{name: "new-pin", prompt: "New PIN of the token", again: true}
	cmd := &cobra.Command{
		Use:   "change NAME",
		Short: "Change a token's PIN, and the PIN file with it",
		Long: `Change the user PIN on a token from the one of the configuration to a new one. Where the configuration names a pin_file, the new
PIN is written beside it first, as FILE.new, and takes its place once the token has it: nothing is lost where that is cut short.
Where it names an environment variable, that is yours to change, before anything else uses the device.`,
		Example: "  nitroseal device pin change stick\n  nitroseal device pin change stick --new-pin-file /run/new-pin",
		Args:    arguments("NAME"), ValidArgsFunction: a.completeDevice,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			configured, err := a.deviceConfig(name)
			if err != nil {
				return err
			}
			changer, err := a.pinChanger(cmd.Context(), name)
			if err != nil {
				return err
			}
			fresh, err := a.secret(cmd.Context(), &pin)
			if err != nil {
				return err
			}
			defer clear(fresh)
			file := pinFile{path: configured.PINFile}
			if device.IsCredential(file.path) { // systemd's copy, which is gone with the service
				file.path = ""
			}
			if err := file.prepare(fresh); err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			err = changer.ChangePIN(ctx, fresh)
			switch {
			case errors.Is(err, hsm.ErrMayHaveHappened):
				return fmt.Errorf("device %q: it is not known whether the token took the new PIN: %w%s", name, err, file.afterDoubt(name))
			case err != nil:
				return errors.Join(fmt.Errorf("device %q: %w; the PIN was not changed", name, err), file.forget())
			}
			if err := file.replace(); err != nil {
				return fmt.Errorf("device %q: the token has the new PIN, and %w", name, err)
			}
			if configured.PINEnv != "" {
				a.say("nitroseal: warning: the token has the new PIN; set the environment variable %s to it before anything else uses the device, "+
					"because a wrong PIN costs a try", configured.PINEnv)
			}
			if device.IsCredential(configured.PINFile) {
				a.say("nitroseal: warning: the token has the new PIN; put it where LoadCredential= reads %s from, and start the services anew, "+
					"before anything else uses the device, because a wrong PIN costs a try", configured.PINFile)
			}
			return a.done(name, "PIN changed")
		},
	}
	pin.add(cmd, "the new PIN")
	return cmd
}
