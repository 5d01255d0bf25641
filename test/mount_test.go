package test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestTheRestOfTheMount is what no other test asks of a real Vault.
func TestTheRestOfTheMount(t *testing.T) {
	plug := pkcs11test.Unpluggable(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &plug.Token})

	t.Run("random bytes", func(t *testing.T) {
		seen := map[any]bool{}
		for range 2 {
			answer := site.Write(t, "nitrokey/random", vaulttest.Fields{"bytes": 24, "format": "hex"})
			if got, _ := answer["random_bytes"].(string); len(got) != 48 || seen[got] {
				t.Errorf("random bytes: %v", answer)
			}
			seen[answer["random_bytes"]] = true
		}
	})
	t.Run("a store of type file", func(t *testing.T) {
		site.Write(t, "nitrokey/stores/disk", vaulttest.Fields{"type": "file", "dir": "envelopes", "check": true})
		putMaterial(t, site, "disk", "eu", "shares")
		reload(t, site)
		openMaterial(t, site, "eu", "shares")
	})
	t.Run("the PIN is changed on the token", func(t *testing.T) {
		const changed = "271828"
		site.Write(t, "nitrokey/devices/hsm/pin", vaulttest.Fields{"new_pin": changed})
		site.Token.PIN = changed
		site.Token.Tool(t, "--list-objects") // logs in
		site.Restart(t)
		site.MustUnwrap(t, "prod", wrapped, secret)
	})
	t.Run("health is 200", func(t *testing.T) {
		code, _, answer := send(t, site, http.MethodGet, "nitrokey/health", nil)
		if code != http.StatusOK || answer.Data["usable"] != true {
			t.Errorf("%d %+v", code, answer)
		}
	})

	headers := []string{"Retry-After"}
	must(t, site.Client(t).Sys().TuneMountAllowNil("nitrokey", api.TuneMountConfigInput{AllowedResponseHeaders: &headers}))
	plug.Unplug(t)
	t.Run("a 503 asks for patience once the mount is tuned so", func(t *testing.T) {
		code, header, answer := send(t, site, http.MethodPut, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped})
		if code != http.StatusServiceUnavailable || header.Get("Retry-After") == "" || len(answer.Errors) == 0 {
			t.Errorf("%d, Retry-After %q, %+v", code, header.Get("Retry-After"), answer)
		}
	})
	t.Run("health is 503 with the same data", func(t *testing.T) {
		vaulttest.Eventually(t, limit, "health to notice, which asks a device once in five seconds", func() error {
			code, _, answer := send(t, site, http.MethodGet, "nitrokey/health", nil)
			devices, _ := answer.Data["devices"].(map[string]any)
			if code != http.StatusServiceUnavailable || answer.Data["usable"] != false || devices["hsm"] == nil || len(answer.Errors) == 0 {
				return fmt.Errorf("it answers %d %+v", code, answer)
			}
			return nil
		})
		cli := exec.CommandContext(t.Context(), vaulttest.Tool(t, "vault"), "read", "nitrokey/health")
		cli.Env = []string{"HOME=" + t.TempDir(), "VAULT_ADDR=" + site.Address, "VAULT_CACERT=" + site.CAFile, "VAULT_TOKEN=" + site.RootToken, "VAULT_MAX_RETRIES=0"}
		if shown, err := cli.CombinedOutput(); err == nil || !strings.Contains(string(shown), "503") || !strings.Contains(string(shown), "no device") {
			t.Errorf("the command line shows %v\n%s", err, shown)
		}
	})
}

// answered is the body of an answer.
type answered struct {
	Errors []string       `json:"errors"`
	Data   map[string]any `json:"data"`
}

// send makes a request by the given method and returns the answer as it came, errors too.
func send(t *testing.T, site *vaulttest.Site, method, path string, fields vaulttest.Fields) (code int, header http.Header, body answered) {
	t.Helper()
	client := site.Client(t)
	request := client.NewRequest(method, "/v1/"+path)
	if fields != nil {
		must(t, request.SetJSONBody(fields))
	}
	answer, err := client.RawRequestWithContext(t.Context(), request) //nolint:staticcheck // the only way to choose the method
	if answer == nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer answer.Body.Close()
	raw, err := io.ReadAll(answer.Body)
	must(t, err)
	if err := json.NewDecoder(bytes.NewReader(raw)).Decode(&body); err != nil {
		t.Fatalf("%s %s: %v in %q", method, path, err, raw)
	}
	return answer.StatusCode, answer.Header, body
}
