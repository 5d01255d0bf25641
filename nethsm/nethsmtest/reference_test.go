package nethsmtest

import (
	"bytes"
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What is known of the original from its source, or was seen on a running server, and is not in the recording.

// asked is one request of a table, and the answer that it must get.
type asked struct {
	name   string
	method string // and path, "GET keys/one"
	login  string
	header string // "Name: value"
	body   string // sent as JSON unless header is a content type
	status int
	answer string // the whole body; "-" means none at all, empty means whatever it is
	with   string // a header of the answer, "Name: value"; "Name:" means that it must be missing
}

// asking sends requests to one node, with the content type of JSON where there is a body and no other is named.
func (c *caller) asking(base string, q asked) (status int, header http.Header, body string) {
	c.t.Helper()
	method, path, _ := strings.Cut(q.method, " ")
	r, err := http.NewRequestWithContext(c.t.Context(), method, base+"/api/v1/"+path, strings.NewReader(q.body))
	if err != nil {
		c.t.Fatal(err)
	}
	if user, passphrase, ok := strings.Cut(q.login, ":"); ok {
		r.SetBasicAuth(user, passphrase)
	}
	if q.body != "" {
		r.Header.Set("Content-Type", typeJSON)
	}
	if name, value, ok := strings.Cut(q.header, ": "); ok {
		r.Header.Set(name, value)
	}
	answer, err := c.client.Do(r)
	if err != nil {
		c.t.Fatalf("%s: %v", q.name, err)
	}
	defer func() { _ = answer.Body.Close() }()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		c.t.Fatalf("%s: %v", q.name, err)
	}
	if answer.Close { // net/http takes the header away
		answer.Header.Set("Connection", "close")
	}
	return answer.StatusCode, answer.Header, string(data)
}

// holds runs a table from its top to its end: a row may depend on those above.
func (c *caller) holds(base string, table []asked) {
	c.t.Helper()
	for _, q := range table {
		status, header, body := c.asking(base, q)
		if status != q.status {
			c.t.Errorf("%s: %s: got %d %q, want %d", q.name, q.method, status, body, q.status)
			continue
		}
		want := q.answer
		if want != "" && want != "-" && !strings.HasPrefix(want, "{") && !strings.HasPrefix(want, "[") {
			want = `{"message":"` + want + `"}`
		}
		switch {
		case want == "-" && body != "":
			c.t.Errorf("%s: %s: body %q, want none", q.name, q.method, body)
		case want != "" && want != "-" && body != want:
			c.t.Errorf("%s: %s: body %s, want %s", q.name, q.method, body, want)
		}
		if name, value, ok := strings.Cut(q.with, ":"); ok && header.Get(name) != strings.TrimSpace(value) {
			c.t.Errorf("%s: %s: header %s is %q, want %q", q.name, q.method, name, header.Get(name), value)
		}
	}
}

// ticking is a clock for a double.
type ticking struct {
	mu sync.Mutex
	at time.Time
}

func newTicking() *ticking { return &ticking{at: time.Now()} }

func (c *ticking) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *ticking) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

const generic = `{"mechanisms":["AES_Encryption_CBC"],"type":"Generic","length":128`

