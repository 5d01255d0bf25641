package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

func newDevicePINTryCommand(a *app) *cobra.Command {
	var lastTry bool
	pin := secretFlag{name: "pin", prompt: "PIN of the token"}
	cmd := &cobra.Command{
		Use:   "try NAME",
		Short: "Log in once with a PIN, at your word",
		Long: `Log in to a token once, although it shows that a wrong PIN was sent before. Programs do not do that by themselves. A PIN that
proves right is remembered as such, and everything works with it again.

It is the PIN of the configuration unless --pin-file or --pin-env names another one.`,
		Example: "  nitroseal device pin try stick\n  nitroseal device pin try stick --pin-file /etc/nitroseal/stick.pin.new",
		Args:    arguments("NAME"), ValidArgsFunction: a.completeDevice,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			changer, err := a.pinChanger(cmd.Context(), name)
			if err != nil {
				return err
			}
			tried, err := a.configuredPIN(name)
			if pin.given() {
				tried, err = a.secret(cmd.Context(), &pin)
			}
			if err != nil {
				return err
			}
			defer clear(tried)
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			if err := changer.AdoptPIN(ctx, tried, lastTry); err != nil {
				return fmt.Errorf("device %q: %w", name, err)
			}
			return a.done(name, "the PIN is right")
		},
	}
	pin.add(cmd, "the PIN")
	cmd.Flags().BoolVar(&lastTry, "last-try", false, "send it even where it is the last try: a wrong PIN then locks the token")
	return cmd
}

// configuredPIN reads the PIN that the configuration has for a device. The caller wipes it.
func (a *app) configuredPIN(name string) ([]byte, error) {
	configured, err := a.deviceConfig(name)
	if err != nil {
		return nil, err
	}
	complete, err := configured.WithEnvironment(os.LookupEnv)
	if err != nil {
		return nil, err
	}
	if complete.PINFile == "" {
		return []byte(complete.PIN), nil
	}
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	return c.SecretFiles().Read(complete.PINFile)
}
