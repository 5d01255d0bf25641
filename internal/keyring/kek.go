package keyring

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/memory"
)

// backgroundTime is what opening a KEK may take that nobody waits for.
const backgroundTime = time.Minute

// firstRest and longestRest bound how long a KEK that did not open in the background is left alone: twice as long after
// each failure.
const (
	firstRest   = time.Second
	longestRest = time.Minute
)

// rest is how the last openings of a KEK in the background ended.
type rest struct {
	busy     bool
	failures int
	until    time.Time // on the monotonic clock
}

// flightID names the opening of a KEK as it is carried by an envelope: one that somebody damaged must not fail those who
// have it whole.
type flightID struct {
	leaseID
	sealed string
}

// flight is a KEK that is being opened: with one HSM operation, for all who need it meanwhile.
type flight struct {
	done    chan struct{} // closed when the rest is set
	opened  *lease        // nil where it failed
	err     error
	held    bool          // as a lease: else the last who leaves wipes it
	length  time.Duration // of the lease that the key had when it began
	waiters int           // who has not left, the leader included; under leases.mu
	ctx     context.Context
	cancel  context.CancelFunc
}

// sealLeased seals with the lease of a version's KEK; ok is false where none is open. Then one is opened in the background:
// sealing never waits for an HSM.
func (k *Keyring) sealLeased(rec *record, v *version, c envelope.Context, auth *envelope.AuthKey, payload []byte) (raw []byte, ok bool, err error) {
	if c.Use != envelope.UseTransit || rec.lease() == 0 || v.kek == nil || len(payload) > envelope.MaxLeasedPayload {
		return nil, false, nil
	}
	if l := k.sealingLease(rec, v); l != nil {
		if raw, ok, err = l.seal(c, auth, payload); ok {
			return raw, true, err
		}
	}
	k.openSoon(rec, v.kek)
	return nil, false, nil
}

// sealingLease returns the lease of a version's KEK, nil where it is not open. What is sealed carries the KEK as the lease opened
// it, so that must be as the record has it: a copy that an envelope brought may open with one of the HSMs alone.
func (k *Keyring) sealingLease(rec *record, v *version) *lease {
	if l := k.leaseOf(rec, leaseID{rec.Name, v.Number, v.kek.ID()}); l != nil && l.kek.Equal(v.kek) {
		return l
	}
	return nil
}

// openLeased opens a leased envelope: with the lease of its KEK or, where none is open, by opening the KEK that it carries
// with one HSM operation, for all who wait for the same. It returns the device that did, "" for a lease, and how many HSM
// keys open the KEK. The caller wipes the payload.
func (k *Keyring) openLeased(
	ctx context.Context, rec *record, v *version, parsed *envelope.Envelope, want envelope.Context, auth *envelope.AuthKey,
) (payload []byte, device string, recipients int, err error) {
	kid, _ := parsed.KEKID()
	for {
		if l := k.leaseOf(rec, leaseID{rec.Name, v.Number, kid}); l != nil {
			if payload, ok, err := l.open(parsed, want, auth); ok {
				return payload, "", l.recipients(), err
			}
		}
		kek, err := parsed.KEK()
		if err != nil {
			return nil, "", 0, err
		}
		l, leave, err := k.openKEK(ctx, rec, v, kek, auth)
		if err != nil {
			return nil, "", 0, err
		}
		payload, ok, err := l.open(parsed, want, auth)
		leave()
		if ok {
			return payload, l.device, l.recipients(), err
		}
		// All leases were ended between the two. This one still wants its answer.
	}
}

// OpenLease opens the key encryption key of the version that seals for encrypt/, where the key has a lease and it is not
// open: at the cost of one private-key operation, and of one more where the authentication key was not opened yet. A
// server does it ahead of time, so that even its first envelopes are leased.
func (k *Keyring) OpenLease(ctx context.Context, name string) error {
	rec, err := k.lookup(ctx, name)
	if err != nil {
		return err
	}
	v := rec.sealsWith(envelope.UseTransit)
	if rec.lease() == 0 || v == nil || v.kek == nil || k.sealingLease(rec, v) != nil {
		return nil
	}
	auth, err := k.authKey(ctx, rec, v.Number)
	if err != nil {
		return err
	}
	defer clear(auth[:])
	_, leave, err := k.openKEK(ctx, rec, v, v.kek, auth)
	if err != nil {
		return fmt.Errorf("key %q: opening the key encryption key of version %d: %w", name, v.Number, err)
	}
	leave()
	return nil
}

