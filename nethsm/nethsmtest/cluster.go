package nethsmtest

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
)

// memberRecord is a member that was added over the API: one that no node of this double stands behind.
type memberRecord struct {
	ID      int64    `json:"id"`
	Name    string   `json:"name"`
	URLs    []string `json:"urls"`
	Learner bool     `json:"learner"`
}

// memberItem is an entry of the list of members.
type memberItem struct {
	ID      string   `json:"id"`
	Name    string   `json:"name"`
	URLs    []string `json:"urls"`
	Learner bool     `json:"learner"`
}

// peerItem is a member as a joining node is told of it.
type peerItem struct {
	Name string   `json:"name"`
	URLs []string `json:"urls"`
}

func clusterRoutes() {
	admin := notRootRole(roleAdministrator)
	for _, row := range []struct {
		path     string
		resource resource
	}{
		{"cluster/members", resource{
			states: operational, allow: []string{http.MethodGet, http.MethodPost}, forbidden: admin, provides: typeJSON,
			accepts: []string{typeJSON}, creates: true, get: listMembers, post: addMember,
		}},
		{"cluster/members/{id}", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodDelete}, forbidden: admin, provides: typeJSON,
			accepts: []string{typeJSON}, exists: memberExists, put: putMember, delete: deleteMember,
		}},
		{"cluster/members/{id}/promote", resource{
			states: operational, allow: postOnly, forbidden: admin, provides: typeJSON, exists: memberExists,
			post: promoteMember,
		}},
		{"cluster/join", resource{
			states: operational, allow: postOnly, forbidden: admin, provides: typeJSON, post: joinCluster,
		}},
		{"cluster/force-new", resource{
			states: []State{Failed}, allow: postOnly, provides: typeJSON, post: forceNew,
		}},
		{"health/diagnose", resource{
			states: always, open: []State{Unprovisioned, Locked, Failed}, allow: getOnly, forbidden: admin,
			provides: typeJSON, get: diagnose,
		}},
	} {
		add(row.path, row.resource)
	}
}

// members are the nodes and whoever was added.
func (r *record) members(nodes int) []memberItem {
	var items []memberItem
	for i, n := range r.Nodes[:nodes] {
		items = append(items, memberItem{
			strconv.FormatInt(n.ID, 16), fmt.Sprintf("node%d", i+1), []string{fmt.Sprintf("https://192.168.1.%d:2380", i+1)}, false,
		})
	}
	for _, m := range r.Members {
		items = append(items, memberItem{strconv.FormatInt(m.ID, 16), m.Name, m.URLs, m.Learner})
	}
	return items
}

func listMembers(x *exchange) answer {
	var items []memberItem
	x.hsm.store.read(func(r *record) { items = r.members(len(x.hsm.nodes)) })
	return jsonAnswer(items)
}

func memberURLs(x *exchange) ([]string, *answer) {
	var urls []string
	if err := decode("member_req", x.body(), list("urls", "urls", &urls, nil)); err != nil {
		a := refuse(http.StatusBadRequest, err.Error())
		return nil, &a
	}
	return urls, nil
}

func addMember(x *exchange) answer {
	urls, refused := memberURLs(x)
	if refused != nil {
		return *refused
	}
	type added struct {
		Members   []peerItem `json:"members"`
		JoinerKit string     `json:"joinerKit"`
	}
	var result added
	var a answer
	id := newNodeRecord().ID
	err := x.hsm.store.update(func(r *record) error {
		switch {
		case r.Backup == nil:
			a = refuse(http.StatusPreconditionFailed, "Please configure backup key before adding a cluster member.")
			return errGone
		case slices.ContainsFunc(r.Members, func(m *memberRecord) bool { return m.Learner }):
			a = refuse(http.StatusConflict, "too many learner members in cluster")
			return errExists
		}
		r.Members = append(r.Members, &memberRecord{ID: id, URLs: urls, Learner: true})
		for _, m := range r.members(len(x.hsm.nodes)) {
			result.Members = append(result.Members, peerItem{m.Name, m.URLs})
		}
		kit, err := seal(r.Backup.Key, []byte("joiner-kit"), x.node.record().Lock.Sealed)
		result.JoinerKit = b64(kit)
		return err
	})
	switch {
	case a.status != 0:
		return a
	case err != nil:
		return databaseTrouble("write to")
	}
	return created(x.location(strconv.FormatInt(id, 16)), result)
}

