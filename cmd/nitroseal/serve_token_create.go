package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
)

func newServeTokenCreateCommand(a *app) *cobra.Command {
	var out string
	var rate, burst int
	spec := token.Spec{}
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a token, and show it once",
		Long: `Make a token for whoever NAME is, a cluster for example, and print it. Nobody can see it again: what is kept is a hash. With --out it is
written to a new file with mode 0600 that only this user reads; a file that is there is never overwritten.

Vault reads it from a file by token = "file:///etc/vault.d/seal.token" in its stanza seal "transit", or from the environment variable
VAULT_TOKEN. It is written without a line break, which Vault would take for a part of it. A running server takes it within five seconds. To
replace a token make another one for the same keys, give it to the cluster, restart its nodes one by one, and revoke the old one.

Each sealed cluster needs a wrapping key of its own name; several names may share one key in the HSM (nitroseal key adopt), because the name is
bound in what is sealed. A key that is not there yet, or not ready, is warned of.`,
		Example: `  nitroseal serve token create prod --key prod --out prod.token
  nitroseal serve token create edge --key edge --certificate-name vault-1.example.org --address 192.0.2.0/24 --rate 20`,
		Args: arguments("NAME"), ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			spec.Name, spec.By = args[0], by()
			if spec.Keys == nil {
				return usage("%s: --key is missing; name the wrapping keys that the token is for", cmd.CommandPath())
			}
			if cmd.Flags().Changed("burst") && !cmd.Flags().Changed("rate") {
				return usage("--burst belongs to --rate; give both")
			}
			if cmd.Flags().Changed("rate") {
				if !cmd.Flags().Changed("burst") {
					burst = min(10*rate, token.MaxLimit)
				}
				spec.Limit = &token.Limit{Rate: rate, Burst: burst}
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			return a.createToken(ctx, spec, out)
		},
	}
	flags := cmd.Flags()
	flags.StringSliceVar(&spec.Keys, "key", nil, "a wrapping key that it may use; several times for several")
	flags.StringSliceVar(&spec.CertificateNames, "certificate-name", nil,
		"it is taken with a client certificate of that name only (DNS name, URI, or common name where there is neither); several times for several")
	flags.StringSliceVar(&spec.Addresses, "address", nil, "it is taken from that address or network only (192.0.2.0/24); several times for several")
	flags.IntVar(&rate, "rate", 0, "how many requests a second it has, 0 for no limit (default: what the block serve says)")
	flags.IntVar(&burst, "burst", 0, "how many it has at once, after a pause (default: ten times the rate)")
	flags.StringVar(&out, "out", "", `new file for the token (default "-": standard output)`)
	_ = cmd.RegisterFlagCompletionFunc("key", func(cmd *cobra.Command, _ []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return a.completeKeys(cmd, nil, begun)
	})
	for _, name := range []string{"certificate-name", "address", "rate", "burst"} {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	return cmd
}

func (a *app) createToken(ctx context.Context, spec token.Spec, out string) error {
	kept, err := a.tokenStore(ctx)
	if err == nil {
		err = a.checkStateDir() // the audit log may be made there, and must not be made by another user than the server's
	}
	if err != nil {
		return err
	}
	for _, key := range spec.Keys {
		if trouble := a.unserved(ctx, key); trouble != "" {
			a.say("nitroseal: warning: the token is of no use for wrapping key %q yet: %s", key, trouble)
		}
	}
	toFile := out != "" && out != "-"
	var made token.Token
	var secret []byte
	defer func() { clear(secret) }()
	act := audit.Act{Verb: "make token", Detail: map[string]string{"name": spec.Name, "keys": strings.Join(spec.Keys, ",")}}
	err = a.act(ctx, act, func() error {
		var keep func([]byte) error
		written := false
		if toFile {
			keep = func(secret []byte) error {
				err := writeNewSecret(out, secret)
				written = err == nil
				return err
			}
		}
		var err error
		if made, secret, err = token.Create(ctx, kept, spec, keep); err != nil && written {
			err = errors.Join(err, os.Remove(out))
		}
		return err
	})
	if err != nil {
		return err
	}
	view := madeTokenView{tokenView: showToken(&made)}
	if toFile {
		view.Out = out
		a.say("token %s for %s is in %s; servers take it within five seconds", made.ID, made.Name, out)
		return a.print(view, nil)
	}
	// Where the reader of stdout went away, writing to it fails; without somebody who is told, it would end the process before unmake.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	if err := a.showSecret(view, secret); err != nil {
		return a.unmake(ctx, kept, made.ID, err)
	}
	a.say("token %s for %s; servers take it within five seconds, and nobody can see it again", made.ID, made.Name)
	return nil
}

// showSecret prints a token, this once. No line break follows it, which would become a part of it: Vault takes a file byte for byte.
func (a *app) showSecret(view madeTokenView, secret []byte) error {
	if a.format != formatJSON {
		err := a.output("", secret)
		if err == nil && isTerminal(a.stdout) {
			err = a.output("", []byte("\n"))
		}
		return err
	}
	view.Token = strconv.AppendQuote(nil, string(secret)) // characters that JSON takes as they are
	defer clear(view.Token)
	return a.print(view, nil)
}

// unmake revokes a token that nobody saw, although the command's time may be up.
func (a *app) unmake(ctx context.Context, kept store.Store, id string, failure error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ordinaryTimeout)
	defer cancel()
	if _, err := token.Revoke(ctx, kept, id); err != nil {
		return fmt.Errorf("%w; nobody saw the token and it is there all the same: nitroseal serve token revoke %s", failure, id)
	}
	return fmt.Errorf("%w; the token was revoked, since nobody saw it", failure)
}

// madeTokenView is a new token as JSON, with the token itself unless it went to a file.
type madeTokenView struct {
	tokenView

	Out   string          `json:"out,omitempty"`
	Token json.RawMessage `json:"token,omitempty"`
}

// writeNewSecret writes a file that is not there yet, durably, for this user alone.
func writeNewSecret(path string, secret []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return usage("%s is there already, and a token that somebody may use is not overwritten; name another file", path)
	}
	if err != nil {
		return usage("writing the token to %s: %w", path, pathless(err))
	}
	_, err = file.Write(secret)
	if err = errors.Join(err, file.Sync(), file.Close()); err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing the token to %s: %w", path, pathless(err)), os.Remove(path))
	}
	return nil
}
