package pkcs11

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// ForeignLabels implements [hsm.ForeignObjects].
func (d *Device) ForeignLabels(ctx context.Context) ([]string, error) {
	during := "listing all data objects on " + d.describeToken()
	frame, err := d.run(ctx, operation{
		during: during, op: wire.OpForeignObjects, private: true, idempotent: true, directory: true, build: slot,
	})
	if err != nil {
		return nil, err
	}
	var found wire.Objects
	if err := wire.Decode(frame.Meta, &found); err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	return found.Labels, nil
}

// ReadForeign implements [hsm.ForeignObjects].
func (d *Device) ReadForeign(ctx context.Context, label string) ([]hsm.ForeignObject, error) {
	during := "reading " + d.describeForeign(label)
	if label == "" {
		return nil, fmt.Errorf("%s: %w: a label is needed", during, hsm.ErrUnsupported)
	}
	frame, err := d.run(ctx, operation{
		during: during, op: wire.OpReadForeign, private: true, idempotent: true, directory: true, build: foreign(label, nil),
	})
	if err != nil {
		return nil, err
	}
	objects, err := splitForeign(frame)
	clear(frame.Data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	return objects, nil
}

// splitForeign takes the values of an answer apart.
func splitForeign(frame wire.Frame) ([]hsm.ForeignObject, error) {
	var found wire.Foreign
	if err := wire.Decode(frame.Meta, &found); err != nil {
		return nil, err
	}
	rest := frame.Data
	objects := make([]hsm.ForeignObject, 0, len(found.Objects))
	for _, o := range found.Objects {
		if o.Size < 0 || o.Size > len(rest) {
			return nil, fmt.Errorf("%w: the module host tells of more than it gave", hsm.ErrUnavailable)
		}
		objects = append(objects, hsm.ForeignObject{Application: o.Application, Value: bytes.Clone(rest[:o.Size])})
		rest = rest[o.Size:]
	}
	return objects, nil
}

// DeleteForeign implements [hsm.ForeignObjects]. It is believed only when a fresh host no longer finds them.
func (d *Device) DeleteForeign(ctx context.Context, label string, value []byte) error {
	during := "deleting " + d.describeForeign(label)
	if label == "" {
		return fmt.Errorf("%s: %w: a label is needed", during, hsm.ErrUnsupported)
	}
	sum := sha256.Sum256(value)
	destroy := operation{during: during, op: wire.OpDestroyForeign, private: true, directory: true, build: foreign(label, sum[:])}
	return d.removed(ctx, destroy, func(ctx context.Context, a *attachment) (bool, error) {
		frame, err := d.exchange(ctx, a, wire.OpReadForeign, wire.ForeignRequest{Slot: a.slot, Label: label}, nil)
		if failed, ok := errors.AsType[*wire.Error](err); ok && failed.Code == wire.CodeNotFound {
			return true, nil
		}
		if err != nil {
			return false, err
		}
		defer clear(frame.Data)
		left, err := splitForeign(frame)
		if err != nil {
			return false, err
		}
		gone := true
		for _, o := range left {
			gone = gone && !bytes.Equal(o.Value, value)
			clear(o.Value)
		}
		return gone, nil
	})
}

// foreign is the build of operations on the objects of a label.
func foreign(label string, sum []byte) func(context.Context, *attachment) (any, []byte, error) {
	return func(_ context.Context, a *attachment) (any, []byte, error) {
		return wire.ForeignRequest{Slot: a.slot, Label: label, SHA256: sum}, nil, nil
	}
}

func (d *Device) describeForeign(label string) string {
	return fmt.Sprintf("the data objects %q on %s", label, d.describeToken())
}
