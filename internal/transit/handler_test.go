package transit

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
)

var update = flag.Bool("update", false, "write golden files")

// exchange is a request and what the golden file says of its answer.
type exchange struct {
	what                      string
	method, path, token, body string
}

// sealed is what the fixture's key makes of a value.
func sealed(plaintext string) string { return Format(3, []byte("envelope("+plaintext+")")) }

// exchanges are what a seal asks, and what others may try.
func exchanges() []exchange {
	const put, post, get = http.MethodPut, http.MethodPost, http.MethodGet
	encrypt, decrypt, renew, lookup := "/v1/transit/encrypt/prod", "/v1/transit/decrypt/prod", "/v1/auth/token/renew-self", "/v1/auth/token/lookup-self"
	return []exchange{
		{"a seal renews its token", put, renew, "ns.good", `{"increment":0}`},
		{"a seal tries its seal", put, encrypt, "ns.good", `{"plaintext":"YQ=="}`},
		{"a seal opens", put, decrypt, "ns.good", `{"ciphertext":"` + sealed("a") + `"}`},
		{"a person asks what a token is", get, lookup, "ns.good", ""},
		{"POST is as good as PUT", post, encrypt, "ns.good", `{"plaintext":"YQ=="}`},
		{"an empty value is one", put, encrypt, "ns.good", `{"plaintext":""}`},
		{"white space around a ciphertext is cut off", put, decrypt, "ns.good", `{"ciphertext":" ` + sealed("a") + `\n"}`},
		{"escaped characters are what they stand for", put, encrypt, "ns.good", `{"\u0070laintext":"Y\u0051\u003d="}`},
		{"members that change nothing are ignored", put, encrypt, "ns.good", `{"type":"aes256-gcm96","plaintext":"YQ==","key_version":0,"x":[{"y":[1]}]}`},

		{"no token", put, encrypt, "", `{"plaintext":"YQ=="}`},
		{"an unknown token", put, encrypt, "ns.bad", `{"plaintext":"YQ=="}`},
		{"a token that is bound to another address", put, decrypt, "ns.home", `{"ciphertext":"` + sealed("a") + `"}`},
		{"a token of another key", put, "/v1/transit/encrypt/other", "ns.good", `{"plaintext":"YQ=="}`},
		{"an unknown token is renewed", put, renew, "ns.bad", `{"increment":0}`},
		{"a token that asks too often", put, encrypt, "ns.limited", `{"plaintext":"YQ=="}`},

		{"a key that is not there", put, "/v1/transit/encrypt/absent", "ns.good", `{"plaintext":"YQ=="}`},
		{"no body", put, encrypt, "ns.good", ``},
		{"no plaintext", put, encrypt, "ns.good", `{}`},
		{"no ciphertext", put, decrypt, "ns.good", `{"ciphertext":null}`},
		{"plaintext that is no base64", put, encrypt, "ns.good", `{"plaintext":"%%%"}`},
		{"plaintext that is a number", put, encrypt, "ns.good", `{"plaintext":1}`},
		{"plaintext twice", put, encrypt, "ns.good", `{"plaintext":"YQ==","plaintext":"Yg=="}`},
		{"a body that is no JSON", put, encrypt, "ns.good", `plaintext=YQ==`},
		{"a body with something after it", put, encrypt, "ns.good", `{"plaintext":"YQ=="}{}`},
		{"a batch", put, encrypt, "ns.good", `{"batch_input":[{"plaintext":"YQ=="}]}`},
		{"a context", put, decrypt, "ns.good", `{"ciphertext":"` + sealed("a") + `","context":"YQ=="}`},
		{"a version to seal with", put, encrypt, "ns.good", `{"plaintext":"YQ==","key_version":2}`},
		{"a ciphertext without a prefix", put, decrypt, "ns.good", `{"ciphertext":"YQ=="}`},
		{"a ciphertext of Vault's own transit", put, decrypt, "ns.good", `{"ciphertext":"vault:v3:AAAAAAAAAAAAAAAAAAAAAAAA"}`},
		{"a ciphertext with another version outside than inside", put, decrypt, "ns.good", `{"ciphertext":"` + strings.Replace(sealed("a"), "v3", "v4", 1) + `"}`},
		{"a body that is too large", put, encrypt, "ns.good", `{"plaintext":"` + strings.Repeat("YQ==", 1024) + `"}`},

		{"a method that is none", get, encrypt, "ns.good", ""},
		{"renewing by GET", get, renew, "ns.good", ""},
		{"looking up by PUT", put, lookup, "ns.good", ""},
		{"a path that Vault has", get, "/v1/sys/seal-status", "ns.good", ""},
		{"rewrapping", put, "/v1/transit/rewrap/prod", "ns.good", `{"ciphertext":"` + sealed("a") + `"}`},
		{"another mount", put, "/v1/other/encrypt/prod", "ns.good", `{"plaintext":"YQ=="}`},
		{"a key without a name", put, "/v1/transit/encrypt/", "ns.good", `{"plaintext":"YQ=="}`},
		{"a key with a slash", put, "/v1/transit/encrypt/a/b", "ns.good", `{"plaintext":"YQ=="}`},
		{"the root", get, "/", "", ""},
		{"health", get, "/v1/sys/health", "", ""},
	}
}

