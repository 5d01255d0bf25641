package daemon

import (
	"fmt"
	"time"
)

// readiness is the answer of /readyz. It holds no secret: addresses, states and the sentences of errors.
type readiness struct {
	Ready    bool              `json:"ready"`
	Reasons  []string          `json:"reasons"` // why not, empty where it is
	Nodes    []nodeReadiness   `json:"nodes"`
	Devices  []deviceReadiness `json:"devices"`
	Stores   []storeReadiness  `json:"stores"`
	Critical []string          `json:"critical,omitempty"` // windows that are open
}

type nodeReadiness struct {
	Cluster  string     `json:"cluster"`
	Node     string     `json:"node"`
	State    string     `json:"state"` // unknown, unreachable, uninitialized, sealed or unsealed
	Alarm    Alarm      `json:"alarm,omitempty"`
	Reason   string     `json:"reason,omitempty"`
	Looked   *time.Time `json:"looked,omitempty"`
	Unsealed *time.Time `json:"unsealed,omitempty"` // by this process
}

type deviceReadiness struct {
	Device string `json:"device"`
	Up     *bool  `json:"up"` // null while nobody knows
	Reason string `json:"reason,omitempty"`
}

type storeReadiness struct {
	Store string `json:"store"`
	Up    *bool  `json:"up"` // null while nobody knows
}

// maxReason bounds the sentence of one error.
const maxReason = 500

// readiness says whether the daemon could do its work now.
func (d *daemon) readiness() readiness {
	r := readiness{Reasons: []string{}, Nodes: []nodeReadiness{}, Devices: []deviceReadiness{}, Stores: []storeReadiness{}}
	r.Critical, _ = d.hooks.windows()
	c := d.crew.Load()
	if c == nil {
		r.Reasons = append(r.Reasons, "the daemon is starting")
		return r
	}
	needed, from := 0, map[string]int{} // by store
	for _, v := range c.views() {
		n := nodeReadiness{
			Cluster: v.cluster, Node: v.address, State: v.condition(), Alarm: v.alarm, Reason: shorten(v.note),
			Looked: present(v.looked), Unsealed: present(v.unsealed),
		}
		if v.err != nil {
			n.Reason = shorten(v.err.Error())
		}
		if v.looked.IsZero() {
			r.Reasons = append(r.Reasons, fmt.Sprintf("the node %s of cluster %q was not looked at yet", v.address, v.cluster))
		}
		if v.seen && !v.well() && v.up {
			needed++
			from[c.storeOf(v.cluster)]++
		}
		r.Nodes = append(r.Nodes, n)
	}
	anyUp := len(c.devices) == 0
	for _, p := range c.devices {
		shown := deviceReadiness{Device: p.Device.Name()}
		if state, known := p.State(); known {
			shown.Up, shown.Reason = &state.Up, shorten(state.Reason)
			anyUp = anyUp || state.Up
		} else {
			anyUp = true // nobody knows better yet, and the first operation will tell
		}
		r.Devices = append(r.Devices, shown)
	}
	if needed > 0 && !anyUp {
		r.Reasons = append(r.Reasons, fmt.Sprintf("%d nodes wait to be unsealed, and no HSM answers", needed))
	}
	if err := c.auditError(); err != nil {
		r.Reasons = append(r.Reasons, "nothing would be unsealed: "+shorten(err.Error()))
	}
	for _, s := range c.site.Stores {
		shown := storeReadiness{Store: s.Name}
		if last, known := d.metrics.lastOfStore(s.Name); known {
			shown.Up = &last.ok
			if n := from[s.Name]; n > 0 && !last.ok {
				r.Reasons = append(r.Reasons, fmt.Sprintf("%d nodes wait to be unsealed, and the store %q does not answer", n, s.Name))
			}
		}
		r.Stores = append(r.Stores, shown)
	}
	r.Ready = len(r.Reasons) == 0
	return r
}

func present(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}

func shorten(text string) string {
	if len(text) > maxReason {
		return text[:maxReason] + "…"
	}
	return text
}
