package monitor

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Device is an HSM of the configuration. *device.Handle is one.
type Device interface {
	Name() string
	Device(ctx context.Context) (hsm.Device, error)
}

// The pace of a probe.
const (
	deviceInterval = 30 * time.Second
	probeLimit     = 20 * time.Second
	turnSlack      = time.Minute // by which it may be late before it counts as stuck
)

// Probe asks an HSM now and then how it fares: no private-key operation, so that idle hours cost the HSM nothing. A
// token may answer that from a cache after it was taken away; so an operation that fails counts as well, until it is asked again.
type Probe struct {
	Device Device
	// Last tells of the last operation on the device that somebody had a use for: when it was, and whether the device answered.
	// known is false where there was none.
	Last   func(device string) (at time.Time, ok, known bool)
	Logger *slog.Logger
	// Again is how soon an HSM is asked again that did not answer, or whose last operation failed; 0 for as soon as one that does.
	Again time.Duration

	mu    sync.Mutex // guards what follows
	asked time.Time
	info  hsm.Info
	err   error
	due   time.Time
}

// DeviceState is what is known of an HSM.
type DeviceState struct {
	Up     bool
	Reason string // why it is not
	Told   bool   // it told how its PIN fares
	PIN    hsm.PINState
}

// Run asks the HSM until ctx ends.
func (p *Probe) Run(ctx context.Context) {
	for {
		p.Ask(ctx)
		wait := Jittered(deviceInterval)
		p.expect(wait)
		if !p.rest(ctx, wait) {
			return
		}
	}
}

// rest waits until the HSM is to be asked again; false where ctx ended first.
func (p *Probe) rest(ctx context.Context, wait time.Duration) bool {
	if p.Again == 0 {
		return Sleep(ctx, wait)
	}
	for ; wait > 0; wait -= p.Again {
		if !Sleep(ctx, min(wait, p.Again)) {
			return false
		}
		if state, known := p.State(); known && !state.Up {
			return true
		}
	}
	return true
}

// Ask asks the HSM now.
func (p *Probe) Ask(parent context.Context) {
	ctx, cancel := context.WithTimeout(parent, probeLimit)
	defer cancel()
	p.expect(probeLimit)
	var info hsm.Info
	opened, err := p.Device.Device(ctx)
	if err == nil {
		info, err = opened.Info(ctx)
	}
	if parent.Err() != nil {
		return // the process stops, which says nothing about the HSM
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil && (p.err == nil || p.asked.IsZero()):
		p.Logger.Warn("the HSM does not answer", "device", p.Device.Name(), "cause", err)
	case err == nil && p.err != nil:
		p.Logger.Info("the HSM answers again", "device", p.Device.Name())
	}
	p.asked, p.info, p.err = time.Now(), info, err
}

// State returns what is known; false where nothing is yet.
func (p *Probe) State() (DeviceState, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	used, ok, known := p.Last(p.Device.Name())
	known = known && used.After(p.asked)
	if p.asked.IsZero() && !known {
		return DeviceState{}, false
	}
	s := DeviceState{Up: p.err == nil, Told: p.err == nil && !p.asked.IsZero(), PIN: p.info.PIN}
	switch {
	case p.err != nil:
		s.Reason = p.err.Error()
	case !p.asked.IsZero() && p.info.State != "" && p.info.State != hsm.StateOperational:
		s.Up, s.Reason = false, "it is "+string(p.info.State)
	}
	if known && ok {
		s.Up, s.Reason = true, ""
	} else if known {
		s.Up, s.Reason = false, "the last operation failed"
	}
	return s, true
}

func (p *Probe) expect(within time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.due = time.Now().Add(within + turnSlack)
}

// Stuck tells whether the probe does not turn.
func (p *Probe) Stuck(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.due.IsZero() && now.After(p.due)
}
