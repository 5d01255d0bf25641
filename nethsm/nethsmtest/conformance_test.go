package nethsmtest_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// The conformance test replays the recording of a real server, testdata/nethsm-exchanges.jsonl, and compares status,
// headers and bodies of every answer. It runs against the double, or against a real NetHSM: the package comment says how.
// What the recording leaves out (a write between two reads, waiting for the rate limit) is in the table below.

// exchange is one line of the recording.
type exchange struct {
	Section string `json:"section"`
	Request struct {
		Method    string            `json:"method"`
		Path      string            `json:"path"`
		BasicAuth string            `json:"basic_auth"`
		Headers   map[string]string `json:"headers"`
		Body      string            `json:"body"`
	} `json:"request"`
	Response struct {
		Status  int               `json:"status"`
		Headers map[string]string `json:"headers"`
		Body    string            `json:"body"`
	} `json:"response"`
}

// recordedPlaintext and recordedCiphertext are what the recording decrypts; the ciphertext is made anew for each key.
const recordedPlaintext = "7OqrN0/6vNk73Vr011HCpXCjyBDN86iqsLNqka64n9A="

// hidden are steps that the recording left out, by the number of the line that they come before.
var hidden = map[int]func(*replay){
	47:  (*replay).encryptAnew,
	69:  (*replay).putCertificate,
	103: (*replay).wait,
	109: (*replay).manyWrong,
	125: (*replay).wait,
	127: (*replay).wait,
	143: (*replay).afterReboot,
	148: (*replay).afterReboot,
	151: (*replay).afterReboot,
}

// harmless are the sections that may run on a NetHSM in use.
var harmless = []string{
	"users", "keys", "decrypt", "AES-CBC", "tags restriction: ed1 wants tag t1", "certificate store",
	"delete user and key", "wrong password, three at once, then the right one at once, then after 1.1 s",
	"many wrong, one every 1.1 s: never a longer lockout",
}

// replay is one run of the recording against one server.
type replay struct {
	t      *testing.T
	base   string // https://host:port
	client *http.Client
	// waiting lets the rate limit pass; reboots lets the server come back.
	waiting func()
	reboots func()
	// prefix is put before the ids of the recording on a NetHSM in use; login replaces admin there.
	prefix string
	login  string

	// actual maps recorded values (ids made by the server, ciphertexts) to those of this run.
	actual map[string]string
	etags  map[string]string // likewise, kept apart: they only have to be consistent
	made   []string          // ids made by the server
	places []string          // and where they are, below /api/v1/
}

func recording(t *testing.T) []exchange {
	t.Helper()
	file, err := os.Open("testdata/nethsm-exchanges.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	var all []exchange
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e exchange
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestConformance(t *testing.T) {
	url := os.Getenv("NITROSEAL_NETHSM_URL")
	if url == "" {
		clock := newClock()
		h := nethsmtest.Start(t, nethsmtest.Options{Now: clock.now})
		r := newReplay(t, h.URLs()[0], trusting(t, h.CA(), ""))
		r.waiting = func() { clock.advance(1100 * time.Millisecond) }
		r.reboots = func() {}
		r.run(nil)
		return
	}
	r := realServer(t, url)
	if os.Getenv("NITROSEAL_NETHSM_MAY_ERASE") == "yes" {
		r.run(nil)
		return
	}
	user, passphrase := os.Getenv("NITROSEAL_NETHSM_USER"), os.Getenv("NITROSEAL_NETHSM_PASSPHRASE")
	if user == "" || passphrase == "" {
		t.Fatal("NITROSEAL_NETHSM_URL is set, so set NITROSEAL_NETHSM_USER and NITROSEAL_NETHSM_PASSPHRASE as well, " +
			"or NITROSEAL_NETHSM_MAY_ERASE=yes where all that is on the NetHSM may be lost")
	}
	r.harmlessly(user, passphrase)
}

// The part for a NetHSM in use is replayed against the double as well, by an administrator of a namespace.
func TestTheHarmlessPartLeavesNothingBehind(t *testing.T) {
	clock := newClock()
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true, Now: clock.now})
	if err := h.AddUser("tests~admin", "Administrator", "TestsAdministrator"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.AddKey(nethsmtest.Key{ID: "tests~somebody-elses", Type: "Generic"}); err != nil {
		t.Fatal(err)
	}
	for _, who := range []struct{ user, passphrase string }{
		{nethsmtest.AdminUser, nethsmtest.AdminPassphrase}, {"tests~admin", "TestsAdministrator"},
	} {
		before, users := h.KeyIDs(), h.UserNames()
		r := newReplay(t, h.URLs()[0], trusting(t, h.CA(), ""))
		r.waiting = func() { clock.advance(1100 * time.Millisecond) }
		r.harmlessly(who.user, who.passphrase)
		if diff := cmp.Diff(before, h.KeyIDs()); diff != "" {
			t.Errorf("keys, before and after (%s): %s", who.user, diff)
		}
		if diff := cmp.Diff(users, h.UserNames()); diff != "" {
			t.Errorf("users, before and after (%s): %s", who.user, diff)
		}
	}
}

// ---- servers ------------------------------------------------------------------------------------------------------

func newReplay(t *testing.T, base string, client *http.Client) *replay {
	t.Helper()
	return &replay{t: t, base: base, client: client, actual: map[string]string{}, etags: map[string]string{}}
}

// trusting is a client that trusts a CA, or one certificate by its hash.
func trusting(t *testing.T, ca []byte, pin string) *http.Client {
	t.Helper()
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(ca) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			t.Fatal("the CA is no certificate")
		}
	}
	if pin != "" {
		config.InsecureSkipVerify = true // the pin is checked instead
		config.VerifyConnection = func(s tls.ConnectionState) error {
			sum := sha256.Sum256(s.PeerCertificates[0].Raw)
			if !strings.EqualFold(hex.EncodeToString(sum[:]), strings.ReplaceAll(pin, ":", "")) {
				return errors.New("the server's certificate is not the pinned one")
			}
			return nil
		}
	}
	transport := &http.Transport{TLSClientConfig: config}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 2 * time.Minute}
}

