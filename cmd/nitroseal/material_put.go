package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func newMaterialPutCommand(a *app) *cobra.Command {
	var store storeFlag
	var cas casFlag
	var key, request string
	cmd := &cobra.Command{
		Use:   "put CLUSTER NAME FIELD=FILE…",
		Short: "Seal files as the fields of an item and store it",
		Long: `Seal the content of files, byte for byte, into one envelope, a field for each, and store it as a new generation of the item. "-"
as a file is standard input. All fields together have room for 64 KiB.

A write replaces whatever is there, unless --cas says at which generation the item must be, 0 for none at all. Sealing asks no
HSM but for the first time after the command's start, when the key that authenticates envelopes is opened.`,
		Example: `  nitroseal material put prod tls key=vault.key cert=vault.pem --key prod
  pass show prod/token | nitroseal material put prod monitoring token=- --cas 0`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 3 {
				return usage(`%s: CLUSTER, NAME and FIELD=FILE are needed; "%s --help" shows an example`, cmd.CommandPath(), cmd.CommandPath())
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) > 1 {
				return nil, cobra.ShellCompDirectiveDefault
			}
			return a.completeItem(cmd, args, begun)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cluster, name := args[0], args[1]
			ours, err := a.ofCustody(cluster, name)
			if err != nil {
				return err
			}
			if ours {
				return usage("%q of cluster %q belongs to custody: \"nitroseal init\", \"rekey\" and \"import\" write it; take another name", name, cluster)
			}
			expected, err := cas.generation()
			if err != nil {
				return err
			}
			keeper, err := a.keeper()
			if err != nil {
				return err
			}
			options := custody.PutOptions{Key: key, CAS: expected, By: by(), RequestID: request}
			if options.Store, err = store.of(a, cluster, name); err != nil {
				return err
			}
			if err := a.chooseKey(cmd.Context(), keeper, cluster, name, &options); err != nil {
				return err
			}
			fields, err := a.readFields(cmd.Context(), args[2:])
			if err != nil {
				return err
			}
			defer fields.Wipe()
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			return a.audited(ctx, "put material", cluster, name, func() error {
				written, err := keeper.Put(ctx, cluster, name, fields, options)
				if err != nil {
					return explain(err, cluster, name)
				}
				view := newItemView(written)
				return a.print(view, view.rows)
			})
		},
	}
	store.add(cmd, a)
	cas.add(cmd, "the generation that the item must be at, 0 for none at all (default: any)")
	cmd.Flags().StringVar(&key, "key", "", "the wrapping key (default: the one that the item has, or its cluster's)")
	cmd.Flags().StringVar(&request, "request-id", "", "names the write, so that repeating it, after a time-out, is no second one")
	_ = cmd.RegisterFlagCompletionFunc("key", func(cmd *cobra.Command, _ []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return a.completeKeys(cmd, nil, begun)
	})
	return cmd
}

// chooseKey fills in the wrapping key of an item that has none yet.
func (a *app) chooseKey(ctx context.Context, keeper *custody.Keeper, cluster, name string, options *custody.PutOptions) error {
	if options.Key != "" {
		return nil
	}
	_, err := keeper.Get(ctx, cluster, name, custody.ReadOptions{Store: options.Store})
	if err == nil || !errors.Is(err, custody.ErrNotFound) {
		return err
	}
	c, err := a.config()
	if err != nil {
		return err
	}
	if found, ok := c.Cluster(cluster); ok && found.Key != "" {
		options.Key = found.Key
		return nil
	}
	return usage("a new item needs a wrapping key; name it with --key")
}

// readFields reads FIELD=FILE. The caller wipes them.
func (a *app) readFields(ctx context.Context, args []string) (custody.Fields, error) {
	fields := custody.Fields{}
	for _, arg := range args {
		name, path, ok := strings.Cut(arg, "=")
		var err error
		switch {
		case !ok || name == "" || path == "":
			err = usage("one of the arguments is not FIELD=FILE; a secret itself is never an argument, where other users see it")
		case fields[name] != nil:
			err = usage("the field %q is there twice", name)
		default:
			fields[name], err = a.input(ctx, path, envelope.MaxPayload, fmt.Sprintf("the field %q", name))
		}
		if err != nil {
			fields.Wipe()
			return nil, err
		}
	}
	return fields, nil
}
