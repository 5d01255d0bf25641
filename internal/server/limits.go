package server

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"vault-plugin-secrets-nitrokey/internal/token"
)

// holders are the tokens that have been used since the process began: how often each may ask, and when it last did.
type holders struct {
	all sync.Map // of *holder, by the id of the token
}

// holder is one token.
type holder struct {
	last              atomic.Int64 // Unix seconds of its last use
	rules             atomic.Pointer[rules]
	requests, limited atomic.Uint64
}

// rules are how often a token may ask.
type rules struct {
	limit   token.Limit
	limiter *rate.Limiter // nil for no limit
}

// of returns the holder of a grant.
func (h *holders) of(grant *token.Grant) *holder {
	if known, found := h.all.Load(grant.ID); found {
		return known.(*holder) //nolint:forcetypeassert // nothing else is in it
	}
	known, _ := h.all.LoadOrStore(grant.ID, &holder{})
	return known.(*holder) //nolint:forcetypeassert // nothing else is in it
}

// ask notes a request and returns how long it should wait, 0 for not at all. The default is for tokens without a limit of
// their own.
func (h *holders) ask(grant *token.Grant, otherwise token.Limit, now time.Time) time.Duration {
	limit := otherwise
	if grant.Limit != nil {
		limit = *grant.Limit
	}
	who := h.of(grant)
	who.last.Store(now.Unix())
	who.requests.Add(1)
	known := who.rules.Load()
	if known == nil || known.limit != limit {
		known = &rules{limit: limit}
		if limit.Rate > 0 {
			known.limiter = rate.NewLimiter(rate.Limit(limit.Rate), max(1, limit.Burst))
		}
		who.rules.Store(known)
	}
	if known.limiter == nil || known.limiter.AllowN(now, 1) {
		return 0
	}
	who.limited.Add(1)
	missing := 1 - known.limiter.TokensAt(now)
	return max(time.Millisecond, time.Duration(math.Ceil(missing/float64(limit.Rate)*float64(time.Second))))
}

// known returns the holder of a token that was used, nil for another.
func (h *holders) known(id string) *holder {
	if found, ok := h.all.Load(id); ok {
		return found.(*holder) //nolint:forcetypeassert // nothing else is in it
	}
	return nil
}