// openSoon opens a KEK in the background, unless that is being done or failed a moment ago.
func (k *Keyring) openSoon(rec *record, kek *envelope.KEK) {
	v := rec.version(kek.Envelope().Context().Version)
	id := leaseID{rec.Name, v.Number, kek.ID()}
	k.leases.mu.RLock()
	last := k.leases.rests[id]
	idle := !last.busy && !time.Now().Before(last.until)
	k.leases.mu.RUnlock()
	if !idle {
		return
	}
	k.leases.mu.Lock()
	if last = k.leases.rests[id]; last.busy || k.leases.closed {
		k.leases.mu.Unlock()
		return
	}
	if k.leases.rests == nil {
		k.leases.rests = map[leaseID]rest{}
	}
	last.busy = true
	k.leases.rests[id] = last
	k.leases.mu.Unlock()
	k.background(func(ctx context.Context) {
		err := k.openAhead(ctx, rec, v, kek)
		if err != nil && k.running.Err() == nil {
			k.logger.Warn("opening a lease failed; envelopes are sealed to the HSM meanwhile", "key", id.key, "version", id.version, "kid",
				id.kid, "error", err)
		}
		k.leases.mu.Lock()
		defer k.leases.mu.Unlock()
		if err == nil {
			delete(k.leases.rests, id)
			return
		}
		pause := min(longestRest, firstRest<<min(last.failures, 10))
		k.leases.rests[id] = rest{failures: last.failures + 1, until: time.Now().Add(pause)}
	})
}

func (k *Keyring) openAhead(ctx context.Context, rec *record, v *version, kek *envelope.KEK) error {
	auth, err := k.authKey(ctx, rec, v.Number)
	if err != nil {
		return err
	}
	defer clear(auth[:])
	_, leave, err := k.openKEK(ctx, rec, v, kek, auth)
	if err != nil {
		return err
	}
	leave()
	return nil
}

// openKEK opens a KEK with one HSM operation, together with all who want it meanwhile, and holds it where the key has a
// lease. The caller calls leave when it has used it.
func (k *Keyring) openKEK(
	ctx context.Context, rec *record, v *version, kek *envelope.KEK, auth *envelope.AuthKey,
) (opened *lease, leave func(), err error) {
	id := flightID{leaseID{rec.Name, v.Number, kek.ID()}, string(kek.Raw())}
	for {
		f, leads := k.board(ctx, id, rec.lease())
		if leads {
			k.fly(f, id, rec, v, kek, auth)
		}
		select {
		case <-f.done:
		case <-ctx.Done():
			k.leave(f)
			return nil, nil, fmt.Errorf("waiting for an HSM to open the key encryption key: %w", ctx.Err())
		}
		if f.err == nil {
			return f.opened, sync.OnceFunc(func() { k.leave(f) }), nil
		}
		k.leave(f)
		// The leader's time was over, or it had gone. Whoever has time left goes on.
		if gone := ctx.Err(); gone != nil && !errors.Is(f.err, gone) {
			return nil, nil, fmt.Errorf("%w: %w", gone, f.err)
		}
		if leads || !errors.Is(f.err, context.Canceled) && !errors.Is(f.err, context.DeadlineExceeded) {
			return nil, nil, f.err
		}
	}
}

// board takes part in the opening of a KEK, or begins one and leads it.
func (k *Keyring) board(ctx context.Context, id flightID, length time.Duration) (f *flight, leads bool) {
	k.leases.mu.Lock()
	defer k.leases.mu.Unlock()
	if f := k.leases.flights[id]; f != nil {
		f.waiters++
		return f, false
	}
	f = &flight{done: make(chan struct{}), waiters: 1, ctx: ctx, length: length}
	if k.leases.flights == nil {
		k.leases.flights = map[flightID]*flight{}
	}
	k.leases.flights[id] = f
	return f, true
}

// leave ends one's part in a flight. The last one wipes what is not held.
func (k *Keyring) leave(f *flight) {
	k.leases.mu.Lock()
	f.waiters--
	last := f.waiters == 0
	if f.waiters == 1 && f.cancel != nil && f.ctx.Err() != nil {
		f.cancel() // the leader went on for the others alone
	}
	k.leases.mu.Unlock()
	if last && f.opened != nil && !f.held {
		f.opened.aes.Wipe()
	}
}