func TestChecksComeInTheOrderOfTheOriginal(t *testing.T) {
	clock := newTicking()
	h := Start(t, Options{Provisioned: true, Now: clock.now})
	c, url := newCaller(t, h), h.URLs()[0]
	addRSA(t, h, "one")
	long := strings.Repeat("x", 3000)
	big := strings.Repeat(" ", ordinaryLimit+1)
	accept := "Accept: text/plain"
	c.holds(url, []asked{
		{name: "a long path is looked at before the method", method: "DELETE keys?" + long, status: 414, answer: "-", with: "Content-Type:"},
		{name: "an unknown method before a long path", method: "PATCH keys?" + long, status: 501, answer: "-"},
		{name: "the method before who sent it", method: "PUT keys/one/decrypt", status: 405, answer: "-", with: "Allow: POST"},
		{name: "HEAD is a method that a slot has not", method: "HEAD keys/one/cert", login: adminLogin, status: 405, with: "Allow: PUT,GET,DELETE"},
		{name: "users list their methods in this order", method: "TRACE users/x", status: 405, with: "Allow: PUT,GET,DELETE,POST"},
		{name: "who sent it before what it may", method: "POST lock", status: 401, answer: "-", with: `WWW-Authenticate: Basic realm="NetHSM"`},
		{name: "the role before the size", method: "POST keys/generate", login: operatorLogin, body: big, status: 403, answer: "-", with: "Content-Type:"},
		{name: "the size before what is accepted", method: "POST keys/generate", login: adminLogin, body: big, header: accept, status: 413, answer: "-"},
		{name: "what is accepted before what exists", method: "GET keys/none", login: adminLogin, header: accept, status: 406, answer: "-", with: "Content-Type:"},
		{name: "what exists before the version", method: "GET keys/none", login: adminLogin, header: `If-None-Match: *`, status: 404, answer: "-"},
		{name: "a version of nothing does not match", method: "GET keys/none", login: adminLogin, header: `If-Match: *`, status: 412, answer: "-"},
		{name: "any version of something matches", method: "GET keys/one", login: adminLogin, header: `If-Match: *`, status: 200},
		{name: "what must not exist and does", method: "DELETE keys/one", login: adminLogin, header: `If-None-Match: *`, status: 412, answer: "-"},
		{name: "read only what is new, and nothing is", method: "GET keys/one", login: adminLogin, header: `If-None-Match: *`, status: 304, answer: "-"},
		{name: "a bad id before the body", method: "PUT keys/-x", login: adminLogin, body: "{", status: 400, answer: "ID cannot start with underscore, dash, or dot."},
		{name: "the size before the content type", method: "PUT keys/two", login: adminLogin, body: big, header: "Content-Type: text/plain", status: 413},
		{name: "PUT needs its content type", method: "PUT keys/two", login: adminLogin, body: "{}", header: "Content-Type: text/plain", status: 415, answer: "-"},
		{name: "so does POST that makes something", method: "POST keys/generate", login: adminLogin, body: "{}", header: "Content-Type: text/plain", status: 415, answer: "-"},
		{name: "and with no word about the charset", method: "POST users", login: adminLogin, body: "{}", header: "Content-Type: application/json;charset=utf-8", status: 415, answer: "-"},
		{name: "POST that makes nothing does not look", method: "POST random", login: operatorLogin, body: `{"length":1}`, header: "Content-Type: text/plain", status: 200},
		{name: "no operation looks", method: "POST keys/one/decrypt", login: operatorLogin, body: `{}`, header: "Content-Type: text/plain", status: 400},
		{name: "operations take large bodies", method: "POST keys/one/decrypt", login: operatorLogin, body: big, status: 400},
		{name: "a route that is none", method: "GET nothing", status: 404, with: "Content-Type:"},
	})
	lost := asked{name: "a wrong password", method: "GET keys", login: "operator:WrongPassphrase", status: 401, answer: "-", with: `WWW-Authenticate: Basic realm="invalid authorization"`}
	limited := asked{name: "again", method: "GET keys", login: operatorLogin, status: 429, answer: "Too many requests"}
	free := asked{name: "and again", method: "GET keys", login: operatorLogin, status: 200}
	c.holds(url, []asked{lost, limited})
	clock.pass(999 * time.Millisecond)
	c.holds(url, []asked{limited})
	clock.pass(time.Millisecond)
	c.holds(url, []asked{free, lost, limited})
	clock.pass(limitPeriod)
	h.Node(0).SetState(Locked)
	c.holds(url, []asked{
		{name: "the state comes before all", method: "PATCH keys?" + long, login: "operator:WrongPassphrase", status: 412, answer: "Service not available", with: "Content-Type: application/json"},
	})
	h.Node(0).SetState(Operational)
	c.holds(url, []asked{free}) // what the state refused was no attempt
}

func TestFailuresAreCountedByAddressAndName(t *testing.T) {
	h, err := New(Options{Provisioned: true})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for _, test := range []struct {
		address, user, passphrase string
		want                      int
	}{
		{"192.0.2.1:1000", OperatorUser, "WrongPassphrase", 401},
		{"192.0.2.1:2000", OperatorUser, OperatorPassphrase, 429},
		{"192.0.2.2:1000", OperatorUser, OperatorPassphrase, 200},
		{"192.0.2.1:1000", AdminUser, AdminPassphrase, 200},
		{"[2001:db8::1]:1000", "nobody", "WrongPassphrase", 401},
		{"[2001:db8::1]:2000", "nobody", "WrongPassphrase", 429},
		{"[2001:db8::2]:2000", "nobody", "WrongPassphrase", 401},
	} {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/api/v1/keys", http.NoBody)
		r.RemoteAddr = test.address
		r.SetBasicAuth(test.user, test.passphrase)
		answer := httptest.NewRecorder()
		h.ServeHTTP(answer, r)
		if answer.Code != test.want {
			t.Errorf("%s from %s with %s: %d, want %d", test.user, test.address, test.passphrase, answer.Code, test.want)
		}
	}
}

func TestAcceptIsReadAsTheStandardHasIt(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]
	addRSA(t, h, "one")
	for accept, want := range map[string]int{
		"*/*":                              200,
		"application/*":                    200,
		"application/json;q=0.1":           200,
		"text/plain, application/json":     200,
		"text/plain":                       406,
		"application/json;q=0":             406,
		"*/*, application/json;q=0":        406,
		"application/*;q=0, */*":           406,
		"application/octet-stream, text/*": 406,
	} {
		c.holds(url, []asked{{name: accept, method: "GET keys/one", login: operatorLogin, header: "Accept: " + accept, status: want}})
	}
	c.holds(url, []asked{
		{name: "JSON where there is PEM", method: "GET keys/one/public.pem", login: operatorLogin, header: "Accept: application/json", status: 406},
		{name: "JSON where there are bytes", method: "GET keys/one/cert", login: operatorLogin, header: "Accept: application/json", status: 406},
		{name: "a slot with nothing in it", method: "GET keys/one/cert", login: operatorLogin, header: "Accept: */*", status: 404, answer: "-", with: "Content-Type: application/octet-stream"},
	})
}

