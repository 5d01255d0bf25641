package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// Device is one mount's view of one token. It implements hsm.Device, hsm.ObjectStore, hsm.ForeignObjects,
// hsm.Randomer and hsm.PINChanger.
// Everything that can be lost with the token (slot, sessions, log-in, handles) belongs to an [attachment], which dies
// with its host; a device only remembers which token it is.
type Device struct {
	manager *Manager
	module  *module
	config  Config

	mu     sync.Mutex // guards what follows
	closed bool
	pin    []byte
	token  *token // nil before the token was found for the first time
	name   string // of the token, for messages
}

var (
	_ hsm.Device      = (*Device)(nil)
	_ hsm.ObjectStore = (*Device)(nil)
	_ hsm.Randomer    = (*Device)(nil)
	_ hsm.PINChanger  = (*Device)(nil)

	_ hsm.ForeignObjects = (*Device)(nil)
)

func newDevice(m *Manager, mod *module, config Config) *Device {
	d := &Device{manager: m, module: mod, config: config.withDefaults()}
	d.pin = append([]byte(nil), config.PIN...)
	d.config.PIN = nil
	return d
}

// Close implements [hsm.Device]. The module's host ends with the last device on it; Close waits a few seconds for that.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	clear(d.pin)
	d.pin = nil
	t := d.token
	d.mu.Unlock()
	if t != nil {
		t.leave(d)
	}
	d.manager.release(d.module, d)
	return nil
}

// operation is one thing to be done on the token.
type operation struct {
	// during begins every error: "decrypting with key …".
	during string
	op     wire.Op
	// private operations need the log-in.
	private bool
	// idempotent operations may be repeated although they may have happened.
	idempotent bool
	// directory operations look names up on the token and must not miss what another process wrote.
	directory bool
	// turn, where set, is the right to write, which the operation has until it has left the module.
	turn *writeTurn
	// build makes the request for one attachment; it may ask the host for a handle first. The caller of run owns data.
	build func(ctx context.Context, a *attachment) (meta any, data []byte, err error)
	// doubt, where set, is asked about a failure that may be the token's or the request's fault. An error that it
	// returns is the answer; nil means that the token does not work.
	doubt func(ctx context.Context, a *attachment, failed error) error
}

// slot is the build of operations that need to know only the slot.
func slot(_ context.Context, a *attachment) (any, []byte, error) {
	return wire.SlotRequest{Slot: a.slot}, nil, nil
}

// run does an operation, on a new host once more where the first one was lost and a repeat does no harm. The answer's
// Data is the caller's.
func (d *Device) run(ctx context.Context, o operation) (wire.Frame, error) {
	frame, _, err := d.runAt(ctx, o)
	return frame, err
}

// runAt is run for those who want to know where the answer came from.
func (d *Device) runAt(ctx context.Context, o operation) (wire.Frame, *attachment, error) {
	const patience = 16 // hosts that were replaced by others before they took the call: each is news, but not for ever
	for attempts, retired := 0, 0; ; {
		frame, a, again, err := d.attempt(ctx, o)
		switch {
		case err == nil:
			return frame, a, nil
		case again && errors.Is(err, errRetired) && retired < patience:
			retired++
		case again && attempts == 0:
			attempts++
		default:
			return wire.Frame{}, nil, fmt.Errorf("%s: %w", o.during, err)
		}
	}
}

// attempt does an operation on the current host; again says whether another attempt makes sense.
func (d *Device) attempt(ctx context.Context, o operation) (_ wire.Frame, _ *attachment, again bool, err error) {
	if err := d.open(); err != nil {
		return wire.Frame{}, nil, false, err
	}
	host := d.module.host
	if o.directory {
		host = d.module.upToDate
	}
	h, err := host(ctx)
	if err != nil {
		return wire.Frame{}, nil, false, err
	}
	var frame wire.Frame
	var sent bool
	a, err := d.attachTo(ctx, h)
	if err == nil {
		frame, sent, err = d.try(ctx, o, a)
	}
	if err != nil {
		again, err = d.recover(ctx, o, h, a, sent, err)
		return wire.Frame{}, nil, again, err
	}
	if o.private {
		d.module.succeeded(h)
	}
	return frame, a, false, nil
}

