package main

import (
	"encoding/hex"
	"fmt"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
)

// maxRandom is how many bytes a device makes at a time, see [hsm.Randomer].
const maxRandom = 1024

func newDeviceRandomCommand(a *app) *cobra.Command {
	var count int
	var raw bool
	var out string
	cmd := &cobra.Command{
		Use:   "random NAME",
		Short: "Make random bytes in a device",
		Long:  "Make random bytes with a device's own generator, and print them in hexadecimal, or as they are with --raw.",
		Example: `  nitroseal device random stick --bytes 16
  nitroseal device random rack --bytes 32 --raw --out device_key`,
		Args: arguments("NAME"), ValidArgsFunction: a.completeDevice,
		RunE: func(cmd *cobra.Command, args []string) error {
			if count < 1 || count > maxRandom {
				return usage("--bytes is %d; ask for 1 to %d", count, maxRandom)
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			opened, err := a.device(ctx, args[0])
			if err != nil {
				return err
			}
			randomer, ok := opened.(hsm.Randomer)
			if !ok {
				return fmt.Errorf("device %q makes no random bytes: %w", args[0], hsm.ErrUnsupported)
			}
			random, err := randomer.Random(ctx, count)
			if err != nil {
				return fmt.Errorf("device %q: making random bytes: %w", args[0], err)
			}
			defer clear(random)
			toFile := out != "" && out != "-"
			if raw && (toFile || a.format != formatJSON) {
				return a.output(out, random)
			}
			text := hex.EncodeToString(random)
			if toFile {
				return a.output(out, []byte(text+"\n"))
			}
			return a.print(randomView{args[0], text}, func(t *table) { t.row(text) })
		},
	}
	cmd.Flags().IntVarP(&count, "bytes", "n", 32, fmt.Sprintf("how many bytes, 1 to %d", maxRandom))
	cmd.Flags().BoolVar(&raw, "raw", false, "write the bytes as they are")
	cmd.Flags().StringVar(&out, "out", "", `file for the bytes, made with mode 0600 (default "-": standard output)`)
	return cmd
}

type randomView struct {
	Device string `json:"device"`
	Hex    string `json:"hex"`
}