func TestIDsFollowTheRules(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]
	const (
		short = "ID cannot be shorter than 1 character."
		long  = "ID cannot be longer than 128 characters."
		chars = "ID may only contain alphanumeric characters, underscores, dashes, and dots."
		start = "ID cannot start with underscore, dash, or dot."
	)
	full := strings.Repeat("x", 128)
	for id, complaint := range map[string]string{
		"a": "", "Z9._-": "", "0": "", full: "", full + "x": long, "-a": start, ".a": start, "_a": start,
		"a b": chars, "ä": chars, "a/b": chars, "a:b": chars, "a~b": chars,
	} {
		status, want := 201, ""
		if complaint != "" {
			status, want = 400, complaint
		}
		c.holds(url, []asked{{
			name: "a key " + id, method: "POST keys/generate", login: adminLogin, status: status, answer: want,
			body: generic + `,"id":"` + id + `"}`,
		}})
	}
	user := `{"realName":"x","role":"Operator","passphrase":"OperatorPassphrase"}`
	c.holds(url, []asked{
		{name: "a user of 128", method: "PUT users/" + full, login: adminLogin, body: user, status: 201, with: "Location: /api/v1/users/" + full},
		{name: "a user of 129", method: "PUT users/x" + full, login: adminLogin, body: user, status: 400, answer: long},
		{name: "a user with a bad start", method: "PUT users/.x", login: adminLogin, body: user, status: 400, answer: start},
		{name: "a namespace with a bad start", method: "PUT namespaces/-x", login: adminLogin, status: 400, answer: start},
		{name: "a tag with a bad start", method: "PUT users/operator/tags/_x", login: adminLogin, status: 400, answer: start},
		{name: "a user of a namespace without a name", method: "PUT users/~x", login: adminLogin, body: user, status: 400, answer: short},
		{name: "every key", method: "GET keys/*", login: adminLogin, status: 400, answer: short},
		{name: "a move to a bad id", method: "POST keys/a/move", login: adminLogin, body: `{"newId":"-x"}`, status: 400, answer: start},
		{name: "a key with a bad tag", method: "POST keys/generate", login: adminLogin, body: generic + `,"restrictions":{"tags":["-x"]}}`, status: 400, answer: start},
	})
}

func TestPassphrasesAreCountedInBytes(t *testing.T) {
	clock := newTicking()
	h := Start(t, Options{Now: clock.now})
	c, url := newCaller(t, h), h.URLs()[0]
	const length = "passphrase passphrase is not >= 10 and <= 200 characters"
	provision := func(unlock, admin, at string) string {
		return `{"unlockPassphrase":"` + unlock + `","adminPassphrase":"` + admin + `","systemTime":"` + at + `"}`
	}
	const utc = "2026-01-01T00:00:00Z"
	c.holds(url, []asked{
		{name: "a short admin", method: "POST provision", body: provision(UnlockPassphrase, "Admin", utc), status: 400, answer: "passphrase adminPassphrase is not >= 10 and <= 200 characters"},
		{name: "a long unlock", method: "POST provision", body: provision(strings.Repeat("u", 201), AdminPassphrase, utc), status: 400, answer: "passphrase unlockPassphrase is not >= 10 and <= 200 characters"},
		{name: "a time that is none", method: "POST provision", body: provision(UnlockPassphrase, AdminPassphrase, "yesterday"), status: 400},
		{name: "a time of another zone", method: "POST provision", body: provision(UnlockPassphrase, AdminPassphrase, "2026-01-01T00:00:00+01:00"), status: 400, answer: "Error while parsing timestamp. Offset must be 0."},
		{name: "a time without a zone", method: "POST provision", body: provision(UnlockPassphrase, AdminPassphrase, "2026-01-01T00:00:00"), status: 400},
		{
			name: "an offset of zero, names without quotes, no content type", method: "POST provision", header: "Content-Type: text/plain",
			body:   `{unlockPassphrase:"` + UnlockPassphrase + `",adminPassphrase:"` + AdminPassphrase + `",systemTime:"2026-01-01T00:00:00+00:00"}`,
			status: 204, answer: "-",
		},
		{name: "a second time", method: "POST provision", body: provision(UnlockPassphrase, AdminPassphrase, utc), status: 412},
	})
	for passphrase, want := range map[string]int{
		strings.Repeat("p", 9): 400, strings.Repeat("p", 10): 201, strings.Repeat("p", 200): 201, strings.Repeat("p", 201): 400,
		strings.Repeat("ä", 5): 201, strings.Repeat("ä", 100): 201, strings.Repeat("ä", 101): 400,
	} {
		answer := ""
		if want == 400 {
			answer = length
		}
		c.holds(url, []asked{{
			name: "a passphrase " + passphrase, method: "POST users", login: adminLogin, status: want, answer: answer,
			body: `{"realName":"x","role":"Operator","passphrase":"` + passphrase + `"}`,
		}})
	}
	// Whatever fails at unlocking counts: a wrong one, a short one, one that is missing.
	c.holds(url, []asked{{name: "lock", method: "POST lock", login: adminLogin, status: 204}})
	good := asked{name: "the right one", method: "POST unlock", body: `{"passphrase":"` + UnlockPassphrase + `"}`, status: 204}
	limited := good
	limited.status, limited.answer = 429, "Service unavailable: too many requests"
	for _, bad := range []asked{
		{name: "a wrong one", method: "POST unlock", body: `{"passphrase":"WrongPassphrase"}`, status: 403, answer: "not authenticated"},
		{name: "a short one", method: "POST unlock", body: `{"passphrase":"short"}`, status: 400, answer: length},
		{name: "none", method: "POST unlock", body: `{}`, status: 400, answer: "Invalid data for JSON schema: Json.passphrase_req.passphrase."},
	} {
		c.holds(url, []asked{bad, limited})
		clock.pass(limitPeriod)
	}
	c.holds(url, []asked{good, {name: "once more", method: "POST unlock", body: good.body, status: 412, answer: "Service not available"}})
}

