package main

import (
	"encoding/base64"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody"
)

func newMaterialOpenCommand(a *app) *cobra.Command {
	var store storeFlag
	var field, out string
	var reveal bool
	cmd := &cobra.Command{
		Use:   "open CLUSTER NAME",
		Short: "Open an item and show what is in it",
		Long: `Open an item with one operation in one HSM, and print its fields in base64. With --field only that field is written, as it is,
byte for byte. The audit log takes note of it before it is opened.

The keys of a cluster of the configuration are shown only with --reveal-keys: nobody needs to see them to unseal or rekey, and
"nitroseal export" gives them out encrypted to people.`,
		Example: `  nitroseal material open prod tls --field key --out /run/tls.key
  nitroseal material open prod tls -o json`,
		Args: arguments("CLUSTER", "NAME"), ValidArgsFunction: a.completeItem,
		RunE: func(cmd *cobra.Command, args []string) error {
			if out != "" && out != "-" && field == "" {
				return usage("--out takes one field; name it with --field")
			}
			ours, err := a.ofCustody(args[0], args[1])
			if err != nil {
				return err
			}
			if ours && !reveal {
				return usage("%q of cluster %q opens the whole cluster; \"nitroseal export\" gives it out encrypted to people, and --reveal-keys shows it "+
					"all the same", args[1], args[0])
			}
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
			return a.audited(ctx, "open material", args[0], args[1], func() error {
				fields, metadata, err := keeper.Open(ctx, args[0], args[1], options)
				if err != nil {
					return explain(err, args[0], args[1])
				}
				defer fields.Wipe()
				a.warnAll(metadata.Warnings)
				return a.showFields(fields, metadata, field, out)
			})
		},
	}
	store.add(cmd, a)
	cmd.Flags().StringVar(&field, "field", "", "write this field only, as it is")
	cmd.Flags().BoolVar(&reveal, "reveal-keys", false, "show keys or a root token of a cluster of the configuration")
	cmd.Flags().StringVar(&out, "out", "", `file for the field, made with mode 0600 (default "-": standard output)`)
	return cmd
}

// openedItemView is an item that was opened, as JSON. The fields are base64; left out where one went to a file.
type openedItemView struct {
	Cluster    string            `json:"cluster"`
	Name       string            `json:"name"`
	Generation uint64            `json:"generation"`
	Key        string            `json:"key"`
	KeyVersion int               `json:"key_version"`
	Fields     map[string][]byte `json:"fields,omitempty"`
	Field      string            `json:"field,omitempty"`
	Out        string            `json:"out,omitempty"`
}

func (a *app) showFields(fields custody.Fields, m custody.Metadata, field, out string) error {
	view := openedItemView{Cluster: m.Cluster, Name: m.Name, Generation: m.Generation, Key: m.Key, KeyVersion: m.Version}
	if field == "" {
		view.Fields = fields
		return a.print(view, func(t *table) {
			for _, name := range fields.Names() {
				t.row(name, base64.StdEncoding.EncodeToString(fields[name]))
			}
		})
	}
	value, there := fields[field]
	if !there {
		return usage("%s of cluster %q has no field %q; it has %s", m.Name, m.Cluster, field, strings.Join(fields.Names(), ", "))
	}
	if toFile := out != "" && out != "-"; toFile {
		if err := a.output(out, value); err != nil {
			return err
		}
		view.Field, view.Out = field, out
		return a.print(view, func(t *table) { t.row(fmt.Sprintf("%s is in %s", field, out)) })
	}
	if a.format == formatJSON {
		view.Fields = map[string][]byte{field: value}
		return a.print(view, nil)
	}
	return a.output("", value)
}
