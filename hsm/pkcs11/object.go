package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// maxObject is the largest value of an object in bytes: what fits into a frame beside its names.
const maxObject = wire.MaxFrame - 16<<10

// Objects implements [hsm.ObjectStore].
func (d *Device) Objects(ctx context.Context, application string) ([]hsm.ObjectRef, error) {
	during := fmt.Sprintf("listing the objects of %q on %s", application, d.describeToken())
	frame, err := d.run(ctx, operation{
		during: during, op: wire.OpObjects, private: true, idempotent: true, directory: true,
		build: func(_ context.Context, a *attachment) (any, []byte, error) {
			return wire.ObjectRequest{Slot: a.slot, Application: application}, nil, nil
		},
	})
	if err != nil {
		return nil, err
	}
	var found wire.Objects
	if err := wire.Decode(frame.Meta, &found); err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	refs := make([]hsm.ObjectRef, len(found.Labels))
	for i, label := range found.Labels {
		refs[i] = hsm.ObjectRef{Application: application, Label: label}
	}
	return refs, nil
}

// ReadObject implements [hsm.ObjectStore].
func (d *Device) ReadObject(ctx context.Context, ref hsm.ObjectRef) ([]byte, error) {
	frame, err := d.run(ctx, operation{
		during: "reading " + d.describeObject(ref), op: wire.OpReadObject, private: true, idempotent: true, directory: true, build: object(ref),
	})
	if err != nil {
		return nil, err
	}
	return frame.Data, nil
}

// WriteObject implements [hsm.ObjectStore]. OpenSC answers CKR_OK to writes that the card refused and then reads them
// back from its cache, so the value is believed only when a fresh host, with a log-in of its own, reads it. That host
// takes over from the one that wrote: its log-in is the newest, and on a card a log-in ends those of other processes.
//
// A value that was not kept is written once more through the fresh host, because the usual reason is a log-in that the
// card had forgotten; lost again, the token is taken to be full. Where the token or the module fails in between the
// error is ErrUnavailable and the object may be there or not: ReadObject tells, and a repeat is safe.
func (d *Device) WriteObject(ctx context.Context, ref hsm.ObjectRef, value []byte) error {
	during := "writing " + d.describeObject(ref)
	if len(value) == 0 || len(value) > maxObject {
		return fmt.Errorf("%s: %w: a value of %d bytes; 1 to %d are possible", during, hsm.ErrUnsupported, len(value), maxObject)
	}
	turn, err := d.writing(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", during, err)
	}
	defer turn.leave()

	sent := false
	create := operation{
		during: during, op: wire.OpCreateObject, private: true, directory: true, turn: turn,
		build: func(ctx context.Context, a *attachment) (any, []byte, error) {
			labels, err := d.labels(ctx, a, ref.Application)
			if err == nil && slices.Contains(labels, ref.Label) {
				err = hsm.ErrExists
			}
			sent = sent || err == nil
			return wire.ObjectRequest{Slot: a.slot, Application: ref.Application, Label: ref.Label}, value, err
		},
	}
	for first := true; ; first = false {
		_, err := d.run(ctx, create)
		// A module may write and then say that it did not. Then the repeat meets the object that is our own.
		taken := sent && errors.Is(err, hsm.ErrExists)
		if taken || mayHaveWritten(err) {
			d.manager.wrote(nil)
		}
		if err != nil && !taken {
			return err
		}
		found, there, unread := d.stored(ctx, ref)
		kept := there && bytes.Equal(found, value)
		clear(found)
		switch {
		case unread != nil:
			return fmt.Errorf("%s: checking with a fresh module host: %w", during, plain(unread))
		case kept:
			return nil
		case there && taken:
			return err
		case there:
			return fmt.Errorf("%s: checking with a fresh module host: %w: the token holds something else than was written", during, hsm.ErrUnavailable)
		case !first:
			return fmt.Errorf("%s: %w: the token said yes twice and did not keep the %d bytes; delete objects or keys that are not needed",
				during, hsm.ErrFull, len(value))
		}
	}
}

// stored is the value of an object as a fresh host reads it, and whether there is one.
func (d *Device) stored(ctx context.Context, ref hsm.ObjectRef) (value []byte, there bool, err error) {
	err = d.verify(ctx, func(ctx context.Context, a *attachment) error {
		frame, err := d.exchange(ctx, a, wire.OpReadObject, wire.ObjectRequest{Slot: a.slot, Application: ref.Application, Label: ref.Label}, nil)
		if failed, ok := errors.AsType[*wire.Error](err); ok && failed.Code == wire.CodeNotFound {
			return nil
		}
		value, there = frame.Data, err == nil
		return err
	})
	return value, there, err
}

