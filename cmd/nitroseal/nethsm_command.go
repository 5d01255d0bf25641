package main

import (
	"time"

	"github.com/spf13/cobra"
)

// How long the verbs of a NetHSM may take. A NetHSM that lost its database refuses right passwords for a minute, and a
// password is called wrong only when it was refused for longer than that.
const (
	loginTimeout = 3 * time.Minute
	setupTimeout = 15 * time.Minute // keys of 4096 bits, and a log-in for each user
	dataTimeout  = 30 * time.Minute // backups
)

const nethsmHelp = `Make a NetHSM ready and look after it: an appliance, or the software container.

A NetHSM of the configuration is named with --device; one that is not there yet is described with --url and what
proves its certificate: --ca-cert or --pin. Where neither is given and the certificate is the NetHSM's own, its
SHA-256 is shown and a person has to confirm it before anything secret is sent.

The usual way of a new NetHSM:
  nitroseal nethsm provision --url https://10.0.0.5   its passphrases and clock; once
  nitroseal nethsm setup     --url https://10.0.0.5   operator, key, unattended boot, backups; as often as you like
  nitroseal nethsm backup    FILE --device hsm        and keep the file elsewhere`

func newNetHSMCommand(a *app) *cobra.Command {
	return group("nethsm", "Make a NetHSM ready and look after it", nethsmHelp,
		newNetHSMProvisionCommand(a),
		newNetHSMUnlockCommand(a),
		newNetHSMLockCommand(a),
		newNetHSMStatusCommand(a),
		newNetHSMSetupCommand(a),
		newNetHSMBackupCommand(a),
		newNetHSMRestoreCommand(a),
	)
}