// memberID is the id of the path.
func (x *exchange) memberID() (int64, error) { return strconv.ParseInt(x.path["id"], 16, 64) }

func memberExists(x *exchange) (bool, *answer) {
	id, err := x.memberID()
	if err != nil {
		a := refuse(http.StatusBadRequest, "scanf: bad input at char number 0: character is not a hexadecimal digit")
		return false, &a
	}
	found := false
	x.hsm.store.read(func(r *record) {
		found = slices.ContainsFunc(r.members(len(x.hsm.nodes)), func(m memberItem) bool {
			return m.ID == strconv.FormatInt(id, 16)
		})
	})
	return found, nil
}

// changeMember changes a member that was added; one of the nodes stays as it is.
func (x *exchange) changeMember(change func(*record, int)) answer {
	id, err := x.memberID()
	if err == nil {
		err = x.hsm.store.update(func(r *record) error {
			i := slices.IndexFunc(r.Members, func(m *memberRecord) bool { return m.ID == id })
			if i < 0 {
				return errGone
			}
			change(r, i)
			return nil
		})
	}
	if errors.Is(err, errGone) {
		return refuse(http.StatusPreconditionFailed, "this member is a node of the double and cannot change")
	}
	return stored(err, answer{})
}

func putMember(x *exchange) answer {
	if found, refused := memberExists(x); refused != nil {
		return *refused
	} else if !found {
		return empty(http.StatusNotFound)
	}
	urls, refused := memberURLs(x)
	if refused != nil {
		return *refused
	}
	return x.changeMember(func(r *record, i int) { r.Members[i].URLs = urls })
}

func deleteMember(x *exchange) answer {
	return x.changeMember(func(r *record, i int) { r.Members = slices.Delete(r.Members, i, i+1) })
}

// promoteMember succeeds once something has joined, which gives the member its name; until then it has not caught up.
func promoteMember(x *exchange) answer {
	caughtUp := true
	a := x.changeMember(func(r *record, i int) {
		if caughtUp = r.Members[i].Name != ""; caughtUp {
			r.Members[i].Learner = false
		}
	})
	if !caughtUp {
		return refuse(http.StatusPreconditionFailed, "can only promote a learner member which is in sync with leader")
	}
	return a
}

// CatchUp lets the learner that was added over the API look as if its node had joined and caught up.
func (h *HSM) CatchUp(name string) error {
	return h.store.update(func(r *record) error {
		for _, m := range r.Members {
			if m.Learner {
				m.Name = name
				return nil
			}
		}
		return fmt.Errorf("letting a member of a NetHSM double catch up: no learner %w", errGone)
	})
}

// joinCluster checks what it is given and ends Locked, as a node does that joined; the data stays the double's own.
func joinCluster(x *exchange) answer {
	var kit, passphrase string
	var peers []any
	err := decode("join_req", x.body(),
		field{name: "members", set: func(v any) string {
			var ok bool
			if peers, ok = v.([]any); !ok {
				return "."
			}
			return ""
		}},
		text("joinerKit", &kit), text("backupPassphrase", &passphrase))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if len(peers) == 0 || kit == "" || passphrase == "" {
		return refuse(http.StatusBadRequest, "joining cluster failed: incomplete joiner kit")
	}
	x.node.SetState(Locked)
	return empty(http.StatusNoContent)
}

// forceNew is for a node that lost its cluster: user "unlock" with the unlock passphrase.
func forceNew(x *exchange) answer {
	name, passphrase, ok := basic(x.r.Header.Get("Authorization"))
	var l *lockRecord
	x.hsm.store.read(func(*record) { l = x.node.record().Lock })
	if !ok || name != "unlock" || l == nil {
		return *unauthorized("NetHSM")
	}
	if _, err := l.open(passphrase); err != nil {
		return *unauthorized("invalid authorization")
	}
	x.node.boot()
	return empty(http.StatusNoContent)
}

func diagnose(x *exchange) answer {
	type logItem struct {
		Level   string `json:"level"`
		Message string `json:"msg"`
	}
	type clusterState struct {
		Running bool `json:"running"`
	}
	logs := []logItem{}
	if x.node.blind() {
		logs = append(logs, logItem{"error", "etcd does not answer"})
	}
	return jsonAnswer(struct {
		Logs  []logItem    `json:"clusterLogs"`
		State clusterState `json:"clusterState"`
	}{logs, clusterState{!x.node.blind()}})
}
