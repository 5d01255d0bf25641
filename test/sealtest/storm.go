package sealtest

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Tally counts calls and their answers; Add is a [Config.Observe].
type Tally struct {
	mu    sync.Mutex
	calls map[Op]map[int]int
	took  map[Op][]time.Duration
	bare  int            // 429 and 503 that do not say when to come again
	lost  []error        // why calls had no answer
	said  map[string]int // in refusals
}

// NewTally is one that has counted nothing.
func NewTally() *Tally {
	return &Tally{calls: map[Op]map[int]int{}, took: map[Op][]time.Duration{}, said: map[string]int{}}
}

// Add counts a call.
func (t *Tally) Add(call Call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.calls[call.Op] == nil {
		t.calls[call.Op] = map[int]int{}
	}
	t.calls[call.Op][call.Status]++
	t.took[call.Op] = append(t.took[call.Op], call.Took)
	if (call.Status == http.StatusServiceUnavailable || call.Status == http.StatusTooManyRequests) && !call.RetryAfter {
		t.bare++
	}
	if call.Reason != "" {
		t.said[call.Reason]++
	}
	if call.Err != nil {
		t.lost = append(t.lost, call.Err)
	}
}

// Count is how often a call had one of the answers, or how often it was made where none is given.
func (t *Tally) Count(op Op, statuses ...int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	sum := 0
	for status, n := range t.calls[op] {
		if len(statuses) == 0 || slices.Contains(statuses, status) {
			sum += n
		}
	}
	return sum
}

// Lost are the errors of the calls that had no answer at all.
func (t *Tally) Lost() []error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.lost)
}

// Unfair tells what no client may be told: an answer other than 200, and than 429 and 503 that say when to come again. It is
// empty when there was no such thing. Calls without any answer are those of [Tally.Lost].
func (t *Tally) Unfair() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var found []string
	for op, answers := range t.calls {
		for status, n := range answers {
			switch status {
			case 0, http.StatusOK, http.StatusServiceUnavailable, http.StatusTooManyRequests:
			default:
				found = append(found, fmt.Sprintf("%d %s were answered with %d", n, op, status))
			}
		}
	}
	if t.bare > 0 {
		found = append(found, fmt.Sprintf("%d of 429 and 503 had no Retry-After", t.bare))
	}
	slices.Sort(found)
	return strings.Join(found, "\n")
}

// Quantile is the time within which the part q, 0 to 1, of a kind of calls was answered.
func (t *Tally) Quantile(op Op, q float64) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return quantile(slices.Clone(t.took[op]), q)
}

func (t *Tally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var lines []string
	for op, answers := range t.calls {
		took := slices.Clone(t.took[op])
		lines = append(lines, fmt.Sprintf("%s: answers %v, p50 %s, p99 %s, longest %s", op, answers,
			quantile(took, 0.5).Round(time.Millisecond), quantile(took, 0.99).Round(time.Millisecond), quantile(took, 1).Round(time.Millisecond)))
	}
	for reason, n := range t.said {
		lines = append(lines, fmt.Sprintf("refused %d times: %s", n, reason))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// quantile sorts the times.
func quantile(times []time.Duration, q float64) time.Duration {
	if len(times) == 0 {
		return 0
	}
	slices.Sort(times)
	return times[min(int(q*float64(len(times))), len(times)-1)]
}

// Outcome is how a [Storm] ended.
type Outcome struct {
	// Healthy is how many seals came up, of Seals.
	Healthy, Seals int
	// Took is the time until the last one was up, or given up; Times when each came up.
	Took  time.Duration
	Times []time.Duration
	// Failures are the errors of the others.
	Failures []error
}

func (o Outcome) String() string {
	return fmt.Sprintf("%d of %d seals healthy in %s, half of them in %s", o.Healthy, o.Seals, o.Took.Round(time.Millisecond),
		quantile(slices.Clone(o.Times), 0.5).Round(time.Millisecond))
}

// Storm gives power to all seals at once, see [Seal.PowerUp], and waits until each is healthy or ctx ends.
func Storm(ctx context.Context, seals []*Seal) Outcome {
	return Each(seals, func(s *Seal) error { return s.PowerUp(ctx) })
}

// Each does something with all seals at once.
func Each(seals []*Seal, do func(s *Seal) error) Outcome {
	outcome := Outcome{Seals: len(seals)}
	began := time.Now()
	var mu sync.Mutex
	var all sync.WaitGroup
	for _, s := range seals {
		all.Go(func() {
			err := do(s)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				outcome.Failures = append(outcome.Failures, err)
				return
			}
			outcome.Healthy++
			outcome.Times = append(outcome.Times, time.Since(began))
		})
	}
	all.Wait()
	outcome.Took = time.Since(began)
	return outcome
}
