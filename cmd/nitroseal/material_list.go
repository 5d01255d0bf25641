package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
)

func newMaterialListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list [CLUSTER]",
		Short: "List what is kept, of one cluster or of all",
		Long: `List the items of a cluster, or of all: those that are recorded here, and those that lie in the stores of the configuration.
No HSM is asked.`,
		Example: "  nitroseal material list\n  nitroseal material list prod -o json",
		Args:    atMost(1, "CLUSTER"), ValidArgsFunction: a.completeCluster,
		RunE: func(cmd *cobra.Command, args []string) error {
			cluster := ""
			if len(args) == 1 {
				cluster = args[0]
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			view, err := a.listMaterial(ctx, cluster)
			if err != nil {
				return err
			}
			return a.print(view, func(t *table) {
				t.row("CLUSTER", "NAME", "STATE", "GENERATION", "KEY", "HSMS", "STORE")
				for _, i := range view.Items {
					t.row(i.Cluster, i.Name, i.State, i.Generation, versionOf(i.Key, i.KeyVersion, i.LatestVersion), i.HSMs, i.Store)
				}
				for _, warning := range view.Warnings {
					t.row("warning: " + warning)
				}
			})
		},
	}
}

// materialView is a list of items as JSON.
type materialView struct {
	Items    []itemView `json:"items"`
	Warnings []string   `json:"warnings"`
}

// listMaterial looks into every store: a machine that has no record of an item yet sees it as well.
func (a *app) listMaterial(ctx context.Context, cluster string) (materialView, error) {
	view := materialView{Items: []itemView{}, Warnings: []string{}}
	found, warnings, err := a.findMaterial(ctx, cluster)
	if err != nil {
		return view, err
	}
	view.Warnings = append(view.Warnings, warnings...)
	for _, item := range found {
		described, err := item.keeper.Get(ctx, item.Cluster, item.Name, custody.ReadOptions{Store: item.store})
		switch {
		case errors.Is(err, custody.ErrNotFound): // deleted meanwhile
		case ctx.Err() != nil:
			return view, err
		case err != nil:
			view.Warnings = append(view.Warnings, err.Error())
		default:
			view.Items = append(view.Items, newItemView(described))
		}
	}
	return view, nil
}

// foundItem is an item, the keeper that knows where it lies, and the store where it was found without a record.
type foundItem struct {
	custody.Ref

	keeper *custody.Keeper
	store  string // "" where there is a record
}

// findMaterial lists the items of a cluster, of all where it is "", in order.
func (a *app) findMaterial(ctx context.Context, cluster string) (found []foundItem, warnings []string, err error) {
	c, err := a.config()
	if err != nil {
		return nil, nil, err
	}
	settings, err := a.keeperConfig()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range append([]string{""}, storeNames(c)...) { // first those that have a record
		settings.DefaultStore = func(context.Context) (string, error) { return name, nil }
		keeper := custody.New(settings)
		items, told, err := keeper.List(ctx, cluster)
		if err != nil {
			return nil, nil, err
		}
		for _, warning := range told {
			if !slices.Contains(warnings, warning) {
				warnings = append(warnings, warning)
			}
		}
		for _, ref := range items {
			if !slices.ContainsFunc(found, func(other foundItem) bool { return other.Ref == ref }) {
				found = append(found, foundItem{Ref: ref, keeper: keeper, store: name})
			}
		}
	}
	slices.SortFunc(found, func(a, b foundItem) int {
		return strings.Compare(a.Cluster+"/"+a.Name, b.Cluster+"/"+b.Name)
	})
	return found, warnings, nil
}

func storeNames(c *config.Config) []string {
	all := make([]string, len(c.Stores))
	for i := range c.Stores {
		all[i] = c.Stores[i].Name
	}
	return all
}

func newMaterialShowCommand(a *app) *cobra.Command {
	var store storeFlag
	cmd := &cobra.Command{
		Use:   "show CLUSTER NAME",
		Short: "Show what is known of an item, without opening it",
		Long: `Show what is known of an item: where it lies, its generation and the one that is expected, the wrapping key and on how many
HSMs it opens. It succeeds for an item that would not open, and says why. No HSM is asked.`,
		Example: "  nitroseal material show prod unseal",
		Args:    arguments("CLUSTER", "NAME"), ValidArgsFunction: a.completeItem,
		RunE: func(cmd *cobra.Command, args []string) error {
			keeper, err := a.keeper()
			if err != nil {
				return err
			}
			options, err := store.read(a, args[0], args[1])
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			described, err := keeper.Get(ctx, args[0], args[1], options)
			if err != nil {
				return err
			}
			view := newItemView(described)
			return a.print(view, view.rows)
		},
	}
	store.add(cmd, a)
	return cmd
}

// read is how an item is read.
func (s *storeFlag) read(a *app, cluster, item string) (custody.ReadOptions, error) {
	name, err := s.of(a, cluster, item)
	return custody.ReadOptions{Store: name, By: by()}, err
}

// atMost allows that many arguments or fewer.
func atMost(n int, names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > n {
			return usage("%s takes %s at most, and %d came", cmd.CommandPath(), fmt.Sprintf("%d argument (%s)", n, strings.Join(names, " ")), len(args))
		}
		return nil
	}
}