// try does an operation on one attachment; sent says whether the operation itself reached the host.
func (d *Device) try(ctx context.Context, o operation, a *attachment) (frame wire.Frame, sent bool, err error) {
	if o.private {
		if err := d.logIn(ctx, a); err != nil {
			return wire.Frame{}, false, err
		}
	}
	meta, data, err := o.build(ctx, a)
	if err != nil {
		return wire.Frame{}, false, err
	}
	frame, err = d.send(ctx, a, o.turn, o.op, meta, data)
	return frame, true, err
}

// exchange waits for this owner's turn on the token and calls the host. The turn ends when the call has left the module,
// which may be long after the caller has.
func (d *Device) exchange(ctx context.Context, a *attachment, op wire.Op, meta any, data []byte) (wire.Frame, error) {
	return d.send(ctx, a, nil, op, meta, data)
}

// send is exchange for a call that may have the right to write, and then keeps it as long as its turn on the token.
func (d *Device) send(ctx context.Context, a *attachment, turn *writeTurn, op wire.Op, meta any, data []byte) (wire.Frame, error) {
	release, err := a.token.queue.acquire(ctx, d.config.Owner)
	if err != nil {
		return wire.Frame{}, fmt.Errorf("waiting for a turn on the token: %w", err)
	}
	returned := release
	if turn != nil {
		turn.enter()
		returned = func() { release(); turn.leave() }
	}
	frame, err := a.host.call(ctx, request{op: op, meta: meta, data: data, token: a.token.identity, limit: d.limit(a, op), returned: returned})
	if err != nil && err == ctx.Err() { //nolint:errorlint // this very error: the caller gave up, and nothing else happened
		err = fmt.Errorf("waiting for the token's answer: %w", err)
	}
	return frame, err
}

// limit is how long an operation may stay inside the module; a device that was closed in the meantime still has its own.
func (d *Device) limit(a *attachment, op wire.Op) time.Duration {
	own := d.config.DecryptLimit
	if op == wire.OpGenerateKey {
		own = d.config.GenerateLimit
	}
	return max(own, a.token.limit(op))
}

// recover decides what a failed attempt on h means: whether another one makes sense, and the error otherwise. A host
// that no longer serves the token is taken out of use here. The attachment is nil where the attempt did not get that far.
func (d *Device) recover(ctx context.Context, o operation, h *host, a *attachment, sent bool, err error) (again bool, _ error) {
	harmless := o.idempotent || !sent
	if died, ok := errors.AsType[*hostDiedError](err); ok {
		if !harmless {
			return false, unknownOutcome(err)
		}
		return !died.culprit, fmt.Errorf("%w: %w", hsm.ErrUnavailable, err)
	}
	if errors.Is(err, errRetired) {
		return true, fmt.Errorf("%w: %w", hsm.ErrUnavailable, err)
	}
	if _, ok := errors.AsType[*absentError](err); ok {
		return h.unattached() && d.module.refresh(h), err
	}
	failed, ok := errors.AsType[*wire.Error](err)
	if !ok {
		return false, err
	}
	described := describe(failed)
	verdict := judge(failed.Code)
	if sent && o.doubt != nil && (verdict == verdictBroken || failed.Code == ckrArgumentsBad) {
		if answer := o.doubt(ctx, a, described); answer != nil {
			return false, answer
		}
		if err := ctx.Err(); err != nil { // then nothing is known about the token
			return false, err
		}
		verdict = verdictBroken
	}
	if verdict == verdictFinal {
		return false, described
	}
	d.module.replace(h, described)
	if verdict == verdictBroken && !harmless {
		return false, unknownOutcome(described)
	}
	return true, described
}

