package nodetest

import (
	"cmp"
	"fmt"
	"net/http"
)

// rekey is one that is under way.
type rekey struct {
	recovery          bool
	nonce             string
	shares, threshold int
	pgp               []string
	verify            bool
	given             [][]byte

	made              *keys // wait for their verification
	verificationNonce string
	verified          [][]byte
}

// onRekey refuses what Vault refuses for all calls of a kind of rekey.
func (n *Node) onRekey(recovery bool, handler func(recovery bool, w http.ResponseWriter, r *http.Request)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch {
		case (n.cluster == nil || n.sealed) && n.options.Kind != Raft:
			refuse(w, http.StatusServiceUnavailable, "node is not active")
		case n.cluster == nil || n.sealed:
			refuse(w, http.StatusServiceUnavailable, "Vault is sealed")
		case recovery && n.options.Kind != Auto:
			refuse(w, http.StatusBadRequest, "recovery rekeying not supported")
		default:
			handler(recovery, w, r)
		}
	}
}

// rekeying is the rekey of a kind that is under way, or nil.
func (c *cluster) rekeying(recovery bool) *rekey {
	if c.rekey != nil && c.rekey.recovery == recovery {
		return c.rekey
	}
	return nil
}

func (n *Node) rekeyStatus(recovery bool) object {
	status := object{
		"nonce": "", "started": false, "t": 0, "n": 0, "progress": 0, "required": n.cluster.asked().threshold, "pgp_fingerprints": nil,
		"backup": false, "verification_required": false,
	}
	if k := n.cluster.rekeying(recovery); k != nil {
		status["nonce"], status["started"], status["t"], status["n"] = k.nonce, true, k.threshold, k.shares
		status["progress"], status["verification_required"], status["pgp_fingerprints"] = len(k.given), k.verify, k.fingerprints()
		if k.verificationNonce != "" {
			status["verification_nonce"] = k.verificationNonce
		}
	}
	return status
}

func (k *rekey) fingerprints() any {
	if len(k.pgp) == 0 {
		return nil
	}
	var all []string
	for _, key := range k.pgp {
		all = append(all, fingerprint(key))
	}
	return all
}

func (n *Node) getRekey(recovery bool, w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, n.rekeyStatus(recovery))
}

func (n *Node) putRekey(recovery bool, w http.ResponseWriter, r *http.Request) {
	var request struct {
		Shares    int      `json:"secret_shares"`
		Threshold int      `json:"secret_threshold"`
		PGPKeys   []string `json:"pgp_keys"`
		Verify    bool     `json:"require_verification"`
	}
	if !parse(w, r, &request) {
		return
	}
	switch {
	case len(request.PGPKeys) > 0 && len(request.PGPKeys) != request.Shares:
		refuse(w, http.StatusBadRequest, "incorrect number of PGP keys for rekey")
		return
	case request.Threshold > request.Shares:
		refuse(w, http.StatusBadRequest, "provided threshold greater than the total shares")
		return
	case n.options.Kind == Auto && !recovery && request.Verify:
		refuse(w, http.StatusBadRequest, "requiring verification not supported when rekeying the barrier key with recovery keys")
		return
	}
	problem := numbers(request.Shares, request.Threshold)
	for _, key := range request.PGPKeys {
		if _, err := parsePGP(key); err != nil {
			problem = cmp.Or(problem, "error parsing given PGP key: "+err.Error())
		}
	}
	switch {
	case problem != "" && recovery:
		refuse(w, http.StatusInternalServerError, "invalid recovery configuration: "+problem)
		return
	case problem != "":
		refuse(w, http.StatusInternalServerError, "invalid rekey seal configuration: "+problem)
		return
	case n.cluster.rekeying(recovery) != nil:
		refuse(w, http.StatusBadRequest, "rekey already in progress")
		return
	}
	n.cluster.rekey = &rekey{
		recovery: recovery, nonce: uuid(), shares: request.Shares, threshold: request.Threshold, pgp: request.PGPKeys, verify: request.Verify,
	}
	answer(w, http.StatusOK, n.rekeyStatus(recovery))
}

func (n *Node) deleteRekey(recovery bool, w http.ResponseWriter, r *http.Request) {
	var request struct{ Nonce string }
	if !parse(w, r, &request) {
		return
	}
	if k := n.cluster.rekeying(recovery); k != nil {
		if k.nonce != request.Nonce {
			refuse(w, http.StatusBadRequest, "invalid request")
			return
		}
		n.cluster.rekey = nil
	}
	w.WriteHeader(http.StatusNoContent)
}

// keyRequest gives a share to an attempt.
type keyRequest struct{ Key, Nonce string }

// share reads a request that gives a share; nil where it was refused.
func shareOf(w http.ResponseWriter, r *http.Request, prefix string) (share []byte, nonce string) {
	var request keyRequest
	if !parse(w, r, &request) {
		return nil, ""
	}
	share, problem := decodeKey(request.Key)
	if problem == "" {
		if problem = measured(share); problem != "" {
			problem = prefix + problem
		}
	}
	if problem != "" {
		refuse(w, http.StatusBadRequest, problem)
		return nil, ""
	}
	return share, request.Nonce
}