func realServer(t *testing.T, url string) *replay {
	t.Helper()
	var ca []byte
	if file := os.Getenv("NITROSEAL_NETHSM_CA"); file != "" {
		var err error
		if ca, err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	}
	r := newReplay(t, strings.TrimSuffix(url, "/"), trusting(t, ca, os.Getenv("NITROSEAL_NETHSM_PIN")))
	r.waiting = func() { pause(t, 1100*time.Millisecond) }
	r.reboots = func() {
		pause(t, 5*time.Second) // it goes on answering for a moment
		for deadline := time.Now().Add(10 * time.Minute); time.Now().Before(deadline); pause(t, time.Second) {
			if r.alive() {
				return
			}
		}
		t.Fatal("the NetHSM did not come back within ten minutes after its reboot")
	}
	return r
}

func pause(t *testing.T, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
	}
}

func (r *replay) alive() bool {
	ctx, cancel := context.WithTimeout(r.t.Context(), 3*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+"/api/v1/health/state", http.NoBody)
	if err != nil {
		r.t.Fatal(err)
	}
	answer, err := r.client.Do(request)
	if err != nil {
		return false
	}
	defer func() { _ = answer.Body.Close() }()
	return answer.StatusCode == http.StatusOK
}

// clock is a clock that only the test moves.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Now()} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

// ---- the run ------------------------------------------------------------------------------------------------------

// run replays the sections named, or all.
func (r *replay) run(sections []string) {
	r.t.Helper()
	for i, e := range recording(r.t) {
		line := i + 1
		if sections != nil && !slices.Contains(sections, e.Section) {
			continue
		}
		if step := hidden[line]; step != nil {
			step(r)
		}
		r.check(line, e)
	}
}

// harmlessly replays what harms nobody on a NetHSM in use, and cleans up.
func (r *replay) harmlessly(user, passphrase string) {
	r.t.Helper()
	r.prefix, r.login = "nitroseal-test-", user+":"+passphrase
	r.cleanUp() // what a run that was interrupted left
	defer r.cleanUp()
	r.run(harmless)
}

// cleanUp removes what the harmless part makes.
func (r *replay) cleanUp() {
	r.t.Helper()
	for _, place := range r.places {
		r.remove(place)
	}
	for _, id := range []string{"rsa1", "aes1", "ec1", "ed1"} {
		r.remove("keys/" + r.prefix + id)
	}
	r.remove("users/" + r.namespace() + r.prefix + "operator")
}

func (r *replay) remove(path string) {
	r.t.Helper()
	a := r.send(http.MethodDelete, "/api/v1/"+path, r.login, nil, "")
	if a.status != http.StatusNoContent && a.status != http.StatusNotFound {
		r.t.Errorf("removing %s: HTTP %d %s", path, a.status, a.body)
	}
}

// namespace is that of the login, with its "~".
func (r *replay) namespace() string {
	if namespace, _, ok := strings.Cut(r.login, "~"); ok {
		return namespace + "~"
	}
	return ""
}

type received struct {
	status int
	header http.Header
	body   string
}

