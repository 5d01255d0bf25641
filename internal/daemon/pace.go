package daemon

import "time"

// How often a watch looks at its node.
const (
	defaultInterval = 5 * time.Second
	firstPause      = time.Second      // while the node is sealed, starting or out of reach
	longestPause    = 30 * time.Second // what these pauses grow to
	growth          = 1.5

	// barTime is how long nothing is asked of the custodian after an error that only a person can mend.
	barTime = 10 * time.Minute
	// barLook is how often it is looked whether the material changed meanwhile.
	barLook = 30 * time.Second
	// settleInterval is how often a cluster whose nodes are well is tended nevertheless, settlePause where that failed.
	settleInterval = time.Hour
	settlePause    = time.Minute
	// relapse is how soon after an unsealing a node that is sealed again has relapsed. After so many relapses in a row the next
	// unsealing comes later each time, up to longestPause after the one before.
	relapse  = time.Minute
	relapses = 20
	// silence is how long a complaint about a node that changes its words is not logged again.
	silence = time.Minute
)

// Time limits.
const (
	lookLimit   = time.Minute            // of one look; the node's own limit is shorter
	actLimit    = 15 * time.Minute       // of one act: an HSM that a hundred wait for, a Vault that is slow to start
	stopGrace   = 20 * time.Second       // for which acts may go on when the daemon stops
	gatherLimit = 250 * time.Millisecond // for which a sealed node waits for its siblings, to share one opening
	turnSlack   = time.Minute            // by which a loop may be late before it counts as stuck

	storeInterval = time.Minute      // between two probes of a store
	probeLimit    = 20 * time.Second // of one of them
)

// maxActs is how many clusters are tended at one time. More would wait for the HSM, whose queue is bounded.
const maxActs = 32

// pause returns how long to wait after the n-th round (from 0) in which a node was not well.
func pause(n int) time.Duration {
	d := float64(firstPause)
	for range n {
		if d *= growth; d >= float64(longestPause) {
			return longestPause
		}
	}
	return time.Duration(d)
}
