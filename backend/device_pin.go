package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// pinChanger returns the device as one that has a PIN. The caller is changing its record, and nobody else meanwhile.
func (b *backend) pinChanger(ctx context.Context, name string, record *deviceRecord) (hsm.PINChanger, error) {
	opened, err := b.openDevice(ctx, func() (*device.Handle, error) { return b.shelved(name, record) })
	if err != nil {
		return nil, err
	}
	return asPINChanger(name, opened)
}

func asPINChanger(name string, opened hsm.Device) (hsm.PINChanger, error) {
	changer, ok := opened.(hsm.PINChanger)
	if !ok {
		return nil, mistake("device %q is a NetHSM: it has no PIN, and bars nobody for a wrong password; where a password was changed on the "+
			"NetHSM, write devices/%s with the new one", name, name)
	}
	return changer, nil
}

func (b *backend) deviceUnbar(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name, handle, err := b.knownDevice(ctx, data)
	if err != nil {
		return nil, err
	}
	opened, err := b.Device(ctx, name)
	if err != nil {
		return nil, err
	}
	changer, err := asPINChanger(name, opened)
	if err != nil {
		return nil, err
	}
	err = changer.Unbar(ctx)
	if pinError := (*hsm.PINError)(nil); errors.As(err, &pinError) {
		return nil, mistake("lifting the bar of device %q: %w", name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("lifting the bar of device %q: %w", name, err)
	}
	handle.ForgetStatus()
	b.logger.Info("PIN bar lifted", "device", name, "by", by(req))
	return nil, nil
}

func (b *backend) devicePIN(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	pin, err := secretField(data, "new_pin")
	switch {
	case err != nil:
		return nil, err
	case pin == "":
		return nil, mistake("new_pin is missing")
	}
	done, err := b.changingDevice(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	record, err := b.readDevice(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case record == nil:
		return nil, absent("device %q: %w; write devices/%s first", name, keyring.ErrNoDevice, name)
	case record.Config.PINFile != "":
		return nil, mistake("the PIN of device %q comes from the file %s: change it on the token with the vendor's tool (pkcs11-tool "+
			"--change-pin), then in the file", name, record.Config.PINFile)
	}
	onToken, force := data.Get("on_token").(bool), data.Get("force").(bool)
	switch {
	case onToken && force:
		return nil, mistake("force belongs to on_token=false: a change on the token logs in with the stored PIN, which has to be right")
	case onToken:
		if err = b.settleRecord(ctx, name, record); err == nil { // an earlier change was cut short
			err = b.changePIN(ctx, name, record, pin)
		}
	default:
		err = b.replacePIN(ctx, name, record, pin, force)
	}
	if err != nil {
		return nil, err
	}
	b.logger.Info("PIN changed", "device", name, "on_token", onToken, "by", by(req))
	return nil, nil
}

// settleTimeout is how long the record of a change of the PIN may take to be written after its request has ended.
const settleTimeout = 5 * time.Second

// changePIN changes the PIN on the token and in the record. The record holds both while the token is asked.
func (b *backend) changePIN(ctx context.Context, name string, record *deviceRecord, pin string) error {
	changer, err := b.pinChanger(ctx, name, record)
	if err != nil {
		return err
	}
	record.NextPIN = pin
	if err := b.putDevice(ctx, name, record); err != nil {
		return err
	}
	change := []byte(pin)
	defer clear(change)
	err = changer.ChangePIN(ctx, change)
	switch pinError := (*hsm.PINError)(nil); {
	case err == nil:
		record.Config.PIN = pin
	case errors.Is(err, hsm.ErrMayHaveHappened):
		b.dropDevice(name)
		return fmt.Errorf("changing the PIN of device %q: it is not known whether the token took the new one; both are kept and the next "+
			"use of the device finds out: %w", name, err)
	case errors.Is(err, hsm.ErrUnavailable), ctx.Err() != nil:
		err = fmt.Errorf("changing the PIN of device %q; it was not changed: %w", name, err)
	case errors.As(err, &pinError):
		err = &statusError{http.StatusBadRequest, fmt.Errorf("changing the PIN of device %q: %w", name, err)}
	default: // the token refused the new PIN: too short, for example
		err = &statusError{http.StatusBadRequest, fmt.Errorf("changing the PIN of device %q: the token refused: %w", name, err)}
	}
	record.NextPIN = ""
	// Also for a caller who has gone: what stays in the record is sent to the token with its next use.
	writing, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	return errors.Join(err, b.writeDevice(writing, name, record))
}

// replacePIN stores a PIN that the token has already, once it has proved right. Until then the device stays logged in with
// the stored one.
func (b *backend) replacePIN(ctx context.Context, name string, record *deviceRecord, pin string, force bool) error {
	changer, err := b.pinChanger(ctx, name, record)
	if err != nil {
		return err
	}
	tried := []byte(pin)
	defer clear(tried)
	err = changer.AdoptPIN(ctx, tried, force)
	if pinError := (*hsm.PINError)(nil); errors.As(err, &pinError) {
		return mistake("the stored PIN of device %q was kept: %w", name, err)
	}
	if errors.Is(err, hsm.ErrMayHaveHappened) {
		return fmt.Errorf("trying the new PIN of device %q: the token may or may not have taken it, and the stored one was kept; repeat "+
			"the request: %w", name, err)
	}
	if err != nil {
		return fmt.Errorf("trying the new PIN of device %q; the stored one was kept: %w", name, err)
	}
	record.Config.PIN, record.NextPIN = pin, "" // a change that was cut short is settled by a PIN that proved right
	return b.writeDevice(ctx, name, record)
}
