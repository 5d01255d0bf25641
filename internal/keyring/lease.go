package keyring

import (
	"cmp"
	"context"
	"crypto/cipher"
	"slices"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/memory"
)

// Bounds of [Settings].Lease.
const (
	MinLease = 10 * time.Second
	MaxLease = 24 * time.Hour
)

// sweepEvery is how often the ends of leases are compared with the clock on the wall while there are any. The clock that
// timers go by stands still while the machine is suspended.
const sweepEvery = 5 * time.Second

// renewalFifth: a lease that is used within the last fifth of its time is opened anew.
const renewalFifth = 5

// leaseID names a KEK of a version. Two wrapping keys never share one.
type leaseID struct {
	key     string
	version int
	kid     string
}

// lease is an opened KEK.
type lease struct {
	id     leaseID
	kek    *envelope.KEK // as it was opened, and will be opened anew
	aes    *memory.AES
	device string // that opened it
	opened moment
	length time.Duration // of the setting, when it was opened or since; under leases.mu
}

// moment is a point in time on two clocks. A lease ends by whichever is first: one stands still while the machine is
// suspended, the other can be set back.
type moment struct{ wall, monotonic time.Time }

func (k *Keyring) moment() moment { return moment{wall: k.now().Round(0), monotonic: time.Now()} }

func (m moment) since(earlier moment) time.Duration {
	return max(m.wall.Sub(earlier.wall), m.monotonic.Sub(earlier.monotonic))
}

// seal makes a leased envelope; ok is false where the lease ended just now.
func (l *lease) seal(c envelope.Context, auth *envelope.AuthKey, payload []byte) (raw []byte, ok bool, err error) {
	ok = l.aes.Use(func(block cipher.Block) { raw, err = envelope.SealLeased(c, l.kek, block, auth, payload) })
	return raw, ok, err
}

// open opens a leased envelope; ok is false where the lease ended just now. The caller wipes the payload.
func (l *lease) open(parsed *envelope.Envelope, want envelope.Context, auth *envelope.AuthKey) (payload []byte, ok bool, err error) {
	ok = l.aes.Use(func(block cipher.Block) { payload, err = parsed.OpenLeased(want, block, auth) })
	return payload, ok, err
}

// recipients is how many HSM keys open the KEK.
func (l *lease) recipients() int { return len(l.kek.Envelope().Recipients()) }

// leases are the KEKs that are held in memory, and those that are being opened.
type leases struct {
	mu      sync.RWMutex
	held    map[leaseID]*lease
	flights map[flightID]*flight
	rests   map[leaseID]rest
	ended   uint64      // how often all were ended, or what is being opened was not to be held any more
	sweeper *time.Timer // nil while none is held
	closed  bool
	work    sync.WaitGroup // in the background
}

// leaseOf returns the lease of a KEK, nil where it is not open. What is used when it is about to end is opened anew in the
// background.
func (k *Keyring) leaseOf(rec *record, id leaseID) *lease {
	k.leases.mu.RLock()
	l := k.leases.held[id]
	if l == nil {
		k.leases.mu.RUnlock()
		return nil
	}
	length := min(l.length, rec.lease()) // somebody may have made it shorter since
	k.leases.mu.RUnlock()
	left := length - k.moment().since(l.opened)
	if left <= 0 {
		k.endLease(l)
		return nil
	}
	if left < length/renewalFifth {
		k.openSoon(rec, l.kek)
	}
	return l
}

// hold keeps an opened KEK for the lease that its key has, unless all were ended since it was asked for. leases.mu is held.
func (k *Keyring) hold(l *lease, ended uint64) (held bool, replaced *lease) {
	if l.length <= 0 || k.leases.closed || k.leases.ended != ended {
		return false, nil
	}
	if k.leases.held == nil {
		k.leases.held = map[leaseID]*lease{}
	}
	replaced = k.leases.held[l.id]
	k.leases.held[l.id] = l
	if k.leases.sweeper == nil {
		k.leases.sweeper = time.AfterFunc(min(sweepEvery, l.length), k.sweep)
	}
	return true, replaced
}

