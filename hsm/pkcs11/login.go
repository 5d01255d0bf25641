package pkcs11

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// logIn makes sure that the host is logged in to the token, and that this device may use that log-in: it must hold the
// same PIN. C_Login is called once for each host, whoever comes first; the others wait for it.
func (d *Device) logIn(ctx context.Context, a *attachment) error {
	if a.flags&ckfLoginRequired == 0 && a.flags&ckfTokenInitialized != 0 {
		return nil
	}
	for {
		a.mu.Lock()
		if a.loggedIn {
			digest := a.pinDigest
			a.mu.Unlock()
			if d.holds(digest) {
				a.token.share(d, digest)
				return nil
			}
			return d.anotherPIN()
		}
		if running := a.loggingIn; running != nil {
			a.mu.Unlock()
			select {
			case <-running:
				continue // it may have failed because of another owner's PIN, which says nothing about ours
			case <-ctx.Done():
				return fmt.Errorf("waiting for the log-in: %w", ctx.Err())
			}
		}
		running := make(chan struct{})
		a.loggingIn = running
		a.mu.Unlock()

		// The result of C_Login has to reach the ledger even where the caller has gone meanwhile.
		result := make(chan error, 1)
		end := func() {
			a.mu.Lock()
			a.loggingIn = nil
			a.mu.Unlock()
			close(running)
		}
		started := d.module.goWaitedFor(func() {
			err := d.sendPIN(ctx, a)
			end()
			result <- err
		})
		if !started {
			end()
			return ErrClosed
		}
		select {
		case err := <-result:
			return err
		case <-ctx.Done():
			return fmt.Errorf("waiting for the log-in: %w", ctx.Err())
		}
	}
}

// holds compares the device's PIN with one that logged in, in constant time.
func (d *Device) holds(digest [32]byte) bool {
	d.mu.Lock()
	own := d.manager.digest(d.pin)
	d.mu.Unlock()
	return subtle.ConstantTimeCompare(own[:], digest[:]) == 1
}

func (d *Device) anotherPIN() error {
	return &hsm.PINError{TriesLeft: -1, Barred: true, Detail: fmt.Sprintf(
		"another mount is logged in to %s with another PIN; nothing was sent, to save its tries; %s", d.describeToken(), d.advice().next())}
}

// mayTry says whether the device's PIN may be sent although another device's is known to be right: never, while that
// device is open. Hosts come and go, and the one that comes first on a new host must not be the one with a wrong PIN.
func (t *token) mayTry(d *Device) bool {
	t.mu.Lock()
	held, digest := len(t.holders) > 0, t.digest
	t.mu.Unlock()
	return !held || d.holds(digest)
}

// took reports whether a PIN with this digest is the one that logged in last.
func (t *token) took(digest [32]byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.holders) > 0 && subtle.ConstantTimeCompare(digest[:], t.digest[:]) == 1
}

// hold records whose PIN logged in; who has the same one goes on holding it. A device that was closed meanwhile holds nothing.
func (t *token) hold(d *Device, digest [32]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holders == nil || t.digest != digest {
		t.holders, t.digest = make(map[*Device]struct{}), digest
	}
	if d.open() == nil {
		t.holders[d] = struct{}{}
	}
}

// share records that a device uses the log-in of another one, and has the same PIN.
func (t *token) share(d *Device, digest [32]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.holders != nil && t.digest == digest && d.open() == nil {
		t.holders[d] = struct{}{}
	}
}

// leave ends what a device that is closed has of the token.
func (t *token) leave(d *Device) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.users, d)
	delete(t.holders, d)
}

// forget forgets which PIN logged in last.
func (t *token) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holders, t.digest = nil, [32]byte{}
}

// digest makes PINs comparable without keeping them.
func (m *Manager) digest(pin []byte) (sum [32]byte) {
	mac := hmac.New(sha256.New, m.pinKey[:])
	mac.Write(pin)
	mac.Sum(sum[:0])
	return sum
}

// takePIN returns a copy of the device's PIN, which the caller wipes.
func (d *Device) takePIN() ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, ErrClosed
	}
	return append([]byte(nil), d.pin...), nil
}

