package nethsmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is for scrypt with the race detector on a busy machine.
const patience = time.Minute

// caller talks to a double over TLS.
type caller struct {
	t      *testing.T
	client *http.Client
}

func newCaller(t *testing.T, h *HSM) *caller {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(h.CA())
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	return &caller{t, &http.Client{Transport: transport, Timeout: patience}}
}

// try sends a request; credentials are "user:passphrase" or empty.
func (c *caller) try(method, url, credentials, body string) (int, string, error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	if credentials != "" {
		user, passphrase, _ := strings.Cut(credentials, ":")
		r.SetBasicAuth(user, passphrase)
	}
	if body != "" {
		r.Header.Set("Content-Type", typeJSON)
	}
	answer, err := c.client.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = answer.Body.Close() }()
	data, err := io.ReadAll(answer.Body)
	return answer.StatusCode, string(data), err
}

// must is try where an answer of a status is the only right thing.
func (c *caller) must(status int, method, url, credentials, body string) string {
	c.t.Helper()
	got, text, err := c.try(method, url, credentials, body)
	if err != nil || got != status {
		c.t.Fatalf("%s %s: got %d %q (%v), want %d", method, url, got, text, err, status)
	}
	return text
}

const (
	adminLogin    = AdminUser + ":" + AdminPassphrase
	operatorLogin = OperatorUser + ":" + OperatorPassphrase
)

// encrypted is a request for decryption of plaintext, made in software.
func encrypted(t *testing.T, public *rsa.PublicKey, plaintext []byte) string {
	t.Helper()
	block, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, plaintext, nil)
	if err != nil {
		t.Fatal(err)
	}
	return `{"mode":"OAEP_SHA256","encrypted":"` + b64(block) + `"}`
}

func decrypted(t *testing.T, body string) []byte {
	t.Helper()
	var a struct{ Decrypted []byte }
	if err := json.Unmarshal([]byte(body), &a); err != nil {
		t.Fatalf("reading %q: %v", body, err)
	}
	return a.Decrypted
}

func TestDecryptsWhatWasEncryptedInSoftware(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	id, public, err := h.AddKey(Key{ID: "k1"})
	if err != nil {
		t.Fatal(err)
	}
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/keys/"+id
	secret := []byte("a secret of 32 bytes, more or less")
	rsaKey, ok := public.(*rsa.PublicKey)
	if !ok {
		t.Fatalf("the public key is a %T", public)
	}
	body := c.must(200, "POST", url+"/decrypt", operatorLogin, encrypted(t, rsaKey, secret))
	if got := decrypted(t, body); !bytes.Equal(got, secret) {
		t.Fatalf("decrypted %q", got)
	}
	if n := h.Node(0).Operations(); n != 1 {
		t.Fatalf("counted %d operations", n)
	}
	if body := c.must(200, "GET", url, operatorLogin, ""); !strings.Contains(body, `"operations":1`) {
		t.Fatalf("the key says %s", body)
	}
	random := c.must(200, "POST", h.URLs()[0]+"/api/v1/random", operatorLogin, `{"length":16}`)
	var r struct{ Random []byte }
	if err := json.Unmarshal([]byte(random), &r); err != nil || len(r.Random) != 16 {
		t.Fatalf("random answered %s", random)
	}
}
