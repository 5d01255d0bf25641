package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func newExportCommand(a *app) *cobra.Command {
	var pgpKeys []string
	var dir string
	request := cluster.ExportRequest{}
	cmd := &cobra.Command{
		Use:   "export CLUSTER --pgp-key FILE",
		Short: "Give the keys of a cluster to people, as OpenPGP messages",
		Long: `Open the keys of a cluster and encrypt them to one or more people, any of whom can read them: as one message that "nitroseal import" and people
understand, or with --each a message for each share, as Vault makes them. Keys never leave in the clear. Shares that persons hold already
come as the messages that Vault made for them. The keys stay in custody; "nitroseal rekey" makes what was given out worthless.`,
		Example: `  nitroseal export prod --pgp-key alice.asc > prod.asc
  nitroseal export prod --pgp-key alice.asc --pgp-key bob.asc --each --out ./shares`,
		Args: arguments("CLUSTER"), ValidArgsFunction: a.completeCluster,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.cluster(args[0])
			if err != nil {
				return err
			}
			if len(pgpKeys) == 0 {
				return usage("--pgp-key is missing: keys leave encrypted to somebody, or not at all")
			}
			for _, path := range pgpKeys {
				key, err := a.input(cmd.Context(), path, maxPGPKeyFile, "the OpenPGP key")
				if err != nil {
					return err
				}
				request.Recipients = append(request.Recipients, key)
			}
			if dir != "" {
				if err := os.MkdirAll(dir, 0o700); err != nil {
					return usage("--out: making %s: %w", dir, pathless(err))
				}
			}
			custodian, err := a.custodian()
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), openTimeout)
			defer cancel()
			request.By = by()
			exported, err := custodian.Export(ctx, c, request)
			if err != nil {
				return err
			}
			return a.showExport(c, exported, dir)
		},
	}
	cmd.Flags().StringArrayVar(&pgpKeys, "pgp-key", nil, `file with the public OpenPGP key of a person ("-": standard input); may be given several times`)
	cmd.Flags().BoolVar(&request.Each, "each", false, "a message for each share, in place of one with all of them")
	cmd.Flags().BoolVar(&request.RootToken, "root-token", false, "the root token as well, where it is kept")
	cmd.Flags().BoolVar(&request.Former, "former", false, "the keys from before the last rekey in their place, which an old snapshot may want")
	cmd.Flags().StringVar(&dir, "out", "", "folder for the messages, a file for each (default: they are printed)")
	_ = cmd.MarkFlagDirname("out")
	_ = cmd.MarkFlagFilename("pgp-key", "asc", "gpg", "pgp")
	return cmd
}

// exportView is an export as JSON.
type exportView struct {
	Cluster  string         `json:"cluster"`
	Messages []exportedView `json:"messages"`
}

// exportedView is a message. It is left out where it went to a file.
type exportedView struct {
	Name       string   `json:"name"`
	Recipients []string `json:"recipients"`
	File       string   `json:"file,omitempty"`
	Message    string   `json:"message,omitempty"`
}

func (a *app) showExport(c *cluster.Cluster, exported []cluster.Exported, dir string) error {
	view := exportView{Cluster: c.Name, Messages: []exportedView{}}
	for _, message := range exported {
		shown := exportedView{Name: message.Name, Recipients: list(message.Recipients)}
		if dir == "" {
			shown.Message = string(message.Message)
		} else {
			shown.File = filepath.Join(dir, exportFile(c, message.Name))
			if err := writeNew(shown.File, message.Message); err != nil {
				return err
			}
		}
		view.Messages = append(view.Messages, shown)
	}
	if dir == "" && len(exported) == 1 && a.format == formatTable { // fit for a redirection
		return a.output("", exported[0].Message)
	}
	return a.print(view, func(t *table) {
		for _, message := range view.Messages {
			where := message.File
			if where == "" {
				where = "message below"
			}
			t.row(message.Name, "for "+strings.Join(message.Recipients, " or "), where)
		}
		for _, message := range view.Messages {
			showMessage(t, message.Name, message.Message)
		}
	})
}

// exportFile is the name of the file of a message.
func exportFile(c *cluster.Cluster, name string) string {
	if name != c.Name {
		name = c.Name + "-" + name
	}
	return name + ".asc"
}

// writeNew writes a file that must not be there.
func writeNew(path string, content []byte) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return usage("%s is there already; move it away, or name another folder", path)
	}
	if err := writeFile(path, content); err != nil {
		return fmt.Errorf("writing %s: %w", path, pathless(err))
	}
	return nil
}