func TestKeysTakeWhatTheOriginalTakes(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]
	addRSA(t, h, "rsa", append([]string{"AES_Encryption_CBC"}, mechanismsOf(typeRSA)...)...)
	for _, k := range []Key{
		{ID: "ec", Type: typeP256, Mechanisms: []string{"RSA_Decryption_RAW", "EdDSA_Signature"}},
		{ID: "aes", Type: typeGeneric, Length: 128, Mechanisms: []string{"RSA_Decryption_RAW", "ECDSA_Signature", "AES_Decryption_CBC"}},
		{ID: "odd", Type: typeGeneric, Length: 136},
		{ID: "tagged", Type: typeGeneric, Tags: []string{"t1", "t2"}},
	} {
		if _, _, err := h.AddKey(k); err != nil {
			t.Fatal(err)
		}
	}
	sixteen := b64(make([]byte, 16))
	body := func(mode, member, data string) string {
		return `{"mode":"` + mode + `","` + member + `":"` + data + `"}`
	}
	generating := func(members string) asked {
		return asked{name: members, method: "POST keys/generate", login: adminLogin, status: 400, body: "{" + members + "}"}
	}
	says := func(a asked, message string) asked { a.answer = message; return a }
	label := strings.Repeat("ä", 16)
	c.holds(url, []asked{
		says(generating(`"mechanisms":["RSA_Signature_PKCS1"],"type":"RSA","length":1023`), "RSA key length must be between 1024 and 8192."),
		says(generating(`"mechanisms":["RSA_Signature_PKCS1"],"type":"RSA","length":8193`), "RSA key length must be between 1024 and 8192."),
		says(generating(`"mechanisms":[],"type":"RSA","length":2048`), "Empty set of mechanisms"),
		says(generating(`"mechanisms":["EdDSA_Signature"],"type":"EC_P256"`), "Mechanism does not match key type"),
		says(generating(`"mechanisms":["ECDSA_Signature"],"type":"EC_P224"`), "P224 is unsupported"),
		generating(`"mechanisms":["AES_Encryption_CBC"],"type":"Generic","length":127`),
		generating(`"mechanisms":["AES_Encryption_CBC"],"type":"Generic","length":8193`),
		generating(`"mechanisms":["AES_Encryption_CBC"],"type":"Generic","length":128,"surprise":1`),
		generating(`"mechanisms":["AES_Encryption_CBC"],"type":"Generic","length":128,"label":"` + label + `x"`),
		{name: "a label of 32 bytes", method: "POST keys/generate", login: adminLogin, body: generic + `,"id":"l","label":"` + label + `"}`, status: 201},
		{name: "found by it", method: "GET keys?label=" + label, login: adminLogin, status: 200, answer: `[{"id":"l"}]`, with: "Etag:"},
		{name: "the same again", method: "PUT keys/l/label", login: adminLogin, body: `{"label":"` + label + `"}`, status: 304, answer: "-"},
		{name: "33 bytes", method: "PUT keys/l/label", login: adminLogin, body: `{"label":"` + label + `x"}`, status: 400},
		{name: "16 letters, 33 bytes", method: "PUT keys/l/label", login: adminLogin, body: `{"label":"` + label[:30] + `abc"}`, status: 400},
		{name: "by an operator", method: "PUT keys/l/label", login: operatorLogin, body: `{"label":"x"}`, status: 403, answer: "-"},
		{name: "of no key", method: "PUT keys/none/label", login: adminLogin, body: `{"label":"x"}`, status: 404},
		{name: "none of no key", method: "DELETE keys/none/label", login: adminLogin, status: 404, answer: "-"},
		{name: "a tag of no key", method: "PUT keys/none/restrictions/tags/t", login: adminLogin, status: 404},
		{name: "a certificate of no key", method: "PUT keys/none/cert", login: adminLogin, body: "x", header: "Content-Type: " + typeBytes, status: 404, answer: "keyID not found"},
		{name: "an operator makes no certificate", method: "PUT keys/rsa/cert", login: operatorLogin, body: "x", header: "Content-Type: " + typeBytes, status: 403, answer: "-"},
		{name: "a move onto another", method: "POST keys/l/move", login: adminLogin, body: `{"newId":"rsa"}`, status: 409},

		{name: "tags guard operations", method: "POST keys/tagged/encrypt", login: operatorLogin, body: body("AES_CBC", "message", sixteen), status: 403, answer: "tags restriction not met", with: "Content-Type: application/json"},
		{name: "tags do not guard reading", method: "GET keys/tagged", login: operatorLogin, status: 200},
		{name: "nor the slot", method: "GET keys/tagged/cert", login: operatorLogin, status: 404},
		{name: "they do not hide it from the list", method: "GET keys", login: operatorLogin, status: 200, answer: `[{"id":"aes"},{"id":"ec"},{"id":"l"},{"id":"odd"},{"id":"rsa"},{"id":"tagged"}]`},
		{name: "but from the filtered one", method: "GET keys?filter=", login: operatorLogin, status: 200, answer: `[{"id":"aes"},{"id":"ec"},{"id":"l"},{"id":"odd"},{"id":"rsa"}]`},
		{name: "one tag is given", method: "PUT users/operator/tags/t2", login: adminLogin, status: 204},
		{name: "one tag is enough", method: "POST keys/tagged/encrypt", login: operatorLogin, body: body("AES_CBC", "message", sixteen), status: 200},

		{name: "base64 in lines", method: "POST keys/tagged/encrypt", login: operatorLogin, body: body("AES_CBC", "message", sixteen[:8]+`\n`+sixteen[8:]+`\n`), status: 200},
		{name: "base64 in lines of another system", method: "POST keys/tagged/encrypt", login: operatorLogin, body: body("AES_CBC", "message", sixteen[:8]+`\r\n`+sixteen[8:]), status: 400},
		{name: "base64 for URLs", method: "POST keys/rsa/decrypt", login: operatorLogin, body: body("RAW", "encrypted", "_-8="), status: 400},
		{name: "a mode that is none", method: "POST keys/rsa/sign", login: operatorLogin, body: body("PSS", "message", "AAAA"), status: 400, answer: "Invalid data for JSON schema: Json.sign_mode."},
		{name: "a generic key has one mode", method: "POST keys/aes/decrypt", login: operatorLogin, body: body("RAW", "encrypted", "AAAA"), status: 400, answer: "decrypt mode not supported by Generic key"},
		{name: "a generic key wants an iv", method: "POST keys/aes/decrypt", login: operatorLogin, body: body("AES_CBC", "encrypted", sixteen), status: 400, answer: "AES-CBC decrypt requires IV"},
		{name: "a generic key signs nothing", method: "POST keys/aes/sign", login: operatorLogin, body: body("ECDSA", "message", "AAAA"), status: 400, answer: "Generic keys can't sign."},
		{name: "a curve decrypts nothing", method: "POST keys/ec/decrypt", login: operatorLogin, body: body("RAW", "encrypted", "AAAA"), status: 400, answer: "Decryption only supported for RSA and Generic keys."},
		{name: "another curve's mode", method: "POST keys/ec/sign", login: operatorLogin, body: body("EdDSA", "message", "AAAA"), status: 400, answer: "invalid sign mode"},
		{name: "too long for the key", method: "POST keys/rsa/sign", login: operatorLogin, body: body("PKCS1", "message", b64(make([]byte, 246))), status: 400, answer: "Signing failure: RSA key too short."},
		{name: "a mechanism that is missing", method: "POST keys/ec/sign", login: operatorLogin, body: body("ECDSA", "message", "AAAA"), status: 400, answer: "Key mechanisms do not allow requested signing."},
		{name: "an RSA key and AES", method: "POST keys/rsa/encrypt", login: operatorLogin, body: body("AES_CBC", "message", sixteen), status: 400},
		{name: "an AES key of 17 bytes", method: "POST keys/odd/encrypt", login: operatorLogin, body: body("AES_CBC", "message", sixteen), status: 400},
		{name: "an administrator uses no key", method: "POST keys/tagged/encrypt", login: adminLogin, body: body("AES_CBC", "message", sixteen), status: 403, answer: "-"},
		{name: "nor random bytes", method: "POST random", login: adminLogin, body: `{"length":1}`, status: 403, answer: "-"},
		{name: "as many random bytes as there may be", method: "POST random", login: operatorLogin, body: `{"length":1024}`, status: 200},
		{name: "one more", method: "POST random", login: operatorLogin, body: `{"length":1025}`, status: 400},
		{name: "none", method: "POST random", login: operatorLogin, body: `{"length":0}`, status: 400},
		{
			name: "an import takes any mechanism", method: "PUT keys/brought", login: adminLogin, status: 204, answer: "-",
			body: `{"mechanisms":["ECDSA_Signature"],"type":"Generic","private":{"data":"` + sixteen + `"}}`,
		},
		{
			name: "but no id twice", method: "PUT keys/brought", login: adminLogin, status: 400, answer: "Key with id brought already exists",
			body: `{"mechanisms":["ECDSA_Signature"],"type":"Generic","private":{"data":"` + sixteen + `"}}`,
		},
		{
			name: "a public key of nothing", method: "GET keys/aes", login: operatorLogin, status: 200,
			answer: `{"mechanisms":["RSA_Decryption_RAW","ECDSA_Signature","AES_Decryption_CBC"],"type":"Generic","operations":0,"public":null,"restrictions":{}}`,
		},
		{name: "PEM of nothing", method: "GET keys/aes/public.pem", login: operatorLogin, status: 400, answer: "Generic keys have no public key"},
	})
}

