package nodetest

import (
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"net/http"
)

// root is the making of a root token that is under way.
type root struct {
	nonce, otp, pgp string
	given           [][]byte
}

// tokenLength is that of a root token.
const tokenLength = 28

func (n *Node) rootStatus() object {
	status := object{
		"nonce": "", "started": false, "progress": 0, "required": n.cluster.asked().threshold, "complete": false, "encoded_token": "",
		"encoded_root_token": "", "pgp_fingerprint": "", "otp": "", "otp_length": tokenLength,
	}
	if g := n.cluster.root; g != nil {
		status["nonce"], status["started"], status["progress"], status["pgp_fingerprint"] = g.nonce, true, len(g.given), fingerprint(g.pgp)
	}
	return status
}

func (n *Node) getRoot(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, n.rootStatus())
}

func (n *Node) putRoot(w http.ResponseWriter, r *http.Request) {
	var request struct {
		PGPKey string `json:"pgp_key"`
	}
	if !parse(w, r, &request) {
		return
	}
	if request.PGPKey != "" {
		if _, err := parsePGP(request.PGPKey); err != nil {
			refuse(w, http.StatusBadRequest, "error parsing PGP key: error parsing given PGP key: "+err.Error())
			return
		}
	}
	if n.cluster.root != nil {
		refuse(w, http.StatusBadRequest, "root generation already in progress")
		return
	}
	g := &root{nonce: uuid(), pgp: request.PGPKey}
	n.cluster.root = g
	status := n.rootStatus()
	if g.pgp == "" {
		g.otp = letters(tokenLength)
		status["otp"] = g.otp
	}
	answer(w, http.StatusOK, status)
}

func (n *Node) deleteRoot(w http.ResponseWriter, _ *http.Request) {
	n.cluster.root = nil
	w.WriteHeader(http.StatusNoContent)
}

func (n *Node) updateRoot(w http.ResponseWriter, r *http.Request) {
	share, nonce := shareOf(w, r, "invalid key: ")
	if share == nil {
		return
	}
	g := n.cluster.root
	switch {
	case g == nil:
		refuse(w, http.StatusBadRequest, "no root generation in progress")
		return
	case g.nonce != nonce:
		refuse(w, http.StatusBadRequest, fmt.Sprintf("incorrect nonce supplied; nonce for this root generation operation is %q", g.nonce))
		return
	case holds(g.given, share):
		refuse(w, http.StatusBadRequest, "given key has already been provided during this generation operation")
		return
	}
	g.given = append(g.given, share)
	asked := n.cluster.asked()
	if len(g.given) < asked.threshold {
		status := n.rootStatus()
		status["otp_length"] = 0
		answer(w, http.StatusOK, status)
		return
	}
	given := g.given
	g.given = nil
	switch why := apart(given); {
	case why != "":
		refuse(w, http.StatusBadRequest, "failed to compute root key: "+why)
		return
	case !asked.opens(given) && n.cluster.recovery != nil:
		refuse(w, http.StatusBadRequest, "root generation aborted: unable to authenticate: recovery key verification failed: "+
			"recovery key does not match submitted values")
		return
	case !asked.opens(given):
		refuse(w, http.StatusBadRequest, "root generation aborted: unable to authenticate: unable to retrieve stored keys: invalid key: "+
			"failed to decrypt keys from storage: error decrypting seal wrapped value\n"+
			"error decrypting using seal shamir: cipher: message authentication failed")
		return
	}
	token := n.cluster.token()
	encoded := make([]byte, len(token))
	if g.pgp == "" {
		subtle.XORBytes(encoded, []byte(token), []byte(g.otp))
		token = base64.RawStdEncoding.EncodeToString(encoded)
	} else {
		token = base64.StdEncoding.EncodeToString(encrypt(g.pgp, token))
	}
	status := n.rootStatus()
	status["progress"], status["complete"], status["otp_length"] = asked.threshold, true, 0
	status["encoded_token"], status["encoded_root_token"] = token, token
	n.cluster.root = nil
	answer(w, http.StatusOK, status)
}