func (r *replay) send(method, path, login string, headers map[string]string, body string) received {
	r.t.Helper()
	request, err := http.NewRequestWithContext(r.t.Context(), method, r.base+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	for name, value := range headers {
		request.Header.Set(name, value)
	}
	if login != "" {
		user, passphrase, _ := strings.Cut(login, ":")
		request.SetBasicAuth(user, passphrase)
	}
	answer, err := r.client.Do(request)
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = answer.Body.Close() }()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, path, err)
	}
	return received{answer.StatusCode, answer.Header, string(data)}
}

// names are the ids of the recording that get the prefix.
var (
	userNames = regexp.MustCompile(`\b(operator|ghost|nobody|shortpw|badrole)\b`)
	keyNames  = regexp.MustCompile(`\b(rsa1|aes1|ec1|ed1|nokey|byop|wrongmech|tooshort|nolength)\b`)
)

// translate turns recorded text into this run's.
func (r *replay) translate(text string) string {
	if r.prefix != "" {
		text = userNames.ReplaceAllString(text, r.namespace()+r.prefix+"$1")
		text = keyNames.ReplaceAllString(text, r.prefix+"$1")
		text = strings.ReplaceAll(text, "/users/bad%20id!", "/users/"+r.namespace()+"bad%20id!")
	}
	for _, old := range slices.Sorted(maps.Keys(r.actual)) {
		text = strings.ReplaceAll(text, old, r.actual[old])
	}
	return text
}

// credentials of the recording are those of this run.
func (r *replay) credentials(recorded string) string {
	if r.prefix == "" || recorded == "" {
		return recorded
	}
	if user, _, _ := strings.Cut(recorded, ":"); user == "admin" {
		return r.login
	}
	return r.namespace() + r.prefix + recorded
}

func (r *replay) check(line int, e exchange) {
	r.t.Helper()
	q := e.Request
	got := r.send(q.Method, r.translate(q.Path), r.credentials(q.BasicAuth), q.Headers, r.translate(q.Body))
	fail := func(format string, args ...any) {
		r.t.Helper()
		r.t.Errorf("line %d, %s %s (%s): %s", line, q.Method, q.Path, e.Section, fmt.Sprintf(format, args...))
	}
	if got.status != e.Response.Status {
		fail("status %d %q, want %d", got.status, got.body, e.Response.Status)
		return
	}
	r.learn(e, got)
	for _, name := range []string{"content-type", "allow", "www-authenticate", "location"} {
		if want := r.translate(e.Response.Headers[name]); got.header.Get(name) != want {
			fail("header %s %q, want %q", name, got.header.Get(name), want)
		}
	}
	if complaint := r.etag(got.header.Get("etag"), e.Response.Headers["etag"]); complaint != "" {
		fail("%s", complaint)
	}
	if diff := r.compare(e, got.body); diff != "" {
		fail("body, recorded and got: %s", diff)
	}
}

var etagShape = regexp.MustCompile(`^"[0-9a-f]{32}"$`)

// etag compares presence and shape, and that the same recorded tag is the same here, and another another.
func (r *replay) etag(got, recorded string) string {
	if recorded == "" || got == "" {
		if got != recorded {
			return fmt.Sprintf("etag %q, recorded %q", got, recorded)
		}
		return ""
	}
	if !etagShape.MatchString(got) {
		return fmt.Sprintf("etag %q has another shape than %q", got, recorded)
	}
	if r.prefix != "" {
		return "" // others may write meanwhile
	}
	for old, actual := range r.etags {
		if (old == recorded) != (actual == got) {
			return fmt.Sprintf("etag %q for %q, but %q was for %q before", got, recorded, actual, old)
		}
	}
	r.etags[recorded] = got
	return ""
}

// learn remembers values that the server made up and that later requests use.
func (r *replay) learn(e exchange, got received) {
	var recorded, actual map[string]any
	if json.Unmarshal([]byte(e.Response.Body), &recorded) != nil || json.Unmarshal([]byte(got.body), &actual) != nil {
		return
	}
	for _, name := range []string{"id", "encrypted"} {
		old, isText := recorded[name].(string)
		fresh, both := actual[name].(string)
		if !isText || !both || old == fresh || (name == "id" && len(old) != 20) {
			continue
		}
		r.actual[old] = fresh
		if name == "id" {
			r.made = append(r.made, fresh)
			r.places = append(r.places, strings.TrimPrefix(got.header.Get("Location"), "/api/v1/"))
		}
	}
}

// volatile are members whose value differs from run to run; only its kind and length are compared.
var volatile = []string{"modulus", "data", "signature", "random", "encrypted", "iv", "softwareBuild", "softwareVersion"}

