package main

import (
	"cmp"
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/nethsm"
)

func newNetHSMBackupCommand(a *app) *cobra.Command {
	target := &nethsmTarget{app: a}
	user := "backup"
	password := secretFlag{name: "password", prompt: "Password of the backup user"}
	passphrase := secretFlag{name: "passphrase", prompt: "Backup passphrase of the NetHSM"}
	structureOnly := false
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Save a backup of a NetHSM to a new file",
		Long: `Save a backup of the whole NetHSM to a new file: keys, users, namespaces and settings, encrypted with the backup
passphrase. The file gets its name only when it was read again and found whole, and when the passphrase opened
every entry. An existing file is never replaced.

A machine that should not know the backup passphrase takes --structure-only: then a file that is whole, but
encrypted with another passphrase than you think, is not noticed.

To restore one needs the backup passphrase and the unlock passphrase of the time of the backup. Try it before
you need it.`,
		Example: `  nitroseal nethsm backup nethsm-2026-11-22.backup --device hsm --password-file /run/secrets/backup
  nitroseal nethsm backup /mnt/stick/nethsm.backup --device hsm --structure-only`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			client, err := target.open(ctx)
			if err != nil {
				return err
			}
			secret, err := a.secret(ctx, &password)
			if err != nil {
				return err
			}
			a.wipeAtEnd(secret)
			var opens []byte
			if !structureOnly {
				if opens, err = a.secret(ctx, &passphrase); err != nil {
					return err
				}
				a.wipeAtEnd(opens)
			}
			working, cancel := a.within(ctx, dataTimeout)
			defer cancel()
			if client, err = a.logIn(working, client, nethsm.Credentials{Username: user, Password: secret}); err != nil {
				return err
			}
			a.progress("Making a backup …")
			info, err := client.SaveBackup(working, args[0], opens)
			if err != nil {
				return err
			}
			return a.printBackup(newBackupView(args[0], info))
		},
	}
	target.add(cmd, false)
	cmd.Flags().StringVar(&user, "user", user, "user with the role Backup")
	cmd.Flags().BoolVar(&structureOnly, "structure-only", false, "do not decrypt the backup to check it")
	password.add(cmd, "the backup user's password")
	passphrase.add(cmd, "the backup passphrase")
	cmd.MarkFlagsMutuallyExclusive("structure-only", "passphrase-file")
	cmd.MarkFlagsMutuallyExclusive("structure-only", "passphrase-env")
	return cmd
}

// backupView is a backup file, in JSON.
type backupView struct {
	File       string `json:"file"`
	Size       int64  `json:"size"`
	Format     int    `json:"format"`
	Entries    int    `json:"entries"`
	Decrypted  bool   `json:"decrypted"`
	DeviceID   string `json:"device_id,omitempty"`
	Users      int    `json:"users"`
	Keys       int    `json:"keys"`
	Namespaces int    `json:"namespaces"`
}

func newBackupView(file string, info nethsm.BackupInfo) backupView {
	return backupView{
		File: absolute(file), Size: info.Size, Format: info.Format, Entries: info.Entries, Decrypted: info.Opened,
		DeviceID: info.DeviceID, Users: info.Users, Keys: info.Keys, Namespaces: info.Namespaces,
	}
}

func (a *app) printBackup(view backupView) error {
	return a.print(view, func(t *table) { view.rows(t) })
}

func (b backupView) rows(t *table) {
	t.row("file", b.File)
	t.row("size", fmt.Sprintf("%d bytes, %d entries", b.Size, b.Entries))
	if !b.Decrypted {
		t.row("checked", "its structure only; whether the passphrase opens it was not tried")
		return
	}
	t.row("holds", fmt.Sprintf("%d users, %d keys, %d namespaces", b.Users, b.Keys, b.Namespaces))
	t.row("of NetHSM", cmp.Or(b.DeviceID, "-"))
	t.row("checked", "every entry decrypts with the backup passphrase")
}

const restoreWarning = `Restoring %s to %s, which is %s:
%s
  - afterwards the unlock passphrase is the one that the backup was made under, the backup passphrase too`

