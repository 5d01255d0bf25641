package server

import (
	"context"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// The pace of warming.
const (
	warmLimit    = 40 * time.Second // of one try
	firstWarm    = time.Second      // between two tries, twice as long after each
	longestWarm  = 10 * time.Second
	warmTogether = 4 // keys at one time
)

// warmth is what is known of the authentication keys of a wrapping key.
type warmth struct {
	record  string // the SHA-256 of the key record that they were opened for, "" for none
	version int    // that sealed then
	err     error  // why the last try failed
	tries   int    // that failed in a row
	next    time.Time
	busy    bool
}

// warmed tells whether the authentication keys of a key are open, and why not. What was open for another state of its record
// still is, but for a version that is new.
func (s *service) warmed(name, record string, version int) (yes bool, err error) {
	s.warmMu.Lock()
	defer s.warmMu.Unlock()
	w := s.warmths[name]
	if w == nil {
		return false, nil
	}
	if w.record == record || w.record != "" && (w.err == nil || w.version == version) {
		return true, nil
	}
	return false, w.err
}

// warm opens authentication keys and leases for as long as there is something to open, until ctx ends. It is what makes an HSM's
// return, a new key and a new version known to what serves.
func (s *service) warm(ctx context.Context) {
	places := make(chan struct{}, warmTogether)
	var running sync.WaitGroup
	defer running.Wait()
	for {
		for _, v := range s.views() {
			if !s.due(v) {
				continue
			}
			running.Go(func() {
				select {
				case places <- struct{}{}:
					defer func() { <-places }()
					s.warmOne(ctx, v)
				case <-ctx.Done():
				}
			})
		}
		select {
		case <-s.wake:
		case <-ctx.Done():
			return
		}
	}
}

// due tells whether a key is to be warmed now, and takes it.
func (s *service) due(v *view) bool {
	s.warmMu.Lock()
	defer s.warmMu.Unlock()
	w := s.warmths[v.health.Name]
	if w == nil {
		w = &warmth{}
		s.warmths[v.health.Name] = w
	}
	if w.busy || v.record == "" || w.record == v.record || time.Now().Before(w.next) {
		return false
	}
	w.busy = true
	return true
}

// warmOne tries to open what a key needs.
func (s *service) warmOne(parent context.Context, v *view) {
	ctx, cancel := context.WithTimeout(parent, warmLimit)
	defer cancel()
	name := v.health.Name
	err := s.site.Keys.Warm(ctx, name)
	if err == nil {
		if problem := s.site.Keys.OpenLease(ctx, name); problem != nil && parent.Err() == nil { // it is opened at its first use
			s.logger.Warn("the lease of a key is not open yet", "key", name, "cause", problem)
		}
	}
	s.warmMu.Lock()
	w := s.warmths[name]
	w.busy = false
	told := w.err != nil
	switch {
	case err == nil:
		w.record, w.version, w.err, w.tries = v.record, v.health.Version, nil, 0
	case parent.Err() == nil:
		w.next = time.Now().Add(monitor.Jittered(min(longestWarm, firstWarm<<min(w.tries, 10))))
		w.err = err
		w.tries++
	}
	s.warmMu.Unlock()
	switch {
	case parent.Err() != nil:
	case err == nil && v.health.Version > 0:
		s.logger.Info("a key is ready to seal and to open", "key", name, "version", v.health.Version)
	case err == nil: // what it lacks for sealing is said elsewhere
		s.logger.Info("a key is ready to open", "key", name)
	case !told:
		s.logger.Warn("a key is not ready: its HSM is needed once before it can seal; it is tried again", "key", name, "cause", err)
	}
	s.nudge()
}

// hurry has what failed tried again now: an HSM came back.
func (s *service) hurry() {
	s.warmMu.Lock()
	for _, w := range s.warmths {
		w.next, w.tries = time.Time{}, 0
	}
	s.warmMu.Unlock()
}
