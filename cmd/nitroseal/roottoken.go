package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func newRootTokenCommand(a *app) *cobra.Command {
	var pgpKey string
	var revoke bool
	cmd := &cobra.Command{
		Use:   "root CLUSTER (-- COMMAND [ARGUMENT…] | --pgp-key FILE | --revoke)",
		Short: "Make a root token for one command, or for one person",
		Long: `Have Vault make a root token with the shares in custody, run a command with it, and revoke it afterwards, also where the command fails or is
interrupted. The command finds VAULT_ADDR, VAULT_TOKEN and VAULT_CACERT in its environment, and its exit code is the one of nitroseal. The
token is printed nowhere; until it is revoked it lies, sealed to the HSM, in state_dir, so that a next run revokes it where this one died.

With --pgp-key Vault encrypts the token to a person, and the message is printed. It is that person's to revoke. With --revoke only a token
that an earlier run left is revoked.

Vault makes one root token at a time. An attempt that was not begun here is reported and left as it is.`,
		Example: `  nitroseal root prod -- vault policy write operators operators.hcl
  nitroseal root prod -- sh -c 'vault audit enable file file_path=/var/log/vault.log && vault audit list'
  nitroseal root prod --pgp-key alice.asc`,
		Args:              func(cmd *cobra.Command, args []string) error { return rootArguments(cmd, args, pgpKey != "" || revoke) },
		ValidArgsFunction: a.completeCluster,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.cluster(args[0])
			if err != nil {
				return err
			}
			options := cluster.RootOptions{By: by(), Revoke: revoke}
			if pgpKey != "" {
				if options.PGPKey, err = a.input(cmd.Context(), pgpKey, maxPGPKeyFile, "the OpenPGP key"); err != nil {
					return err
				}
			}
			run := &withToken{a: a, c: c, args: args[1:]}
			if len(run.args) > 0 {
				if err := run.find(); err != nil {
					return err
				}
				options.Use = run.use
			}
			custodian, err := a.custodian()
			if err != nil {
				return err
			}
			ctx := cmd.Context()
			if options.Use == nil || a.timeout > 0 { // a command takes as long as it takes
				limited, cancel := a.within(ctx, ordinaryTimeout)
				defer cancel()
				ctx = limited
			}
			result, err := custodian.Root(ctx, c, options)
			for _, warning := range result.Warnings {
				a.say("nitroseal: warning: %s", warning)
			}
			if err == nil && run.failed != nil {
				err = run.failed
			}
			if err != nil || options.Use != nil {
				return err
			}
			return a.showRoot(c, &result)
		},
	}
	cmd.Flags().StringVar(&pgpKey, "pgp-key", "", `file with the public OpenPGP key of the person who is to have the token ("-": standard input)`)
	cmd.Flags().BoolVar(&revoke, "revoke", false, "only revoke a token that an earlier run left")
	cmd.MarkFlagsMutuallyExclusive("pgp-key", "revoke")
	_ = cmd.MarkFlagFilename("pgp-key", "asc", "gpg", "pgp")
	return cmd
}

// maxPGPKeyFile is the size of the largest file with a person's key, in bytes.
const maxPGPKeyFile = 1 << 20

// rootArguments wants CLUSTER, and a command after "--" unless the token goes elsewhere.
func rootArguments(cmd *cobra.Command, args []string, elsewhere bool) error {
	dash := cmd.ArgsLenAtDash()
	switch {
	case dash < 0 && len(args) > 1:
		return usage(`%s: write "--" before the command that gets the token: %s CLUSTER -- COMMAND`, cmd.CommandPath(), cmd.CommandPath())
	case len(args) == 0 || dash == 0:
		return usage(`%s: CLUSTER is missing; "%s --help" shows an example`, cmd.CommandPath(), cmd.CommandPath())
	case dash > 1:
		return usage("%s takes one cluster before \"--\", and %d arguments came", cmd.CommandPath(), dash)
	case len(args) == 1 && !elsewhere:
		return usage(`%s: what is the token for? Write "-- COMMAND" after the cluster, or --pgp-key FILE; a token in the clear is never printed`, cmd.CommandPath())
	case len(args) > 1 && elsewhere:
		return usage("%s: --pgp-key and --revoke run no command; leave it out", cmd.CommandPath())
	}
	return nil
}

// withToken is a command that runs with a root token.
type withToken struct {
	a      *app
	c      *cluster.Cluster
	args   []string
	path   string
	failed error // *childError, where it ended with another code than 0
}

// find looks the command up before there is a token.
func (w *withToken) find() error {
	path, err := exec.LookPath(w.args[0])
	if err != nil {
		return usage("the command %q that is to get the token cannot be run: %w", w.args[0], err)
	}
	w.path = path
	return nil
}

