package nethsmtest

import (
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// The largest bodies, by Content-Length, of operations with a key and of all else.
const (
	ordinaryLimit  = 1 << 20
	operationLimit = 67 << 20
)

// apiPrefix is where the API lives.
const apiPrefix = "/api/v1/"

// knownMethods are the methods that the original has heard of; others get 501.
var knownMethods = []string{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete,
	http.MethodTrace, http.MethodConnect, http.MethodOptions,
}

// resource is one row of the API: who may do what in which state, and how. A handler that is nil is a method that is
// not allowed.
type resource struct {
	states []State
	// allow are the methods in the order of the Allow header.
	allow []string
	// forbidden says whether the authenticated user may not; nil: nobody is asked who they are.
	forbidden func(*exchange) bool
	// open are states in which nobody is asked, forbidden or not.
	open []State
	// provides is the content type of answers; accepts are those of the body of a PUT, and of a POST that creates.
	provides string
	accepts  []string
	creates  bool
	limit    int64 // of the body; 0: ordinaryLimit, -1: none
	// exists says whether the thing is there; an answer ends the request. nil: always there.
	exists func(*exchange) (bool, *answer)
	// etag is the version of what GET shows; empty: none.
	etag                   func(*exchange) string
	get, post, put, delete func(*exchange) answer
}

// exchange is one request on its way through the checks.
type exchange struct {
	hsm    *HSM
	node   *Node
	w      http.ResponseWriter
	r      *http.Request
	path   map[string]string // the {names} of the route
	name   string            // the user name that was sent
	user   *user             // who it turned out to be
	k      *keyRecord        // the key of the path, as it was when the request looked for it
	u      *user             // the user of the path, likewise
	client string            // the address, for rate limits
	header http.Header       // to be sent with whatever answer
	after  func()            // to be run once the answer was sent
}

// serve runs one request through the checks, in the original's order, and writes the answer.
func (x *exchange) serve() answer {
	if !strings.HasPrefix(x.r.URL.EscapedPath(), apiPrefix) {
		return notFound()
	}
	res, path := route(strings.TrimPrefix(x.r.URL.EscapedPath(), apiPrefix))
	if res == nil {
		return notFound()
	}
	x.path = path
	a := x.run(res)
	for name, values := range x.header {
		if a.header == nil {
			a.header = http.Header{}
		}
		if a.header[name] == nil {
			a.header[name] = values
		}
	}
	return a
}

// notFound is the answer for a path that is no route.
func notFound() answer {
	return answer{status: http.StatusNotFound, kind: "none", body: []byte("Not found")}
}

func (x *exchange) run(res *resource) answer {
	method, state := x.r.Method, x.node.State()
	switch {
	case !slices.Contains(res.states, state):
		return notAvailable()
	case !slices.Contains(knownMethods, method):
		return empty(http.StatusNotImplemented)
	case len(x.r.URL.String()) > 2000:
		return empty(http.StatusRequestURITooLong)
	case !slices.Contains(res.allow, method):
		a := empty(http.StatusMethodNotAllowed)
		a.header = http.Header{"Allow": {strings.Join(res.allow, ",")}}
		return a
	}
	if res.forbidden != nil && !slices.Contains(res.open, state) {
		if refused := x.authenticate(); refused != nil {
			return *refused
		}
		if x.namespaceGone() || res.forbidden(x) {
			return empty(http.StatusForbidden)
		}
	}
	limit := res.limit
	if limit == 0 {
		limit = ordinaryLimit
	}
	if limit > 0 && x.r.ContentLength > limit {
		return empty(http.StatusRequestEntityTooLarge)
	}
	if accept := x.r.Header.Get("Accept"); accept != "" && !acceptable(accept, res.provides) {
		return empty(http.StatusNotAcceptable)
	}
	a := x.perform(res)
	if a.kind == "" {
		a.kind = res.provides
	}
	return a
}

// perform is what comes after content negotiation: the answers from here on carry a content type.
func (x *exchange) perform(res *resource) answer {
	found := true
	if res.exists != nil {
		var refused *answer
		if found, refused = res.exists(x); refused != nil {
			return *refused
		}
	}
	var tag string
	if found && res.etag != nil && x.r.Method != http.MethodPost {
		tag = res.etag(x)
	}
	if halted := x.preconditions(found, tag); halted != nil {
		return *halted
	}
	if x.chokes(res) {
		x.hangUp()
		panic(http.ErrAbortHandler)
	}
	switch x.r.Method {
	case http.MethodPut:
		if !accepted(x.r, res.accepts) {
			return empty(http.StatusUnsupportedMediaType)
		}
		return res.put(x)
	case http.MethodPost:
		if !found {
			return empty(http.StatusNotFound)
		}
		if res.creates && !accepted(x.r, res.accepts) {
			return empty(http.StatusUnsupportedMediaType)
		}
		return res.post(x)
	case http.MethodDelete:
		if !found {
			return empty(http.StatusNotFound)
		}
		return res.delete(x)
	default:
		if !found {
			return empty(http.StatusNotFound)
		}
		if tag != "" {
			x.header.Set("Etag", strconv.Quote(tag))
		}
		return res.get(x)
	}
}

// preconditions judges If-Match and If-None-Match (RFC 9110, 13.1).
func (x *exchange) preconditions(found bool, tag string) *answer {
	failed := empty(http.StatusPreconditionFailed)
	if match := x.r.Header.Get("If-Match"); match != "" {
		if !found || (match != "*" && !hasTag(match, tag)) {
			return &failed
		}
	}
	if match := x.r.Header.Get("If-None-Match"); match != "" && found {
		if match == "*" || hasTag(match, tag) {
			if x.r.Method == http.MethodGet || x.r.Method == http.MethodHead {
				a := empty(http.StatusNotModified)
				if tag != "" {
					x.header.Set("Etag", strconv.Quote(tag))
				}
				return &a
			}
			return &failed
		}
	}
	return nil
}

func hasTag(list, tag string) bool {
	for one := range strings.SplitSeq(list, ",") {
		if tag != "" && strings.Trim(strings.TrimSpace(one), `"`) == tag {
			return true
		}
	}
	return false
}

// acceptable says whether an Accept header allows a type (RFC 9110, 12.5.1); a q of 0 excludes.
func acceptable(accept, provided string) bool {
	major, _, _ := strings.Cut(provided, "/")
	best, allowed := -1, false
	for one := range strings.SplitSeq(accept, ",") {
		kind, params, err := mime.ParseMediaType(one)
		if err != nil {
			continue
		}
		precision := slices.Index([]string{"*/*", major + "/*", provided}, kind)
		if precision > best {
			q, err := strconv.ParseFloat(params["q"], 64)
			best, allowed = precision, err != nil || q > 0
		}
	}
	return allowed
}

// accepted says whether the content type of a body is one of types, given without parameters, in upper or lower case. A
// missing one will do where nobody reads the body.
func accepted(r *http.Request, types []string) bool {
	sent := r.Header.Get("Content-Type")
	if sent == "" {
		return slices.Equal(types, anyType)
	}
	if strings.HasPrefix(strings.ToLower(sent), "multipart/form-data;") {
		return slices.Contains(types, typeMultipart)
	}
	return slices.ContainsFunc(types, func(t string) bool { return strings.EqualFold(t, sent) })
}

// anyType are the types of requests whose body nobody reads.
var anyType = []string{typeJSON, typeBytes}

// typeMultipart stands for multipart/form-data with whatever boundary.
const typeMultipart = "multipart/form-data"

// body reads the request's body. A client that stops half-way ends the exchange.
func (x *exchange) body() []byte {
	data, err := io.ReadAll(http.MaxBytesReader(x.w, x.r.Body, operationLimit))
	if err != nil {
		var tooLong *http.MaxBytesError
		if errors.As(err, &tooLong) {
			x.hangUp() // the original has no limit for chunked bodies and chokes on them
		}
		panic(http.ErrAbortHandler)
	}
	return data
}

// hangUp waits until the client leaves or the node stops.
func (x *exchange) hangUp() {
	_, _ = io.Copy(io.Discard, x.r.Body)
	select {
	case <-x.r.Context().Done(): // seen only once the body was read
	case <-x.node.stopping():
	}
}

// location is the path of the request with more segments behind it.
func (x *exchange) location(segments ...string) string {
	place := strings.TrimSuffix(x.r.URL.EscapedPath(), "/")
	for _, s := range segments {
		place += "/" + url.PathEscape(s)
	}
	return place
}

// clientAddress is the address that rate limits count by: without the port.
func clientAddress(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}
