package server

import (
	"encoding/base64"
	"net/http"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/token"
)

// TestASealIsServed: what a Vault does, from the start to its first health check.
func TestASealIsServed(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	for range 2 {
		if got := r.ask(client, http.MethodPut, "/v1/auth/token/renew-self", text, `{"increment":0}`); got.code != http.StatusOK {
			t.Errorf("renew-self: %d %s", got.code, got.raw)
		}
	}
	sealed := r.encrypt(client, text, "prod", "a secret")
	if sealed.code != http.StatusOK {
		t.Fatalf("encrypt: %d %s", sealed.code, sealed.raw)
	}
	opened := r.decrypt(client, text, "prod", sealed.data("ciphertext"))
	if got, _ := base64.StdEncoding.DecodeString(opened.data("plaintext")); opened.code != http.StatusOK || string(got) != "a secret" {
		t.Errorf("decrypt: %d %s", opened.code, opened.raw)
	}
	if got := r.ask(client, http.MethodGet, "/v1/sys/health", "", ""); got.code != http.StatusOK {
		t.Errorf("health: %d %s", got.code, got.raw)
	}
	t.Log(r.logged)
	t.Log(r.told)
	t.Log(r.page("/readyz"))
}