// TestAnswersAreVaults compares every answer with the golden file: codes, words and shapes that clients look for.
func TestAnswersAreVaults(t *testing.T) {
	f := newFixture(t)
	var got strings.Builder
	id := regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)
	for _, e := range exchanges() {
		request := httptest.NewRequestWithContext(t.Context(), e.method, e.path, strings.NewReader(e.body))
		request.RemoteAddr = "198.51.100.7:1234"
		if e.token != "" {
			request.Header.Set("X-Vault-Token", e.token)
		}
		recorder := httptest.NewRecorder()
		f.ServeHTTP(recorder, request)
		body := e.body
		if len(body) > 200 {
			body = body[:40] + "…"
		}
		_, _ = fmt.Fprintf(&got, "# %s\n> %s %s (%s)\n> %s\n< %d\n", e.what, e.method, e.path, e.token, body, recorder.Code)
		for _, name := range slices.Sorted(maps.Keys(recorder.Header())) {
			if name != "Content-Length" {
				_, _ = fmt.Fprintf(&got, "< %s: %s\n", name, recorder.Header().Get(name))
			}
		}
		_, _ = fmt.Fprintf(&got, "< %s\n\n", strings.TrimSpace(id.ReplaceAllString(recorder.Body.String(), "REQUEST-ID")))
		if e.path != healthPath && !json.Valid(recorder.Body.Bytes()) {
			t.Errorf("%s: the answer is no JSON: %s", e.what, recorder.Body)
		}
		if last := f.seen[len(f.seen)-1]; last.Code != recorder.Code {
			t.Errorf("%s: observed %d, answered %d", e.what, last.Code, recorder.Code)
		}
	}
	golden := filepath.Join("testdata", "answers.golden")
	if *update {
		must(t, os.MkdirAll("testdata", 0o750))
		must(t, os.WriteFile(golden, []byte(got.String()), 0o600))
	}
	want, err := os.ReadFile(golden)
	must(t, err)
	if diff := cmp.Diff(string(want), got.String()); diff != "" {
		t.Errorf("answers are not those of the golden file (-want +got):\n%s", diff)
	}
	for _, word := range []string{"ns.good", "ns.bad", "ns.home", "ns.limited"} {
		if strings.Contains(f.log.String(), word) {
			t.Errorf("a token is in the log:\n%s", f.log)
		}
	}
}

