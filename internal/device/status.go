package device

import (
	"context"
	"errors"
	"fmt"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// probeInterval is for how long a probe's result is given again instead of troubling the HSM: a monitor that asks
// every second must not keep a card busy that takes 0.6 s for one operation.
const probeInterval = 5 * time.Second

// Status is how a device fares.
type Status struct {
	// Info is what the HSM tells of itself; the zero value where it does not answer.
	Info hsm.Info
	// Keys are the key pairs found.
	Keys []hsm.Key
	// RoundTrip is how long one private-key operation took, 0 where none could be tried.
	RoundTrip time.Duration
	// Nodes are the nodes of a device that has several, a NetHSM; each says by itself what is wrong with it.
	Nodes []hsm.Node
	// Err is why the device cannot be used now; nil where it can. A device that answers and holds no key that could
	// open an envelope has none: a key can be made on it.
	Err error
	// Checked is when all this was found out.
	Checked time.Time

	proved bool // a private-key operation worked
}

// CanOpen tells whether an envelope sealed to a key of the device could be opened now: a private-key operation worked.
func (s Status) CanOpen() bool { return s.Err == nil && s.proved }

// probe is the newest status and the one being made.
type probe struct {
	status  Status
	running chan struct{} // closed when the probe in flight has ended; nil where none is
	forgot  int           // counts calls of ForgetStatus, so that a probe that began before one is not kept
}

// isFresh tells whether the newest status may be given again. One that says "no key" may not: it cost no private-key
// operation, and whoever has just made the first key wants to see it.
func (p probe) isFresh() bool {
	return time.Since(p.status.Checked) < probeInterval && (p.status.Err != nil || p.status.CanOpen())
}

// Status finds out how the device fares: it reads what the HSM tells of itself, lists its keys and performs one
// private-key operation, because only a real operation proves that a card is there (C_GetTokenInfo answers from a cache
// when it is gone). Callers at one time share one probe, and a result is reused for a few seconds.
func (h *Handle) Status(ctx context.Context) Status {
	for {
		h.mu.Lock()
		if h.probed.isFresh() {
			defer h.mu.Unlock()
			return h.probed.status
		}
		if running := h.probed.running; running != nil {
			h.mu.Unlock()
			select {
			case <-running:
				continue
			case <-ctx.Done():
				return Status{Err: ctx.Err(), Checked: time.Now()}
			}
		}
		running := make(chan struct{})
		h.probed.running = running
		forgot := h.probed.forgot
		h.mu.Unlock()

		status := h.check(ctx)

		h.mu.Lock()
		h.probed.running = nil
		if ctx.Err() == nil && h.probed.forgot == forgot { // a caller's own impatience says nothing about the device
			h.probed.status = status
		}
		h.mu.Unlock()
		close(running)
		return status
	}
}

// ForgetStatus makes the next Status ask the HSM again: a person has just changed what it would say.
func (h *Handle) ForgetStatus() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.probed.status = Status{}
	h.probed.forgot++
}

func (h *Handle) check(ctx context.Context) (status Status) {
	defer func() { status.Checked = time.Now() }()
	device, err := h.Device(ctx)
	if err != nil {
		return Status{Err: err}
	}
	if cluster, ok := device.(hsm.Clustered); ok {
		nodes := make(chan []hsm.Node, 1)
		go func() { nodes <- cluster.Nodes(ctx) }() // ends before check does
		defer func() {
			status.Nodes = <-nodes
			status = withNodes(status, h.config)
		}()
	}
	if status.Info, status.Err = device.Info(ctx); status.Err != nil {
		return status
	}
	if status.Keys, status.Err = device.FindKeys(ctx, hsm.KeyQuery{}); status.Err != nil {
		return status
	}
	status = prove(ctx, device, status)
	if status.Err == nil && !status.proved && h.config.Type == TypeNetHSM {
		status.Err = checkRole(ctx, device)
	}
	return status
}

// prove performs the private-key operation with the first key that can. An HSM may hold keys that are not ours, for
// signing for example, or ones for other users: those say nothing about ours.
func prove(ctx context.Context, device hsm.Device, status Status) Status {
	var forbidden error
	for _, key := range status.Keys {
		begin := time.Now()
		_, err := hsm.Prove(ctx, key)
		switch {
		case errors.Is(err, hsm.ErrUnsupported):
		case errors.Is(err, hsm.ErrForbidden) && forbidden != nil:
		case errors.Is(err, hsm.ErrForbidden):
			forbidden = err
			if status.Err = checkRole(ctx, device); status.Err != nil { // then no other key will do
				return status
			}
		case err != nil:
			status.Err = err
			return status
		default:
			status.RoundTrip, status.proved = time.Since(begin), true
			return status
		}
	}
	if forbidden != nil {
		status.Err = fmt.Errorf("none of the keys is for this user: give it a tag of the key that it is to use: %w", forbidden)
	}
	return status
}

// checkRole finds out without a key whether the user could use one: random bytes are for the same role of a NetHSM.
func checkRole(ctx context.Context, device hsm.Device) error {
	randomer, ok := device.(hsm.Randomer)
	if !ok {
		return nil
	}
	random, err := randomer.Random(ctx, 1)
	clear(random)
	if errors.Is(err, hsm.ErrForbidden) {
		return fmt.Errorf("the user may list keys and not use them: name one with the role Operator: %w", err)
	}
	return err
}
