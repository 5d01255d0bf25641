package daemon

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// deviceProbe asks an HSM now and then how it fares: no private-key operation, so that idle hours cost the HSM nothing. A
// token may answer that from a cache after it was taken away; so an operation that fails counts as well, until it is asked again.
type deviceProbe struct {
	name    string
	device  Device
	metrics *metrics
	logger  *slog.Logger

	mu    sync.Mutex // guards what follows
	asked time.Time
	info  hsm.Info
	err   error
	due   time.Time
}

// deviceState is what is known of an HSM.
type deviceState struct {
	up     bool
	reason string // why it is not
	told   bool   // it told how its PIN fares
	pin    hsm.PINState
}

func (p *deviceProbe) run(ctx context.Context) {
	for {
		p.probe(ctx)
		wait := jittered(deviceInterval)
		p.expect(wait)
		if !sleep(ctx, wait) {
			return
		}
	}
}

func (p *deviceProbe) probe(parent context.Context) {
	ctx, cancel := context.WithTimeout(parent, probeLimit)
	defer cancel()
	p.expect(probeLimit)
	var info hsm.Info
	opened, err := p.device.Device(ctx)
	if err == nil {
		info, err = opened.Info(ctx)
	}
	if parent.Err() != nil {
		return // the daemon stops, which says nothing about the HSM
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err != nil && (p.err == nil || p.asked.IsZero()):
		p.logger.Warn("the HSM does not answer", "device", p.name, "cause", err)
	case err == nil && p.err != nil:
		p.logger.Info("the HSM answers again", "device", p.name)
	}
	p.asked, p.info, p.err = time.Now(), info, err
}

// state returns what is known; false where nothing is yet.
func (p *deviceProbe) state() (deviceState, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	used, known := p.metrics.lastOfDevice(p.name)
	known = known && used.at.After(p.asked)
	if p.asked.IsZero() && !known {
		return deviceState{}, false
	}
	s := deviceState{up: p.err == nil, told: p.err == nil && !p.asked.IsZero(), pin: p.info.PIN}
	switch {
	case p.err != nil:
		s.reason = p.err.Error()
	case !p.asked.IsZero() && p.info.State != "" && p.info.State != hsm.StateOperational:
		s.up, s.reason = false, "it is "+string(p.info.State)
	}
	if known && used.ok {
		s.up, s.reason = true, ""
	} else if known {
		s.up, s.reason = false, "the last operation failed"
	}
	return s, true
}

func (p *deviceProbe) expect(within time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.due = time.Now().Add(within + turnSlack)
}

func (p *deviceProbe) stuck(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.due.IsZero() && now.After(p.due)
}

// probeName is read from stores to see whether they answer. It does not exist.
const probeName = "nitroseal/probe"

// probeStore asks a store now and then. Its answer is counted by the store itself, see [Hooks.Store].
func probeStore(ctx context.Context, s store.Store) {
	for {
		limited, cancel := context.WithTimeout(ctx, probeLimit)
		_, _ = s.Get(limited, probeName) // what it says is counted
		cancel()
		if !sleep(ctx, jittered(storeInterval)) {
			return
		}
	}
}

// sleep waits; false where ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
