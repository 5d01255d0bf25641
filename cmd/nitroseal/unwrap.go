package main

import (
	"bytes"
	"context"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func newUnwrapCommand(a *app) *cobra.Command {
	var in, out string
	var context callerContext
	cmd := &cobra.Command{
		Use:   "unwrap KEY",
		Short: "Open an envelope that was sealed to a wrapping key",
		Long: `Open an envelope with the first of the key's HSMs that can, and write the value as it was, byte for byte. The context must be
the one that the envelope was made with.`,
		Example: `  nitroseal unwrap prod --in unseal-keys.jwe
  nitroseal unwrap prod --in root.jwe --context vault-root --out root-token`,
		Args:              arguments("KEY"),
		ValidArgsFunction: a.completeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
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
			opened, err := keys.Unwrap(ctx, args[0], envelope.UseWrap, sealed, context.bytes())
			if err != nil {
				return err
			}
			defer clear(opened.Payload)
			toFile := out != "" && out != "-"
			view := openedView{Key: args[0], Version: opened.Version, LatestVersion: opened.LatestVersion, Device: opened.Device}
			if !toFile && a.format == formatJSON {
				view.Plaintext = &opened.Payload
				return a.print(view, nil)
			}
			if err := a.output(out, opened.Payload); err != nil || !toFile {
				return err
			}
			view.Out = out
			return a.print(view, nil)
		},
	}
	cmd.Flags().StringVar(&in, "in", "", `file that holds the envelope (default "-": standard input)`)
	cmd.Flags().StringVar(&out, "out", "", `file for the value, made with mode 0600 (default "-": standard output)`)
	context.add(cmd, "the context that the envelope was made with")
	return cmd
}

// openedView is an opened envelope as JSON. The plaintext is base64; it is left out where it went to a file.
type openedView struct {
	Key           string  `json:"key"`
	Version       int     `json:"version"`
	LatestVersion int     `json:"latest_version"`
	Device        string  `json:"device"`
	Out           string  `json:"out,omitempty"`
	Plaintext     *[]byte `json:"plaintext,omitempty"`
}

// readEnvelope reads an envelope, without the line break that files end with.
func (a *app) readEnvelope(ctx context.Context, path string) ([]byte, error) {
	sealed, err := a.input(ctx, path, envelope.MaxSize+2, "the envelope")
	return bytes.TrimRight(sealed, "\r\n"), err
}
