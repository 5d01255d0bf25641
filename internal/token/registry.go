package token

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// The pauses of a registry. What is revoked is refused within interval and the time that the store takes.
const (
	interval = 3 * time.Second
	// againAfter is when an item is read again that is known: it never changes, so this only finds what somebody did to the store.
	againAfter = time.Minute
	// copyAfter is when the copy is written again although nothing changed, so that it tells how old it is.
	copyAfter = time.Hour
	// patience is how long one reading may take. It is short, so that a store that hangs does not delay the word of a revocation.
	patience = 10 * time.Second
	// firstPatience is the same where nothing was read yet and there may be a copy: a Vault that starts does not wait for long.
	firstPatience = 3 * time.Second
)

// RegistryOptions are what [NewRegistry] needs.
type RegistryOptions struct {
	Store store.Store
	// Cache is the file that the list is copied to, for a restart while the store is away; "" for none. Its folder exists.
	Cache string
	// Origin names the store in the copy: a copy of another one's list is not used.
	Origin string
	Logger *slog.Logger  // nil for none
	Every  time.Duration // between two readings; 0 for 3 s
}

// Registry answers from memory which tokens are good. Its methods are safe for concurrent use.
type Registry struct {
	options RegistryOptions
	logger  *slog.Logger

	known atomic.Pointer[known]

	reading sync.Mutex           // one reading at a time; guards what follows
	checked map[string]time.Time // when each item was read
	damaged map[string]bool      // ids that the log was told of
	failing bool                 // the log was told that the store is away
	stuck   bool                 // the log was told that the copy cannot be written
	copied  [sha256.Size]byte    // what the copy holds
	copyOf  time.Time            // and since when

	state   sync.Mutex // guards state
	current Status
}

// known is the list as it was read. It is never changed.
type known struct {
	tokens  map[string]Token
	holders map[string]*holder
	ids     []string
	keys    []string
}

// Source is where a registry has its list from.
type Source string

// The sources.
const (
	SourceNone  Source = "none"  // not all were told yet, and no copy tells the rest: who is not known may have a good token
	SourceStore Source = "store" // and it is at most one interval old, unless Err is set
	SourceCache Source = "cache" // the store has not answered since the start
)

// Status says how fresh the list of a registry is.
type Status struct {
	Tokens  int
	Damaged int // items that are no tokens
	Source  Source
	Read    time.Time // when the store told the list; the copy's age where it comes from there
	Err     error     // why the last reading failed; nil where it did not
	Cache   error     // why the copy could not be written; nil where it was
}

// NewRegistry makes a registry that knows no token yet: call Refresh, then Run.
func NewRegistry(options RegistryOptions) *Registry {
	r := &Registry{options: options, logger: options.Logger, checked: map[string]time.Time{}, damaged: map[string]bool{}, current: Status{Source: SourceNone}}
	if r.logger == nil {
		r.logger = slog.New(slog.DiscardHandler)
	}
	if r.options.Every <= 0 {
		r.options.Every = interval
	}
	r.known.Store(newKnown(nil))
	return r
}

func newKnown(tokens map[string]Token) *known {
	k := &known{tokens: tokens, holders: make(map[string]*holder, len(tokens)), ids: slices.Sorted(maps.Keys(tokens))}
	keys := map[string]bool{}
	for id := range tokens {
		t := tokens[id]
		k.holders[id] = newHolder(&t)
		for _, key := range t.Keys {
			keys[key] = true
		}
	}
	k.keys = slices.Sorted(maps.Keys(keys))
	return k
}

// Authenticate returns what the token is good for. The error wraps [ErrDenied] and tells our own log more than a client may know. It
// takes no lock, and as long for an id that there is not as for a wrong secret.
func (r *Registry) Authenticate(text string, peer Peer) (*Grant, error) {
	return r.known.Load().holders[split(text)].admit(text, peer)
}

// Keys returns the wrapping keys that tokens name, sorted. They are the ones to be served where the configuration names none.
func (r *Registry) Keys() []string { return r.known.Load().keys }

// IDs returns the ids of all tokens, sorted.
func (r *Registry) IDs() []string { return r.known.Load().ids }

// Status says how fresh the list is.
func (r *Registry) Status() Status {
	r.state.Lock()
	defer r.state.Unlock()
	return r.current
}

// Run reads the list every few seconds until ctx ends.
func (r *Registry) Run(ctx context.Context) {
	tick := time.NewTicker(r.options.Every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			_ = r.Refresh(ctx) // Status and the log have it
		}
	}
}

// Refresh reads the list now. Where the store does not tell it, the last one goes on; at the start that is the copy on the local
// disk. The error is the store's.
func (r *Registry) Refresh(ctx context.Context) error {
	r.reading.Lock()
	defer r.reading.Unlock()
	limit := patience
	if r.Status().Source == SourceNone && r.options.Cache != "" {
		limit = firstPatience
	}
	bounded, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	at := time.Now()
	tokens, damaged, untold, err := r.read(bounded, at)
	if err != nil && ctx.Err() != nil {
		return err // whoever asked gave up: that says nothing about the store
	}
	if tokens == nil { // not even the ids are known
		r.lost(err)
		return err
	}
	before := r.known.Load()
	r.known.Store(newKnown(tokens))
	r.tell(before.tokens, tokens, err)
	r.note(func(s *Status) {
		s.Tokens, s.Damaged, s.Err = len(tokens), damaged, err
		if err == nil {
			s.Source, s.Read = SourceStore, at
		} else if s.Source == SourceNone && untold == 0 { // the copy had what the store did not tell
			s.Source = SourceStore
		}
	})
	if untold == 0 {
		r.save(tokens, at)
	}
	return err
}

