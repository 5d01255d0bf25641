package node

import (
	"context"
	"net/http"
)

// JoinRequest names the cluster to join.
type JoinRequest struct {
	LeaderAddress    string // the API address of its active node, or of a standby that passes the request on
	LeaderCA         []byte // PEM: how the node knows the leader. nil: the system's authorities
	LeaderServerName string // "": the host of the address
	Retry            bool   // the node goes on trying by itself; the answer is then at once, and joined is false
}

// Join makes an uninitialised node with raft storage join a cluster. It is sealed afterwards, with the cluster's shares and
// threshold in its status. A node that is initialised answers "joined" and does nothing. A leader that cannot be reached is
// ErrUnavailable, a node with another storage ErrRefused.
func (n *Node) Join(ctx context.Context, request JoinRequest) (joined bool, err error) {
	w := &writer{}
	w.text("leader_api_addr", request.LeaderAddress)
	if len(request.LeaderCA) > 0 {
		w.text("leader_ca_cert", string(request.LeaderCA))
	}
	if request.LeaderServerName != "" {
		w.text("leader_tls_servername", request.LeaderServerName)
	}
	w.flag("retry", request.Retry)
	err = n.do(ctx, &call{
		op: "joining to its raft cluster the node", method: http.MethodPut, path: "sys/storage/raft/join", body: w.end(), changes: true,
		field: func(name string, s *scanner) error {
			if name == "joined" {
				return s.boolean(&joined)
			}
			return s.skip()
		},
	})
	return joined && err == nil, err
}
