package backend

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// The kinds of journal entry. Vault hands one back, when it is old enough, until its rollback succeeds.
const (
	walGenerate = "generate" // an HSM key is being made
	walRewrap   = "rewrap"   // stored material is being sealed anew
)

// checkMaker refuses to begin what a device, as it is configured, can never end. One that is not configured at all is the
// keyring's to name.
func (b *backend) checkMaker(ctx context.Context, request keyring.GenerateRequest) error {
	record, err := b.readDevice(ctx, request.Device)
	switch {
	case err != nil || record == nil || record.Config.Type != device.TypeNetHSM:
		return err
	case record.Config.AdminUsername == "":
		return mistake("device %q has no Administrator, and nobody else makes keys on a NetHSM; configure admin_username and admin_password "+
			"with devices/%s, or adopt a key that is there", request.Device, request.Device)
	case !strings.HasPrefix(string(request.Algorithm), "rsa-"):
		return mistake("device %q is a NetHSM, which cannot do key agreement (ECDH): only its RSA keys can be wrapping keys; use algorithm "+
			"%s, %s or %s", request.Device, hsm.RSA2048, hsm.RSA3072, hsm.RSA4096)
	default:
		return nil
	}
}

// beginGeneration journals that an HSM key is about to be made, lets begin record the intent in the keyring, and makes
// the key in the background: a card takes half a minute and more, longer than a request may last.
//
// The intent in the keyring is what a repeated request finds; the journal is what makes Vault ask us again where this
// process dies in between.
func (b *backend) beginGeneration(ctx context.Context, name string, begin func() (*keyring.Key, error)) (*keyring.Key, error) {
	entry, err := framework.PutWAL(ctx, b.storage, walGenerate, map[string]any{"key": name})
	if err != nil {
		return nil, fmt.Errorf("journalling that an HSM key for %q is to be made: %w", name, err)
	}
	key, err := begin()
	if err != nil || key.Pending == nil {
		// Nothing was begun, or a repeated request finds it done. An entry that cannot be removed does no harm: its
		// rollback finds nothing to do.
		b.commit(ctx, entry)
		return key, err
	}
	if !b.generate(name, entry) {
		b.commit(ctx, entry) // it is being made already, and journalled
	}
	return key, nil
}

// generate makes the HSM key of an intent in the background, and tells whether it began to. The journal entry, if there
// is one, is removed once the key is made; where it cannot be, it stays, and Vault's rollback tries again.
func (b *backend) generate(name, entry string) bool {
	return b.jobs.start(b.closing, walGenerate+" "+name, func(ctx context.Context) {
		if err := b.finishGeneration(ctx, name); err != nil {
			b.logger.Warn("making an HSM key; it is tried again", "key", name, "error", err)
			return
		}
		b.commit(ctx, entry)
	})
}

// finishGeneration makes the HSM key of an intent. Where that was a rotation, stored material is sealed anew.
func (b *backend) finishGeneration(ctx context.Context, name string) error {
	key, err := b.keys.Finish(ctx, name)
	if err != nil {
		return err
	}
	if key.LatestVersion > 1 {
		b.startRewrap(ctx, name, key.Versions[len(key.Versions)-1].CreatedBy)
	}
	return nil
}

// commit removes a journal entry.
func (b *backend) commit(ctx context.Context, entry string) {
	if entry == "" {
		return
	}
	if err := framework.DeleteWAL(ctx, b.storage, entry); err != nil {
		b.logger.Warn("removing a journal entry; it is found to be done later", "entry", entry, "error", err)
	}
}

// resumeGeneration goes on with every HSM key whose making an earlier process had begun.
func (b *backend) resumeGeneration(ctx context.Context) {
	names, err := b.keys.List(ctx)
	if err != nil {
		b.logger.Warn("looking for HSM keys whose making was cut short", "error", err)
		return
	}
	for _, name := range names {
		if key, err := b.keys.Get(ctx, name); err != nil {
			b.logger.Warn("looking for HSM keys whose making was cut short", "key", name, "error", err)
		} else if key.State == keyring.StateGenerating {
			b.generate(name, "")
		}
	}
}

// rollback is called by Vault for a journal entry of some age. It returns nil when the entry's business is settled, and
// an error to be asked again.
func (b *backend) rollback(ctx context.Context, _ *logical.Request, kind string, data any) error {
	fields, _ := data.(map[string]any)
	name, _ := fields["key"].(string)
	by, _ := fields["by"].(string)
	switch kind {
	case walGenerate:
		return b.rollbackGeneration(ctx, name)
	case walRewrap:
		return b.rollbackRewrap(ctx, name, by)
	default:
		return fmt.Errorf("journal entry of the unknown kind %q: was it written by a newer version of the plugin?", kind)
	}
}

func (b *backend) rollbackGeneration(ctx context.Context, name string) error {
	if b.jobs.isRunning(walGenerate + " " + name) {
		return fmt.Errorf("the HSM key for %q is still being made", name)
	}
	key, err := b.keys.Get(ctx, name)
	switch {
	case errors.Is(err, keyring.ErrKeyNotFound):
		return nil // the intent was never recorded, or undone
	case err != nil:
		return err
	case key.State == keyring.StateAbandoning:
		return b.keys.Abandon(ctx, name)
	case key.State != keyring.StateGenerating:
		return nil
	}
	err = b.finishGeneration(ctx, name)
	if err != nil && hopeless(err) {
		b.logger.Warn("an HSM key cannot be made; undoing the request", "key", name, "error", err)
		return b.keys.Abandon(ctx, name)
	}
	return err
}

// hopeless tells whether making an HSM key failed for a reason that trying again does not mend.
func hopeless(err error) bool {
	return errors.Is(err, hsm.ErrFull) || errors.Is(err, hsm.ErrUnsupported) || errors.Is(err, keyring.ErrUnusableKey) ||
		errors.Is(err, device.ErrRequest)
}
