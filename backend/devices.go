package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// deviceRecord is what "devices/<name>" holds in the mount's storage.
type deviceRecord struct {
	Config device.Config `json:"config"`
	// NextPIN is a PIN that is being set on the token. It is recorded before the token hears of it: a crash in between
	// leaves both, and the next use finds out which one the token took.
	NextPIN string `json:"next_pin,omitempty"`
}

// deviceShelf keeps the handles of the mount's devices.
type deviceShelf struct {
	// writing is held, for one device, while its record is read, changed and written.
	writing turns

	mu      sync.Mutex // guards what follows
	handles map[string]*device.Handle
	drops   int // counts drops, so that a handle made from a record read before one is not kept
}

// Device implements [keyring.Devices].
func (b *backend) Device(ctx context.Context, name string) (hsm.Device, error) {
	return b.openDevice(ctx, func() (*device.Handle, error) { return b.handle(ctx, name) })
}

// openDevice opens the device of a handle; it asks for the handle again where that was closed meanwhile.
func (b *backend) openDevice(ctx context.Context, find func() (*device.Handle, error)) (hsm.Device, error) {
	for {
		handle, err := find()
		if err != nil {
			return nil, err
		}
		opened, err := handle.Device(ctx)
		if errors.Is(err, device.ErrClosed) && ctx.Err() == nil && b.closing.Err() == nil {
			continue // its configuration was changed between the two calls
		}
		return opened, outlived(err)
	}
}

// outlived gives the right status to the error of a configuration that was right when it was written and is not any more,
// because a module or a PIN file is gone, or the plugin registered anew: it is nobody's mistake in this request.
func outlived(err error) error {
	if errors.Is(err, device.ErrConfig) {
		return &statusError{http.StatusServiceUnavailable, err}
	}
	return err
}

// handle returns the handle of a configured device. The HSM is not touched, unless a change of its PIN was cut short.
// Who is changing the device's record must not call it: see [backend.shelved].
func (b *backend) handle(ctx context.Context, name string) (*device.Handle, error) {
	for {
		handle, drops := b.devices.find(name)
		if handle != nil {
			return handle, nil
		}
		record, err := b.readDevice(ctx, name)
		switch {
		case err != nil:
			return nil, err
		case record == nil:
			return nil, keyring.ErrNoDevice // the caller names it
		case record.NextPIN != "":
			if err := b.settlePIN(ctx, name); err != nil {
				return nil, err
			}
			continue
		}
		if handle, err := b.shelve(name, record, drops); handle != nil || err != nil {
			return handle, err
		}
	}
}

// shelved returns the handle of a device whose record the caller is changing, and nobody else meanwhile.
func (b *backend) shelved(name string, record *deviceRecord) (*device.Handle, error) {
	for {
		handle, drops := b.devices.find(name)
		if handle != nil {
			return handle, nil
		}
		if handle, err := b.shelve(name, record, drops); handle != nil || err != nil {
			return handle, err
		}
	}
}

// shelve makes the handle of a record and puts it on the shelf; nil and nil where the shelf has changed since.
func (b *backend) shelve(name string, record *deviceRecord, drops int) (*device.Handle, error) {
	handle, err := b.options.Devices.Open(b.mount, name, record.Config)
	if err != nil {
		return nil, outlived(err)
	}
	if b.devices.keep(name, handle, drops) {
		return handle, nil
	}
	if err := handle.Close(); err != nil {
		b.logger.Warn("closing a device", "device", name, "error", err)
	}
	return nil, nil //nolint:nilnil // documented
}

// find returns the handle on the shelf, nil for none, and how often one was taken down until now.
func (s *deviceShelf) find(name string) (handle *device.Handle, drops int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.handles[name], s.drops
}

// keep puts a handle on the shelf, unless another is there already or its record may have changed meanwhile.
func (s *deviceShelf) keep(name string, handle *device.Handle, drops int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.drops != drops || s.handles[name] != nil {
		return false
	}
	if s.handles == nil {
		s.handles = map[string]*device.Handle{}
	}
	s.handles[name] = handle
	return true
}

// dropDevice closes a device; the next use opens it from its record. Operations in flight on it fail with an error that
// tells clients to try again.
func (b *backend) dropDevice(name string) {
	b.dropStores(name)
	b.devices.mu.Lock()
	handle := b.devices.handles[name]
	delete(b.devices.handles, name)
	b.devices.drops++
	b.devices.mu.Unlock()
	if handle == nil {
		return
	}
	if err := handle.Close(); err != nil {
		b.logger.Warn("closing a device", "device", name, "error", err)
	}
}

func (b *backend) dropAllDevices() {
	b.devices.mu.Lock()
	var names []string
	for name := range b.devices.handles {
		names = append(names, name)
	}
	b.devices.mu.Unlock()
	for _, name := range names {
		b.dropDevice(name)
	}
}