// sweep ends the leases whose time is over, used or not.
func (k *Keyring) sweep() {
	now := k.moment()
	next := sweepEvery
	k.endWhere(func(l *lease) bool {
		left := l.length - now.since(l.opened)
		if left > 0 {
			next = min(next, left)
		}
		return left <= 0
	})
	k.leases.mu.Lock()
	defer k.leases.mu.Unlock()
	if len(k.leases.held) == 0 || k.leases.closed {
		k.leases.sweeper = nil
		return
	}
	k.leases.sweeper.Reset(next)
}

// endLease wipes one lease, if it is not another one by now.
func (k *Keyring) endLease(ending *lease) {
	k.endWhere(func(l *lease) bool { return l == ending })
	ending.aes.Wipe() // not only when it was held until now: when this returns, it is wiped
}

// endWhere wipes the leases that over chooses, which is asked under the lock.
func (k *Keyring) endWhere(over func(*lease) bool) {
	var ended []*lease
	k.leases.mu.Lock()
	for id, l := range k.leases.held {
		if over(l) {
			delete(k.leases.held, id)
			ended = append(ended, l)
		}
	}
	k.leases.mu.Unlock()
	for _, l := range ended { // without the lock: it waits for whoever works with the key
		l.aes.Wipe()
		k.logger.Info("lease ended", "key", l.id.key, "version", l.id.version, "kid", l.id.kid)
	}
}

// shorten makes the leases of a key no longer than its setting is now. What is being opened by a longer one is not held.
func (k *Keyring) shorten(name string, setting time.Duration) {
	now := k.moment()
	k.leases.mu.Lock()
	for id, f := range k.leases.flights {
		if id.key == name && f.length > setting {
			k.leases.ended++
			break
		}
	}
	k.leases.mu.Unlock()
	k.endWhere(func(l *lease) bool {
		if l.id.key != name {
			return false
		}
		l.length = min(l.length, setting)
		return l.length <= now.since(l.opened)
	})
}

// leased returns the names of the keys of which a lease is open or being opened, of one key or, by an empty name, of all.
func (k *Keyring) leased(name string) []string {
	k.leases.mu.RLock()
	defer k.leases.mu.RUnlock()
	var names []string
	add := func(key string) {
		if (name == "" || key == name) && !slices.Contains(names, key) {
			names = append(names, key)
		}
	}
	for id := range k.leases.held {
		add(id.key)
	}
	for id := range k.leases.flights {
		add(id.key)
	}
	return names
}

// Leases lists the key encryption keys that are held in memory.
func (k *Keyring) Leases() []Lease {
	k.leases.mu.RLock()
	defer k.leases.mu.RUnlock()
	list := make([]Lease, 0, len(k.leases.held))
	for id, l := range k.leases.held {
		list = append(list, Lease{Key: id.key, Version: id.version, KID: id.kid, Until: l.opened.wall.Add(l.length), Locked: l.aes.Locked()})
	}
	slices.SortFunc(list, func(a, b Lease) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version), cmp.Compare(a.KID, b.KID))
	})
	return list
}

// EndLeases wipes all key encryption keys that are held in memory. Those that are being opened now serve whoever waits
// for them, and are not held.
func (k *Keyring) EndLeases() {
	k.leases.mu.Lock()
	k.leases.ended++
	k.leases.mu.Unlock()
	k.endWhere(func(*lease) bool { return true })
}

// Close ends all leases and waits for work in the background. The keyring works on, without leases.
func (k *Keyring) Close() error {
	k.leases.mu.Lock()
	k.leases.closed = true
	if k.leases.sweeper != nil {
		k.leases.sweeper.Stop()
	}
	k.leases.mu.Unlock()
	k.EndLeases()
	k.stop()
	k.leases.work.Wait()
	return nil
}

// background lets do run for a while without anybody waiting, until Close.
func (k *Keyring) background(do func(context.Context)) {
	k.leases.mu.Lock()
	defer k.leases.mu.Unlock()
	if k.leases.closed {
		return
	}
	k.leases.work.Go(func() {
		ctx, cancel := context.WithTimeout(k.running, backgroundTime)
		defer cancel()
		do(ctx)
	})
}
