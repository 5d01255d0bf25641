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
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
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
	// context ends with the test, or when somebody interrupts it.
	context func() context.Context
	// waiting lets the rate limit pass; reboots lets the server come back.
	waiting func()
	reboots func()
	// prefix is put before the ids of the recording on a NetHSM in use; login replaces admin there, and passphrase the one
	// of the recording's operators, which everybody knows.
	prefix     string
	login      string
	passphrase string

	// actual maps recorded values (ids made by the server, ciphertexts) to those of this run.
	actual  map[string]string
	etags   map[string]string // likewise, kept apart: they only have to be consistent
	made    []string          // ids made by the server
	checked int               // lines
	ours    bool              // this run provisioned the NetHSM
}

// lines is how many exchanges the recording has.
const lines = 151

// mark is the label of keys, and the real name of users, to which a NetHSM in use gave ids of its own.
const mark = "nitroseal-test"

func recording(t *testing.T) []exchange {
	t.Helper()
	file, err := os.Open("testdata/nethsm-exchanges.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	var all []exchange
	scanner := bufio.NewScanner(file)
	scanner.Buffer(nil, 1<<20)
	for scanner.Scan() {
		var e exchange
		if err := json.Unmarshal(scanner.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		all = append(all, e)
	}
	if err := scanner.Err(); err != nil {
		t.Fatal(err)
	}
	if len(all) != lines { // the table of hidden steps counts on it
		t.Fatalf("the recording has %d lines, not %d", len(all), lines)
	}
	return all
}

func TestConformance(t *testing.T) {
	url, _, _ := strings.Cut(os.Getenv("NITROSEAL_NETHSM_URL"), ",") // the suite of devices takes several nodes
	if url == "" {
		clock := newClock()
		h := nethsmtest.Start(t, nethsmtest.Options{Now: clock.now})
		r := newReplay(t, h.URLs()[0], trusting(t, h.CA(), ""))
		r.waiting = func() { clock.advance(1100 * time.Millisecond) }
		r.reboots = func() {}
		r.run(nil)
		if r.checked != lines {
			t.Errorf("%d of %d exchanges were compared", r.checked, lines)
		}
		return
	}
	r := realServer(t, url)
	if os.Getenv("NITROSEAL_NETHSM_MAY_ERASE") == "yes" {
		r.wholly()
		return
	}
	user, file := os.Getenv("NITROSEAL_NETHSM_ADMIN"), os.Getenv("NITROSEAL_NETHSM_ADMIN_PASSWORD_FILE")
	if user == "" || file == "" {
		t.Fatal("NITROSEAL_NETHSM_URL is set, so set NITROSEAL_NETHSM_ADMIN and NITROSEAL_NETHSM_ADMIN_PASSWORD_FILE as well, " +
			"or NITROSEAL_NETHSM_MAY_ERASE=yes where all that is on the NetHSM may be lost")
	}
	password, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	r.harmlessly(user, strings.TrimRight(string(password), "\r\n"))
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
	return &replay{
		t: t, base: base, client: client, context: t.Context, actual: map[string]string{}, etags: map[string]string{},
	}
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
	return &http.Client{
		Transport: transport, Timeout: 2 * time.Minute,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func realServer(t *testing.T, url string) *replay {
	t.Helper()
	if !strings.HasPrefix(url, "https://") {
		t.Fatalf("NITROSEAL_NETHSM_URL is %q: passphrases are sent there, so it has to begin with https://", url)
	}
	var ca []byte
	if file := os.Getenv("NITROSEAL_NETHSM_CA"); file != "" {
		var err error
		if ca, err = os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	}
	r := newReplay(t, strings.TrimSuffix(url, "/"), trusting(t, ca, os.Getenv("NITROSEAL_NETHSM_PIN")))
	r.waiting = func() { r.pause(1100 * time.Millisecond) }
	r.reboots = func() {
		r.pause(5 * time.Second) // it goes on answering for a moment
		for deadline := time.Now().Add(10 * time.Minute); time.Now().Before(deadline); r.pause(time.Second) {
			if r.state() != "" {
				return
			}
		}
		t.Fatal("the NetHSM did not come back within ten minutes after its reboot")
	}
	return r
}

func (r *replay) pause(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.context().Done():
		r.t.Fatal("interrupted")
	}
}

// state is what the server says of itself; empty where it does not answer.
func (r *replay) state() string {
	r.t.Helper()
	a, err := r.try(http.MethodGet, "/api/v1/health/state", "", nil, "")
	var s struct{ State string }
	if err != nil || json.Unmarshal([]byte(a.body), &s) != nil {
		return ""
	}
	return s.State
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
	r.prefix, r.login, r.passphrase = mark+"-", user+":"+passphrase, rand.Text()
	r.cleanUp() // what a run that was killed left
	if r.t.Failed() {
		r.t.Fatal("nothing was begun")
	}
	defer r.cleanUp()
	defer r.interruptible()()
	r.run(harmless)
}

// wholly replays all on a NetHSM that has nothing to lose, and leaves it as it was.
func (r *replay) wholly() {
	r.t.Helper()
	if state := r.state(); state != "Unprovisioned" {
		r.t.Fatalf("the NetHSM is %q. The whole recording is for one that is Unprovisioned; nothing was changed", state)
	}
	defer r.reset()
	defer r.interruptible()()
	r.run(nil)
}

// interruptible lets Ctrl-C end the run at the next request, so that what is deferred before it cleans up. After stop a
// second Ctrl-C ends the process at once.
func (r *replay) interruptible() (stop func()) {
	ctx, cancel := signal.NotifyContext(r.t.Context(), os.Interrupt, syscall.SIGTERM)
	r.context = func() context.Context { return ctx }
	return func() {
		cancel()
		r.context = r.t.Context
	}
}

// reset takes back a provisioning of this run, whose passphrases everybody knows.
func (r *replay) reset() {
	r.t.Helper()
	if !r.ours || r.state() == "Unprovisioned" {
		return
	}
	r.waiting()
	if r.state() == "Locked" {
		_, _ = r.try(http.MethodPost, "/api/v1/unlock", "", nil, `{"passphrase":"UnlockPassphrase"}`) // the next line tells
	}
	a, err := r.try(http.MethodPost, "/api/v1/system/factory-reset", "admin:Administrator", nil, "")
	if err != nil || a.status != http.StatusNoContent {
		r.t.Errorf("resetting the NetHSM: HTTP %d %s (%v). RESET IT BY HAND: its passphrases are known to everybody",
			a.status, a.body, err)
	}
}

// generated is an id that a NetHSM made up.
var generated = regexp.MustCompile(`^[0-9a-f]{20}$`)

// cleanUp removes what the harmless part makes, of this run and of one that was killed: what has the prefix, and under an
// id of the NetHSM's choice what bears the mark. It reads each of those itself: a filter that an older server does not know
// would list them all.
func (r *replay) cleanUp() {
	r.t.Helper()
	for _, id := range r.list("keys") {
		if strings.HasPrefix(id, r.prefix) {
			r.remove("keys/" + id)
		}
	}
	for _, id := range r.list("keys?label=" + mark) {
		if generated.MatchString(id) && r.marked("keys/"+id) {
			r.remove("keys/" + id)
		}
	}
	for _, name := range r.list("users") {
		id, own := strings.CutPrefix(name, r.namespace())
		if own && (strings.HasPrefix(id, r.prefix) || (generated.MatchString(id) && r.marked("users/"+name))) {
			r.remove("users/" + name)
		}
	}
}

// list is the ids, or user names, of a list.
func (r *replay) list(path string) []string {
	r.t.Helper()
	a, err := r.try(http.MethodGet, "/api/v1/"+path, r.login, nil, "")
	var items []struct{ ID, User string }
	if err != nil || json.Unmarshal([]byte(a.body), &items) != nil {
		r.t.Errorf("looking for what has to be removed again: %s: HTTP %d %s (%v)", path, a.status, a.body, err)
	}
	var all []string
	for _, item := range items {
		all = append(all, item.ID+item.User)
	}
	return all
}

func (r *replay) marked(path string) bool {
	r.t.Helper()
	a, err := r.try(http.MethodGet, "/api/v1/"+path, r.login, nil, "")
	var thing struct{ Label, RealName string }
	return err == nil && json.Unmarshal([]byte(a.body), &thing) == nil && thing.Label+thing.RealName == mark
}

func (r *replay) remove(path string) {
	r.t.Helper()
	a, err := r.try(http.MethodDelete, "/api/v1/"+path, r.login, nil, "")
	if err != nil || a.status != http.StatusNoContent {
		r.t.Errorf("removing %s: HTTP %d %s (%v). Remove it by hand", path, a.status, a.body, err)
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

// send is try where an answer has to come.
func (r *replay) send(method, path, login string, headers map[string]string, body string) received {
	r.t.Helper()
	a, err := r.try(method, path, login, headers, body)
	if err != nil {
		r.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

func (r *replay) try(method, path, login string, headers map[string]string, body string) (received, error) {
	request, err := http.NewRequestWithContext(r.context(), method, r.base+path, strings.NewReader(body))
	if err != nil {
		return received{}, err
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
		return received{}, err
	}
	defer func() { _ = answer.Body.Close() }()
	data, err := io.ReadAll(answer.Body)
	return received{answer.StatusCode, answer.Header, string(data)}, err
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
		text = strings.ReplaceAll(text, "OperatorPassphrase", r.passphrase)
		text = strings.ReplaceAll(text, `"realName":"Op"`, `"realName":"`+mark+`"`)
		if left, ok := strings.CutSuffix(text, `"type":"RSA","length":2048}`); ok { // the one without an id
			text = left + `"type":"RSA","length":2048,"label":"` + mark + `"}`
		}
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
	return r.namespace() + r.prefix + strings.ReplaceAll(recorded, "OperatorPassphrase", r.passphrase)
}

func (r *replay) check(line int, e exchange) {
	r.t.Helper()
	q := e.Request
	got := r.send(q.Method, r.translate(q.Path), r.credentials(q.BasicAuth), q.Headers, r.translate(q.Body))
	fail := func(format string, args ...any) {
		r.t.Helper()
		r.t.Errorf("line %d, %s %s (%s): %s", line, q.Method, q.Path, e.Section, fmt.Sprintf(format, args...))
	}
	r.checked++
	if q.Path == "/api/v1/provision" && got.status == http.StatusNoContent {
		r.ours = true
	}
	if got.status != e.Response.Status {
		fail("status %d %q, want %d", got.status, got.body, e.Response.Status)
		if q.Path == "/api/v1/provision" {
			r.t.FailNow() // what follows is for a NetHSM of this run
		}
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
		}
	}
}

// volatile are members whose value differs from run to run; only its kind and length are compared, unless the request
// brought the value.
var volatile = []string{"modulus", "data", "signature", "random", "encrypted", "iv", "softwareBuild", "softwareVersion"}

func (r *replay) compare(e exchange, got string) string {
	want := r.translate(e.Response.Body)
	var wanted, actual any
	if json.Unmarshal([]byte(want), &wanted) == nil && json.Unmarshal([]byte(got), &actual) == nil {
		sent := r.translate(e.Request.Body)
		return cmp.Diff(inOrder(r.normal(wanted, sent)), r.normal(actual, sent))
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

// normal replaces what varies: volatile values that were not sent by their length, lists by what is this run's.
func (r *replay) normal(value any, sent string) any {
	switch v := value.(type) {
	case map[string]any:
		for name, inner := range v {
			text, isText := inner.(string)
			if isText && slices.Contains(volatile, name) && !strings.Contains(sent, text) {
				v[name] = fmt.Sprintf("%d bytes", len(text))
				continue
			}
			v[name] = r.normal(inner, sent)
		}
		return v
	case []any:
		items := []string{}
		for _, item := range v {
			encoded, err := json.Marshal(item)
			if err != nil {
				r.t.Fatal(err)
			}
			if r.own(item) {
				items = append(items, string(encoded))
			}
		}
		return items
	default:
		return v
	}
}

// inOrder sorts a recorded list of things by their ids, as a NetHSM does: of its own ids each run has others.
func inOrder(value any) any {
	if items, ok := value.([]string); ok && len(items) > 0 && items[0][0] == '{' {
		slices.Sort(items)
	}
	return value
}

// own says whether an item of a list was made by this run; on a NetHSM in use there are others.
func (r *replay) own(item any) bool {
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
