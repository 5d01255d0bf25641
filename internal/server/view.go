package server

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// view is how a served key fares, as it was last looked at.
type view struct {
	health   KeyHealth
	record   string   // SHA-256 of the key record, "" where there is none
	at       []string // the devices of all versions, sorted
	err      error    // why it does not seal, for the log and /readyz
	patience bool     // whoever waits for it to seal waits for an HSM, and not for a person who mends the key
	counts   bool     // the server is not well where it is not
}

// lookAt looks at a key. No HSM is asked.
func (s *service) lookAt(ctx context.Context, name string, leases []keyring.Lease) *view {
	v := &view{health: KeyHealth{Name: name, Mode: ModeStrict}, counts: s.site.Names != nil}
	key, err := s.site.Keys.Get(ctx, name)
	if err != nil {
		v.err = err
		return v
	}
	v.record = key.RecordSHA256
	devices := map[string]bool{}
	for _, version := range key.Versions {
		for _, r := range version.Recipients {
			devices[r.Device] = true
		}
	}
	v.at = slices.Sorted(maps.Keys(devices))
	if key.Lease > 0 {
		v.health.Mode = ModeLeased
	}
	v.health.Version = key.EncryptVersion
	warmed, err := s.warmed(name, key.RecordSHA256, key.EncryptVersion)
	v.patience = !warmed && passes(err)
	v.err = err
	if notReady := s.site.Keys.Ready(ctx, name, keyring.PurposeEncrypt); notReady != nil {
		v.err, v.patience = notReady, false
	}
	// A token for a key that is misspelt, or not finished, is no reason to take this server, and all others with it, from those
	// whose keys are well.
	v.counts = v.counts || v.err == nil || v.patience
	v.health.Seals = v.err == nil && warmed
	if key.EncryptVersion > 0 {
		s.lookAtDevices(v, key.Versions[key.EncryptVersion-1].Recipients)
	}
	for _, l := range leases {
		if l.Key == name && l.Version == key.EncryptVersion {
			until := l.Until.UTC().Truncate(time.Second)
			v.health.LeaseUntil, v.health.LeaseLocked = &until, &l.Locked
		}
	}
	v.health.Opens = warmed && (v.health.RecipientsUp > 0 || v.health.LeaseUntil != nil) && s.deaf() == nil
	return v
}

// lookAtDevices counts the recipients whose HSM answers, and what these can do.
func (s *service) lookAtDevices(v *view, recipients []keyring.Recipient) {
	v.health.Recipients = len(recipients)
	counted := map[string]bool{}
	for _, r := range recipients {
		probe := s.probes[r.Device]
		if probe == nil {
			continue // it is not configured here
		}
		if state, known := probe.State(); known && !state.Up {
			continue
		}
		v.health.RecipientsUp++
		if counted[r.Device] { // two keys on one HSM share its time
			continue
		}
		counted[r.Device] = true
		took := s.hooks.operations.of(r.Device)
		v.health.OperationSeconds = max(v.health.OperationSeconds, took.Seconds())
		v.health.Capacity += capacity(took, s.parallel[r.Device])
	}
}

// passes tells whether what keeps a key from being warmed is an HSM that is away or waits for a person, and not the key itself.
func passes(err error) bool {
	var pin *hsm.PINError
	return err == nil || hsm.Away(err) || errors.Is(err, hsm.ErrLocked) || errors.As(err, &pin) || errors.Is(err, device.ErrConfig) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// refresh looks at all keys, and has what depends on them follow.
func (s *service) refresh(ctx context.Context) {
	known := (doorkeeper{s.site.Tokens}).knows() // before it is asked which keys they name
	leases := s.site.Keys.Leases()
	var views []*view
	gates, waiting, leased := map[string]*gate{}, map[string]int{}, map[string]struct{}{}
	for _, name := range s.site.served() {
		v := s.lookAt(ctx, name, leases)
		if ctx.Err() != nil {
			return
		}
		views = append(views, v)
		s.tellUnfit(v)
		if v.record == "" { // nothing to be opened, or nobody knows: as it was
			if before := (*s.desk.gates.Load())[name]; before != nil {
				gates[name] = before
			}
			continue
		}
		gates[name] = s.gate(v.at)
		if v.patience {
			waiting[name] = v.health.Version
		}
		if v.health.Mode == ModeLeased {
			leased[name] = struct{}{}
		}
	}
	s.desk.gates.Store(&gates)
	s.desk.waiting.Store(&waiting)
	s.desk.leased.Store(&leased)
	s.current.Store(&views)
	s.looked.Store(known)
}

// gate returns the gate of a set of devices. Only refresh calls it.
func (s *service) gate(devices []string) *gate {
	id := strings.Join(devices, "\n")
	if known := s.gates[id]; known != nil {
		return known
	}
	places := 0
	for _, name := range devices {
		places += s.parallel[name] // 0 for one that is not configured
	}
	g := &gate{
		width: func() int { return 2 * places }, now: time.Now,
		pace: func() time.Duration { return s.pace(devices) },
	}
	s.gates[id] = g
	return g
}

// pace is the time between the ends of two openings when a set of devices is busy; 0 where nobody knows.
func (s *service) pace(devices []string) time.Duration {
	rate := 0.0 // openings in a second
	for _, name := range devices {
		took := s.hooks.operations.of(name)
		if took == 0 {
			continue
		}
		if probe := s.probes[name]; probe != nil {
			if state, known := probe.State(); known && !state.Up {
				continue
			}
		}
		rate += float64(s.parallel[name]) / took.Seconds()
	}
	if rate == 0 {
		return 0
	}
	return time.Duration(float64(time.Second) / rate)
}

// tellUnfit writes to the log, once, that a key which is asked for wants a person. Only refresh calls it.
func (s *service) tellUnfit(v *view) {
	name, text := v.health.Name, ""
	if v.err != nil && !v.patience {
		text = v.err.Error()
	}
	if text != "" && text != s.unfit[name] {
		s.logger.Warn("a key that is to be served is not fit for use", "key", name, "cause", v.err)
	}
	s.unfit[name] = text
}

// newest returns one lease of each version: there are several for a moment after a recipient was added, and the last to end counts.
func newest(leases []keyring.Lease) []keyring.Lease {
	var kept []keyring.Lease
	for _, l := range leases {
		at := slices.IndexFunc(kept, func(k keyring.Lease) bool { return k.Key == l.Key && k.Version == l.Version })
		switch {
		case at < 0:
			kept = append(kept, l)
		case l.Until.After(kept[at].Until):
			kept[at] = l
		}
	}
	return kept
}