// readDevice returns a device's record, nil where there is none.
func (b *backend) readDevice(ctx context.Context, name string) (*deviceRecord, error) {
	entry, err := b.storage.Get(ctx, devicesPrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading the record of device %q: %w", name, err)
	}
	if entry == nil {
		return nil, nil //nolint:nilnil // "absent" is an ordinary answer, and Vault's own: a nil response is 404
	}
	record := new(deviceRecord)
	if err := json.Unmarshal(entry.Value, record); err != nil {
		return nil, fmt.Errorf("reading the record of device %q: it is damaged; delete the device and write it again", name) // no %w: it may quote a PIN
	}
	return record, nil
}

// writeDevice stores a record and closes the device that was opened from the old one.
func (b *backend) writeDevice(ctx context.Context, name string, record *deviceRecord) error {
	defer b.dropDevice(name)
	return b.putDevice(ctx, name, record)
}

// putDevice stores a record; the device stays open.
func (b *backend) putDevice(ctx context.Context, name string, record *deviceRecord) error {
	entry, err := logical.StorageEntryJSON(devicesPrefix+name, record)
	if err != nil {
		return fmt.Errorf("encoding the record of device %q: %w", name, err)
	}
	entry.SealWrap = true
	if err := b.storage.Put(ctx, entry); err != nil {
		return fmt.Errorf("writing the record of device %q: %w", name, err)
	}
	return nil
}

// tryDevice finds what a configuration's own check does not: a module that is not allowed, for example. Whether the HSM
// is there does not matter: a device may be configured while it lies in a drawer.
func (b *backend) tryDevice(ctx context.Context, name string, config device.Config) error {
	if err := b.options.Devices.Check(config); err != nil {
		return err
	}
	handle, err := b.options.Devices.Open(b.mount, name, config)
	if err != nil {
		return err
	}
	_, err = handle.Device(ctx)
	if closing := handle.Close(); closing != nil {
		b.logger.Warn("closing a device", "device", name, "error", closing)
	}
	if err == nil || status(err) == http.StatusServiceUnavailable && ctx.Err() == nil {
		return nil
	}
	return err
}

// changingDevice waits for the turn to change a device's record. The caller calls done once.
func (b *backend) changingDevice(ctx context.Context, name string) (done func(), err error) {
	return b.devices.writing.take(ctx, fmt.Sprintf("device %q", name))
}

// settlePIN finds out which of two PINs a token took, where a change of it was cut short.
func (b *backend) settlePIN(ctx context.Context, name string) error {
	done, err := b.changingDevice(ctx, name)
	if err != nil {
		return err
	}
	defer done()
	record, err := b.readDevice(ctx, name)
	if err != nil || record == nil {
		return err
	}
	return b.settleRecord(ctx, name, record)
}

// settleRecord finds out which of the two PINs in a record the token took, and records that one. The caller has the turn
// to change the record. The new one is tried first: a change is far more often cut short after the token did it. One
// that it did not do costs one try, which the right PIN gives back at once. A node that could not record the result
// leaves it to the one that can.
func (b *backend) settleRecord(ctx context.Context, name string, record *deviceRecord) error {
	if record.NextPIN == "" {
		return nil
	}
	if !b.WriteSafeReplicationState() {
		return logical.ErrReadOnly
	}
	b.logger.Warn("a change of the PIN was cut short; finding out which one the token took", "device", name)
	next := record.Config
	next.PIN = record.NextPIN
	pinError := (*hsm.PINError)(nil)
	err := b.logIn(ctx, name, next)
	switch {
	case err == nil:
		record.Config = next
	case errors.As(err, &pinError) && pinError.Barred:
		// Nothing was sent: it was found wrong before, or another mount is logged in with the old one.
		err = b.logIn(ctx, name, record.Config)
	case errors.As(err, &pinError) && pinError.Wrong:
		err = nil // so the token has the old one
	}
	if err != nil {
		return fmt.Errorf("finding out which PIN device %q has since a change of it was cut short; write devices/%s with the right pin "+
			"to settle it: %w", name, name, err)
	}
	record.NextPIN = ""
	return b.writeDevice(ctx, name, record)
}

// logIn proves that a configuration's PIN is right, with a handle of its own.
func (b *backend) logIn(ctx context.Context, name string, config device.Config) (err error) {
	handle, err := b.options.Devices.Open(b.mount, name, config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, handle.Close()) }()
	opened, err := handle.Device(ctx)
	if err != nil {
		return err
	}
	_, err = opened.FindKeys(ctx, hsm.KeyQuery{}) // private keys are seen by those only who are logged in
	return err
}
