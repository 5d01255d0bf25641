package main

import (
	"encoding/json"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyBackupCommand(a *app) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "backup KEY",
		Short: "Print the key record of a wrapping key, to be kept elsewhere",
		Long: `Print the key record of a wrapping key. It holds no secret, and together with one of the key's HSMs it is all that is needed to
open what the key sealed, after this machine was lost. Keep it elsewhere, and note down its SHA-256, which goes to stderr:
restoring it asks for that, so that nobody slips in another one. Once the record is written, that it was read is recorded.`,
		Example:           "  nitroseal key backup prod --out prod.key-record.json",
		Args:              arguments("KEY"),
		ValidArgsFunction: a.completeKeys,
		RunE: func(cmd *cobra.Command, args []string) error {
			keys, err := a.keyring()
			if err != nil {
				return err
			}
			return keys.BackupTo(cmd.Context(), args[0], by(), func(backup keyring.KeyRecord) error { return a.putKeyRecord(args[0], out, backup) })
		},
	}
	cmd.Flags().StringVar(&out, "out", "", `file for the key record (default "-": standard output)`)
	return cmd
}

// putKeyRecord writes a key record to a file or to standard output, and its SHA-256 where a person sees it.
func (a *app) putKeyRecord(name, out string, backup keyring.KeyRecord) error {
	toFile := out != "" && out != "-"
	if toFile || a.format != formatJSON {
		if err := a.output(out, append(backup.Record, '\n')); err != nil {
			return err
		}
		a.say("SHA-256 of the key record: %s", backup.SHA256)
	}
	view := keyRecordView{Name: name, SHA256: backup.SHA256}
	if toFile {
		view.Out = out
	} else {
		view.Record = backup.Record
	}
	return a.print(view, nil)
}

// keyRecordView is a key record as JSON.
type keyRecordView struct {
	Name   string          `json:"name"`
	SHA256 string          `json:"record_sha256"`
	Out    string          `json:"out,omitempty"`
	Record json.RawMessage `json:"record,omitempty"`
}
