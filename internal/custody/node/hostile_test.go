package node

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
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
