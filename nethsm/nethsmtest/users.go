package nethsmtest

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
)

// user is a user, as it is written. The passphrase is kept as a salted HMAC only.
type user struct {
	RealName string   `json:"realName"`
	Role     string   `json:"role"`
	Salt     []byte   `json:"salt"`
	Digest   []byte   `json:"digest"`
	Tags     []string `json:"tags,omitempty"`
	Revision int64    `json:"revision"`

	id, namespace string // of an authenticated caller
}

func newUser(realName, role string, passphrase []byte) *user {
	u := &user{RealName: realName, Role: role}
	u.setPassphrase(passphrase)
	return u
}

func (u *user) setPassphrase(passphrase []byte) {
	u.Salt = random(16)
	u.Digest = digest(u.Salt, passphrase)
}

// clone is a copy of its own; nil stays nil.
func (u *user) clone() *user {
	if u == nil {
		return nil
	}
	copied := *u
	copied.Tags = slices.Clone(u.Tags)
	return &copied
}

var roles = []string{roleAdministrator, roleOperator, roleMetrics, roleBackup}

// AddUser makes a user; name may be "namespace~id", and the namespace is made with it.
func (h *HSM) AddUser(name, role, passphrase string, tags ...string) error {
	if !slices.Contains(roles, role) {
		return fmt.Errorf("adding user %q to a NetHSM double: no role %q", name, role)
	}
	return h.store.update(func(r *record) error {
		u := newUser(name, role, []byte(passphrase))
		u.Tags = sortedSet(tags)
		u.Revision = r.Revision + 1
		r.Users[name] = u
		if namespace, _ := splitName(name); namespace != "" {
			r.Namespaces[namespace] = true
		}
		return nil
	})
}

// SetUserPassphrase changes a passphrase as an administrator elsewhere would.
func (h *HSM) SetUserPassphrase(name, passphrase string) error {
	return h.store.update(func(r *record) error {
		u := r.Users[name].clone()
		if u == nil {
			return fmt.Errorf("changing user %q of a NetHSM double: %w", name, errGone)
		}
		u.setPassphrase([]byte(passphrase))
		r.Users[name] = u
		return nil
	})
}

// userID is the checked user id of the path.
func (x *exchange) userID() (string, *answer) {
	name := x.path["id"]
	parts := []string{name}
	if strings.Contains(name, "~") {
		parts = strings.SplitN(name, "~", 2)
	}
	for _, part := range parts {
		if complaint := validID(part); complaint != "" {
			a := refuse(http.StatusBadRequest, complaint)
			return "", &a
		}
	}
	return name, nil
}

// target is the user of the path; nil for none. As with keys, a request sees one version.
func (x *exchange) target() *user {
	if x.u == nil {
		x.hsm.store.read(func(r *record) { x.u = r.Users[x.path["id"]].clone() })
	}
	return x.u
}

// userOrPrefixExists is userExists for /users/{id} itself, where POST takes the prefix of a namespace.
func userOrPrefixExists(x *exchange) (bool, *answer) {
	if x.r.Method == http.MethodPost {
		return true, nil
	}
	return userExists(x)
}

func userExists(x *exchange) (bool, *answer) {
	if _, refused := x.userID(); refused != nil {
		return false, refused
	}
	return x.target() != nil, nil
}

// outOfReach says whether the path's user is none of the caller's business: it lies in another namespace. The root looks
// after the users of a namespace until that exists, and then no more.
func (x *exchange) outOfReach() bool {
	namespace, _ := splitName(x.path["id"])
	if namespace == x.user.namespace {
		return false
	}
	exists := true
	x.hsm.store.read(func(r *record) { exists = r.Namespaces[namespace] })
	return exists || x.user.namespace != ""
}

// mayNotUser guards /users/{id}: administrators of the namespace, and operators reading about themselves. The root
// namespace may look into the others.
func mayNotUser(x *exchange) bool {
	switch x.r.Method {
	case http.MethodGet:
		if x.user.namespace != "" && x.outOfReach() {
			return true
		}
		self := x.user.Role == roleOperator && x.user.id == x.path["id"]
		return x.user.Role != roleAdministrator && !self
	case http.MethodDelete:
		return x.user.Role != roleAdministrator || x.outOfReach()
	default: // whom a PUT or POST would make is judged with its body
		return x.user.Role != roleAdministrator
	}
}