// TestEachErrorHasItsCode: by what it is, wherever it comes from.
func TestEachErrorHasItsCode(t *testing.T) {
	tests := []struct {
		err   error
		code  int
		retry string
	}{
		{hsm.ErrUnavailable, 503, "2"},
		{fmt.Errorf("device one: %w; device two: %w", envelope.ErrDecrypt, hsm.ErrUnavailable), 503, "2"},
		{context.DeadlineExceeded, 503, "2"},
		{context.Canceled, 503, "2"},
		{keyring.ErrGenerating, 503, "2"},
		{keyring.ErrVersionUnknown, 503, "2"},
		{store.ErrUnavailable, 503, "2"},
		{audit.ErrNoSink, 503, "2"},
		{&BusyError{After: 2500 * time.Millisecond, Cause: "busy"}, 503, "3"},
		{hsm.ErrLocked, 503, ""},
		{&hsm.PINError{TriesLeft: 2, Detail: "wrong PIN"}, 503, ""},
		{hsm.ErrNotFound, 503, ""},
		{hsm.ErrKeyChanged, 503, ""},
		{keyring.ErrNoDevice, 503, ""},
		{fmt.Errorf("%w: %w", keyring.ErrRecordMalformed, envelope.ErrInvalid), 503, ""},
		{keyring.ErrNotReady, 400, ""},
		{keyring.ErrVersionTooOld, 400, ""},
		{keyring.ErrKeyNotFound, 400, ""},
		{envelope.ErrNotAuthentic, 400, ""},
		{envelope.ErrDecrypt, 400, ""},
		{envelope.ErrContext, 400, ""},
		{hsm.ErrCiphertext, 400, ""},
		{errOdd, 500, ""},
	}
	for _, test := range tests {
		f := newFixture(t)
		f.keys.err = fmt.Errorf("opening: %w", test.err)
		for _, path := range []string{"encrypt/prod", "decrypt/prod"} {
			got := f.ask(http.MethodPut, "/v1/transit/"+path, `{"plaintext":"YQ==","ciphertext":"`+sealed("a")+`"}`)
			if got.Code != test.code || got.Header().Get("Retry-After") != test.retry {
				t.Errorf("%s, %v: %d, Retry-After %q; want %d, %q", path, test.err, got.Code, got.Header().Get("Retry-After"), test.code, test.retry)
			}
			if test.code >= 500 && (strings.Contains(got.Body.String(), "opening") || test.code == 503 && test.retry != "3" && !strings.Contains(f.log.String(), "opening: ")) {
				t.Errorf("%s, %v: the client reads %s, the log\n%s", path, test.err, got.Body, f.log)
			}
		}
		if outcome := f.diary.lines[len(f.diary.lines)-1]; !strings.Contains(outcome, test.err.Error()) {
			t.Errorf("%v: the audit log says %q", test.err, outcome)
		}
	}
}

