package etcd

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// connectLimit is how long an operation waits for a connection to any member. Nothing was sent by then.
const connectLimit = 3 * time.Second

// connection makes etcd's client on first use and says why it cannot reach etcd.
//
// etcd's client hands every request to gRPC with "wait for ready": without a connection it waits for the caller's
// deadline and then cannot say why. So an operation first waits for a connection here, for a shorter time, and when
// gRPC reports a failure the reason is looked for.
type connection struct {
	config clientv3.Config

	making chan struct{} // a token: who holds it may make the client
	mu     sync.Mutex
	made   *clientv3.Client // nil until the first operation
	closed bool
}

var errClosed = errors.New("the store was closed")

func newConnection(config clientv3.Config) *connection {
	return &connection{config: config, making: make(chan struct{}, 1)}
}

// client returns a client that is connected to etcd.
func (c *connection) client(ctx context.Context) (*clientv3.Client, error) {
	made, err := c.make(ctx)
	if err != nil {
		return nil, err
	}
	return made, c.waitReady(ctx, made.ActiveConnection())
}

func (c *connection) waitReady(ctx context.Context, conn *grpc.ClientConn) error {
	state := conn.GetState()
	if state == connectivity.Ready {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	diagnosed := false
	for ; state != connectivity.Ready; state = conn.GetState() {
		switch {
		case state == connectivity.Idle:
			conn.Connect()
		case state == connectivity.Shutdown:
			return fmt.Errorf("%w: %w", store.ErrUnavailable, errClosed)
		case state == connectivity.TransientFailure && !diagnosed:
			diagnosed = true
			if err := c.diagnose(limited); err != nil {
				return err
			}
		}
		if !conn.WaitForStateChange(limited, state) {
			return c.notConnected(ctx)
		}
	}
	return nil
}

func (c *connection) notConnected(ctx context.Context) error {
	if err := explainContext(ctx); err != nil {
		return err
	}
	return fmt.Errorf("%w: no connection to any of %q within %v; nothing was sent", store.ErrUnavailable, c.config.Endpoints, connectLimit)
}

// make returns the client, which the first caller makes. etcd's client logs in when it is made.
func (c *connection) make(ctx context.Context) (*clientv3.Client, error) {
	if err := explainContext(ctx); err != nil {
		return nil, err
	}
	select {
	case c.making <- struct{}{}:
		defer func() { <-c.making }()
	case <-ctx.Done():
		return nil, explainContext(ctx)
	}
	c.mu.Lock()
	made, closed := c.made, c.closed
	c.mu.Unlock()
	if closed {
		return nil, fmt.Errorf("%w: %w", store.ErrUnavailable, errClosed)
	}
	if made != nil {
		return made, nil
	}
	if c.config.Username != "" { // the log-in would wait for a connection, and not say why there is none
		if err := c.diagnose(ctx); err != nil {
			return nil, err
		}
	}

	// The client outlives this call, but its log-in has to end with it.
	life, end := context.WithCancel(context.Background())
	stop := context.AfterFunc(ctx, end)
	config := c.config
	config.Context = life
	config.DialTimeout = connectLimit // of the log-in
	made, err := clientv3.New(config)
	if !stop() {
		if err == nil {
			_ = made.Close() // it was never used
		}
		return nil, explainContext(ctx)
	}
	if err != nil {
		end()
		return nil, explain(ctx, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		end()
		_ = made.Close() // it was never used
		return nil, fmt.Errorf("%w: %w", store.ErrUnavailable, errClosed)
	}
	c.made = made
	return made, nil
}

func (c *connection) close() error {
	c.mu.Lock()
	made := c.made
	c.made, c.closed = nil, true
	c.mu.Unlock()
	if made == nil {
		return nil
	}
	if err := made.Close(); err != nil && !errors.Is(err, context.Canceled) { // closing cancels its own context
		return err
	}
	return nil
}
