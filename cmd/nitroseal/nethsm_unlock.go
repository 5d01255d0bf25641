package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/nethsm"
)

func newNetHSMUnlockCommand(a *app) *cobra.Command {
	target := &nethsmTarget{app: a}
	passphrase := secretFlag{name: "passphrase", prompt: "Unlock passphrase of the NetHSM"}
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Unlock the nodes of a NetHSM that are locked",
		Long: `Unlock every node that is Locked, as each is after its start unless unattended boot is on. Nodes that are
Operational get no passphrase. The passphrase comes from the flags, else from the configuration, else from a
person.`,
		Example: `  nitroseal nethsm unlock --device hsm
  nitroseal nethsm unlock --device hsm --node https://10.0.0.6 --passphrase-file /run/secrets/unlock`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			client, err := target.open(ctx)
			if err != nil {
				return err
			}
			var secret []byte
			if locked, err := a.anyIn(ctx, client, nethsm.StateLocked); err != nil {
				return err
			} else if locked {
				if secret, err = target.unlockPassphrase(ctx, &passphrase); err != nil {
					return err
				}
			}
			working, cancel := a.within(ctx, loginTimeout)
			defer cancel()
			return a.printNodes(client.UnlockNodes(working, secret), "unlocked", "was unlocked already")
		},
	}
	target.add(cmd, false)
	passphrase.add(cmd, "the unlock passphrase")
	return cmd
}

// anyIn tells whether any node is in a state, so that a secret will be needed; one that does not answer says so when
// its turn comes.
func (a *app) anyIn(ctx context.Context, client *nethsm.Client, wanted nethsm.State) (bool, error) {
	ctx, cancel := a.within(ctx, ordinaryTimeout)
	defer cancel()
	for _, url := range client.URLs() {
		node, err := client.At(url)
		if err != nil {
			return false, err
		}
		if state, err := node.State(ctx); err == nil && state == wanted {
			return true, nil
		}
	}
	return false, ctx.Err()
}

// unlockPassphrase is that of the flags, else of the configuration, else a person types it. It is wiped at the end.
func (t *nethsmTarget) unlockPassphrase(ctx context.Context, s *secretFlag) ([]byte, error) {
	var secret []byte
	var err error
	if !s.given() {
		secret, err = t.configuredSecret(t.configured.UnlockPassphraseFile, t.configured.UnlockPassphraseEnv)
	}
	if err == nil && secret == nil {
		secret, err = t.app.secret(ctx, s)
	}
	t.app.wipeAtEnd(secret)
	return secret, err
}

func newNetHSMLockCommand(a *app) *cobra.Command {
	target, admin := &nethsmTarget{app: a}, &nethsmAdministrator{}
	cmd := &cobra.Command{
		Use:   "lock",
		Short: "Lock the nodes of a NetHSM",
		Long: `Lock every node that is Operational: nothing that it holds can be used until somebody unlocks it. Needs an
administrator of the root namespace.`,
		Example: "  nitroseal nethsm lock --device hsm --node https://10.0.0.6",
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			client, err := target.open(ctx)
			if err != nil {
				return err
			}
			login, err := admin.credentials(ctx, target)
			if err != nil {
				return err
			}
			working, cancel := a.within(ctx, loginTimeout)
			defer cancel()
			if needed, err := a.anyIn(working, client, nethsm.StateOperational); err != nil {
				return err
			} else if needed {
				if client, err = a.logIn(working, client, login); err != nil {
					return err
				}
			}
			return a.printNodes(client.LockNodes(working), "locked", "was locked already")
		},
	}
	target.add(cmd, false)
	admin.add(cmd)
	return cmd
}

// nodeOutcome is what became of one node, in JSON.
type nodeOutcome struct {
	URL     string `json:"url"`
	Before  string `json:"before,omitempty"`
	State   string `json:"state,omitempty"`
	Changed bool   `json:"changed"`
	Error   string `json:"error,omitempty"`
}

// printNodes prints what became of each node, and fails where one is not as wanted.
func (a *app) printNodes(results []nethsm.NodeResult, changed, same string) error {
	var outcomes []nodeOutcome
	var failures []error
	for _, result := range results {
		outcome := nodeOutcome{URL: result.URL, Before: string(result.Before), State: string(result.After), Changed: result.Changed()}
		if result.Err != nil {
			outcome.Error = result.Err.Error()
			failures = append(failures, result.Err)
		}
		outcomes = append(outcomes, outcome)
	}
	err := a.print(map[string]any{"nodes": list(outcomes)}, func(t *table) {
		t.row("NODE", "STATE", "WHAT HAPPENED")
		for i, outcome := range outcomes {
			what := same
			switch {
			case results[i].Err != nil:
				what = "failed: the message below says why"
			case outcome.Changed:
				what = changed
			}
			t.row(outcome.URL, outcome.State, what)
		}
	})
	if failures != nil {
		err = errors.Join(err, fmt.Errorf("%d of %d nodes: %w", len(failures), len(results), errors.Join(failures...)))
	}
	return err
}