// DeleteObject implements [hsm.ObjectStore]. It is believed only when a fresh host no longer finds the object.
func (d *Device) DeleteObject(ctx context.Context, ref hsm.ObjectRef) error {
	destroy := operation{during: "deleting " + d.describeObject(ref), op: wire.OpDestroyObject, private: true, directory: true, build: object(ref)}
	return d.removed(ctx, destroy, func(ctx context.Context, a *attachment) (bool, error) {
		labels, err := d.labels(ctx, a, ref.Application)
		return !slices.Contains(labels, ref.Label), err
	})
}

// removed runs an operation that destroys something, and has a fresh host confirm it. What is still there is destroyed
// once more through that host, whose log-in is the newest.
func (d *Device) removed(ctx context.Context, destroy operation, gone func(context.Context, *attachment) (bool, error)) error {
	turn, err := d.writing(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", destroy.during, err)
	}
	defer turn.leave()
	destroy.turn = turn
	for first := true; ; first = false {
		_, err := d.run(ctx, destroy)
		if mayHaveWritten(err) {
			d.manager.wrote(nil)
		}
		if err != nil {
			return err
		}
		isGone := false
		err = d.verify(ctx, func(ctx context.Context, a *attachment) (err error) {
			isGone, err = gone(ctx, a)
			return err
		})
		switch {
		case err != nil:
			return fmt.Errorf("%s: checking with a fresh module host: %w", destroy.during, plain(err))
		case isGone:
			return nil
		case !first:
			return fmt.Errorf("%s: %w: the token said yes twice and still has it", destroy.during, hsm.ErrUnavailable)
		}
	}
}

// writeTurn is the right of one write to a token. It ends when its holder is done and every call that it sent has left the
// module: a caller that gives up at its deadline leaves its key or object half made in there.
type writeTurn struct {
	mu    sync.Mutex
	users int
	end   func()
}

// enter counts a call that writes; the turn lasts until it calls leave.
func (w *writeTurn) enter() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.users++
}

func (w *writeTurn) leave() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.users--; w.users == 0 {
		w.end()
	}
}

// writing waits until nobody else of this process writes to the token. The caller calls leave when it is done.
func (d *Device) writing(ctx context.Context) (*writeTurn, error) {
	if err := d.open(); err != nil {
		return nil, err
	}
	h, err := d.module.host(ctx)
	if err != nil {
		return nil, err
	}
	t := d.known()
	if t == nil {
		a, err := d.attachTo(ctx, h)
		if err != nil {
			return nil, plain(err)
		}
		t = a.token
	}
	select {
	case t.writing <- struct{}{}:
		return &writeTurn{users: 1, end: func() { <-t.writing }}, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for another write: %w", ctx.Err())
	}
}

// verify looks at the token through a fresh host, which becomes the current one where the look succeeded.
func (d *Device) verify(ctx context.Context, look func(context.Context, *attachment) error) error {
	h, err := d.module.fresh(ctx)
	if err != nil {
		return err
	}
	a, err := d.attachTo(ctx, h)
	if err == nil {
		err = d.logIn(ctx, a)
	}
	if err == nil {
		err = look(ctx, a)
	}
	if err != nil {
		h.retire()
		return err
	}
	d.module.install(h)
	d.module.succeeded(h)
	return nil
}

// labels lists the objects of an application on one host.
func (d *Device) labels(ctx context.Context, a *attachment, application string) ([]string, error) {
	frame, err := d.exchange(ctx, a, wire.OpObjects, wire.ObjectRequest{Slot: a.slot, Application: application}, nil)
	if err != nil {
		return nil, err
	}
	var found wire.Objects
	err = wire.Decode(frame.Meta, &found)
	return found.Labels, err
}

// object is the build of operations on one object.
func object(ref hsm.ObjectRef) func(context.Context, *attachment) (any, []byte, error) {
	return func(_ context.Context, a *attachment) (any, []byte, error) {
		return wire.ObjectRequest{Slot: a.slot, Application: ref.Application, Label: ref.Label}, nil, nil
	}
}

func (d *Device) describeObject(ref hsm.ObjectRef) string {
	return fmt.Sprintf("the object %q of %q on %s", ref.Label, ref.Application, d.describeToken())
}
