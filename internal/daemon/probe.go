package daemon

import (
	"context"

	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// probeName is read from stores to see whether they answer. It does not exist.
const probeName = "nitroseal/probe"

// probeStore asks a store now and then. Its answer is counted by the store itself, see [Hooks.Store].
func probeStore(ctx context.Context, s store.Store) {
	for {
		limited, cancel := context.WithTimeout(ctx, probeLimit)
		_, _ = s.Get(limited, probeName) // what it says is counted
		cancel()
		if !monitor.Sleep(ctx, monitor.Jittered(storeInterval)) {
			return
		}
	}
}