// sendPIN calls C_Login under the PIN rule and tells the ledger what came of it.
func (d *Device) sendPIN(ctx context.Context, a *attachment) error {
	pin, err := d.takePIN()
	if err != nil {
		return err
	}
	defer clear(pin)
	if len(pin) == 0 {
		return &hsm.PINError{TriesLeft: -1, Barred: true, Detail: fmt.Sprintf("no PIN is set for %s; %s", d.describeToken(), d.advice().next())}
	}
	if !a.token.mayTry(d) {
		return d.anotherPIN()
	}
	release, err := a.token.queue.acquire(ctx, d.config.Owner)
	if err != nil {
		return err
	}
	defer release()
	intent, err := d.manager.ledger.attemptOnFullDisk(ctx, a.token.identity, pin, d.showsPIN(a))
	if err != nil {
		return err
	}
	if intent.unrecorded != nil {
		d.manager.logger.Warn("logging in with the PIN that worked last although that cannot be recorded; make room in the state "+
			"directory", "token", d.describeToken(), "state_dir", d.manager.options.StateDir, "error", intent.unrecorded)
	}
	// From here on the caller's patience does not matter: the PIN is on its way, and what comes of it must be recorded. The
	// watchdog bounds the wait.
	_, err = a.host.call(context.WithoutCancel(ctx), request{
		op: wire.OpLogin, meta: wire.SlotRequest{Slot: a.slot}, data: pin, token: a.token.identity, limit: d.limit(a, wire.OpLogin),
	})
	if err == nil {
		digest := d.manager.digest(pin)
		a.mu.Lock()
		a.loggedIn, a.pinDigest = true, digest
		a.mu.Unlock()
		a.token.hold(d, digest)
		if err := intent.succeeded(); err != nil {
			d.manager.logger.Warn("the log-in worked, but the PIN ledger could not record it", "token", d.describeToken(), "error", err)
		}
		return nil
	}
	return d.refused(context.WithoutCancel(ctx), a, intent, err)
}

// showsPIN asks the token about its PIN, through one host.
func (d *Device) showsPIN(a *attachment) func(context.Context) (hsm.PINState, error) {
	return func(ctx context.Context) (hsm.PINState, error) {
		seen, err := d.look(ctx, a.host)
		if err == nil && seen.Token.Flags&ckfUserPINInitialized == 0 && seen.Token.Flags&ckfTokenInitialized == 0 {
			err = fmt.Errorf("%w: %s is not initialised", hsm.ErrUnsupported, d.describeToken())
		}
		return pinState(seen.Token.Flags), err
	}
}

// showsPINNow asks the token about its PIN, through the host of the day.
func (d *Device) showsPINNow(ctx context.Context) (hsm.PINState, error) {
	h, err := d.module.host(ctx)
	if err != nil {
		return hsm.PINState{}, err
	}
	seen, err := d.look(ctx, h)
	return pinState(seen.Token.Flags), err
}

// refused sorts out a C_Login that did not work.
func (d *Device) refused(ctx context.Context, a *attachment, intent *attempt, err error) error {
	failed, ok := errors.AsType[*wire.Error](err)
	switch {
	case ok && failed.Code == ckrUserPINNotInitialized:
		return errors.Join(&hsm.PINError{TriesLeft: -1, Detail: fmt.Sprintf(
			"%s has no user PIN yet; initialise it first (pkcs11-tool --login --login-type so --init-pin)", d.describeToken())}, intent.withdrawn())
	case ok && aboutPIN(failed.Code):
		a.token.forget() // only the PIN that was right came this far: it was changed
		return d.refusedPIN(ctx, a, intent, failed.Code)
	case errors.Is(err, errRetired):
		return errors.Join(err, intent.withdrawn())
	}
	recordError := intent.unresolved()
	if _, died := errors.AsType[*hostDiedError](err); died {
		// Hidden from the recovery on purpose: a PIN that may have cost a try is not sent again by itself.
		err = unavailable("logging in to %s: %v; whether the PIN arrived is not known", d.describeToken(), err)
	}
	return errors.Join(err, recordError)
}

// aboutPIN tells return values that mean the PIN itself.
func aboutPIN(code uint) bool {
	switch code {
	case ckrPINIncorrect, ckrPINInvalid, ckrPINLenRange, ckrPINExpired, ckrPINLocked:
		return true
	default:
		return false
	}
}

// refusedPIN records that the token did not take a PIN, and makes the error with the tries that the token says are left.
func (d *Device) refusedPIN(ctx context.Context, a *attachment, intent *attempt, code uint) error {
	recordError := intent.wrong()
	var flags hsm.PINState
	if seen, err := d.look(ctx, a.host); err == nil {
		flags = pinState(seen.Token.Flags)
	}
	flags.Locked = flags.Locked || code == ckrPINLocked
	refusal := &hsm.PINError{TriesLeft: triesLeft(flags), Wrong: code == ckrPINIncorrect || code == ckrPINInvalid || code == ckrPINLenRange}
	what := "refused the PIN"
	switch {
	case flags.Locked:
		what = "is locked now"
	case code == ckrPINLenRange:
		what = "takes no PIN of that length, which costs no try on most tokens"
	case code == ckrPINExpired:
		what = "says that the PIN has expired; change it with pkcs11-tool --change-pin"
	}
	next := "this PIN is not sent again from this machine; " + d.advice().next()
	switch {
	case flags.Locked:
		next = "no PIN works until the SO-PIN has unblocked it (pkcs11-tool --login --login-type so --init-pin); after that, " + d.advice().next()
	case flags.FinalTry:
		next = "ONE try is left before it locks; " + next
	}
	refusal.Detail = fmt.Sprintf("%s %s (C_Login: %s); %s", d.describeToken(), what, codeName(code), next)
	if recordError != nil {
		return errors.Join(refusal, recordError)
	}
	return refusal
}

