package transit

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

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
