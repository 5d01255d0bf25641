package main

import (
	"cmp"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/token"
)

func newServeTokenListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the tokens, and what each is good for",
		Long: `List the tokens of all servers that share the store: what each is for, where it is taken from, who made it and when. What keeps one from
being of use on this machine, a wrapping key that is not there for example, is told below the list.

When a token was last used is known to each server since it was started: the list has what the one of this machine says, and the metric
nitroseal_serve_token_last_use_timestamp_seconds is that of each. A Vault that is unsealed asks every ten minutes.`,
		Example: "  nitroseal serve token list -o json",
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			kept, err := a.tokenStore(cmd.Context())
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			listed, err := token.List(ctx, kept)
			if err != nil {
				return err
			}
			view := tokenListView{Tokens: []listedTokenView{}}
			uses := lastUses(ctx, a.configuration)
			troubles := map[string]string{}
			for i := range listed {
				shown := listedTokenView{tokenView: showToken(&listed[i].Token), LastUsedHere: stamp(uses[listed[i].ID]), Error: text(listed[i].Err), Warnings: []string{}}
				for _, key := range shown.Keys {
					trouble, asked := troubles[key]
					if !asked {
						trouble = a.unserved(ctx, key)
						troubles[key] = trouble
					}
					if trouble != "" {
						shown.Warnings = append(shown.Warnings, trouble)
					}
				}
				view.Tokens = append(view.Tokens, shown)
			}
			return a.print(view, view.rows)
		},
	}
}

type tokenListView struct {
	Tokens []listedTokenView `json:"tokens"`
}

// listedTokenView is a token in a list.
type listedTokenView struct {
	tokenView

	LastUsedHere string   `json:"last_used_here"` // by the server of this machine, since that was started; empty where it does not tell
	Warnings     []string `json:"warnings"`       // why it is of no use on this machine
	Error        string   `json:"error"`          // why its item is no token
}

func (v *tokenListView) rows(t *table) {
	t.row("ID", "NAME", "KEYS", "BOUND TO", "LIMIT", "CREATED", "BY", "LAST USED HERE")
	for i := range v.Tokens {
		one := &v.Tokens[i]
		if one.Error != "" {
			t.row(one.ID, "DAMAGED", "-", "-", "-", "-", "-", "-")
			continue
		}
		t.row(one.ID, one.Name, strings.Join(one.Keys, ","), one.bound(), one.limit(), one.Created, one.CreatedBy, cmp.Or(one.LastUsedHere, "-"))
	}
	for i := range v.Tokens {
		one := &v.Tokens[i]
		t.field("error "+one.ID, one.Error)
		for _, warning := range one.Warnings {
			t.field("warning "+one.ID, warning)
		}
	}
}
