package nethsmtest

import (
	"net/http"
	"net/url"
	"strings"
)

// The states in which resources are there.
var (
	always      = []State{Unprovisioned, Locked, Operational, Failed}
	operational = []State{Operational}
)

// The lists of methods, in the order of the original's Allow headers.
var (
	getOnly  = []string{http.MethodGet, http.MethodHead}
	postOnly = []string{http.MethodPost}
	putOnly  = []string{http.MethodPut}
)

// pattern is a route: segments, where {name} stands for any one.
type pattern struct {
	segments []string
	resource *resource
}

// routes is the API, the most exact pattern of a shape first.
var routes []pattern

func init() {
	for _, row := range []struct {
		path     string
		resource resource
	}{
		{"info", resource{
			states: always, allow: getOnly, provides: typeJSON, get: getInfo,
			etag: func(*exchange) string { return etag("info") },
		}},
		{"health/state", resource{states: always, allow: getOnly, provides: typeJSON, get: getState}},
		{"health/alive", resource{states: []State{Locked, Unprovisioned}, allow: getOnly, provides: typeJSON, get: healthy}},
		{"health/ready", resource{states: operational, allow: getOnly, provides: typeJSON, get: healthy}},
		{"provision", resource{states: []State{Unprovisioned}, allow: postOnly, provides: typeJSON, post: provision}},
		{"unlock", resource{states: []State{Locked}, allow: postOnly, provides: typeJSON, post: unlock}},
		{"lock", resource{
			states: operational, allow: postOnly, provides: typeJSON, forbidden: notRootRole(roleAdministrator), post: lock,
		}},
		{"random", resource{
			states: operational, allow: postOnly, provides: typeJSON, forbidden: notRole(roleOperator), post: randomBytes,
		}},

		{"users", resource{
			states: operational, allow: []string{http.MethodPost, http.MethodGet}, forbidden: notRole(roleAdministrator),
			provides: typeJSON, accepts: []string{typeJSON}, creates: true, etag: userListTag, get: listUsers, post: postUser,
		}},
		{"users/{id}", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodGet, http.MethodDelete, http.MethodPost},
			forbidden: mayNotUser, provides: typeJSON, accepts: []string{typeJSON}, creates: true, exists: userOrPrefixExists,
			etag: userTag, get: getUser, put: putUser, post: postUserIn, delete: deleteUser,
		}},
		{"users/{id}/passphrase", resource{
			states: operational, allow: postOnly, forbidden: mayNotSelf, provides: typeJSON, exists: userExists,
			post: postPassphrase,
		}},
		{"users/{id}/tags", resource{
			states: operational, allow: []string{http.MethodGet}, forbidden: mayNotTags, provides: typeJSON,
			exists: userTagsExist, get: listUserTags,
		}},
		{"users/{id}/tags/{tag}", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodDelete}, forbidden: mayNotTag, provides: typeJSON,
			accepts: anyType, exists: userTagExists, put: putUserTag, delete: deleteUserTag,
		}},

		{"namespaces", resource{
			states: operational, allow: []string{http.MethodGet}, forbidden: notRootRole(roleAdministrator),
			provides: typeJSON, get: listNamespaces,
		}},
		{"namespaces/{id}", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodDelete},
			forbidden: notRootRole(roleAdministrator), provides: typeJSON, accepts: anyType,
			exists: namespaceExists, put: putNamespace, delete: deleteNamespace,
		}},

		{"keys", resource{
			states: operational, allow: []string{http.MethodPost, http.MethodGet}, forbidden: operatorsMayRead,
			provides: typeJSON, accepts: []string{typeJSON, typeMultipart}, creates: true, etag: keyListTag,
			get: listKeys, post: importKey,
		}},
		{"keys/generate", resource{
			states: operational, allow: postOnly, forbidden: notRole(roleAdministrator), provides: typeJSON,
			accepts: []string{typeJSON}, creates: true, post: generateKey,
		}},
		{"keys/{id}*", resource{
			states: operational, allow: []string{http.MethodGet}, forbidden: operatorsMayRead, provides: typeJSON, get: listKeys,
		}},
		{"keys/{id}", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodGet, http.MethodDelete},
			forbidden: operatorsMayRead, provides: typeJSON, accepts: []string{typeJSON, typeMultipart},
			exists: keyExists, etag: keyTag, get: getKey, put: putKey, delete: deleteKey,
		}},
		{"keys/{id}/public.pem", resource{
			states: operational, allow: []string{http.MethodGet}, forbidden: notRole(roleAdministrator, roleOperator),
			provides: typePEM, exists: keyExists, etag: keyTag, get: publicPEM,
		}},
		{"keys/{id}/csr.pem", resource{
			states: operational, allow: postOnly, forbidden: notRole(roleAdministrator, roleOperator),
			provides: typePEM, exists: keyExists, post: keyCSR,
		}},
		{"keys/{id}/decrypt", resource{
			states: operational, allow: postOnly, forbidden: notRole(roleOperator), provides: typeJSON, limit: operationLimit,
			exists: keyExists, post: decryptKey,
		}},
		{"keys/{id}/encrypt", resource{
			states: operational, allow: postOnly, forbidden: notRole(roleOperator), provides: typeJSON, limit: operationLimit,
			exists: keyExists, post: encryptKey,
		}},
		{"keys/{id}/sign", resource{
			states: operational, allow: postOnly, forbidden: notRole(roleOperator), provides: typeJSON, limit: operationLimit,
			exists: keyExists, post: signKey,
		}},
		{"keys/{id}/cert", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodGet, http.MethodDelete},
			forbidden: operatorsMayRead, provides: typeBytes, accepts: []string{typeBytes}, exists: keyExists, etag: keyTag,
			get: getCertificate, put: putCertificate, delete: deleteCertificate,
		}},
		{"keys/{id}/label", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodDelete}, forbidden: notRole(roleAdministrator),
			provides: typeJSON, accepts: []string{typeJSON}, exists: keyExists, put: putLabel, delete: deleteLabel,
		}},
		{"keys/{id}/move", resource{
			states: operational, allow: postOnly, forbidden: notRole(roleAdministrator), provides: typeJSON,
			exists: keyExists, post: moveKey,
		}},
		{"keys/{id}/restrictions/tags/{tag}", resource{
			states: operational, allow: []string{http.MethodPut, http.MethodDelete}, forbidden: notRole(roleAdministrator),
			provides: typeJSON, accepts: anyType, exists: keyTagExists,
			put: putKeyTag, delete: deleteKeyTag,
		}},
	} {
		add(row.path, row.resource)
	}
	configurationRoutes()
	systemRoutes()
	updateRoutes()
	clusterRoutes()
}

func add(path string, r resource) {
	routes = append(routes, pattern{strings.Split(path, "/"), &r})
}

// route finds the resource of an escaped path below /api/v1/, and what stands for its {names}.
func route(path string) (*resource, map[string]string) {
	segments := strings.Split(strings.TrimSuffix(path, "/"), "/")
	for i, s := range segments {
		if decoded, err := url.PathUnescape(s); err == nil {
			segments[i] = decoded
		}
	}
next:
	for _, p := range routes {
		if len(p.segments) != len(segments) {
			continue
		}
		found := map[string]string{}
		for i, want := range p.segments {
			name, hole := strings.CutPrefix(want, "{")
			star := strings.HasSuffix(name, "*")
			switch {
			case hole && star && strings.HasSuffix(segments[i], "*"):
				found[strings.TrimSuffix(name, "}*")] = segments[i]
			case hole && !star:
				found[strings.TrimSuffix(name, "}")] = segments[i]
			case want != segments[i]:
				continue next
			}
		}
		return p.resource, found
	}
	return nil, nil
}
