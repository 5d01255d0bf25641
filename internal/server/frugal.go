package server

import (
	"context"
	"math"
	"runtime/debug"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// How much memory Go's runtime is to stay under: the collector lets the heap double before it works, so a thousand handshakes at
// one time would leave twice of what a thousand connections need.
const (
	memoryUsual         = 64 << 20 // bytes, for as many connections as a storm has
	usualConnections    = 1000
	memoryPerConnection = 40 << 10 // for each one more
	memoryStep          = 64       // connections more or less that are worth a new limit
)

// memoryLimit is the soft limit, in bytes, for a number of connections.
func memoryLimit(connections int64) int64 {
	return memoryUsual + max(0, connections-usualConnections)*memoryPerConnection
}

// saveMemory keeps the limit in step with the connections. One that the operator has set (GOMEMLIMIT) stays.
func (s *server) saveMemory(ctx context.Context) {
	const ask = -1
	if debug.SetMemoryLimit(ask) != math.MaxInt64 || s.timing.memory == 0 {
		return
	}
	defer debug.SetMemoryLimit(math.MaxInt64)
	set := int64(-memoryStep)
	for {
		if open := s.conns.Load(); open-set >= memoryStep || set-open >= memoryStep {
			debug.SetMemoryLimit(memoryLimit(open))
			set = open
		}
		if !monitor.Sleep(ctx, s.timing.memory) {
			return
		}
	}
}