func (r *replay) compare(e exchange, got string) string {
	want := r.translate(e.Response.Body)
	var wanted, actual any
	if json.Unmarshal([]byte(want), &wanted) == nil && json.Unmarshal([]byte(got), &actual) == nil {
		return cmp.Diff(r.normal(wanted), r.normal(actual))
	}
	if block, _ := pem.Decode([]byte(want)); block != nil {
		other, rest := pem.Decode([]byte(got))
		if other == nil || other.Type != block.Type || len(other.Bytes) != len(block.Bytes) || len(rest) != 0 ||
			strings.HasSuffix(want, "\n") != strings.HasSuffix(got, "\n") {
			return cmp.Diff(want, got)
		}
		return ""
	}
	return cmp.Diff(want, got)
}

// normal replaces what varies: volatile values by their length, lists by sorted ones without what is not the test's.
func (r *replay) normal(value any) any {
	switch v := value.(type) {
	case map[string]any:
		for name, inner := range v {
			text, isText := inner.(string)
			if isText && slices.Contains(volatile, name) {
				v[name] = fmt.Sprintf("%d bytes", len(text))
				continue
			}
			v[name] = r.normal(inner)
		}
		return v
	case []any:
		var items []string
		for _, item := range v {
			encoded, err := json.Marshal(item)
			if err != nil {
				r.t.Fatal(err)
			}
			if r.ours(item) {
				items = append(items, string(encoded))
			}
		}
		slices.Sort(items)
		return items
	default:
		return v
	}
}

// ours says whether an item of a list was made by this run; on a NetHSM in use there are others.
func (r *replay) ours(item any) bool {
	entry, isEntry := item.(map[string]any)
	if r.prefix == "" || !isEntry {
		return true
	}
	for _, name := range []string{"id", "user"} {
		if id, ok := entry[name].(string); ok {
			return strings.Contains(id, r.prefix) || slices.Contains(r.made, id)
		}
	}
	return true
}

// ---- hidden steps -------------------------------------------------------------------------------------------------

func (r *replay) wait() { r.waiting() }

func (r *replay) afterReboot() { r.reboots() }

// encryptAnew makes the ciphertext that the recording decrypts, for the key of this run.
func (r *replay) encryptAnew() {
	r.t.Helper()
	a := r.send(http.MethodGet, "/api/v1/keys/"+r.prefix+"rsa1/public.pem", r.credentials("operator:OperatorPassphrase"), nil, "")
	block, _ := pem.Decode([]byte(a.body))
	if block == nil {
		r.t.Fatalf("reading the public key: HTTP %d %q", a.status, a.body)
	}
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		r.t.Fatal(err)
	}
	key, ok := public.(*rsa.PublicKey)
	if !ok {
		r.t.Fatalf("the public key is a %T", public)
	}
	plaintext, err := base64.StdEncoding.DecodeString(recordedPlaintext)
	if err != nil {
		r.t.Fatal(err)
	}
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, key, plaintext, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	for _, e := range recording(r.t) {
		var q struct{ Encrypted string }
		if json.Unmarshal([]byte(e.Request.Body), &q) == nil && len(q.Encrypted) == len(base64.StdEncoding.EncodeToString(ciphertext)) {
			r.actual[q.Encrypted] = base64.StdEncoding.EncodeToString(ciphertext)
		}
	}
}

// putCertificate stores what the next lines read. The recording shows the last bytes, which are no text, as "????".
func (r *replay) putCertificate() {
	r.t.Helper()
	content := []byte("arbitrary bytes \x00\x01\x02\xff")
	headers := map[string]string{"Content-Type": "application/octet-stream"}
	login := r.credentials("admin:Administrator")
	path := "/api/v1/keys/" + r.prefix + "rsa1/cert"
	if a := r.send(http.MethodPut, path, login, headers, string(content)); a.status != http.StatusCreated || a.body != "" {
		r.t.Fatalf("storing a certificate: HTTP %d %q", a.status, a.body)
	}
	a := r.send(http.MethodPut, path, login, headers, string(content))
	if a.status != http.StatusConflict || a.body != `{"message":"Key already contains a certificate"}` {
		r.t.Errorf("storing a certificate again: HTTP %d %q", a.status, a.body)
	}
	a = r.send(http.MethodGet, path, login, nil, "")
	if !bytes.Equal([]byte(a.body), content) {
		r.t.Errorf("the certificate came back as %q", a.body)
	}
	r.actual["arbitrary bytes ????"] = string(content)
}

// manyWrong tries a wrong password twelve times, slowly: there is no lock-out.
func (r *replay) manyWrong() {
	r.t.Helper()
	for range 12 {
		r.wait()
		a := r.send(http.MethodGet, "/api/v1/keys", r.credentials("operator:WrongPassphrase"), nil, "")
		if a.status != http.StatusUnauthorized {
			r.t.Errorf("a wrong password: HTTP %d, want 401", a.status)
		}
	}
	r.wait()
}
