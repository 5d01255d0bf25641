package nethsm

import (
	"context"
	"errors"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// unlocker unlocks the one node of a view. A wrong passphrase is an [*hsm.PINError].
type unlocker func(ctx context.Context, at *Client) error

// setUnlocker makes nodes that are found Locked be unlocked by themselves, in the background: one try at a time for each
// node, never more than one a second, and none after a wrong passphrase until the next setUnlocker. Nil ends that.
func (p *pool) setUnlocker(unlock unlocker) {
	p.mu.Lock()
	p.unlocker = unlock
	p.mu.Unlock()
	for _, n := range p.nodes {
		n.mu.Lock()
		n.unlockBarred = false
		locked := false
		if n.rest != nil {
			n.rest.unlockErr = nil
			locked = errors.Is(n.rest.cause, hsm.ErrLocked)
			if n.rest.unlocking != nil && !n.unlockBusy { // announced, and not to come any more
				close(n.rest.unlocking)
				n.rest.unlocking = nil
			}
		}
		n.mu.Unlock()
		if locked {
			p.announceUnlock(n)
			n.probeSoon()
		}
	}
}

// announceUnlock notes that a Locked node is about to be unlocked by itself, so that requests can wait for it; true where that
// is new.
func (p *pool) announceUnlock(n *node) bool {
	p.mu.Lock()
	can := p.unlocker != nil
	p.mu.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	if !can || n.unlockBarred || n.rest == nil || n.rest.unlocking != nil || n.rest.unlockErr != nil {
		return false
	}
	n.rest.unlocking = make(chan struct{})
	return true
}

// unlock unlocks a Locked node where somebody has said how; true when that was tried and worked.
func (p *pool) unlock(n *node) bool {
	p.mu.Lock()
	unlock := p.unlocker
	p.mu.Unlock()
	n.mu.Lock()
	if unlock == nil || n.unlockBarred || n.unlockBusy || n.rest == nil || !errors.Is(n.rest.cause, hsm.ErrLocked) || time.Since(n.unlockTried) < limitPause {
		n.mu.Unlock()
		return false
	}
	n.unlockTried, n.unlockBusy = time.Now(), true
	n.mu.Unlock()

	ctx, cancel := context.WithTimeout(p.ctx, unlockTimeout)
	defer cancel()
	err := unlock(ctx, &Client{pool: p, only: n})

	n.mu.Lock()
	defer n.mu.Unlock()
	n.unlockBusy = false
	if n.rest == nil { // a request found it unlocked
		return true
	}
	n.rest.unlockErr = err
	n.rest.brief = err == nil // requests need not wait for the probe
	if _, wrong := errors.AsType[*hsm.PINError](err); wrong {
		n.unlockBarred = true
		n.logger.Error("unlocking a node of the NetHSM by itself is given up: its unlock passphrase is another one", "node", n.host, "error", err)
	} else if err != nil && p.ctx.Err() == nil {
		n.logger.Warn("unlocking a node of the NetHSM by itself did not work; it is tried again", "node", n.host, "error", err)
	}
	if n.rest.unlocking != nil {
		close(n.rest.unlocking)
		n.rest.unlocking = nil
	}
	return err == nil
}