// childError is a command that ended with another exit code than 0.
type childError struct {
	command string
	code    int
}

func (e *childError) Error() string {
	return fmt.Sprintf("the command %q ended with %d; its root token is revoked", e.command, e.code)
}

// childGrace is how long a command has to end that was told to.
const childGrace = 10 * time.Second

// use runs the command. That it failed is no error here: the token is revoked in either case.
func (w *withToken) use(ctx context.Context, address string, token []byte) error {
	environment, remove, err := w.environment(address, token)
	if err != nil {
		return err
	}
	defer remove()
	cmd := exec.CommandContext(ctx, w.path, w.args[1:]...) //nolint:gosec // it is what the operator typed
	cmd.Env = environment
	cmd.Stdin, cmd.Stdout, cmd.Stderr = w.a.stdin, w.a.stdout, w.a.stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = childGrace
	err = cmd.Run()
	if ended := (*exec.ExitError)(nil); errors.As(err, &ended) {
		code := ended.ExitCode()
		if status, ok := ended.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			code = 128 + int(status.Signal()) // as shells count
		}
		w.failed, err = &childError{command: w.args[0], code: code}, nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("running %q: %w", w.args[0], err)
	}
	return nil
}

// ofVault are variables that would send the token elsewhere than to the node, or have its answers believed unseen.
var ofVault = []string{
	"ADDR", "TOKEN", "CACERT", "CACERT_BYTES", "CAPATH", "TLS_SERVER_NAME", "SKIP_VERIFY", "AGENT_ADDR", "PROXY_ADDR", "HTTP_PROXY", "REDIRECT_ADDR",
	"CLUSTER_ADDR", "SRV_LOOKUP", "CLIENT_CERT", "CLIENT_KEY", "WRAP_TTL", "MFA", "HEADERS",
}

// environment is what the command sees: ours, but for what concerns another Vault.
func (w *withToken) environment(address string, token []byte) (environment []string, remove func(), err error) {
	for _, variable := range os.Environ() {
		name, _, _ := strings.Cut(variable, "=")
		_, rest, ofVaultOrBao := strings.Cut(name, "_")
		if strings.HasPrefix(name, "VAULT_") || strings.HasPrefix(name, "BAO_") {
			ofVaultOrBao = ofVaultOrBao && slices.Contains(ofVault, rest)
		} else {
			ofVaultOrBao = false
		}
		if !ofVaultOrBao {
			environment = append(environment, variable)
		}
	}
	remove = func() {}
	for _, prefix := range []string{"VAULT_", "BAO_"} {
		environment = append(environment, prefix+"ADDR="+address, prefix+"TOKEN="+string(token))
		if name := w.c.TLS.ServerName; name != "" {
			environment = append(environment, prefix+"TLS_SERVER_NAME="+name)
		}
	}
	if len(w.c.TLS.CA) == 0 {
		if len(w.c.TLS.Pins) > 0 {
			w.a.say("nitroseal: warning: cluster %q is known by pins only, which the command cannot check: it trusts the authorities of this machine", w.c.Name)
		}
		return environment, remove, nil
	}
	dir, err := os.MkdirTemp("", "nitroseal-")
	if err != nil {
		return nil, nil, fmt.Errorf("writing the CA of cluster %q for the command: %w", w.c.Name, err)
	}
	remove = func() { _ = os.RemoveAll(dir) }
	path := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(path, w.c.TLS.CA, 0o600); err != nil {
		remove()
		return nil, nil, fmt.Errorf("writing the CA of cluster %q for the command: %w", w.c.Name, err)
	}
	return append(environment, "VAULT_CACERT="+path, "BAO_CACERT="+path), remove, nil
}

// rootView is a root token for a person, or the revocation of one, as JSON.
type rootView struct {
	Cluster     string `json:"cluster"`
	Node        string `json:"node"`
	Recipient   string `json:"recipient,omitempty"`
	Message     string `json:"message,omitempty"` // OpenPGP
	LeftRevoked bool   `json:"left_revoked"`      // a token that an earlier run left was revoked
}

func (a *app) showRoot(c *cluster.Cluster, result *cluster.RootResult) error {
	view := rootView{Cluster: c.Name, Node: result.Node, Recipient: result.Recipient, Message: string(result.Message), LeftRevoked: result.LeftRevoked}
	if result.Message != nil && a.format == formatTable { // the message alone is fit for a redirection
		a.say("cluster %s has a new root token, for %s", c.Name, result.Recipient)
		return a.output("", result.Message)
	}
	return a.print(view, func(t *table) {
		switch {
		case result.LeftRevoked:
			t.row("cluster "+c.Name, "the root token that was left is revoked")
		default:
			t.row("cluster "+c.Name, "no root token was left")
		}
	})
}