func TestUsersAndNamespacesKeepApart(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]
	addRSA(t, h, "root")
	user := func(role string) string {
		return `{"realName":"x","role":"` + role + `","passphrase":"NamespacePassphrase"}`
	}
	pass := `{"passphrase":"AnotherPassphrase"}`
	const (
		nadmin = "ns~admin:NamespacePassphrase"
		nop    = "ns~op:NamespacePassphrase"
	)
	c.holds(url, []asked{
		{name: "before its namespace exists", method: "PUT users/ns~admin", login: adminLogin, body: user("Administrator"), status: 201, with: "Location: /api/v1/users/ns~admin"},
		{name: "it may read nothing", method: "GET keys", login: nadmin, status: 403, answer: "-"},
		{name: "not even itself", method: "GET users/ns~admin", login: nadmin, status: 403, answer: "-"},
		{name: "nor what is not there", method: "GET keys/none", login: nadmin, status: 403, answer: "-"},
		{name: "meanwhile the root looks after it: tags", method: "PUT users/ns~admin/tags/t", login: adminLogin, status: 400, answer: "tag operations only exist on operator users"},
		{name: "meanwhile the root looks after it: passphrase", method: "POST users/ns~admin/passphrase", login: adminLogin, body: pass, status: 204},
		{name: "meanwhile the root looks after it: removal", method: "DELETE users/ns~admin", login: adminLogin, status: 204},
		{name: "another time", method: "PUT users/ns~admin", login: adminLogin, body: user("Administrator"), status: 201},
		{name: "the namespace comes", method: "PUT namespaces/ns", login: adminLogin, status: 204, answer: "-"},
		{name: "it comes once", method: "PUT namespaces/ns", login: adminLogin, status: 400, answer: "Namespace ns already exists"},
		{name: "from now on the root may only look: passphrase", method: "POST users/ns~admin/passphrase", login: adminLogin, body: pass, status: 403, answer: "-"},
		{name: "from now on the root may only look: removal", method: "DELETE users/ns~admin", login: adminLogin, status: 403, answer: "-"},
		{name: "from now on the root may only look: new users", method: "PUT users/ns~op", login: adminLogin, body: user("Operator"), status: 403, answer: "R-User trying to create N-User for an already created namespace"},
		{name: "the namespace looks after its own", method: "PUT users/ns~op", login: nadmin, body: user("Operator"), status: 201},
		{name: "and after nobody else: root", method: "PUT users/op", login: nadmin, body: user("Operator"), status: 403, answer: "N-User trying to create user for another namespace"},
		{name: "and after nobody else: reading", method: "GET users/operator", login: nadmin, status: 403, answer: "-"},
		{name: "and after nobody else: tags", method: "PUT users/operator/tags/t", login: nadmin, status: 403, answer: "-"},
		{name: "from now on the root may only look: tags", method: "PUT users/ns~op/tags/t", login: adminLogin, status: 403, answer: "-"},
		{name: "the root looks", method: "GET users/ns~op", login: adminLogin, status: 200, answer: `{"realName":"x","role":"Operator"}`},
		{name: "the root looks at tags", method: "GET users/ns~op/tags", login: adminLogin, status: 200, answer: "[]"},
		{name: "the root sees all", method: "GET users", login: adminLogin, status: 200, answer: `[{"user":"admin"},{"user":"backup"},{"user":"metrics"},{"user":"ns~admin"},{"user":"ns~op"},{"user":"operator"}]`},
		{name: "the namespace itself", method: "GET users", login: nadmin, status: 200, answer: `[{"user":"ns~admin"},{"user":"ns~op"}]`},

		{name: "a key of a namespace", method: "POST keys/generate", login: nadmin, body: generic + `,"id":"inside"}`, status: 201},
		{name: "the root does not see it", method: "GET keys/inside", login: adminLogin, status: 404, answer: "-"},
		{name: "nor the namespace the root's", method: "GET keys/root", login: nop, status: 404, answer: "-"},
		{name: "an id may be taken twice", method: "POST keys/generate", login: adminLogin, body: generic + `,"id":"inside"}`, status: 201},
		{name: "the machine is not a namespace's", method: "GET config/time", login: nadmin, status: 403, answer: "-"},
		{name: "nor its lock", method: "POST lock", login: nadmin, status: 403, answer: "-"},
		{name: "nor the namespaces", method: "PUT namespaces/other", login: nadmin, status: 403, answer: "-"},
		{name: "nor its backups", method: "PUT users/ns~backup", login: nadmin, body: user("Backup"), status: 201},
		{name: "whatever the role", method: "POST system/backup", login: "ns~backup:NamespacePassphrase", status: 403, answer: "-"},

		{name: "an operator reads about itself", method: "GET users/operator", login: operatorLogin, status: 200},
		{name: "about nobody else", method: "GET users/admin", login: operatorLogin, status: 403, answer: "-"},
		{name: "nor whether they are there", method: "GET users/none", login: operatorLogin, status: 403, answer: "-"},
		{name: "a metrics user reads nothing", method: "GET users/metrics", login: MetricsUser + ":" + MetricsPassphrase, status: 403, answer: "-"},
		{name: "an operator deletes nobody", method: "DELETE users/operator", login: operatorLogin, status: 403, answer: "-"},
		{name: "an operator makes nobody", method: "POST users", login: operatorLogin, body: user("Operator"), status: 403, answer: "-"},
		{name: "nobody deletes themselves", method: "DELETE users/admin", login: adminLogin, status: 400, answer: "Users cannot delete themselves"},
		{name: "a user exists once", method: "PUT users/operator", login: adminLogin, body: user("Operator"), status: 409, answer: "user already exists"},
		{name: "nobody has one passphrase for two", method: "POST users/none/passphrase", login: adminLogin, body: pass, status: 404, answer: "-"},
		{name: "an operator changes its own", method: "POST users/operator/passphrase", login: operatorLogin, body: pass, status: 204, answer: "-"},
		{name: "at once", method: "GET keys", login: "operator:AnotherPassphrase", status: 200},
		{name: "not another's", method: "POST users/admin/passphrase", login: "operator:AnotherPassphrase", body: pass, status: 403, answer: "-"},
		{name: "an operator reads its tags", method: "GET users/operator/tags", login: "operator:AnotherPassphrase", status: 200, answer: "[]"},
		{name: "and gives itself none", method: "PUT users/operator/tags/t", login: "operator:AnotherPassphrase", status: 403, answer: "-"},
		{name: "a tag", method: "PUT users/operator/tags/t", login: adminLogin, status: 204, answer: "-"},
		{name: "the same tag", method: "PUT users/operator/tags/t", login: adminLogin, status: 304, answer: "-"},
		{name: "no such tag", method: "DELETE users/operator/tags/u", login: adminLogin, status: 404, answer: "-"},
		{name: "a tag of nobody", method: "PUT users/none/tags/t", login: adminLogin, status: 404, answer: `{"message":""}`},
		{name: "tags of somebody who has none", method: "GET users/metrics/tags", login: adminLogin, status: 404, answer: "-"},
		{name: "a tag for somebody who has none", method: "PUT users/metrics/tags/t", login: adminLogin, status: 400, answer: "tag operations only exist on operator users"},

		{name: "the namespace goes", method: "DELETE namespaces/ns", login: adminLogin, status: 204, answer: "-"},
		{name: "it goes once", method: "DELETE namespaces/ns", login: adminLogin, status: 404, answer: "-"},
		{name: "its users may nothing", method: "GET keys", login: nadmin, status: 403, answer: "-"},
		{name: "it comes back", method: "PUT namespaces/ns", login: adminLogin, status: 204},
		{name: "without its keys", method: "GET keys", login: nadmin, status: 200, answer: "[]"},
		{name: "the root's stay", method: "GET keys", login: adminLogin, status: 200, answer: `[{"id":"inside"},{"id":"root"}]`},
	})
}

