package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
)

// compactingServer is an etcd with two pages of one name each, that is compacted between them some times. Its newest
// revision is counted up by each compaction.
type compactingServer struct {
	pb.UnimplementedKVServer

	compactions int64 // to come, at most
	first       atomic.Int64
	second      atomic.Int64
}

func (s *compactingServer) Range(_ context.Context, asked *pb.RangeRequest) (*pb.RangeResponse, error) {
	page := func(revision int64, more bool) *pb.RangeResponse {
		key := fmt.Sprintf("p/%d-%t", revision, more)
		return &pb.RangeResponse{
			Header: &pb.ResponseHeader{Revision: revision}, Kvs: []*mvccpb.KeyValue{{Key: []byte(key)}}, More: more, Count: 2,
		}
	}
	if asked.Revision == 0 {
		return page(s.first.Add(1), true), nil
	}
	if s.second.Add(1) <= s.compactions || asked.Revision != s.first.Load() {
		return nil, rpctypes.ErrGRPCCompacted
	}
	return page(asked.Revision, false), nil
}

func TestAListDuringACompactionIsBegunAnewAndIsOfOneState(t *testing.T) {
	for name, test := range map[string]struct {
		compactions, begun int64
		want               []string
	}{
		"no compaction":                 {0, 1, []string{"1-true", "1-false"}},
		"one":                           {1, 2, []string{"2-true", "2-false"}},
		"three":                         {3, 4, []string{"4-true", "4-false"}},
		"one after each page, for ever": {1 << 60, 4, nil},
	} {
		t.Run(name, func(t *testing.T) {
			listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			fake := &compactingServer{compactions: test.compactions}
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
			names, err := s.List(t.Context(), "")
			if !slices.Equal(names, test.want) || (err == nil) != (test.want != nil) {
				t.Errorf("List = %q, %v, want %q", names, err, test.want)
			}
			if err != nil && !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("List = %v, want ErrUnavailable", err)
			}
			if begun := fake.first.Load(); begun != test.begun {
				t.Errorf("the list was begun %d times, want %d", begun, test.begun)
			}
		})
	}
}
