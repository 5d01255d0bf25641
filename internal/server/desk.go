package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// desk is what the wire asks: it gives each request its time, and puts in order those that need an HSM.
type desk struct {
	keys    Keys
	names   []string // of the keys that are served, nil for all
	metrics *metrics
	logger  *slog.Logger
	recent  *recent
	gates   atomic.Pointer[map[string]*gate]    // by key
	waiting atomic.Pointer[map[string]int]      // keys that cannot seal before their HSM was asked, with the version that they seal with
	leased  atomic.Pointer[map[string]struct{}] // keys with a lease
	sealed  sync.Map                            // keys that have sealed: a string to the version as an int

	mu    sync.Mutex // guards what follows
	quiet time.Time  // until when the log is not told again that openings were turned away
	away  int        // how many were since it was told
}

var _ transit.Keys = (*desk)(nil)

// quietTime is how long the log is not told again of openings that were turned away.
const quietTime = 10 * time.Second

func newDesk(keys Keys, names []string, m *metrics, logger *slog.Logger) *desk {
	d := &desk{keys: keys, names: names, metrics: m, logger: logger, recent: newRecent(recentFor, time.Now)}
	d.gates.Store(&map[string]*gate{})
	d.waiting.Store(&map[string]int{})
	d.leased.Store(&map[string]struct{}{})
	return d
}

// Wrap implements [transit.Keys]. It asks an HSM for nothing but an authentication key that was never opened.
func (d *desk) Wrap(ctx context.Context, name string, use envelope.Use, plaintext, caller []byte) (keyring.Sealed, error) {
	if err := d.serves(name); err != nil {
		return keyring.Sealed{}, err
	}
	if version, waits := (*d.waiting.Load())[name]; waits && !d.hasSealed(name, version) {
		return keyring.Sealed{}, &transit.BusyError{After: shortestPause, Cause: fmt.Sprintf("key %q waits for its HSM since the server was started", name)}
	}
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	sealed, err := d.keys.Wrap(ctx, name, use, plaintext, caller)
	if err != nil {
		return keyring.Sealed{}, plainly(err)
	}
	if !d.hasSealed(name, sealed.Version) {
		d.sealed.Store(name, sealed.Version)
	}
	if !sealed.Leased {
		d.recent.add(sealed.Envelope)
	}
	return sealed, nil
}

// hasSealed tells whether a key has sealed with a version. Such a key waits for nothing, also before it was looked at and warmed: a
// Vault whose first test of a new key went well ends at the second one if that does not.
func (d *desk) hasSealed(name string, version int) bool {
	known, found := d.sealed.Load(name)
	return found && known == version
}

// Open implements [transit.Keys].
func (d *desk) Open(ctx context.Context, name string, raw []byte, want envelope.Context) (keyring.Opened, error) {
	if err := d.serves(name); err != nil {
		return keyring.Opened{}, err
	}
	if opened, ok, err := d.keys.OpenLeased(name, raw, want); ok {
		if err == nil {
			d.metrics.leased.Inc()
		}
		return opened, err
	}
	ctx, cancel := context.WithTimeout(ctx, openLimit)
	defer cancel()
	if g := (*d.gates.Load())[name]; g != nil {
		begun := time.Now()
		leave, err := g.enter(ctx, d.recent.has(raw), d.shares(name, raw), len(raw))
		d.metrics.waited.Observe(time.Since(begun).Seconds())
		if err != nil {
			d.turnedAway(name, err)
			return keyring.Opened{}, err
		}
		defer leave()
	}
	opened, err := d.keys.Open(ctx, name, raw, want)
	if err != nil {
		return keyring.Opened{}, plainly(err)
	}
	if opened.Leased && opened.Device == "" {
		d.metrics.leased.Inc()
	} else {
		d.metrics.strict.Inc()
	}
	return opened, nil
}

// shares tells whether what opens an envelope opens others as well: its KEK, which a lease holds from then on.
func (d *desk) shares(name string, raw []byte) bool {
	if _, lasts := (*d.leased.Load())[name]; !lasts {
		return false
	}
	parsed, err := envelope.Parse(raw)
	if err != nil {
		return false
	}
	_, leased := parsed.KEKID()
	return leased
}

// serves returns an error for a key that the configuration does not name. Where it names none, each that a token is for is served.
func (d *desk) serves(name string) error {
	if d.names == nil || slices.Contains(d.names, name) {
		return nil
	}
	return fmt.Errorf("key %q: %w: it is not served here", name, keyring.ErrKeyNotFound)
}

// turnedAway counts an opening whose turn did not come, and tells the log now and then.
func (d *desk) turnedAway(name string, err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	d.metrics.turnedAway.Inc()
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.away++
	if now.Before(d.quiet) {
		return
	}
	d.logger.Warn("openings are answered with 503: too many wait for the HSM", "key", name, "turned_away", d.away, "cause", err)
	d.quiet, d.away = now.Add(quietTime), 0
}

// plainly says of errors that only package device knows what they are to others.
func plainly(err error) error {
	switch {
	case errors.Is(err, device.ErrClosed), errors.Is(err, device.ErrConfig): // as a PIN's file that is missing, which is read anew each time
		return fmt.Errorf("%w: %w", hsm.ErrUnavailable, err)
	case errors.Is(err, device.ErrRequest):
		return fmt.Errorf("%w: %w", hsm.ErrForbidden, err)
	}
	return err
}

// close turns away all openings that wait, and all that come.
func (d *desk) close() {
	for _, g := range *d.gates.Load() {
		g.close()
	}
}

// load tells how many openings have their turn, and how many wait.
func (d *desk) load() (inside, urgent, patient int) {
	counted := map[*gate]bool{}
	for _, g := range *d.gates.Load() { // several keys may share one
		if !counted[g] {
			counted[g] = true
			i, u, p := g.load()
			inside, urgent, patient = inside+i, urgent+u, patient+p
		}
	}
	return inside, urgent, patient
}