func (n *Node) updateRekey(recovery bool, w http.ResponseWriter, r *http.Request) {
	share, nonce := shareOf(w, r, "")
	if share == nil {
		return
	}
	kind := map[bool]string{false: "barrier", true: "recovery"}[recovery]
	operation := map[bool]string{false: "generation", true: "rekey"}[recovery]
	k := n.cluster.rekeying(recovery)
	switch {
	case k == nil:
		refuse(w, http.StatusBadRequest, "no "+kind+" rekey in progress")
		return
	case k.made != nil:
		refuse(w, http.StatusBadRequest, fmt.Sprintf("rekey operation already finished; verification must be performed; "+
			"nonce for the verification operation is %q", k.verificationNonce))
		return
	case k.nonce != nonce:
		refuse(w, http.StatusBadRequest, fmt.Sprintf("incorrect nonce supplied; nonce for this rekey operation is %q", k.nonce))
		return
	case holds(k.given, share):
		refuse(w, http.StatusBadRequest, "given key has already been provided during this "+operation+" operation")
		return
	}
	k.given = append(k.given, share)
	asked := n.cluster.asked()
	if len(k.given) < asked.threshold {
		answer(w, http.StatusOK, n.rekeyStatus(recovery))
		return
	}
	given := k.given
	k.given = nil
	switch why := apart(given); {
	case why != "" && recovery:
		refuse(w, http.StatusInternalServerError, "failed to compute recovery key: "+why)
	case why != "":
		refuse(w, http.StatusInternalServerError, "failed to compute root key: "+why)
	case !asked.opens(given) && recovery:
		refuse(w, http.StatusBadRequest, "recovery key verification failed: recovery key does not match submitted values")
	case !asked.opens(given):
		refuse(w, http.StatusInternalServerError, "failed to read root key: invalid key: failed to decrypt keys from storage: "+
			"error decrypting seal wrapped value\nerror decrypting using seal : cipher: message authentication failed")
	default:
		n.finishRekey(k, w)
	}
}

func (n *Node) finishRekey(k *rekey, w http.ResponseWriter) {
	made := newKeys(k.shares, k.threshold)
	out := object{
		"nonce": k.nonce, "complete": true, "pgp_fingerprints": k.fingerprints(), "backup": false, "verification_required": k.verify,
	}
	out["keys"], out["keys_base64"] = told(made, k.pgp)
	if k.verify {
		k.made, k.verificationNonce = made, uuid()
		out["verification_nonce"] = k.verificationNonce
	} else {
		n.cluster.replace(k.recovery, made)
	}
	answer(w, http.StatusOK, out)
}

// replace makes new keys valid, and ends the rekey.
func (c *cluster) replace(recovery bool, made *keys) {
	if recovery {
		c.recovery = made
	} else {
		for _, member := range c.members {
			if member.options.Kind == Raft && member.sealed && !member.joined && member.stale == nil {
				member.stale = c.unseal
			}
		}
		c.unseal = made
	}
	c.rekey = nil
}

func (k *rekey) verifyStatus() object {
	return object{"nonce": k.verificationNonce, "started": k.made != nil, "t": k.threshold, "n": k.shares, "progress": len(k.verified)}
}

func (n *Node) getVerify(recovery bool, w http.ResponseWriter, _ *http.Request) {
	k := n.cluster.rekeying(recovery)
	if k == nil {
		refuse(w, http.StatusBadRequest, "no rekey configuration found")
		return
	}
	answer(w, http.StatusOK, k.verifyStatus())
}

func (n *Node) deleteVerify(recovery bool, w http.ResponseWriter, r *http.Request) {
	if k := n.cluster.rekeying(recovery); k != nil {
		k.verified, k.verificationNonce = nil, uuid()
	}
	n.getVerify(recovery, w, r)
}

func (n *Node) putVerify(recovery bool, w http.ResponseWriter, r *http.Request) {
	share, nonce := shareOf(w, r, "")
	if share == nil {
		return
	}
	k := n.cluster.rekeying(recovery)
	switch {
	case k == nil:
		refuse(w, http.StatusBadRequest, "no rekey in progress")
		return
	case k.made == nil:
		refuse(w, http.StatusBadRequest, "no rekey verification in progress")
		return
	case k.verificationNonce != nonce:
		refuse(w, http.StatusBadRequest, fmt.Sprintf("incorrect nonce supplied; nonce for this verify operation is %q", k.verificationNonce))
		return
	case holds(k.verified, share):
		refuse(w, http.StatusBadRequest, "given key has already been provided during this verify operation")
		return
	}
	k.verified = append(k.verified, share)
	if len(k.verified) < k.threshold {
		answer(w, http.StatusOK, k.verifyStatus())
		return
	}
	given := k.verified
	k.verified = nil
	if !k.made.opens(given) {
		k.verificationNonce = uuid()
		refuse(w, http.StatusBadRequest, "rekey verification failed; incorrect key shares supplied")
		return
	}
	n.cluster.replace(recovery, k.made)
	answer(w, http.StatusOK, object{"nonce": k.verificationNonce, "complete": true})
}
