package autounseal

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// answered is what a seal server answered.
type answered struct {
	Code   int
	Header http.Header
	Errors []string       `json:"errors"`
	Data   map[string]any `json:"data"`
	Auth   map[string]any `json:"auth"`
	Raw    []byte         `json:"-"`
}

// call sends a request as a seal does: by PUT, JSON without a Content-Type, the token in its header. The path is what comes
// after /v1/.
func call(t testing.TB, seal vaulttest.Seal, method, path string, fields vaulttest.Fields) answered {
	t.Helper()
	body, err := json.Marshal(fields)
	must(t, err)
	request, err := http.NewRequestWithContext(t.Context(), method, seal.Address+"/v1/"+path, bytes.NewReader(body))
	must(t, err)
	request.Header.Set("X-Vault-Request", "true")
	request.Header.Set("X-Vault-Token", seal.Token)
	if len(body) > 256<<10 { // the server hangs up on what it does not read, and its answer could be lost
		request.Header.Set("Expect", "100-continue")
	}
	client := httpClient(t, seal)
	defer client.CloseIdleConnections()
	response, err := client.Do(request)
	must(t, err)
	defer response.Body.Close()
	got := answered{Code: response.StatusCode, Header: response.Header}
	got.Raw, err = io.ReadAll(response.Body)
	must(t, err)
	if err := json.Unmarshal(got.Raw, &got); err != nil {
		t.Fatalf("%s %s: %d, %v in %q", method, path, got.Code, err, got.Raw)
	}
	return got
}

// httpClient trusts the CA of a seal server, and shows a client certificate where the stanza has one.
func httpClient(t testing.TB, seal vaulttest.Seal) *http.Client {
	t.Helper()
	pem, err := os.ReadFile(seal.CAFile)
	must(t, err)
	config := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !config.RootCAs.AppendCertsFromPEM(pem) {
		t.Fatalf("%s holds no certificate", seal.CAFile)
	}
	if seal.ClientCert != "" {
		pair, err := tls.LoadX509KeyPair(seal.ClientCert, seal.ClientKey)
		must(t, err)
		config.Certificates = []tls.Certificate{pair}
	}
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: config, ExpectContinueTimeout: time.Minute}}
}

// encrypts seals a text and returns the ciphertext.
func encrypts(t testing.TB, seal vaulttest.Seal, text string) string {
	t.Helper()
	got := call(t, seal, http.MethodPut, path(seal, "encrypt"), vaulttest.Fields{"plaintext": vaulttest.Base64(text)})
	ciphertext, ok := got.Data["ciphertext"].(string)
	if got.Code != http.StatusOK || !ok {
		t.Fatalf("encrypt with %s: %d %s", seal.Key, got.Code, got.Raw)
	}
	return ciphertext
}

// opens tells whether a ciphertext opens and holds the text.
func opens(t testing.TB, seal vaulttest.Seal, ciphertext, text string) error {
	t.Helper()
	got := call(t, seal, http.MethodPut, path(seal, "decrypt"), vaulttest.Fields{"ciphertext": ciphertext})
	if got.Code != http.StatusOK || got.Data["plaintext"] != vaulttest.Base64(text) {
		return fmt.Errorf("decrypt with %s: %d %s", seal.Key, got.Code, got.Raw)
	}
	return nil
}

// carriesKEK tells whether an envelope was sealed to a key encryption key, which it carries.
func carriesKEK(t testing.TB, ciphertext string) bool {
	t.Helper()
	parts := strings.Split(ciphertext, ":")
	raw, err := base64.StdEncoding.DecodeString(parts[len(parts)-1])
	must(t, err)
	var envelope struct{ Protected string }
	must(t, json.Unmarshal(raw, &envelope))
	protected, err := base64.RawURLEncoding.DecodeString(envelope.Protected)
	must(t, err)
	var header struct{ KEK string }
	must(t, json.Unmarshal(protected, &header))
	return header.KEK != ""
}

// sealsLeased waits until what is sealed is leased, or is not.
func sealsLeased(t testing.TB, seal vaulttest.Seal, want bool) (ciphertext string) {
	t.Helper()
	vaulttest.Eventually(t, vaulttest.Patience, fmt.Sprintf("leased to be %t", want), func() error {
		ciphertext = encrypts(t, seal, "x")
		if carriesKEK(t, ciphertext) != want {
			return errors.New("it is not")
		}
		return nil
	})
	return ciphertext
}

// path is the endpoint of a verb, encrypt or decrypt.
func path(seal vaulttest.Seal, verb string) string {
	return strings.TrimSuffix(seal.Mount, "/") + "/" + verb + "/" + seal.Key
}