// read asks the store. Items that are known are not read again each time, since they never change; those that are not listed any
// more are gone in any case, also where others could not be read, which is an error beside the result. Untold are those of which
// nothing is known because the store stopped answering.
func (r *Registry) read(ctx context.Context, now time.Time) (tokens map[string]Token, damaged, untold int, err error) {
	ids, err := list(ctx, r.options.Store)
	if err != nil {
		return nil, 0, 0, err
	}
	before := r.known.Load().tokens
	if r.Status().Source == SourceNone && r.options.Cache != "" { // an item that cannot be read now may be in the copy
		if kept, _, err := readCopy(r.options.Cache, r.options.Origin); err == nil {
			maps.Copy(kept, before)
			before = kept
		}
	}
	tokens = make(map[string]Token, len(ids))
	var failure error
	away := false // it is not asked for the rest, each for as long as it takes to give up
	for _, id := range ids {
		t, have := before[id]
		if have && (away || now.Sub(r.checked[id]) < againAfter) {
			tokens[id] = t
		}
		if tokens[id].ID != "" {
			continue
		}
		if away {
			untold++
			continue
		}
		fresh, err := get(ctx, r.options.Store, id)
		switch {
		case err == nil:
			tokens[id] = fresh
			r.checked[id] = now
			delete(r.damaged, id)
		case errors.Is(err, store.ErrNotFound): // revoked meanwhile
		case errors.Is(err, ErrMalformed):
			damaged++
			r.complain(id, err)
		default:
			failure = cmp.Or(failure, err)
			away = errors.Is(err, store.ErrUnavailable) || ctx.Err() != nil
			switch {
			case have:
				tokens[id] = t
			case away:
				untold++
			}
		}
	}
	maps.DeleteFunc(r.checked, func(id string, _ time.Time) bool { return tokens[id].ID == "" })
	return tokens, damaged, untold, failure
}

func (r *Registry) complain(id string, err error) {
	if !r.damaged[id] {
		r.damaged[id] = true
		r.logger.Warn("an item of the store is no token and is left out; revoke or remove it, and make another", "id", id, "cause", err)
	}
}

// lost goes on without the store.
func (r *Registry) lost(failure error) {
	// Once the store has told which there are, the copy could only add what was revoked since.
	if r.Status().Source == SourceNone && r.options.Cache != "" && r.known.Load().tokens == nil {
		tokens, read, err := readCopy(r.options.Cache, r.options.Origin)
		if err == nil {
			r.known.Store(newKnown(tokens))
			r.note(func(s *Status) { s.Tokens, s.Source, s.Read = len(tokens), SourceCache, read })
			r.logger.Warn("the store does not tell the tokens; those of the copy on this disk are taken, also where one was revoked since",
				"copy", r.options.Cache, "of", read, "tokens", len(tokens), "cause", failure)
			r.failing = true
		} else if !r.failing && !errors.Is(err, fs.ErrNotExist) {
			r.logger.Warn("the copy of the tokens on this disk is not used", "cause", err)
		}
	}
	if !r.failing {
		r.failing = true
		text := "the store does not tell the tokens; the last list goes on, and what is revoked or made meanwhile comes later"
		if r.Status().Source == SourceNone {
			text = "the store does not tell the tokens, and no copy on this disk does: every token is refused until it does"
		}
		r.logger.Error(text, "cause", failure)
	}
	r.note(func(s *Status) { s.Err = failure })
}

// tell writes to the log what changed.
func (r *Registry) tell(before, after map[string]Token, err error) {
	switch {
	case err != nil && !r.failing:
		r.failing = true
		r.logger.Error("the store does not tell all tokens; the others are taken as they were", "cause", err)
	case err == nil && r.failing:
		r.failing = false
		r.logger.Info("the store tells the tokens again", "tokens", len(after))
	}
	if r.Status().Source == SourceNone {
		if err == nil {
			r.logger.Info("the tokens were read", "tokens", len(after))
		}
		return
	}
	for id := range after {
		if _, had := before[id]; !had {
			r.logger.Info("a token is new", "id", id, "name", after[id].Name)
		}
	}
	for id := range before {
		if _, has := after[id]; !has {
			r.logger.Info("a token was revoked", "id", id, "name", before[id].Name)
		}
	}
}

// save copies the list to the local disk where it changed, so that a restart without the store knows it.
func (r *Registry) save(tokens map[string]Token, at time.Time) {
	if r.options.Cache == "" {
		return
	}
	raw, sum, err := encodeCopy(tokens, r.options.Origin, at)
	if err == nil && sum == r.copied && at.Sub(r.copyOf) < copyAfter {
		return
	}
	if err == nil {
		err = writeCopy(r.options.Cache, raw)
	}
	if err != nil {
		err = fmt.Errorf("copying the tokens to %s: %w", r.options.Cache, err)
	} else {
		r.copied, r.copyOf = sum, at
	}
	if err != nil && !r.stuck {
		r.logger.Warn("the copy of the tokens could not be written; a restart while the store is away would know none, or older ones", "cause", err)
	}
	r.stuck = err != nil
	r.note(func(s *Status) { s.Cache = err })
}

func (r *Registry) note(change func(*Status)) {
	r.state.Lock()
	defer r.state.Unlock()
	change(&r.current)
}
