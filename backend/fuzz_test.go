package backend

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
)

// FuzzRequest sends requests with any body to any path. Whatever comes, the answer is one of those that are documented:
// no panic, and never a 500, which a client would repeat.
func FuzzRequest(f *testing.F) {
	paths := []string{
		"config", "devices/d", "devices/d/pin", "devices/d/unlock", "keys/k", "keys/k/restore", "keys/k/rotate", "keys/k/recipients",
		"wrap/k", "unwrap/k", "rewrap/k", "encrypt/k", "decrypt/k", "material/c/i", "material/c/i/open", "material/c/i/accept-generation",
		"random", "nothing/here",
	}
	for i, body := range []string{
		`{"request_timeout":45}`, `{"module":"/m","serial":"S","pin":"1"}`, `{"new_pin":""}`, `{"passphrase":"x"}`,
		`{"device":"d","key_label":"l"}`, `{"key_record":"{}","sha256":"0"}`, `{"device":"d","key_id":"01"}`, `{"device":["d"]}`,
		`{"plaintext":"YQ==","context":"c"}`, `{"ciphertext":"{}"}`, `{"ciphertext":7}`, `{"plaintext":null}`, `{"ciphertext":"vault:v1:YQ=="}`,
		`{"fields":{"x":"YQ=="},"key":"k","store":"s","cas":0}`, `{"store":"s"}`, `{"generation":-1}`, `{"bytes":1e3}`, `[]`,
	} {
		f.Add(uint8(i), uint8(i%3), body)
	}
	m := newMount(f)
	m.addDevice("d").AddEC(f, "l", "01", p256())
	m.write("keys/k", fields{"device": "d", "key_label": "l"}).ok(f)
	m.write("stores/s", fields{"type": "vault"}).ok(f)
	operations := []logical.Operation{logical.UpdateOperation, logical.ReadOperation, logical.DeleteOperation, logical.ListOperation}
	documented := []int{
		http.StatusOK, http.StatusNoContent, http.StatusBadRequest, http.StatusNotFound, http.StatusMethodNotAllowed,
		http.StatusConflict, http.StatusServiceUnavailable, http.StatusInsufficientStorage,
	}
	f.Fuzz(func(t *testing.T, path, operation uint8, body string) {
		var data fields
		if err := json.Unmarshal([]byte(body), &data); err != nil || strings.Contains(body, "generate") { // making RSA keys is slow
			t.Skip()
		}
		where, what := paths[int(path)%len(paths)], operations[int(operation)%len(operations)]
		one := *m
		one.t = t
		got := one.do(what, where, data)
		if !slices.Contains(documented, got.status) {
			t.Errorf("%s %s %s: status %d: %s", what, where, body, got.status, got.message)
		}
	})
}