// fly leads a flight to its end. A leader who is no longer wanted goes on as long as somebody waits with it, within its own
// time.
func (k *Keyring) fly(f *flight, id flightID, rec *record, v *version, kek *envelope.KEK, auth *envelope.AuthKey) {
	deadline, ok := f.ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(backgroundTime)
	}
	ctx, cancel := context.WithDeadline(context.WithoutCancel(f.ctx), deadline)
	defer cancel()
	k.leases.mu.Lock()
	f.cancel = cancel
	ended := k.leases.ended
	k.leases.mu.Unlock()
	stop := context.AfterFunc(f.ctx, func() {
		k.leases.mu.RLock()
		defer k.leases.mu.RUnlock()
		if f.waiters <= 1 {
			cancel()
		}
	})
	defer stop()

	f.err = errCutOff // stays where a provider panics: nobody may wait for ever
	defer func() { k.land(f, id, ended) }()
	f.opened, f.err = k.unsealKEK(ctx, id.leaseID, v, kek, auth)
	if f.err == nil {
		f.opened.length = k.leaseNow(ctx, rec)
	}
}

// errCutOff is what those see who waited for an opening that did not come to its end.
var errCutOff = fmt.Errorf("opening the key encryption key was cut off: %w: try again", hsm.ErrUnavailable)

// land ends a flight for all who are in it, and holds what it opened unless all leases were ended meanwhile.
func (k *Keyring) land(f *flight, id flightID, ended uint64) {
	var replaced *lease
	k.leases.mu.Lock()
	delete(k.leases.flights, id)
	f.cancel = nil
	if f.err == nil {
		f.held, replaced = k.hold(f.opened, ended)
	}
	close(f.done)
	k.leases.mu.Unlock()
	if replaced != nil {
		replaced.aes.Wipe()
	}
	if f.held {
		k.logger.Info("lease opened", "key", id.key, "version", id.version, "kid", id.kid, "device", f.opened.device, "lease",
			f.length, "renewed", replaced != nil, "locked", f.opened.aes.Locked())
	}
}

// leaseNow returns how long an opened KEK may be held: somebody may have changed the lease, or deleted the key, since the record was
// read.
func (k *Keyring) leaseNow(ctx context.Context, rec *record) time.Duration {
	now, err := k.lookup(ctx, rec.Name)
	switch {
	case errors.Is(err, ErrKeyNotFound):
		return 0
	case err != nil: // what could be read last holds, as for everything else
		return rec.lease()
	}
	return min(rec.lease(), now.lease())
}

// unsealKEK opens a KEK with one HSM operation and puts it into locked memory.
func (k *Keyring) unsealKEK(
	ctx context.Context, id leaseID, v *version, kek *envelope.KEK, auth *envelope.AuthKey,
) (*lease, error) {
	key, rcpt, err := k.openAnywhere(ctx, kek.Envelope(), kek.Envelope().Context(), v, auth)
	if err != nil {
		return nil, fmt.Errorf("opening the key encryption key: %w", err)
	}
	defer clear(key)
	if err := kek.Check(key); err != nil {
		return nil, err
	}
	aes, err := memory.NewAES(key)
	if err != nil {
		return nil, fmt.Errorf("keeping the key encryption key: %w", err)
	}
	return &lease{id: id, kek: kek, aes: aes, device: rcpt.Device, opened: k.moment()}, nil
}

// lease is how long an opened KEK of the key is held; 0 for strict mode.
func (r *record) lease() time.Duration { return time.Duration(r.LeaseSeconds) * time.Second }

// wantsKEK lists the versions of a leased key that seal, or will next, and have no KEK.
func (r *record) wantsKEK() []int {
	if r.LeaseSeconds == 0 || len(r.Versions) == 0 {
		return nil
	}
	first := r.encryptVersion()
	if first == 0 {
		first = len(r.Versions)
	}
	var wanting []int
	for number := first; number <= len(r.Versions); number++ {
		if r.version(number).KEKEnvelope == nil {
			wanting = append(wanting, number)
		}
	}
	return wanting
}

// giveKEKs makes the KEKs that a key wants, in software, for the versions whose authentication keys are open.
func (k *Keyring) giveKEKs(rec *record) error {
	for _, number := range rec.wantsKEK() {
		v := rec.version(number)
		auth, ok := k.knownAuth(v)
		if !ok {
			continue
		}
		err := v.makeKEK(rec.Name, &auth)
		clear(auth[:])
		if err != nil {
			return fmt.Errorf("key %q: version %d: %w", rec.Name, number, err)
		}
	}
	return nil
}

// makeKEK gives a version a KEK of its own, sealed to all of its recipients. Envelopes that were sealed to another one
// carry that, and open as before.
func (v *version) makeKEK(name string, auth *envelope.AuthKey) error {
	key := envelope.NewKEK()
	defer clear(key)
	kek, err := envelope.SealKEK(name, v.Number, v.sealTo(), auth, key)
	if err != nil {
		return fmt.Errorf("making a key encryption key: %w", err)
	}
	v.kek, v.KEKEnvelope = kek, kek.Raw()
	return nil
}
