package server

import (
	"sync"
	"time"
)

// weight is how much the newest operation counts in the average of an HSM's operations.
const weight = 0.2

// operations measure how long an HSM takes for one opening. What a device tells of is the time from when it was asked, and an
// operation that waited for others tells of theirs as well: with n places an operation begins when the n-th last one ended,
// or when it was asked, whichever is later.
type operations struct {
	mu      sync.Mutex
	devices map[string]*operationTime
}

type operationTime struct {
	parallel int
	ends     []time.Time // of the last ones, as many as there are places, in the order in which they ended
	average  float64     // seconds, 0 for not known
}

// configure says how many operations each device does at one time, and forgets the devices that are not named.
func (o *operations) configure(parallel map[string]int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	before := o.devices
	o.devices = make(map[string]*operationTime, len(parallel))
	for name, n := range parallel {
		d := &operationTime{parallel: n}
		if known := before[name]; known != nil {
			d.average = known.average
		}
		o.devices[name] = d
	}
}

// ended takes in an operation that worked.
func (o *operations) ended(device string, at time.Time, took time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	d := o.devices[device]
	if d == nil {
		return
	}
	begun := at.Add(-took)
	if len(d.ends) == d.parallel {
		if free := d.ends[0]; free.After(begun) {
			begun = free
		}
		d.ends = append(d.ends[:0], d.ends[1:]...)
	}
	d.ends = append(d.ends, at)
	seconds := max(at.Sub(begun).Seconds(), 1e-6)
	if d.average == 0 {
		d.average = seconds
	}
	d.average += weight * (seconds - d.average)
}

// of returns how long an operation takes on a device, 0 where nobody knows yet.
func (o *operations) of(device string) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if d := o.devices[device]; d != nil {
		return time.Duration(d.average * float64(time.Second))
	}
	return 0
}