func TestTheAuditLogHasIntentAndOutcomeOfEachOpening(t *testing.T) {
	f := newFixture(t)
	f.ask(http.MethodPut, "/v1/transit/encrypt/prod", `{"plaintext":"YQ=="}`)
	f.ask(http.MethodPut, "/v1/transit/decrypt/prod", `{"ciphertext":"`+sealed("a")+`"}`)
	f.ask(http.MethodPut, "/v1/auth/token/renew-self", `{}`)
	f.ask(http.MethodPut, "/v1/transit/decrypt/prod", `{"ciphertext":"not ours"}`) // nothing is tried
	want := []string{
		"intent decrypt by token goodgoodid (vault-1): map[from:192.0.2.1 key:prod]", "outcome decrypt: <nil>",
	}
	if diff := cmp.Diff(want, f.diary.lines); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestAnAuditLogThatIsFullEndsOpeningsOnly: a Vault that starts needs a sealing, which gives nothing away.
func TestAnAuditLogThatIsFullEndsOpeningsOnly(t *testing.T) {
	f := newFixture(t)
	f.diary.err = audit.ErrNoSink
	if got := f.ask(http.MethodPut, "/v1/transit/decrypt/prod", `{"ciphertext":"`+sealed("a")+`"}`); got.Code != http.StatusServiceUnavailable || f.keys.asked != 0 {
		t.Errorf("an opening: %d, and the key was asked %d times", got.Code, f.keys.asked)
	}
	if got := f.ask(http.MethodPut, "/v1/transit/encrypt/prod", `{"plaintext":"YQ=="}`); got.Code != http.StatusOK {
		t.Errorf("a sealing: %d %s", got.Code, got.Body)
	}
}

func TestAPanicIsAnAnswerAndALineInTheLog(t *testing.T) {
	f := newFixture(t)
	f.keys.panic = true
	for path, body := range map[string]string{"encrypt": `{"plaintext":"c2VjcmV0"}`, "decrypt": `{"ciphertext":"` + sealed("a") + `"}`} {
		if got := f.ask(http.MethodPut, "/v1/transit/"+path+"/prod", body); got.Code != http.StatusInternalServerError {
			t.Errorf("%s: %d %s", path, got.Code, got.Body)
		}
	}
	if last := f.diary.lines[len(f.diary.lines)-1]; last != "outcome decrypt: "+errUnfinished.Error() {
		t.Errorf("the audit log says %s", last)
	}
	if log := f.log.String(); !strings.Contains(log, "out of order") || strings.Contains(log, "c2VjcmV0") {
		t.Errorf("the log says %s", log)
	}
}

// TestRefusalsFillNoLog: whoever guesses tokens would, otherwise.
func TestRefusalsFillNoLog(t *testing.T) {
	f := newFixture(t)
	for range 100 {
		request := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v1/transit/encrypt/prod", strings.NewReader(`{"plaintext":"YQ=="}`))
		request.Header.Set("Authorization", "Bearer ns.guess")
		recorder := httptest.NewRecorder()
		f.ServeHTTP(recorder, request)
		if recorder.Code != http.StatusForbidden {
			t.Fatalf("%d %s", recorder.Code, recorder.Body)
		}
	}
	if lines := strings.Count(f.log.String(), "\n"); lines != 1 {
		t.Errorf("%d lines:\n%s", lines, f.log)
	}
}

func TestABearerTokenIsTakenAsWell(t *testing.T) {
	f := newFixture(t)
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v1/transit/encrypt/prod", strings.NewReader(`{"plaintext":"YQ=="}`))
	request.Header.Set("Authorization", "Bearer ns.good")
	recorder := httptest.NewRecorder()
	f.ServeHTTP(recorder, request)
	if recorder.Code != http.StatusOK {
		t.Errorf("%d %s", recorder.Code, recorder.Body)
	}
}

// chunks is a body whose length nobody knows beforehand.
type chunks struct{ rest string }

func (c *chunks) Read(p []byte) (int, error) {
	if c.rest == "" {
		return 0, io.EOF
	}
	n := copy(p, c.rest[:min(len(c.rest), 100)])
	c.rest = c.rest[n:]
	return n, nil
}

func TestABodyOfUnknownLengthHasTheSameLimit(t *testing.T) {
	f := newFixture(t)
	for size, code := range map[int]int{1000: http.StatusOK, 4096 - 16: http.StatusOK, 4096: http.StatusRequestEntityTooLarge, 1 << 20: http.StatusRequestEntityTooLarge} {
		body := `{"plaintext":"` + strings.Repeat("A", size/4*4) + `"}`
		request := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v1/transit/encrypt/prod", &chunks{body})
		request.ContentLength = -1
		request.Header.Set("X-Vault-Token", "ns.good")
		recorder := httptest.NewRecorder()
		f.ServeHTTP(recorder, request)
		if recorder.Code != code {
			t.Errorf("%d bytes: %d %s, want %d", len(body), recorder.Code, recorder.Body, code)
		}
	}
}

// TestBuffersHoldNothingOfTheRequestBefore: they are used again.
func TestBuffersHoldNothingOfTheRequestBefore(t *testing.T) {
	f := newFixture(t)
	for range 50 {
		f.ask(http.MethodPut, "/v1/transit/encrypt/prod", `{"plaintext":"`+strings.Repeat("c2VjcmV0", 200)+`"}`)
	}
	for range 50 {
		b := buffers.get()
		if bytes.Trim(b.bytes[:cap(b.bytes)], "\x00") == nil || len(b.bytes) != 0 {
			continue
		}
		if bytes.Contains(b.bytes[:cap(b.bytes)], []byte("c2Vj")) {
			t.Fatal("a buffer holds what a request before had in it")
		}
	}
}

func TestAMountThatEveryVaultHasIsRefused(t *testing.T) {
	for mount, good := range map[string]bool{"": true, "transit": true, "/seals/eu/": true, "sys": false, "auth/token": false, "//": false} {
		_, err := NewHandler(HandlerOptions{Keys: &keys{}, Tokens: tokens{}, Mount: mount})
		if (err == nil) != good {
			t.Errorf("mount %q: %v", mount, err)
		}
	}
	if _, err := NewHandler(HandlerOptions{}); err == nil {
		t.Error("a handler without keys was made")
	}
}

func TestAMountOfSeveralPartsIsServed(t *testing.T) {
	handler, err := NewHandler(HandlerOptions{Keys: &keys{}, Tokens: tokens{}, Mount: "seals/eu"})
	must(t, err)
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v1/seals/eu/encrypt/prod", strings.NewReader(`{"plaintext":"YQ=="}`))
	request.Header.Set("X-Vault-Token", "ns.good")
	recorder := httptest.NewRecorder()
	handler.ServeHTTP(recorder, request)
	if recorder.Code != http.StatusOK {
		t.Errorf("%d %s", recorder.Code, recorder.Body)
	}
}

var _ Tokens = (*token.Registry)(nil)

var _ Keys = (*keyring.Keyring)(nil)

var _ Auditor = (*audit.Log)(nil)

// TestADamagedRecordIsNotTheCiphertextsFault: whoever reads "invalid ciphertext" looks for another snapshot.
func TestADamagedRecordIsNotTheCiphertextsFault(t *testing.T) {
	for name, err := range map[string]error{
		"a damaged record":                       fmt.Errorf("%w: its authentication envelope: %w", keyring.ErrRecordMalformed, envelope.ErrMalformed),
		"one HSM away, another knows it not":     fmt.Errorf("%w; %w", envelope.ErrContext, hsm.ErrUnavailable),
		"a record away for a moment, not absent": fmt.Errorf("%w; %w", keyring.ErrKeyNotFound, hsm.ErrUnavailable),
	} {
		f := newFixture(t)
		f.keys.err = err
		if got := f.ask(http.MethodPut, "/v1/transit/decrypt/prod", `{"ciphertext":"`+sealed("a")+`"}`); got.Code != http.StatusServiceUnavailable {
			t.Errorf("%s: %d %s", name, got.Code, got.Body)
		}
	}
}

// gone is a client that hangs up in the middle of an answer: HTTP/2 gives such a Write back before it has let go of the bytes.
type gone struct {
	*httptest.ResponseRecorder

	kept []byte
}

// Write implements [http.ResponseWriter].
func (g *gone) Write(p []byte) (int, error) {
	g.kept = p
	return 0, errors.New("the stream is closed")
}

// TestAnAnswerThatWasNotTakenIsInNoOtherRequestsBuffer: what still reads it would read another one's secret.
func TestAnAnswerThatWasNotTakenIsInNoOtherRequestsBuffer(t *testing.T) {
	f := newFixture(t)
	request := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v1/transit/decrypt/prod", strings.NewReader(`{"ciphertext":"`+sealed("mine")+`"}`))
	request.Header.Set("X-Vault-Token", "ns.good")
	client := &gone{ResponseRecorder: httptest.NewRecorder()}
	f.ServeHTTP(client, request)
	before := string(client.kept)
	if !strings.Contains(before, `"plaintext":"bWluZQ=="`) {
		t.Fatalf("the answer is %q", before)
	}
	for range 50 {
		f.ask(http.MethodPut, "/v1/transit/decrypt/prod", `{"ciphertext":"`+sealed("another one's")+`"}`)
	}
	if string(client.kept) != before {
		t.Errorf("the answer that was not taken is now %q", client.kept)
	}
}

// TestACertificateThatEndedVouchesForNobody, also over a connection that was made before.
func TestACertificateThatEndedVouchesForNobody(t *testing.T) {
	for name, lasts := range map[string]time.Duration{"good": time.Minute, "ended": -time.Minute} {
		certificate := &x509.Certificate{NotAfter: time.Now().Add(lasts)}
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/v1/transit/decrypt/prod", nil)
		r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{certificate}}}
		if got := peerOf(r).Certificate; (got != nil) != (lasts > 0) {
			t.Errorf("%s: %v", name, got)
		}
	}
}
