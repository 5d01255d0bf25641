package nodetest

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
)

// routes are what a node answers. Vault takes PUT and POST for the same.
func (n *Node) routes() http.Handler {
	mux := http.NewServeMux()
	route := func(path string, methods map[string]http.HandlerFunc) {
		mux.HandleFunc("/v1/"+path, func(w http.ResponseWriter, r *http.Request) {
			method := r.Method
			if method == http.MethodPost {
				method = http.MethodPut
			}
			handler, known := methods[method]
			if !known {
				refuse(w, http.StatusMethodNotAllowed)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			handler(w, r)
		})
	}
	route("sys/seal-status", map[string]http.HandlerFunc{http.MethodGet: n.getSealStatus})
	route("sys/health", map[string]http.HandlerFunc{http.MethodGet: n.getHealth})
	route("sys/leader", map[string]http.HandlerFunc{http.MethodGet: n.getLeader})
	route("sys/init", map[string]http.HandlerFunc{http.MethodGet: n.getInit, http.MethodPut: n.putInit})
	route("sys/unseal", map[string]http.HandlerFunc{http.MethodPut: n.putUnseal})
	route("sys/storage/raft/join", map[string]http.HandlerFunc{http.MethodPut: n.putJoin})
	for path, recovery := range map[string]bool{"sys/rekey": false, "sys/rekey-recovery-key": true} {
		route(path+"/init", map[string]http.HandlerFunc{
			http.MethodGet: n.onRekey(recovery, n.getRekey), http.MethodPut: n.onRekey(recovery, n.putRekey),
			http.MethodDelete: n.onRekey(recovery, n.deleteRekey),
		})
		route(path+"/update", map[string]http.HandlerFunc{http.MethodPut: n.onRekey(recovery, n.updateRekey)})
		route(path+"/verify", map[string]http.HandlerFunc{
			http.MethodGet: n.onRekey(recovery, n.getVerify), http.MethodPut: n.onRekey(recovery, n.putVerify),
			http.MethodDelete: n.onRekey(recovery, n.deleteVerify),
		})
	}
	route("sys/generate-root/attempt", map[string]http.HandlerFunc{
		http.MethodGet: n.onActive(n.getRoot), http.MethodPut: n.onActive(n.putRoot), http.MethodDelete: n.onActive(n.deleteRoot),
	})
	route("sys/generate-root/update", map[string]http.HandlerFunc{http.MethodPut: n.onActive(n.updateRoot)})
	route("auth/token/lookup-self", map[string]http.HandlerFunc{http.MethodGet: n.onActive(n.lookupSelf)})
	route("auth/token/revoke-self", map[string]http.HandlerFunc{http.MethodPut: n.onActive(n.revokeSelf)})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { refuse(w, http.StatusNotFound) })
	return mux
}

// object is an answer.
type object map[string]any

func answer(w http.ResponseWriter, status int, what any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(what) // the client may be gone
}

func refuse(w http.ResponseWriter, status int, messages ...string) {
	if messages == nil {
		messages = []string{}
	}
	answer(w, status, object{"errors": messages})
}

// parse reads a request.
func parse(w http.ResponseWriter, r *http.Request, into any) bool {
	err := json.NewDecoder(r.Body).Decode(into)
	if err == nil {
		return true
	}
	message := "failed to parse JSON input: " + err.Error()
	if errors.Is(err, io.EOF) {
		message = "EOF"
	}
	refuse(w, http.StatusBadRequest, message)
	return false
}

// onActive refuses what a sealed node cannot serve. A standby passes the rest on, so any unsealed node answers alike.
func (n *Node) onActive(handler http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if n.cluster == nil || n.sealed {
			refuse(w, http.StatusServiceUnavailable, "Vault is sealed")
			return
		}
		handler(w, r)
	}
}
