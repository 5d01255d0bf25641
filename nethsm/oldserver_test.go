package nethsm_test

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// oldServer is a NetHSM before 5.0: it has no labels and lists no keys by the beginning of their ids.
func oldServer(t *testing.T, prefixStatus int) nethsm.DeviceConfig {
	t.Helper()
	h, err := nethsmtest.New(nethsmtest.Options{Provisioned: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		switch {
		case bytes.Contains(body, []byte(`"label"`)):
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `{"message":"Invalid data for JSON schema: Json.generate_key_req."}`)
			return
		case strings.HasSuffix(r.URL.Path, "*"):
			w.WriteHeader(prefixStatus)
			return
		}
		query := r.URL.Query()
		query.Del("label")
		r.URL.RawQuery = query.Encode()
		r.Body = io.NopCloser(bytes.NewReader(body))
		h.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	config := deviceOn(h)
	config.URLs, config.TLS = []string{server.URL}, nethsm.TLS{}
	return config
}

func TestServersWithoutLabelsAreServedAsWell(t *testing.T) {
	for _, status := range []int{http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusBadRequest} {
		device, ctx := openDevice(t, oldServer(t, status)), shortly(t)
		for _, id := range []string{"seal", "other"} {
			key := generate(t, device, id)
			if key.Ref().ID != id || key.Ref().Label != id {
				t.Errorf("GenerateKey made %+v, want a key called by its id", key.Ref())
			}
			decrypts(t, key)
		}
		for _, query := range []hsm.KeyQuery{{ID: "seal"}, {Label: "seal"}, {ID: "seal", Label: "seal"}} {
			if key, err := hsm.FindKey(ctx, device, query); err != nil || key.Ref().ID != "seal" {
				t.Errorf("FindKey(%v) = %v, %v", query, key, err)
			}
		}
		if keys, err := device.FindKeys(ctx, hsm.KeyQuery{Label: "nobody"}); err != nil || len(keys) != 0 {
			t.Errorf("FindKeys with another label = %v, %v; want none", keys, err)
		}
		for _, label := range []string{"b#1", "a#1"} {
			if err := device.WriteObject(ctx, hsm.ObjectRef{Application: "nitroseal", Label: label}, []byte("value")); err != nil {
				t.Fatal(err)
			}
		}
		if labels := labelsOf(t, device); !slices.Equal(labels, []string{"a#1", "b#1"}) {
			t.Errorf("with status %d for a prefix, Objects lists %q", status, labels)
		}
	}
}
