package doctor

import (
	"context"
	"fmt"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// keys examines the wrapping keys: whether each of their HSM keys is there, is the recorded one and works.
func (d *doctor) keys(ctx context.Context) {
	keys, err := d.Keys()
	var names []string
	if err == nil {
		names, err = keys.List(ctx)
	}
	if err != nil {
		d.about("keys").problem("records", "the error says what to do with state_dir", "%v", err)
		return
	}
	if len(names) == 0 {
		d.about("keys").skipped("records", "there is no wrapping key yet")
	}
	for _, name := range names {
		f := d.about("key %q", name)
		key, err := keys.Get(ctx, name)
		if err != nil {
			f.problem("record", "restore the key from its record: nitroseal key restore", "%v", err)
			continue
		}
		for i := range key.Versions {
			for _, recipient := range key.Versions[i].Recipients {
				d.recipient(ctx, f, key.Versions[i].Number, recipient)
			}
		}
		redundancy(f, key)
		for _, warning := range key.Warnings {
			f.warning("record", "", "%s", warning)
		}
	}
}

// recipient proves that one HSM key opens what is sealed to it, at the cost of one private-key operation.
func (d *doctor) recipient(ctx context.Context, f chart, version int, recipient keyring.Recipient) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	check := fmt.Sprintf("round trip v%d on %s", version, recipient.Device)
	handle, err := d.Device(recipient.Device)
	if err != nil {
		f.problem(check, "configure the device again; another recipient opens meanwhile, if there is one", "%v", err)
		return
	}
	opened, err := handle.Device(ctx)
	if err == nil {
		var found hsm.Key
		if found, err = hsm.FindKey(ctx, opened, hsm.KeyQuery{Fingerprint: recipient.KID, ID: recipient.ID}); err == nil {
			_, err = hsm.Prove(ctx, found)
		}
	}
	if err != nil {
		f.problem(check, "what is sealed to this HSM alone does not open now", "%v", err)
		return
	}
	f.ok(check, "the HSM key %s opens what is sealed to it", recipient.ID)
}

// redundancy says so where the loss of one HSM costs nothing. Where it does, the keyring's own warning says that.
func redundancy(f chart, key *keyring.Key) {
	const check = "backup"
	if len(key.Versions) == 0 {
		return
	}
	newest := key.Versions[len(key.Versions)-1]
	if hsms := keyring.CountHSMs(newest.Recipients); hsms > 1 {
		f.ok(check, "%d HSMs open what is sealed now", hsms)
	} else if newest.BackupConfirmed != nil {
		f.ok(check, "one HSM opens what is sealed now; %s confirmed a backup of its key", newest.BackupConfirmed.By)
	} else if key.AcceptSingleHSM != nil {
		f.ok(check, "one HSM opens what is sealed now; %s accepted that", key.AcceptSingleHSM.By)
	}
}
