package main

import (
	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody"
)

func newMaterialDeleteCommand(a *app) *cobra.Command {
	var store storeFlag
	var cas casFlag
	var discard bool
	cmd := &cobra.Command{
		Use:   "delete CLUSTER NAME",
		Short: "Delete an item from its store for good",
		Long: `Delete an item from its store. Its record stays as a gravestone, so that no old envelope comes back to life.

What a cluster of the configuration is unsealed with is deleted only with --discard-keys: a Vault that has data and needs these keys
is lost then, unless somebody else has shares of it. It is meant for a Vault that was wiped and is to be initialised anew.`,
		Example: "  nitroseal material delete prod tls --cas 3",
		Args:    arguments("CLUSTER", "NAME"), ValidArgsFunction: a.completeItem,
		RunE: func(cmd *cobra.Command, args []string) error {
			cluster, name := args[0], args[1]
			ours, err := a.ofCustody(cluster, name)
			if err != nil {
				return err
			}
			if ours && !discard {
				return usage("%q of cluster %q is what its nodes are opened with, and without it their data is lost; where that is meant, give --discard-keys",
					name, cluster)
			}
			expected, err := cas.generation()
			if err != nil {
				return err
			}
			keeper, err := a.keeper()
			if err != nil {
				return err
			}
			options := custody.DeleteOptions{CAS: expected, By: by()}
			if options.Store, err = store.of(a, cluster, name); err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			err = a.audited(ctx, "delete material", cluster, name, func() error {
				return explain(keeper.Delete(ctx, cluster, name, options), cluster, name)
			})
			if err != nil {
				return err
			}
			return a.gone(cluster + "/" + name)
		},
	}
	store.add(cmd, a)
	cas.add(cmd, "the generation that the item must be at (default: any)")
	cmd.Flags().BoolVar(&discard, "discard-keys", false, "delete what a cluster is unsealed with: a Vault that needs it is lost")
	return cmd
}

func newMaterialAcceptCommand(a *app) *cobra.Command {
	var store storeFlag
	cmd := &cobra.Command{
		Use:   "accept-generation CLUSTER NAME GENERATION",
		Short: "Let an older or newer envelope open than is expected, after a backup was restored",
		Long: `Let the envelope that lies in the store open, although another generation is expected: after you restored a backup of the store, or
of state_dir, yourself. Who can write the store could put an older envelope back, one with keys that were replaced: where you
restored nothing, find out who did. It has to open, which costs one operation in an HSM.`,
		Example: "  nitroseal material show prod unseal\n  nitroseal material accept-generation prod unseal 4",
		Args:    arguments("CLUSTER", "NAME", "GENERATION"), ValidArgsFunction: a.completeItem,
		RunE: func(cmd *cobra.Command, args []string) error {
			cluster, name := args[0], args[1]
			generation, err := parseGeneration(args[2])
			if err != nil {
				return err
			}
			keeper, err := a.keeper()
			if err != nil {
				return err
			}
			options, err := store.read(a, cluster, name)
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			return a.audited(ctx, "accept generation", cluster, name, func() error {
				accepted, err := keeper.AcceptGeneration(ctx, cluster, name, generation, options)
				if err != nil {
					return err
				}
				view := newItemView(accepted)
				return a.print(view, view.rows)
			})
		},
	}
	store.add(cmd, a)
	return cmd
}
