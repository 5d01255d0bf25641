package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
)

// unclearServer is an etcd whose answer to a transaction leaves open whether it happened.
type unclearServer struct {
	pb.UnimplementedKVServer
	answer error
	txns   atomic.Int32
}

func (s *unclearServer) Txn(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error) {
	s.txns.Add(1)
	return nil, s.answer
}

// A write that may have been applied must not be sent again: the second one would fail its comparison, and the caller
// would be told of a conflict with somebody else, who is himself.
func TestWriteWithAnUnclearAnswerIsSentOnce(t *testing.T) {
	for sentence, answer := range map[string]error{
		"canceled on the server":          rpctypes.ErrGRPCCanceled,
		"deadline exceeded on the server": rpctypes.ErrGRPCDeadlineExceeded,
		"timed out":                       rpctypes.ErrGRPCTimeout,
		"timed out, leader failed":        rpctypes.ErrGRPCTimeoutDueToLeaderFail,
		"leader changed":                  rpctypes.ErrGRPCLeaderChanged,
		"stopped":                         rpctypes.ErrGRPCStopped,
	} {
		t.Run(sentence, func(t *testing.T) {
			listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			fake := &unclearServer{answer: answer}
			server := grpc.NewServer()
			pb.RegisterKVServer(server, fake)
			served := make(chan error, 1)
			go func() { served <- server.Serve(listener) }()
			t.Cleanup(func() {
				server.Stop()
				if err := <-served; err != nil {
					t.Errorf("Serve = %v", err)
				}
			})
			s := open(t, etcd.Config{Endpoints: []string{"http://" + listener.Addr().String()}, Prefix: "p"})
			_, err = s.Put(t.Context(), "a", nil, store.NoRevision)
			if !errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrConflict) {
				t.Errorf("Put = %v, want ErrUnavailable", err)
			}
			if err := s.Delete(t.Context(), "a", "1"); !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("Delete = %v, want ErrUnavailable", err)
			}
			if n := fake.txns.Load(); n != 2 {
				t.Errorf("etcd got %d transactions, want one for each call", n)
			}
		})
	}
}

// A writer counts up while leaders are killed under it. It never sees a conflict, since nobody else writes, unless one
// of its own writes was sent twice; and every write that was confirmed is there at the end.
func TestLeaderKilledInMidWrite(t *testing.T) {
	cluster := etcdtest.Start(t, 3, etcdtest.WithFsync())
	config := config(t, cluster)
	config.RequestTimeout = 5 * time.Second
	s := open(t, config)

	const kills = 2
	ctx, finish := context.WithCancel(t.Context())
	defer finish()
	var written atomic.Int64
	ended := make(chan error, 1)
	go func() { ended <- countUp(ctx, s, &written) }()

	waitFor := func(target int64) {
		t.Helper()
		deadline := time.Now().Add(time.Minute)
		for written.Load() < target {
			if time.Now().After(deadline) {
				t.Fatalf("the writer is stuck at %d, want %d", written.Load(), target)
			}
			select {
			case err := <-ended:
				t.Fatalf("the writer gave up: %v", err)
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	for range kills {
		waitFor(written.Load() + 20)
		leader := cluster.Leader(t)
		cluster.Kill(t, leader)
		waitFor(written.Load() + 20) // two of three go on
		cluster.Restart(t, leader)
	}
	finish()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
}

// countUp writes 1, 2, 3, … until ctx ends. After an unclear answer it reads, as the contract of a store says, and
// goes on from what it finds: the last confirmed number or the one in doubt.
func countUp(ctx context.Context, s *etcd.Store, written *atomic.Int64) error {
	var (
		n        int64
		revision = store.NoRevision
	)
	for ctx.Err() == nil {
		next, err := s.Put(ctx, "n", fmt.Append(nil, n+1), revision)
		switch {
		case err == nil:
			n, revision = n+1, next
			written.Store(n)
			continue
		case ctx.Err() != nil: // the test has seen enough
			return nil //nolint:nilerr // see above
		case !errors.Is(err, store.ErrUnavailable):
			return fmt.Errorf("writing %d: %w", n+1, err)
		}
		entry, err := s.Get(ctx, "n")
		for errors.Is(err, store.ErrUnavailable) && ctx.Err() == nil {
			entry, err = s.Get(ctx, "n")
		}
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // see above
		case errors.Is(err, store.ErrNotFound) && n == 0:
			continue
		case err != nil:
			return fmt.Errorf("reading after an unclear answer: %w", err)
		}
		var found int64
		if _, err := fmt.Sscan(string(entry.Value), &found); err != nil {
			return err
		}
		if found != n && found != n+1 {
			return fmt.Errorf("found %d; %d was confirmed and %d in doubt", found, n, n+1)
		}
		n, revision = found, entry.Revision
	}
	return nil
}
