package server

import (
	"context"
	"math"
	"runtime/debug"
	figures "runtime/metrics"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// How much memory Go's runtime is to stay under: the collector lets the heap double before it works, so a thousand handshakes at
// one time would leave twice of what a thousand connections need.
const (
	memoryUsual         = 64 << 20 // bytes, for as many connections as a storm has
	usualConnections    = 1000
	memoryPerConnection = 40 << 10                 // bytes, for each one more
	memoryStep          = 64 * memoryPerConnection // more or less that is worth a new limit
)

// memoryLimit is the soft limit, in bytes, for a number of connections.
func memoryLimit(connections int64) int64 {
	return memoryUsual + max(0, connections-usualConnections)*memoryPerConnection
}

// liveMemory is what the collector found in use when it last worked, in bytes.
func liveMemory() int64 {
	sample := []figures.Sample{{Name: "/gc/heap/live:bytes"}}
	figures.Read(sample)
	if sample[0].Value.Kind() != figures.KindUint64 {
		return 0
	}
	return int64(min(sample[0].Value.Uint64(), math.MaxInt32))
}

// saveMemory keeps the limit in step with the connections. One that the operator has set (GOMEMLIMIT) stays. Where more is in use than
// was thought of, as with very many keys and tokens, there is room above it: the collector would do nothing but work otherwise.
func (s *server) saveMemory(ctx context.Context) {
	const ask = -1
	if debug.SetMemoryLimit(ask) != math.MaxInt64 || s.timing.memory == 0 {
		return
	}
	defer debug.SetMemoryLimit(math.MaxInt64)
	set := int64(0)
	for {
		limit := max(memoryLimit(s.conns.Load()), liveMemory()*3/2)
		if limit-set >= memoryStep || set-limit >= memoryStep {
			debug.SetMemoryLimit(limit)
			set = limit
		}
		if !monitor.Sleep(ctx, s.timing.memory) {
			return
		}
	}
}
