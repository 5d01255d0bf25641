package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// callerContext are the flags that bind an envelope to a context of the caller's.
type callerContext struct{ text string }

func (c *callerContext) add(cmd *cobra.Command, what string) {
	cmd.Flags().StringVar(&c.text, "context", "", what)
}

func (c *callerContext) bytes() []byte { return []byte(c.text) }

func newWrapCommand(a *app) *cobra.Command {
	var in, out string
	var context callerContext
	cmd := &cobra.Command{
		Use:   "wrap KEY",
		Short: "Seal a value to a wrapping key",
		Long: `Seal a value of at most 64 KiB, any bytes, to the newest version of a wrapping key. The result is an envelope, a JWE in JSON,
that opens with one operation in one of the key's HSMs and nowhere else. It may lie anywhere.

One private-key operation in an HSM is needed here as well: it opens the key with which envelopes are authenticated.`,
		Example: `  nitroseal wrap prod --in unseal-keys.json --out unseal-keys.jwe
  pass show vault/root | nitroseal wrap prod --context vault-root > root.jwe`,
		Args:              arguments("KEY"),
		ValidArgsFunction: a.completeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := a.keyring()
			if err != nil {
				return err
			}
			if _, err := keys.Get(cmd.Context(), args[0]); err != nil { // before somebody types the value
				return err
			}
			plaintext, err := a.input(cmd.Context(), in, envelope.MaxPayload, "the value to be sealed")
			if err != nil {
				return err
			}
			defer clear(plaintext)
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			sealed, err := keys.Wrap(ctx, args[0], envelope.UseWrap, plaintext, context.bytes())
			if err != nil {
				return err
			}
			return a.putEnvelope(out, sealed.Envelope, envelopeView{Key: args[0], Version: sealed.Version, Recipients: sealed.Recipients})
		},
	}
	cmd.Flags().StringVar(&in, "in", "", `file that holds the value (default "-": standard input)`)
	cmd.Flags().StringVar(&out, "out", "", `file for the envelope, made with mode 0600 (default "-": standard output)`)
	context.add(cmd, "anything that is wanted again to open the envelope; it is not secret")
	return cmd
}

// envelopeView is a new envelope as JSON.
type envelopeView struct {
	Key        string `json:"key"`
	Version    int    `json:"version"`
	Recipients int    `json:"recipients"`
	// FromVersion and Changed are a rewrap's.
	FromVersion int   `json:"from_version,omitempty"`
	Changed     *bool `json:"changed,omitempty"`
	// Out is the file with the envelope, or Envelope the envelope itself: a string, because its bytes count.
	Out      string `json:"out,omitempty"`
	Envelope string `json:"envelope,omitempty"`
}

// putEnvelope writes an envelope: into a file, or to standard output, where --output=json puts it among what else is
// known of it.
func (a *app) putEnvelope(out string, sealed []byte, view envelopeView) error {
	switch {
	case out != "" && out != "-":
		if err := a.output(out, append(sealed, '\n')); err != nil {
			return err
		}
		view.Out = out
	case a.format == formatJSON:
		view.Envelope = string(sealed)
	default:
		return a.output("", append(sealed, '\n'))
	}
	return a.print(view, nil)
}