// ChangePIN implements [hsm.PINChanger]. Where the module dies during the change, which PIN the token now has is not
// known: the error says so, and the bar asks the token's count of tries before either is sent again.
func (d *Device) ChangePIN(ctx context.Context, pin []byte) error {
	during := "changing the PIN of " + d.describeToken()
	if len(pin) == 0 {
		return fmt.Errorf("%s: an empty PIN is not possible", during)
	}
	// The log-in proves the old PIN, and meets the bar where that is wrong.
	_, a, err := d.runAt(ctx, operation{during: during, op: wire.OpMechanisms, private: true, idempotent: true, build: slot})
	if err != nil {
		return err
	}
	result := make(chan error, 1)
	fresh := bytes.Clone(pin) // the caller may be gone, and have wiped it, before the token has it
	// As with a log-in, what comes of it has to reach the ledger even where the caller has gone meanwhile.
	if !d.module.goWaitedFor(func() {
		defer clear(fresh)
		result <- d.setPIN(ctx, a, fresh)
	}) {
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

// setPIN calls C_SetPIN and makes the new PIN the device's own.
func (d *Device) setPIN(ctx context.Context, a *attachment, pin []byte) error {
	old, err := d.takePIN()
	if err != nil {
		return err
	}
	defer clear(old)
	both := append(append(make([]byte, 0, len(old)+len(pin)), old...), pin...)
	defer clear(both)

	release, err := a.token.queue.acquire(ctx, d.config.Owner)
	if err != nil {
		return err
	}
	defer release()
	// The old PIN was right a moment ago, but another process may have changed it since: hence an intent for it as well.
	intent, err := d.manager.ledger.attempt(ctx, a.token.identity, old, func(ctx context.Context) (hsm.PINState, error) {
		seen, err := d.look(ctx, a.host)
		return pinState(seen.Token.Flags), err
	})
	if err != nil {
		return plain(err)
	}
	ctx = context.WithoutCancel(ctx)
	_, err = a.host.call(ctx, request{
		op: wire.OpSetPIN, meta: wire.SetPINRequest{Slot: a.slot, OldLen: len(old)}, data: both,
		token: a.token.identity, limit: d.limit(a, wire.OpSetPIN),
	})
	failed, answered := errors.AsType[*wire.Error](err)
	switch {
	case err == nil:
	case answered && (failed.Code == ckrPINIncorrect || failed.Code == ckrPINLocked):
		return d.refusedPIN(ctx, a, intent, failed.Code)
	case answered && judge(failed.Code) != verdictBroken && failed.Code != wire.CodeInternal, errors.Is(err, errRetired):
		// The new PIN is too short, too long or too weak, or the token was not there: the old one holds.
		return errors.Join(plain(err), intent.withdrawn())
	default:
		err = errors.Join(unknownOutcome(plain(err)), intent.unresolved())
		d.module.replace(a.host, err)
		return err
	}

	// A device that was closed meanwhile keeps no PIN, but the token has the new one, which the ledger has to know.
	if own, err := d.swapPIN(pin); err == nil {
		clear(own)
	}
	a.token.hold(d, d.manager.digest(pin))
	// A module may keep the old PIN to log in again by itself, which would cost a try: the host must not be used any more.
	d.module.succeeded(a.host)
	d.module.replace(a.host, errors.New("the PIN was changed"))
	if err := intent.changed(pin); err != nil {
		d.manager.logger.Warn("the PIN was changed, but the PIN ledger could not record it", "token", d.describeToken(), "error", err)
	}
	return nil
}

// Unbar implements [hsm.PINChanger]. It lifts the bar of this device's PIN only.
func (d *Device) Unbar(ctx context.Context) error {
	t := d.known()
	if t == nil { // the bar is filed under the token's serial, which only the token itself tells
		if _, err := d.Info(ctx); err != nil {
			return fmt.Errorf("lifting the PIN bar: %w", err)
		}
		t = d.known()
	}
	during := "lifting the PIN bar of " + d.describeToken()
	if !t.mayTry(d) {
		return fmt.Errorf("%s: %w", during, &hsm.PINError{TriesLeft: -1, Barred: true, Detail: "another mount is open with another PIN, " +
			"which the token took, so this device's is wrong; " + d.advice().Give + "; where the PIN was " +
			"changed since, correct or delete the other mount's device first"})
	}
	pin, err := d.takePIN()
	if err != nil {
		return fmt.Errorf("%s: %w", during, err)
	}
	if len(pin) == 0 {
		return fmt.Errorf("%s: no PIN is set; %s", during, d.advice().Give)
	}
	result := make(chan error, 1)
	if !d.module.goWaitedFor(func() {
		defer clear(pin)
		result <- plain(d.manager.ledger.unbar(t.identity, pin, d.showsPINNow))
	}) {
		clear(pin)
		return fmt.Errorf("%s: %w", during, ErrClosed)
	}
	select {
	case err := <-result:
		if err != nil {
			return fmt.Errorf("%s: %w", during, err)
		}
		return nil
	case <-ctx.Done(): // it waits for a log-in that runs
		return fmt.Errorf("%s: %w", during, ctx.Err())
	}
}