// mayNotSelf guards the passphrase: an administrator within reach, or an operator about itself.
func mayNotSelf(x *exchange) bool {
	self := x.user.Role == roleOperator && x.user.id == x.path["id"]
	return x.outOfReach() || (x.user.Role != roleAdministrator && !self)
}

// mayNotTags is mayNotSelf, but the root namespace may look into the others.
func mayNotTags(x *exchange) bool {
	self := x.user.Role == roleOperator && x.user.id == x.path["id"]
	return (x.user.namespace != "" && x.outOfReach()) || (x.user.Role != roleAdministrator && !self)
}

// mayNotTag: administrators within reach only.
func mayNotTag(x *exchange) bool { return x.user.Role != roleAdministrator || x.outOfReach() }

func listUsers(x *exchange) answer {
	type item struct {
		User string `json:"user"`
	}
	items := []item{}
	x.hsm.store.read(func(r *record) {
		for _, name := range slices.Sorted(maps.Keys(r.Users)) {
			// The root namespace sees everybody.
			if namespace, _ := splitName(name); x.user.namespace == "" || namespace == x.user.namespace {
				items = append(items, item{name})
			}
		}
	})
	return jsonAnswer(items)
}

func userListTag(x *exchange) string {
	version := "users"
	x.hsm.store.read(func(r *record) {
		for _, name := range slices.Sorted(maps.Keys(r.Users)) {
			version += fmt.Sprintf(" %s %d", name, r.Users[name].Revision)
		}
	})
	return etag(version)
}

func userTag(x *exchange) string {
	return etag(fmt.Sprintf("user %s %d", x.path["id"], x.target().Revision))
}

func getUser(x *exchange) answer {
	u := x.target()
	return jsonAnswer(struct {
		RealName string `json:"realName"`
		Role     string `json:"role"`
	}{u.RealName, u.Role})
}

// postUser is POST /users: in the caller's namespace, with an id of the server's choice.
func postUser(x *exchange) answer {
	id := newID()
	if a := x.makeUser(keyName(x.user.namespace, id)); a != nil {
		return *a
	}
	name := keyName(x.user.namespace, id)
	return created(x.location(name), idItem{name})
}

// postUserIn is POST /users/{namespace~}.
func postUserIn(x *exchange) answer {
	namespace, id := splitName(x.path["id"])
	if namespace == "" || id != "" {
		return refuse(http.StatusBadRequest, "POST on this endpoint expects a prefix of the form '/ns~' to "+
			"select in which namespace the new user should be created. For a new root user, don't add a trailing '/'.")
	}
	name := keyName(namespace, newID())
	if a := x.makeUser(name); a != nil {
		return *a
	}
	place := x.r.URL.EscapedPath()
	return created(place[:strings.LastIndexByte(place, '/')+1]+name, idItem{name})
}

func putUser(x *exchange) answer {
	if a := x.makeUser(x.path["id"]); a != nil {
		return *a
	}
	return created(x.location(), nil)
}

func (x *exchange) makeUser(name string) *answer {
	var realName, role, passphrase string
	err := decode("user_req", x.body(),
		text("realName", &realName), choice("role", "role", &role, roles), text("passphrase", &passphrase))
	if err == nil {
		err = validPassphrase("passphrase", passphrase)
	}
	var a answer
	if err != nil {
		a = refuse(http.StatusBadRequest, err.Error())
		return &a
	}
	namespace, _ := splitName(name)
	made := newUser(realName, role, []byte(passphrase))
	err = x.hsm.store.update(func(r *record) error {
		switch {
		case namespace == x.user.namespace:
		case x.user.namespace != "":
			a = refuse(http.StatusForbidden, "N-User trying to create user for another namespace")
			return errExists
		case r.Namespaces[namespace]:
			a = refuse(http.StatusForbidden, "R-User trying to create N-User for an already created namespace")
			return errExists
		}
		if r.Users[name] != nil {
			a = refuse(http.StatusConflict, "user already exists")
			return errExists
		}
		made.Revision = r.Revision + 1
		r.Users[name] = made
		return nil
	})
	if err != nil {
		a = stored(err, a)
		return &a
	}
	return nil
}

// passphraseError is a passphrase of a length that is not allowed.
type passphraseError struct{ field string }

func (e *passphraseError) Error() string {
	return "passphrase " + e.field + " is not >= 10 and <= 200 characters"
}

