package nodetest

import (
	"crypto/x509"
	"net/http"
)

func (n *Node) putJoin(w http.ResponseWriter, r *http.Request) {
	var request struct {
		Leader string `json:"leader_api_addr"`
		CA     string `json:"leader_ca_cert"`
		Name   string `json:"leader_tls_servername"`
		Retry  bool   `json:"retry"`
	}
	if !parse(w, r, &request) {
		return
	}
	switch {
	case n.options.Kind != Raft:
		refuse(w, http.StatusInternalServerError, "raft backend not in use")
	case n.cluster != nil && !n.joined:
		answer(w, http.StatusOK, object{"joined": true})
	case n.follow(running[request.Leader], request.CA, request.Name):
		answer(w, http.StatusOK, object{"joined": true})
	case request.Retry:
		answer(w, http.StatusOK, object{"joined": false})
	default:
		refuse(w, http.StatusInternalServerError, "failed to join raft cluster: failed to get raft challenge")
	}
}

// follow joins the cluster of another node, if the CA is that node's and it serves.
func (n *Node) follow(leader *Node, ca, name string) bool {
	if leader == nil || leader.cluster == nil || leader.sealed || leader == n {
		return false
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(ca))
	if name == "" {
		name = "127.0.0.1"
	}
	if _, err := leader.Certificate().Verify(x509.VerifyOptions{Roots: pool, DNSName: name}); err != nil && !leader.options.Plain {
		return false
	}
	if n.cluster == nil {
		n.cluster, n.sealed, n.joined = leader.cluster, true, true
		n.cluster.members = append(n.cluster.members, n)
	}
	return n.cluster == leader.cluster
}