func TestEachStateAnswersWhatItHasTo(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	n, c, url := h.Node(0), newCaller(t, h), h.URLs()[0]
	for _, test := range []struct {
		method, path string
		served       []State
	}{
		{"GET", "info", always},
		{"GET", "health/state", always},
		{"GET", "health/alive", []State{Unprovisioned, Locked}},
		{"GET", "health/ready", operational},
		{"GET", "health/diagnose", always},
		{"POST", "provision", []State{Unprovisioned}},
		{"POST", "unlock", []State{Locked}},
		{"POST", "random", operational},
		{"GET", "keys", operational},
		{"GET", "metrics", operational},
		{"GET", "system/info", operational},
		{"POST", "system/backup", operational},
		{"POST", "system/restore", []State{Unprovisioned, Operational}},
		{"POST", "cluster/force-new", []State{Failed}},
	} {
		for _, state := range always {
			n.SetState(state)
			want := slices.Contains(test.served, state)
			status, _, body := c.asking(url, asked{method: test.method + " " + test.path, body: "{}"})
			if refused := status == http.StatusPreconditionFailed; refused == want {
				t.Errorf("%s %s, %s: %d %s", test.method, test.path, state, status, body)
			}
		}
	}
	// Who commands the machine: nobody has to say their name where no name can be looked up.
	for _, state := range []State{Locked, Unprovisioned} {
		n.SetState(state)
		for path, want := range map[string]int{"system/reboot": 412, "system/factory-reset": 412, "lock": 412} {
			c.holds(url, []asked{{name: string(state), method: "POST " + path, status: want}})
		}
	}
	n.SetState(Operational)
	for _, path := range []string{"system/reboot", "system/shutdown", "system/factory-reset", "system/restore"} {
		c.holds(url, []asked{{name: "operational", method: "POST " + path, status: 401}})
	}
	for _, state := range []State{Unprovisioned, Locked, Failed} {
		n.SetState(state)
		c.holds(url, []asked{{name: string(state), method: "POST system/shutdown", status: 204}})
		until(t, func() bool { n.mu.Lock(); defer n.mu.Unlock(); return n.server == nil && n.active == 0 })
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		c.client.CloseIdleConnections()
	}
}

