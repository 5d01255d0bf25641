package etcd

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// An etcd that was away for long is found again as soon as one that was away for a moment: whoever asks waits connectLimit.
func TestAnEtcdThatIsAwayIsLookedForAsOftenAsAnybodyWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config, err := Config{Endpoints: []string{"http://127.0.0.1:1"}, Prefix: "p"}.client()
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var tries []time.Time
		config.DialOptions = append(config.DialOptions, grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			mu.Lock()
			defer mu.Unlock()
			tries = append(tries, time.Now())
			return nil, errors.New("connection refused")
		}))
		client, err := clientv3.New(config)
		if err != nil {
			t.Fatal(err)
		}
		client.ActiveConnection().Connect()
		begun := time.Now()
		<-time.After(30 * time.Minute)
		if err := client.Close(); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		for i, last := 0, begun; i <= len(tries); i++ {
			next := time.Now()
			if i < len(tries) {
				next = tries[i]
			}
			if gap := next.Sub(last); gap > connectLimit {
				t.Fatalf("after %v nobody looked for it for %v", last.Sub(begun), gap)
			}
			last = next
		}
	})
}