// unknownOutcome is what a caller gets whose request may or may not have been carried out.
func unknownOutcome(cause error) error {
	return fmt.Errorf("%w: %w: %w", hsm.ErrUnavailable, hsm.ErrMayHaveHappened, cause)
}

// open fails after Close.
func (d *Device) open() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	return nil
}

// describeToken names the token for people.
func (d *Device) describeToken() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.name != "":
		return d.name
	case d.config.Serial != "":
		return fmt.Sprintf("the token with serial %q", d.config.Serial)
	case d.config.TokenLabel != "":
		return fmt.Sprintf("the token labelled %q", d.config.TokenLabel)
	default:
		return fmt.Sprintf("the token in slot %d", *d.config.Slot)
	}
}

// known is the token found before, nil before the first time.
func (d *Device) known() *token {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.token
}

// Info implements [hsm.Device]. Where the token is away the error says so, and the Info beside it has [hsm.StateAbsent].
func (d *Device) Info(ctx context.Context) (hsm.Info, error) {
	absent := hsm.Info{State: hsm.StateAbsent}
	frame, a, err := d.runAt(ctx, operation{
		during: "asking " + d.describeToken() + " for its mechanisms", op: wire.OpMechanisms, idempotent: true, build: slot,
	})
	if err != nil {
		return absent, err
	}
	var mechanisms wire.Mechanisms
	if err := wire.Decode(frame.Meta, &mechanisms); err != nil {
		return absent, err
	}
	found, err := d.look(ctx, a.host)
	if err != nil {
		return absent, fmt.Errorf("looking for %s: %w", d.describeToken(), plain(err))
	}
	info := hsm.Info{
		Vendor: found.Token.Manufacturer, Model: found.Token.Model, Serial: found.Token.Serial, Firmware: found.Token.Firmware,
		Label: found.Token.Label, State: hsm.StateOperational, PIN: pinState(found.Token.Flags), Notes: a.host.hello.Notes,
	}
	if info.PIN.Locked {
		info.State = hsm.StateLocked
	}
	for _, m := range mechanisms.Mechanisms {
		info.Mechanisms = append(info.Mechanisms, mechanismName(m.Type))
	}
	if !a.host.hello.MemoryLocked && len(info.Notes) == 0 {
		info.Notes = []string{"The module host may not lock all its memory; PINs and plaintexts are locked one by one. " +
			"Raise the limit on locked memory (LimitMEMLOCK, or the capability IPC_LOCK) to lock all of it."}
	}
	return info, nil
}

// Random implements [hsm.Randomer].
func (d *Device) Random(ctx context.Context, n int) ([]byte, error) {
	if n < 1 || n > 1024 {
		return nil, fmt.Errorf("%d random bytes are out of range: ask for 1 to 1024", n)
	}
	frame, err := d.run(ctx, operation{
		during: "making random bytes on " + d.describeToken(), op: wire.OpRandom, idempotent: true,
		build: func(_ context.Context, a *attachment) (any, []byte, error) {
			return wire.RandomRequest{Slot: a.slot, Count: n}, nil, nil
		},
	})
	if err != nil {
		return nil, err
	}
	if len(frame.Data) != n {
		clear(frame.Data)
		return nil, fmt.Errorf("making random bytes on %s: %w: it gave %d bytes, not %d", d.describeToken(), hsm.ErrUnavailable, len(frame.Data), n)
	}
	return frame.Data, nil
}

// plain turns what a host answered into an error for callers, where no operation is at hand to recover.
func plain(err error) error {
	if failed, ok := errors.AsType[*wire.Error](err); ok {
		return describe(failed)
	}
	if _, ok := errors.AsType[*hostDiedError](err); ok || errors.Is(err, errRetired) {
		return fmt.Errorf("%w: %w", hsm.ErrUnavailable, err)
	}
	return err
}

// quoteAll lists names for people.
func quoteAll(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
