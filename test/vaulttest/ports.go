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

// ports are those that this process has given away, each with what keeps other test processes of this machine from giving it, too:
// a socket whose name says so, in the abstract namespace, so that it ends with the process and leaves no file.
var ports struct {
	sync.Mutex
	given map[int]net.Listener
}

// FreePorts finds loopback addresses that are free at this moment, all different. None is given twice on a machine while the process
// runs that got it: a server may begin to listen much later, and again and again. They are not of the range that the kernel takes for
// connections, nor of the one that scripts/stage takes for the demos: a server that is started later, or anew, would find its own
// taken now and then.
func FreePorts(t testing.TB, n int) []string {
	t.Helper()
	last := highest()
	ports.Lock()
	defer ports.Unlock()
	if ports.given == nil {
		ports.given = map[int]net.Listener{}
	}
	const tries = 1000
	var addresses []string
	for try := 0; len(addresses) < n; try++ {
		if try == tries {
			t.Fatalf("none of %d ports is free", tries)
		}
		port := lowest + rand.IntN(last-lowest+1)
		if ports.given[port] != nil {
			continue
		}
		sign, err := listen("unix", fmt.Sprintf("@nitroseal-test-port-%d", port))
		if err != nil {
			continue // another process gave it
		}
		listener, err := listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			must(t, sign.Close())
			continue
		}
		must(t, listener.Close())
		ports.given[port] = sign
		addresses = append(addresses, listener.Addr().String())
	}
	return addresses
}

func listen(network, address string) (net.Listener, error) {
	return (&net.ListenConfig{}).Listen(context.Background(), network, address)
}

// lowest is the first port that is given, demos the first one of the demos.
const lowest, demos = 15_000, 20_000

// highest is the last port that is given.
func highest() int {
	first := 32_768 // of connections
	if content, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		if _, err := fmt.Sscan(string(content), &first); err != nil {
			return 65_535
		}
	}
	if first-lowest < 1000 { // nearly all are
		return 65_535
	}
	return min(first, demos) - 1
}