// The warnings for each state that a backup can be restored in.
var restoreWarnings = map[nethsm.State]string{
	nethsm.StateUnprovisioned: `  - it becomes what the backup was made of, with its users, keys, settings and TLS certificate:
    its pin may change
  - it ends Locked`,
	nethsm.StateOperational: `  - its users and keys are replaced by those of the backup; those that are not in the backup are gone
  - unattended boot is switched off and it ends Locked, unless the backup was made of this very NetHSM under the
    same unlock passphrase
  - the administrator's password is the one in the backup`,
}

func newNetHSMRestoreCommand(a *app) *cobra.Command {
	target, admin := &nethsmTarget{app: a}, &nethsmAdministrator{}
	passphrase := secretFlag{name: "passphrase", prompt: "Backup passphrase of the time of the backup"}
	yes := false
	cmd := &cobra.Command{
		Use:   "restore FILE",
		Short: "Restore a backup to a NetHSM",
		Long: `Restore a backup to a NetHSM that is new, or to one that is Operational. The file is read and decrypted first,
to its end: a NetHSM restores half a file as well. What then happens is said and has to be confirmed, by a
person or with --yes.`,
		Example: `  nitroseal nethsm restore nethsm-2026-11-22.backup --url https://10.0.0.9 --pin 3f…9a
  nitroseal nethsm restore nethsm-2026-11-22.backup --device hsm --node https://10.0.0.6 --yes \
    --passphrase-file /etc/nitroseal/backup-passphrase`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if target.insecure {
				return usage("passphrases are not sent to whoever answers; leave --insecure out and confirm the " +
					"certificate, or give --pin")
			}
			node, err := target.openOne(ctx)
			if err != nil {
				return err
			}
			secret, err := a.secret(ctx, &passphrase)
			if err != nil {
				return err
			}
			a.wipeAtEnd(secret)
			backup, err := nethsm.LoadBackup(args[0], secret)
			if err != nil {
				return err
			}
			if node, err = a.restorable(ctx, args[0], node, admin, target); err != nil {
				return err
			}
			if !yes {
				if err := a.confirm(ctx, "Restore it?", "run it with --yes"); err != nil {
					return err
				}
			}
			working, cancel := a.within(ctx, dataTimeout)
			defer cancel()
			a.progress("Restoring …")
			state, err := node.RestoreBackup(working, backup, secret)
			if err != nil {
				return err
			}
			return a.printRestored(args[0], node.URLs()[0], backup.Info, state)
		},
	}
	target.add(cmd, true)
	admin.add(cmd)
	passphrase.add(cmd, "the backup passphrase")
	cmd.Flags().BoolVar(&yes, "yes", false, "do it without asking a person")
	return cmd
}

// restorable says what a restore does to the node, and returns the node with the credentials that it needs.
func (a *app) restorable(
	ctx context.Context, file string, node *nethsm.Client, admin *nethsmAdministrator, target *nethsmTarget,
) (*nethsm.Client, error) {
	asking, cancel := a.within(ctx, ordinaryTimeout)
	state, err := node.State(asking)
	cancel()
	if err != nil {
		return nil, err
	}
	url := node.URLs()[0]
	warning, possible := restoreWarnings[state]
	if !possible {
		return nil, fmt.Errorf("restoring a backup: %w: %s is %s; unlock it, or reset it to its factory settings",
			nethsm.ErrState, url, state)
	}
	if state == nethsm.StateOperational {
		login, err := admin.credentials(ctx, target)
		if err != nil {
			return nil, err
		}
		proving, cancel := a.within(ctx, loginTimeout)
		defer cancel()
		if node, err = a.logIn(proving, node, login); err != nil {
			return nil, err
		}
	}
	a.say(restoreWarning, file, url, state, warning)
	return node, nil
}

// restored is the result of a restore, in JSON.
type restored struct {
	backupView
	URL   string `json:"url"`
	State string `json:"state"`
}

func (a *app) printRestored(file, url string, info nethsm.BackupInfo, state nethsm.State) error {
	result := restored{newBackupView(file, info), url, string(state)}
	return a.print(result, func(t *table) {
		result.rows(t)
		t.row("restored to", url)
		t.row("it is now", state)
		if state == nethsm.StateLocked {
			t.row("next", `"nitroseal nethsm unlock", with the unlock passphrase that the backup was made under`)
		}
	})
}