func TestARebootForgetsFailuresAndForcedStates(t *testing.T) {
	h := Start(t, Options{Provisioned: true, UnattendedBoot: true})
	n, c, url := h.Node(0), newCaller(t, h), h.URLs()[0]
	c.holds(url, []asked{{name: "a wrong password", method: "GET keys", login: "operator:WrongPassphrase", status: 401}})
	n.SetState(Failed)
	if err := n.Restart(); err != nil {
		t.Fatal(err)
	}
	c.client.CloseIdleConnections()
	c.holds(url, []asked{{name: "after it", method: "GET keys", login: operatorLogin, status: 200}})
}

func TestVersionsAreShownWhereTheOriginalShowsThem(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]
	addRSA(t, h, "one")
	tag := func(path string) string {
		t.Helper()
		_, header, _ := c.asking(url, asked{method: "GET " + path, login: adminLogin})
		return header.Get("Etag")
	}
	for path, want := range map[string]bool{
		"info": true, "health/state": false, "users": true, "users/admin": true, "users/operator/tags": false, "keys": true,
		"keys?filter=": false, "keys/one": true, "keys/one/public.pem": true, "keys/one/cert": true, "namespaces": false,
		"system/info": true, "config/time": false, "config/logging": false, "config/tls/public.pem": true, "keys/none": false,
	} {
		if got := tag(path); (got != "") != want {
			t.Errorf("the version of %s is %q", path, got)
		}
	}
	one, all := tag("keys/one"), tag("keys")
	c.holds(url, []asked{
		{name: "304 names the version", method: "GET keys/one", login: adminLogin, header: "If-None-Match: " + one, status: 304, answer: "-", with: "Etag: " + one},
		{name: "a label changes the record", method: "PUT keys/one/label", login: adminLogin, body: `{"label":"x"}`, status: 204},
		{name: "the old version is gone", method: "PUT keys/one/cert", login: adminLogin, body: "x", header: "If-Match: " + one, status: 412, answer: "-"},
	})
	if tag("keys/one") == one || tag("keys") == all {
		t.Error("a key changed and its version, or that of the list, did not")
	}
	// The slot is locked by the version of the whole record.
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, url+"/api/v1/keys/one/cert", bytes.NewReader([]byte("x")))
	if err != nil {
		t.Fatal(err)
	}
	r.SetBasicAuth(AdminUser, AdminPassphrase)
	r.Header.Set("Content-Type", typeBytes)
	r.Header.Set("If-Match", tag("keys/one"))
	answer, err := c.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusCreated {
		t.Errorf("with the version of now: %d", answer.StatusCode)
	}
}

