package daemon

import (
	"time"
)

// view is what is known of a node.
type view struct {
	cluster, address string
	looked           time.Time // the last look, zero before the first
	up               bool      // the last look was answered
	seen             bool      // one was, at any time
	state            State     // as it was last known
	err              error     // of the last look or act; nil where the node is well, or nothing went wrong
	unsealed         time.Time // the last time that we unsealed it
	relapses         int       // times in a row that it was sealed again soon after, see relapse
	attempts         map[string]uint64
	alarm            Alarm     // what only a person can mend, AlarmNone for nothing
	barred           time.Time // until when nothing is asked of the custodian
	generation       string    // of the material when it was barred, "" for not known
	asked            time.Time // when that was last compared
	note             string    // what it waits for
	told             string    // the condition that the log was last told
}

// The outcomes of an act on a node.
const (
	outcomeUnsealed = "unsealed"
	outcomeNone     = "none" // nothing went wrong, and the node is not unsealed: it is joining, or waits for people
	outcomeFailed   = "failed"
)

// outcomes lists them.
var outcomes = []string{outcomeUnsealed, outcomeNone, outcomeFailed}

// well tells whether there is nothing to be done about the node.
func (v view) well() bool { return v.up && v.state.Initialized && !v.state.Sealed }

// afterLook takes in a look.
func (v *view) afterLook(state State, err error, now time.Time) {
	was, over := v.well(), !now.Before(v.barred)
	v.looked, v.up = now, err == nil
	if err != nil {
		v.err = err
		if alarm := alarmOf(err); alarm != AlarmNone {
			v.alarm = alarm
		}
		return
	}
	v.state, v.seen = state, true
	switch {
	case state.Alarm != AlarmNone:
		v.alarm = state.Alarm
	case over && (v.alarm == AlarmIdentity || v.alarm == AlarmForeignCluster): // it is the right node again, the alarm was cleared
		v.alarm = AlarmNone
	}
	if v.well() {
		if was && !over {
			return // what there is to be finished on a node that is well failed, and waits: the alarm stands
		}
		v.err, v.note = nil, ""
		if v.alarm != AlarmForeignCluster { // shares that were given away are not taken back by whoever unsealed it
			v.alarm, v.barred = AlarmNone, time.Time{}
		}
	} else if v.barred.IsZero() {
		v.err = nil
	}
}

// afterTend takes in an act.
func (v *view) afterTend(r Result, generation string, now time.Time) {
	v.err, v.note = r.Err, r.Note
	switch {
	case r.Err == nil && !r.Unsealed && v.well(): // nothing was wrong before
	case r.Err != nil:
		v.count(outcomeFailed)
	case r.Unsealed:
		v.count(outcomeUnsealed)
		if v.relapses++; now.Sub(v.unsealed) > relapse {
			v.relapses = 0
		}
		v.unsealed = now
	default:
		v.count(outcomeNone)
	}
	if r.Err == nil {
		v.state, v.alarm, v.barred = r.State, AlarmNone, time.Time{}
		return
	}
	v.alarm = alarmOf(r.Err)
	if v.alarm != AlarmNone {
		v.barred, v.generation, v.asked = now.Add(barTime), generation, now
	}
}

func (v *view) count(outcome string) {
	counts := map[string]uint64{outcome: 1}
	for known, n := range v.attempts { // a copy: whoever reads the old one goes on reading it
		counts[known] += n
	}
	v.attempts = counts
}

// condition is how a node fares in one word, for the log and /readyz.
func (v view) condition() string {
	switch {
	case v.looked.IsZero():
		return "unknown"
	case !v.up:
		return "unreachable"
	case !v.state.Initialized:
		return "uninitialized"
	case v.state.Sealed:
		return "sealed"
	default:
		return "unsealed"
	}
}
