package nodetest

import (
	"encoding/base64"
	"fmt"
	"net/http"
)

func (n *Node) getInit(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, object{"initialized": n.cluster != nil || n.halfway})
}

// initRequest is what sys/init takes.
type initRequest struct {
	Shares            int      `json:"secret_shares"`
	Threshold         int      `json:"secret_threshold"`
	PGPKeys           []string `json:"pgp_keys"`
	RecoveryShares    int      `json:"recovery_shares"`
	RecoveryThreshold int      `json:"recovery_threshold"`
	RecoveryPGPKeys   []string `json:"recovery_pgp_keys"`
	RootPGPKey        string   `json:"root_token_pgp_key"`
}

// refusal is what Vault says before it has done anything.
func (n *Node) refusal(request *initRequest) string {
	shares, threshold, keys := request.Shares, request.Threshold, request.PGPKeys
	switch auto := n.options.Kind == Auto; {
	case auto && shares+threshold > 0:
		return "parameters secret_shares,secret_threshold not applicable to seal type transit"
	case !auto && request.RecoveryShares+request.RecoveryThreshold > 0:
		return "parameters recovery_shares,recovery_threshold not applicable to seal type shamir"
	case auto:
		shares, threshold, keys = request.RecoveryShares, request.RecoveryThreshold, request.RecoveryPGPKeys
	}
	switch {
	case len(keys) > 0 && len(keys) != shares:
		return "incorrect number of PGP keys"
	case n.cluster != nil || n.halfway:
		return "Vault is already initialized"
	}
	if problem := numbers(shares, threshold); problem != "" {
		return "invalid seal configuration: " + problem
	}
	for _, key := range append(keys[:len(keys):len(keys)], request.RootPGPKey) {
		if _, err := parsePGP(key); key != "" && err != nil {
			return "invalid seal configuration: error parsing given PGP key: " + err.Error()
		}
	}
	return ""
}

// numbers complains about numbers of shares.
func numbers(shares, threshold int) string {
	switch {
	case shares < 1:
		return "shares must be at least one"
	case threshold < 1:
		return "threshold must be at least one"
	case threshold > shares:
		return "threshold cannot be larger than shares"
	case shares > 1 && threshold == 1:
		return "threshold must be greater than one for multiple shares"
	case shares > 255:
		return fmt.Sprintf("shares must be less than %d", 256)
	default:
		return ""
	}
}

func (n *Node) putInit(w http.ResponseWriter, r *http.Request) {
	var request initRequest
	if !parse(w, r, &request) {
		return
	}
	if problem := n.refusal(&request); problem != "" {
		refuse(w, http.StatusBadRequest, problem)
		return
	}
	if run := n.initializing; run != nil {
		n.initializing, n.halfway = nil, true
		mu.Unlock()
		run()
		mu.Lock()
		n.halfway = false
	}
	id := uuid()
	c := &cluster{id: id, name: "vault-cluster-" + id[:8], members: []*Node{n}, tokens: map[string]bool{}}
	out := object{"keys": []string{}, "keys_base64": []string{}}
	if n.options.Kind == Auto {
		c.recovery = newKeys(request.RecoveryShares, request.RecoveryThreshold)
		out["recovery_keys"], out["recovery_keys_base64"] = told(c.recovery, request.RecoveryPGPKeys)
	} else {
		c.unseal = newKeys(request.Shares, request.Threshold)
		out["keys"], out["keys_base64"] = told(c.unseal, request.PGPKeys)
	}
	token := c.token()
	if request.RootPGPKey != "" {
		token = base64.StdEncoding.EncodeToString(encrypt(request.RootPGPKey, token))
	}
	out["root_token"] = token
	n.cluster, n.sealed = c, true
	if n.options.Kind == Auto {
		n.open()
	}
	answer(w, http.StatusOK, out)
}