func TestTheWireIsThatOfTheOriginal(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	n, c, url := h.Node(0), newCaller(t, h), h.URLs()[0]
	dial := func(version uint16) (tls.ConnectionState, error) {
		conn, err := (&tls.Dialer{Config: &tls.Config{
			MinVersion: tls.VersionTLS10, MaxVersion: version, InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"},
		}}).DialContext(t.Context(), "tcp", n.Address())
		if err != nil {
			return tls.ConnectionState{}, err
		}
		defer func() { _ = conn.Close() }()
		tlsConn, ok := conn.(*tls.Conn)
		if !ok {
			t.Fatalf("a %T", conn)
		}
		return tlsConn.ConnectionState(), nil
	}
	for version, want := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		state, err := dial(version)
		if (err == nil) != want {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
		if err == nil && state.NegotiatedProtocol != "http/1.1" {
			t.Errorf("%s speaks %q", tls.VersionName(version), state.NegotiatedProtocol)
		}
	}
	big := strings.Repeat(" ", 300_000) // more than net/http would read to the end by itself
	c.holds(url, []asked{
		{name: "HEAD", method: "HEAD info", status: 200, answer: "-", with: "Content-Length: 45"},
		{name: "a body that nobody reads keeps the connection", method: "POST keys/generate", body: big, status: 401, with: "Connection:"},
	})
	n.ResetCounters()
	c.holds(url, []asked{
		{name: "so does a refusal", method: "POST keys/generate", login: operatorLogin, body: "{}", status: 403},
		{name: "and nothing to say", method: "PUT users/operator/tags/t", login: adminLogin, status: 204, with: "Content-Length:"},
		{name: "and nothing new", method: "PUT users/operator/tags/t", login: adminLogin, status: 304},
	})
	if n.Handshakes() > 1 { // the client may have given up the connection of the large body
		t.Errorf("three requests took %d connections", n.Handshakes())
	}
	// A chunked upload has no length to be judged by.
	addRSA(t, h, "slot")
	status, _ := put(t, c, url+"/api/v1/keys/slot/cert", typeBytes, io.MultiReader(strings.NewReader(strings.Repeat("t", ordinaryLimit+1000))))
	if status != http.StatusCreated {
		t.Errorf("a chunked upload of more than a mebibyte: %d", status)
	}
}
