package backend

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
)

// lockedDevice is a device that has a lock.
type lockedDevice struct {
	name   string
	handle *device.Handle
	hsm.Unlocker
}

// unlocker returns the device of a request as one that has a lock, with the very handle that opened it: where the device is
// written meanwhile, what was configured for one NetHSM must not be sent to another.
func (b *backend) unlocker(ctx context.Context, data *framework.FieldData) (locked lockedDevice, err error) {
	opened, err := b.openDevice(ctx, func() (*device.Handle, error) {
		locked.name, locked.handle, err = b.knownDevice(ctx, data)
		return locked.handle, err
	})
	if err != nil {
		return lockedDevice{}, err
	}
	unlocker, ok := opened.(hsm.Unlocker)
	if !ok {
		return lockedDevice{}, mistake("device %q is a PKCS#11 token: it has no lock of its own, the PIN opens it; to stop its use, delete the device",
			locked.name)
	}
	locked.Unlocker = unlocker
	return locked, nil
}

func (b *backend) deviceUnlock(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	locked, err := b.unlocker(ctx, data)
	if err != nil {
		return nil, err
	}
	passphrase, err := locked.passphrase(data)
	if err != nil {
		return nil, err
	}
	defer clear(passphrase)
	defer locked.handle.ForgetStatus()
	err = locked.Unlock(ctx, passphrase)
	if pinError := (*hsm.PINError)(nil); errors.As(err, &pinError) || errors.Is(err, device.ErrRequest) {
		return nil, mistake("unlocking device %q: %w", locked.name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("unlocking device %q: %w", locked.name, err)
	}
	b.logger.Info("device unlocked", "device", locked.name, "by", by(req))
	response := new(logical.Response)
	for _, node := range locked.nodesNot(ctx, hsm.StateOperational) {
		response.AddWarning(fmt.Sprintf("%s and may not be unlocked: write devices/%s/unlock again when it answers", node, locked.name))
	}
	return warnings(response), nil
}

// nodesNot names the nodes that are not seen in the state that all should be in now, with the reason: one that gave no answer
// was left as it is.
func (d lockedDevice) nodesNot(ctx context.Context, state hsm.State) []string {
	cluster, ok := d.Unlocker.(hsm.Clustered)
	if !ok {
		return nil
	}
	var others []string
	for _, node := range cluster.Nodes(ctx) {
		switch {
		case node.State == state:
		case node.Err != nil:
			others = append(others, fmt.Sprintf("the node %s is in trouble (%v)", node.URL, node.Err))
		default:
			others = append(others, fmt.Sprintf("the node %s is %s", node.URL, node.State))
		}
	}
	return others
}

// warnings is a response of warnings only, nil where there are none.
func warnings(response *logical.Response) *logical.Response {
	if len(response.Warnings) == 0 {
		return nil
	}
	return response
}

// passphrase returns the one that a request gives, or else the configured one. The caller wipes it.
func (d lockedDevice) passphrase(data *framework.FieldData) ([]byte, error) {
	given, err := secretField(data, "passphrase")
	if err != nil {
		return nil, err
	}
	if given != "" {
		return []byte(given), nil
	}
	passphrase, err := d.handle.UnlockPassphrase()
	if err == nil && passphrase == nil {
		err = mistake("passphrase is missing; give it, or configure unlock_passphrase with devices/%s", d.name)
	}
	return passphrase, err
}

func (b *backend) deviceLock(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	unlocked, err := b.unlocker(ctx, data)
	if err != nil {
		return nil, err
	}
	defer unlocked.handle.ForgetStatus()
	// What was opened before it was locked must not open on: neither while a node is slow to lock, nor what another request
	// opens meanwhile.
	b.keys.EndLeases()
	defer b.keys.EndLeases()
	err = unlocked.Lock(ctx)
	switch {
	case errors.Is(err, hsm.ErrForbidden):
		return nil, mistake("locking device %q: only an Administrator of the root namespace may; configure admin_username and admin_password with devices/%s: %w",
			unlocked.name, unlocked.name, err)
	case err != nil:
		return nil, fmt.Errorf("locking device %q: %w", unlocked.name, err)
	}
	b.logger.Info("device locked", "device", unlocked.name, "by", by(req))
	response := new(logical.Response)
	for _, node := range unlocked.nodesNot(ctx, hsm.StateLocked) {
		response.AddWarning(fmt.Sprintf("%s and may not be locked: write devices/%s/lock again when it answers", node, unlocked.name))
	}
	passphrase, err := unlocked.handle.UnlockPassphrase()
	clear(passphrase)
	if err == nil && passphrase == nil {
		return warnings(response), nil
	}
	response.AddWarning(fmt.Sprintf("an unlock passphrase is configured: the NetHSM stays locked for this plugin until devices/%s/unlock, a "+
		"restart or a write of the device, but whoever else has the passphrase unlocks it with the next use; to keep it locked, take "+
		"unlock_passphrase out everywhere", unlocked.name))
	return response, nil
}
