package node

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestWhatANodeTellsOfItselfFitsALogLine: it goes to logs, tables and metadata, whoever answers.
func TestWhatANodeTellsOfItselfFitsALogLine(t *testing.T) {
	odd := `"\u001b[2J\n` + strings.Repeat("x", 100_000) + `"`
	text := `{"initialized":true,"sealed":true,"type":` + odd + `,"version":` + odd + `,"cluster_name":` + odd + `,"cluster_id":` + odd +
		`,"storage_type":` + odd + `,"nonce":` + odd + `}`
	n := answered(t, func(*http.Request) *http.Response {
		return &http.Response{StatusCode: http.StatusOK, ContentLength: -1, Body: io.NopCloser(strings.NewReader(text))}
	})
	status, err := n.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, told := range []string{status.Type, status.Version, status.ClusterName, status.ClusterID, status.StorageType, status.Nonce} {
		if len(told) > maxMessage+len("…") || strings.ContainsAny(told, "\x1b\n") || !strings.HasPrefix(told, "?[2J x") {
			t.Errorf("%d bytes: %.40q", len(told), told)
		}
	}
}

// TestAnAddressMayNameAnInterface: link-local nodes are reached through one.
func TestAnAddressMayNameAnInterface(t *testing.T) {
	n, err := New(Config{Address: "http://[::1%25lo]:1", TLS: TLS{PlainHTTP: true}})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if n.Address() != "http://[::1%25lo]:1" {
		t.Errorf("%s", n.Address())
	}
	if _, err := n.Status(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
}

// TestPlainHTTPNeverLeavesTheMachine: whatever a resolver says that localhost is.
func TestPlainHTTPNeverLeavesTheMachine(t *testing.T) {
	n := answered(t, nil)
	for name, line := range map[string]*http.Transport{"kept": n.lines.kept, "fresh": n.lines.fresh} {
		conn, err := line.DialContext(t.Context(), "tcp", "192.0.2.1:8200")
		if err == nil {
			conn.Close()
		}
		if _, is := errors.AsType[*foreignError](err); !is {
			t.Errorf("the %s line: %v", name, err)
		}
	}
}

// TestAnAnswerIsNoLongerThanItMayBe: neither its body, as announced, nor its head, nor the time that it asks us to wait.
func TestAnAnswerIsNoLongerThanItMayBe(t *testing.T) {
	n := answered(t, func(*http.Request) *http.Response {
		return &http.Response{StatusCode: http.StatusOK, ContentLength: 1 << 50, Body: io.NopCloser(strings.NewReader("{}"))}
	})
	if _, err := n.Status(t.Context()); !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "longer than") {
		t.Error(err)
	}
	for name, line := range map[string]*http.Transport{"kept": n.lines.kept, "fresh": n.lines.fresh} {
		if line.MaxResponseHeaderBytes != headerLimit {
			t.Errorf("the %s line takes %d bytes of headers", name, line.MaxResponseHeaderBytes)
		}
	}
	for text, want := range map[string]time.Duration{"7": 7 * time.Second, "99999999": time.Hour, "-1": 0, "Fri, 31 Dec 1999 23:59:59 GMT": 0} {
		if got := retryAfter(text); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

// TestAnswersThatLackWhatMattersAreNone, and what is left of something that has ended means nothing.
func TestAnswersThatLackWhatMattersAreNone(t *testing.T) {
	says := func(text string) *Node {
		return answered(t, func(*http.Request) *http.Response {
			return &http.Response{StatusCode: http.StatusOK, ContentLength: -1, Body: io.NopCloser(strings.NewReader(text))}
		})
	}
	if _, err := says(`{"initialized":true,"sealed":false}`).Status(t.Context()); !errors.Is(err, ErrMalformed) {
		t.Error("a status without a seal:", err)
	}
	if _, err := says(`{"started":true,"nonce":"n"}`).RootStart(t.Context(), ""); !errors.Is(err, ErrMalformed) {
		t.Error("no one-time pad:", err)
	}
	if status, err := says(`{"started":false,"nonce":"n","progress":1}`).VerifyStatus(t.Context(), UnsealKeys); err != nil || status != (VerifyStatus{}) {
		t.Error(status, err)
	}
	if status, err := says(`{"started":false,"verification_nonce":"n"}`).RekeyStatus(t.Context(), UnsealKeys); err != nil || status.VerificationNonce != "" {
		t.Error(status, err)
	}
}
