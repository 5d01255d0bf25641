package main

import (
	"bytes"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/nethsm"
)

func newNetHSMProvisionCommand(a *app) *cobra.Command {
	target := &nethsmTarget{app: a}
	unlock := secretFlag{name: "unlock-passphrase", prompt: "New unlock passphrase of the NetHSM", again: true}
	admin := secretFlag{name: "admin-password", prompt: `New password of the administrator "admin"`, again: true}
	var generate generateFlag
	cmd := &cobra.Command{
		Use:   "provision",
		Short: "Give a new NetHSM its passphrases and its clock",
		Long: `Give a new NetHSM, or one that was reset, its unlock passphrase, the password of its first user "admin" and the
time of this machine, and wait until it is Operational. One that is provisioned already is left alone.

Keep both passphrases where you find them in years: without the unlock passphrase the keys are lost at the next
start. Both have 10 to 200 characters.`,
		Example: `  nitroseal nethsm provision --url https://10.0.0.5
  nitroseal nethsm provision --url https://10.0.0.5 --pin 3f…9a --generate \
    --unlock-passphrase-file /etc/nitroseal/nethsm-unlock --admin-password-file /etc/nitroseal/nethsm-admin`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if target.insecure {
				return usage("the passphrases of a NetHSM are not sent to whoever answers; leave --insecure out and " +
					"confirm its certificate, or give --pin")
			}
			node, err := target.openOne(ctx)
			if err != nil {
				return err
			}
			// Asked before anybody types a passphrase, or a file with one is made.
			asking, cancel := a.within(ctx, ordinaryTimeout)
			err = node.Provisionable(asking)
			cancel()
			if err != nil {
				return err
			}
			var wanted nethsm.Provisioning
			if wanted.UnlockPassphrase, err = a.newSecret(ctx, &unlock, generate); err != nil {
				return err
			}
			if wanted.AdminPassphrase, err = a.newSecret(ctx, &admin, generate); err != nil {
				return err
			}
			if bytes.Equal(wanted.UnlockPassphrase, wanted.AdminPassphrase) {
				return usage("the unlock passphrase and the password of admin are the same; who works as admin every day " +
					"would know what opens a stolen NetHSM: take two")
			}
			working, cancel := a.within(ctx, loginTimeout)
			defer cancel()
			a.progress("Provisioning %s …", node.URLs()[0])
			if err := node.Commission(working, wanted); err != nil {
				return err
			}
			result := provisioned{
				URL: node.URLs()[0], State: string(nethsm.StateOperational), Administrator: "admin", Pins: target.trusted,
			}
			return a.print(result, func(t *table) {
				t.row(result.URL + " is provisioned and Operational; its administrator is \"admin\"")
				t.row(`"nitroseal nethsm setup" makes it ready for wrapping keys`)
			})
		},
	}
	target.add(cmd, true)
	unlock.add(cmd, "the new unlock passphrase")
	admin.add(cmd, "the new password of admin")
	generate.add(cmd)
	return cmd
}

// provisioned is the result of provisioning.
type provisioned struct {
	URL           string `json:"url"`
	State         string `json:"state"`
	Administrator string `json:"administrator"`
	// Pins are those that a person confirmed.
	Pins []string `json:"tls_pins,omitempty"`
}
