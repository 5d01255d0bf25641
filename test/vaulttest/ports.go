package vaulttest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
)

// ports are those that this process has given away.
var ports struct {
	sync.Mutex
	given map[int]bool
}

// FreePorts finds loopback addresses that are free at this moment, all different, and gives none twice in a process. They are
// not of the range that the kernel takes for connections: a server that is started later, or anew, would find its own taken
// now and then.
func FreePorts(t testing.TB, n int) []string {
	t.Helper()
	last := highest()
	ports.Lock()
	defer ports.Unlock()
	if ports.given == nil {
		ports.given = map[int]bool{}
	}
	const tries = 1000
	var addresses []string
	for try := 0; len(addresses) < n; try++ {
		if try == tries {
			t.Fatalf("none of %d ports is free", tries)
		}
		port := lowest + rand.IntN(last-lowest+1)
		if ports.given[port] {
			continue
		}
		listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		must(t, listener.Close())
		ports.given[port] = true
		addresses = append(addresses, listener.Addr().String())
	}
	return addresses
}

// lowest is the first port that is given.
const lowest = 15_000

// highest is the last port below those of connections.
func highest() int {
	first := 32_768
	if content, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if _, err := fmt.Sscan(string(content), &first); err != nil {
			return 65_535
		}
	}
	if first-lowest < 1000 { // nearly all are
		return 65_535
	}
	return first - 1
}
