package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// AdoptPIN implements [hsm.PINChanger]. A log-in belongs to its host, so another PIN can be tried only on another host: a
// fresh one, which becomes the current one where the token took the PIN, and ends where it did not.
func (d *Device) AdoptPIN(ctx context.Context, pin []byte, last bool) error {
	during := "trying the new PIN of " + d.describeToken()
	if len(pin) == 0 {
		return fmt.Errorf("%s: an empty PIN is not possible", during)
	}
	if err := d.open(); err != nil {
		return fmt.Errorf("%s: %w", during, err)
	}
	h, err := d.module.fresh(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", during, err)
	}
	a, err := d.attachTo(ctx, h)
	if err != nil {
		h.retire()
		return fmt.Errorf("%s: %w", during, plain(err))
	}
	said := oneTry
	if last {
		said = lastTry
	}
	// As with any log-in, what comes of it has to reach the ledger even where the caller has gone meanwhile.
	result := make(chan error, 1)
	fresh := bytes.Clone(pin)
	if !d.module.goWaitedFor(func() {
		defer clear(fresh)
		err := d.adoptPIN(ctx, a, fresh, said)
		if err != nil {
			h.retire()
		}
		result <- err
	}) {
		clear(fresh)
		h.retire()
		return fmt.Errorf("%s: %w", during, ErrClosed)
	}
	select {
	case err := <-result:
		if err != nil {
			return fmt.Errorf("%s: %w", during, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w: %w", during, hsm.ErrMayHaveHappened, ctx.Err())
	}
}

// adoptPIN logs in on an attachment that nobody uses yet.
func (d *Device) adoptPIN(ctx context.Context, a *attachment, pin []byte, said word) error {
	if !a.token.mayTry(d) && !a.token.took(d.manager.digest(pin)) {
		return d.anotherPIN() // the word of one mount's person must not spend the tries that another mount may need
	}
	release, err := a.token.queue.acquire(ctx, d.config.Owner)
	if err != nil {
		return err
	}
	defer release()
	intent, err := d.manager.ledger.attemptAtWord(ctx, said, a.token.identity, pin, d.showsPIN(a))
	if err != nil {
		return plain(err)
	}
	ctx = context.WithoutCancel(ctx)
	_, err = a.host.call(ctx, request{
		op: wire.OpLogin, meta: wire.SlotRequest{Slot: a.slot}, data: pin, token: a.token.identity, limit: d.limit(a, wire.OpLogin),
	})
	if failed, ok := errors.AsType[*wire.Error](err); ok && aboutPIN(failed.Code) {
		return d.refusedPIN(ctx, a, intent, failed.Code) // which says nothing of the PIN that is in use
	}
	if err != nil {
		return plain(d.refused(ctx, a, intent, err))
	}
	old, err := d.swapPIN(pin)
	defer clear(old)
	if err != nil {
		return errors.Join(err, intent.succeeded())
	}
	digest := d.manager.digest(pin)
	a.mu.Lock()
	a.loggedIn, a.pinDigest = true, digest
	a.mu.Unlock()
	a.token.hold(d, digest)
	if err := intent.succeededInPlaceOf(old); err != nil {
		d.manager.logger.Warn("the new PIN is right, but the PIN ledger could not record it", "token", d.describeToken(), "error", err)
	}
	d.module.install(a.host)
	d.module.succeeded(a.host)
	return nil
}

// swapPIN makes a copy of pin the device's own, and returns the one before, which the caller wipes.
func (d *Device) swapPIN(pin []byte) (old []byte, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, ErrClosed
	}
	old, d.pin = d.pin, bytes.Clone(pin)
	return old, nil
}
