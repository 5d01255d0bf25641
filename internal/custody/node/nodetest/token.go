package nodetest

import "net/http"

func (n *Node) lookupSelf(w http.ResponseWriter, r *http.Request) {
	token := r.Header.Get("X-Vault-Token")
	if !n.cluster.tokens[token] {
		denied(w, token)
		return
	}
	answer(w, http.StatusOK, object{"request_id": uuid(), "data": object{"id": token, "policies": []string{"root"}, "path": "auth/token/root"}})
}

func (n *Node) revokeSelf(w http.ResponseWriter, r *http.Request) {
	token := r.Header.Get("X-Vault-Token")
	if !n.cluster.tokens[token] {
		denied(w, token)
		return
	}
	delete(n.cluster.tokens, token)
	w.WriteHeader(http.StatusNoContent)
}

func denied(w http.ResponseWriter, token string) {
	if token == "" {
		refuse(w, http.StatusForbidden, "permission denied")
		return
	}
	refuse(w, http.StatusForbidden, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n")
}
