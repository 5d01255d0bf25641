package nodetest

import (
	"cmp"
	"net/http"
)

// sealStatus is the answer to many questions. The caller holds mu.
func (n *Node) sealStatus() object {
	status := object{
		"type": "shamir", "initialized": n.cluster != nil || n.halfway, "sealed": n.cluster == nil || n.sealed, "t": 0, "n": 0, "progress": len(n.given),
		"nonce": n.nonce, "version": Version, "build_date": "2025-11-18T13:04:32Z", "migration": false,
		"recovery_seal": n.options.Kind == Auto, "storage_type": "inmem",
	}
	switch n.options.Kind {
	case Auto:
		status["type"] = "transit"
	case Raft:
		status["storage_type"], status["removed_from_cluster"] = "raft", false
	case Alone:
	}
	c := n.cluster
	if c == nil {
		return status
	}
	asked := c.asked()
	if n.sealed && n.stale != nil {
		asked = n.stale
	}
	status["t"], status["n"] = asked.threshold, len(asked.shares)
	if !n.sealed {
		status["cluster_name"], status["cluster_id"] = c.name, c.id
		if n.options.Kind == Auto {
			status["recovery_seal_type"] = "shamir"
		}
	}
	return status
}

func (n *Node) getSealStatus(w http.ResponseWriter, _ *http.Request) {
	if n.opening && n.looks == 0 {
		n.open()
	}
	n.looks--
	answer(w, http.StatusOK, n.sealStatus())
}

func (n *Node) getHealth(w http.ResponseWriter, _ *http.Request) {
	sealed := n.cluster == nil || n.sealed
	standby := sealed || n.cluster.active != n
	status := http.StatusOK
	switch {
	case n.cluster == nil:
		status = http.StatusNotImplemented
	case sealed:
		status = http.StatusServiceUnavailable
	case standby:
		status = http.StatusTooManyRequests
	}
	answer(w, status, object{"initialized": n.cluster != nil, "sealed": sealed, "standby": standby, "version": Version})
}

func (n *Node) getLeader(w http.ResponseWriter, _ *http.Request) {
	if n.options.Kind == Raft && (n.cluster == nil || n.sealed) {
		refuse(w, http.StatusServiceUnavailable, "Vault is sealed")
		return
	}
	leader := object{
		"ha_enabled": n.options.Kind == Raft, "is_self": false, "active_time": "0001-01-01T00:00:00Z", "leader_address": "",
		"leader_cluster_address": "", "performance_standby": false, "performance_standby_last_remote_wal": 0,
	}
	if n.options.Kind == Raft {
		leader["raft_committed_index"], leader["raft_applied_index"] = 1, 1
		if active := n.cluster.active; active != nil {
			leader["is_self"], leader["leader_address"] = active == n, active.Address()
			leader["leader_cluster_address"] = active.Address()
		}
	}
	answer(w, http.StatusOK, leader)
}

func (n *Node) putUnseal(w http.ResponseWriter, r *http.Request) {
	var request struct {
		Key     string
		Reset   bool
		Migrate bool
	}
	if !parse(w, r, &request) {
		return
	}
	if request.Reset {
		if n.cluster != nil && !n.sealed {
			refuse(w, http.StatusBadRequest, "vault is unsealed")
			return
		}
		n.given, n.nonce = nil, ""
		answer(w, http.StatusOK, n.sealStatus())
		return
	}
	share, problem := decodeKey(request.Key)
	if request.Key == "" {
		problem += ", or 'reset' set to true"
	}
	switch {
	case problem != "":
		refuse(w, http.StatusBadRequest, problem)
		return
	case request.Migrate:
		refuse(w, http.StatusInternalServerError, "can't perform a seal migration, no migration seal found")
		return
	case n.cluster == nil:
		refuse(w, http.StatusBadRequest, "Vault is not initialized")
		return
	}
	if problem = measured(share); problem != "" {
		refuse(w, http.StatusBadRequest, "invalid key: "+problem)
		return
	}
	if n.sealed && !holds(n.given, share) {
		if status, problem := n.collect(share); problem != "" {
			refuse(w, status, problem)
			return
		}
	}
	answer(w, http.StatusOK, n.sealStatus())
}

// collect takes a share for unsealing.
func (n *Node) collect(share []byte) (status int, problem string) {
	n.nonce = cmp.Or(n.nonce, uuid())
	n.given = append(n.given, share)
	if len(n.given) < n.unsealing().threshold {
		return 0, ""
	}
	given := n.given
	n.given, n.nonce = nil, ""
	switch why := apart(given); {
	case why != "":
		return http.StatusBadRequest, "invalid key: failed to compute combined key: " + why
	case n.unsealing().opens(given) && n.joined:
		n.joined, n.opening, n.looks = false, true, max(n.options.JoinLooks, 1)
		return 0, ""
	case n.unsealing().opens(given):
		n.open()
		return 0, ""
	case !n.joined:
		return http.StatusBadRequest, "unable to retrieve stored keys: invalid key: failed to decrypt keys from storage: " +
			"error decrypting seal wrapped value\nerror decrypting using seal shamir: cipher: message authentication failed"
	default:
		return http.StatusInternalServerError, "error decrypting challenge: error decrypting seal wrapped value\n" +
			"error decrypting using seal shamir: cipher: message authentication failed"
	}
}
