package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/token"
)

func newServeTokenRevokeCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "revoke ID…",
		Short: "Take tokens away",
		Long: `Revoke tokens by their ids, which "nitroseal serve token list" shows. Servers refuse them within five seconds. A Vault whose token was
revoked goes on while it is unsealed, says that its seal is unhealthy, and does not start any more: give it another one first.

Where the audit log takes no line, tokens are revoked all the same.`,
		Example: "  nitroseal serve token revoke 7kq2mzpd3x",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage(`%s: ID is missing; "nitroseal serve token list" shows them`, cmd.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: a.completeTokens,
		RunE: func(cmd *cobra.Command, ids []string) error {
			if err := token.CheckIDs(ids...); err != nil {
				return err // before the audit log has it: it may be a token
			}
			kept, err := a.tokenStore(cmd.Context())
			if err == nil {
				err = a.checkStateDir() // as for a new token
			}
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			var revoked []string
			revoke := func() error {
				var err error
				revoked, err = token.Revoke(ctx, kept, ids...)
				return err
			}
			err = a.act(ctx, audit.Act{Verb: "revoke token", Detail: map[string]string{"tokens": strings.Join(ids, ",")}}, revoke)
			if errors.Is(err, audit.ErrNoSink) { // keeping a token good that somebody wants to be gone would be worse
				a.say("nitroseal: warning: %v; it is done all the same", err)
				err = revoke()
			}
			return errors.Join(a.print(revokedView{list(revoked)}, func(t *table) {
				for _, id := range revoked {
					t.row(id, "revoked")
				}
			}), err)
		},
	}
}

type revokedView struct {
	Revoked []string `json:"revoked"`
}

// completionTimeout is how long somebody who pressed Tab waits for a store.
const completionTimeout = 3 * time.Second

// completeTokens completes arguments with the ids of tokens.
func (a *app) completeTokens(cmd *cobra.Command, given []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	kept, err := a.tokenStore(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	listed, _ := token.List(ctx, kept)
	var known []cobra.Completion
	for i := range listed {
		if !slices.Contains(given, listed[i].ID) {
			known = append(known, cobra.CompletionWithDesc(listed[i].ID, listed[i].Name))
		}
	}
	return known, cobra.ShellCompDirectiveNoFileComp
}