func validPassphrase(field, passphrase string) error {
	if len(passphrase) < minPassphrase || len(passphrase) > maxPassphrase {
		return &passphraseError{field}
	}
	return nil
}

func deleteUser(x *exchange) answer {
	if x.user.id == x.path["id"] {
		return refuse(http.StatusBadRequest, "Users cannot delete themselves")
	}
	return x.changeUser(func(r *record, _ *user) { delete(r.Users, x.path["id"]) })
}

// changeUser changes the user of the path: 204, or 404 where it went meanwhile.
func (x *exchange) changeUser(change func(*record, *user)) answer {
	return stored(x.hsm.store.update(func(r *record) error {
		u := r.Users[x.path["id"]].clone()
		if u == nil {
			return errGone
		}
		u.Revision = r.Revision + 1
		r.Users[x.path["id"]] = u
		change(r, u)
		return nil
	}), answer{})
}

func postPassphrase(x *exchange) answer {
	var passphrase string
	err := decode("passphrase_req", x.body(), text("passphrase", &passphrase))
	if err == nil {
		err = validPassphrase("passphrase", passphrase)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	return x.changeUser(func(_ *record, u *user) { u.setPassphrase([]byte(passphrase)) })
}

func userTagsExist(x *exchange) (bool, *answer) {
	found, refused := userExists(x)
	if refused != nil || !found {
		return found, refused
	}
	return x.target().Role == roleOperator, nil
}

func listUserTags(x *exchange) answer {
	tags := x.target().Tags
	if tags == nil {
		tags = []string{}
	}
	return jsonAnswer(tags)
}

func userTagExists(x *exchange) (bool, *answer) {
	found, refused := userExists(x)
	if refused != nil || !found {
		return found, refused
	}
	tag, refused := x.id("tag")
	if refused != nil {
		return false, refused
	}
	return slices.Contains(x.target().Tags, tag), nil
}

func putUserTag(x *exchange) answer {
	u := x.target()
	tag := x.path["tag"]
	switch {
	case u == nil:
		return refuse(http.StatusNotFound, "")
	case u.Role != roleOperator:
		return refuse(http.StatusBadRequest, "tag operations only exist on operator users")
	case slices.Contains(u.Tags, tag):
		return empty(http.StatusNotModified)
	}
	return x.changeUser(func(_ *record, u *user) { u.Tags = sortedSet(append(u.Tags, tag)) })
}

func deleteUserTag(x *exchange) answer {
	return x.changeUser(func(_ *record, u *user) {
		u.Tags = slices.DeleteFunc(u.Tags, func(t string) bool { return t == x.path["tag"] })
	})
}

// ---- namespaces ---------------------------------------------------------------------------------------------------

func listNamespaces(x *exchange) answer {
	items := []idItem{}
	x.hsm.store.read(func(r *record) {
		for _, id := range slices.Sorted(maps.Keys(r.Namespaces)) {
			items = append(items, idItem{id})
		}
	})
	return jsonAnswer(items)
}

func namespaceExists(x *exchange) (bool, *answer) {
	id, refused := x.id("id")
	if refused != nil {
		return false, refused
	}
	exists := false
	x.hsm.store.read(func(r *record) { exists = r.Namespaces[id] })
	return exists, nil
}

func putNamespace(x *exchange) answer {
	id := x.path["id"]
	return stored(x.hsm.store.update(func(r *record) error {
		if r.Namespaces[id] {
			return errExists
		}
		r.Namespaces[id] = true
		return nil
	}), refuse(http.StatusBadRequest, "Namespace "+id+" already exists"))
}

// deleteNamespace drops the namespace and its keys; its users stay and may nothing.
func deleteNamespace(x *exchange) answer {
	id := x.path["id"]
	return stored(x.hsm.store.update(func(r *record) error {
		if !r.Namespaces[id] {
			return errGone
		}
		delete(r.Namespaces, id)
		maps.DeleteFunc(r.Keys, func(name string, _ *keyRecord) bool {
			namespace, _ := splitName(name)
			return namespace == id
		})
		return nil
	}), answer{})
}

// UserNames are all users, of every namespace ("namespace~id").
func (h *HSM) UserNames() []string {
	var all []string
	h.store.read(func(r *record) { all = slices.Sorted(maps.Keys(r.Users)) })
	return all
}
