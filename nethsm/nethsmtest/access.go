package nethsmtest

import (
	"crypto/hmac"
	"encoding/base64"
	"net/http"
	"slices"
	"strings"
	"time"
)

// The roles.
const (
	roleAdministrator = "Administrator"
	roleOperator      = "Operator"
	roleMetrics       = "Metrics"
	roleBackup        = "Backup"
)

// unlockUser is the name under which failed unlocks are counted.
const unlockUser = "_unlock"

// limitPeriod is how long a failure keeps a user and an address out.
const limitPeriod = time.Second

// authenticate finds out who sent the request. It returns the answer that ends it where nobody known did.
func (x *exchange) authenticate() *answer {
	sent := x.r.Header.Get("Authorization")
	if sent == "" {
		return unauthorized("NetHSM")
	}
	name, passphrase, ok := basic(sent)
	if !ok {
		return unauthorized("invalid authorization")
	}
	x.name = name
	if x.node.limited(x.client, name) {
		a := refuse(http.StatusTooManyRequests, "Too many requests")
		return &a
	}
	var known *user
	if !x.node.blind() { // while etcd is away nobody can be looked up, and the original takes that for a wrong password
		x.hsm.store.read(func(r *record) { known = r.Users[name].clone() })
	}
	if known == nil || !hmac.Equal(digest(known.Salt, passphrase), known.Digest) {
		x.node.failed(x.client, name)
		return unauthorized("invalid authorization")
	}
	x.user = known
	x.user.id = name
	x.user.namespace, _ = splitName(name)
	return nil
}

func unauthorized(realm string) *answer {
	return &answer{
		status: http.StatusUnauthorized, kind: "none",
		header: http.Header{"Www-Authenticate": {`Basic realm="` + realm + `"`}},
	}
}

func basic(header string) (name string, passphrase []byte, ok bool) {
	encoded, ok := strings.CutPrefix(header, "Basic ")
	if !ok {
		return "", nil, false
	}
	decoded, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return "", nil, false
	}
	name, rest, ok := strings.Cut(string(decoded), ":")
	return name, []byte(rest), ok
}

// namespaceGone says whether the user belongs to a namespace that does not exist (yet, or any more).
func (x *exchange) namespaceGone() bool {
	if x.user.namespace == "" {
		return false
	}
	exists := false
	x.hsm.store.read(func(r *record) { exists = r.Namespaces[x.user.namespace] })
	return !exists
}

// The rules of who may: true means forbidden.

func notRole(roles ...string) func(*exchange) bool {
	return func(x *exchange) bool { return !slices.Contains(roles, x.user.Role) }
}

// notRootRole is notRole for what only the root namespace may.
func notRootRole(role string) func(*exchange) bool {
	return func(x *exchange) bool { return x.user.Role != role || x.user.namespace != "" }
}

// operatorsMayRead: an Administrator may all, an Operator may GET.
func operatorsMayRead(x *exchange) bool {
	return x.user.Role != roleAdministrator && (x.user.Role != roleOperator || x.r.Method != http.MethodGet)
}

// limited says whether the pair of address and user failed within the last second.
func (n *Node) limited(client, name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	last, ok := n.failures[failure{client, name}]
	return ok && n.hsm.now().Sub(last) < limitPeriod
}

// failed counts a failure.
func (n *Node) failed(client, name string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.hsm.now()
	for pair, at := range n.failures {
		if now.Sub(at) >= limitPeriod {
			delete(n.failures, pair)
		}
	}
	n.failures[failure{client, name}] = now
}

// failure is what the rate limit counts by.
type failure struct{ client, name string }

// splitName cuts "namespace~id".
func splitName(name string) (namespace, id string) {
	if before, after, ok := strings.Cut(name, "~"); ok {
		return before, after
	}
	return "", name
}
