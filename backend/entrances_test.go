package backend

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// Promise 4, at the doors themselves: an envelope opens at the entrance that it was made for, and at no other, although
// one HSM key opens them all.
func TestEveryEnvelopeOpensAtItsOwnEntranceOnly(t *testing.T) {
	m, token := newKeeping(t)
	m.read("keys/prod/backup").ok(t)
	m.write("keys/prod", fields{"accept_single_hsm": true}).ok(t)

	wrapped, _ := m.write("wrap/prod", fields{"plaintext": "aGk="}).ok(t).data["ciphertext"].(string)
	encrypted, _ := m.write("encrypt/prod", fields{"plaintext": "aGk="}).ok(t).data["ciphertext"].(string)
	m.write("material/c/item", fields{"fields": fields{"x": "aGk="}, "key": "prod", "store": "own"}).ok(t)
	record, _ := m.read("keys/prod/backup").ok(t).data["key_record"].(string)
	version, inside, err := transit.Parse(encrypted)
	if err != nil {
		t.Fatal(err)
	}
	envelopes := map[string]string{
		"wrap":     wrapped,
		"transit":  string(inside),
		"material": string(kept(t, m).Value),
		"auth":     authEnvelope(t, record),
	}
	for use, raw := range envelopes {
		if !strings.HasPrefix(strings.TrimSpace(raw), "{") {
			t.Fatalf("the %s envelope is %q", use, raw)
		}
	}

	plant := func(raw string) {
		t.Helper()
		own, err := m.Store(t.Context(), "own")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := own.Put(t.Context(), "material/c/item", []byte(raw), kept(t, m).Revision); err != nil {
			t.Fatal(err)
		}
	}
	for entrance, test := range map[string]struct {
		opens string
		try   func(raw string) reply
	}{
		"unwrap": {"wrap", func(raw string) reply { return m.write("unwrap/prod", fields{"ciphertext": raw}) }},
		"rewrap": {"wrap", func(raw string) reply { return m.write("rewrap/prod", fields{"ciphertext": raw}) }},
		"decrypt": {"transit", func(raw string) reply {
			return m.write("decrypt/prod", fields{"ciphertext": transit.Format(version, []byte(raw))})
		}},
		"material open": {"material", func(raw string) reply {
			plant(raw)
			return m.write("material/c/item/open", nil)
		}},
	} {
		for use, raw := range envelopes {
			t.Run(use+" at "+entrance, func(t *testing.T) {
				before := token.Operations()
				got := test.try(raw)
				if use == test.opens {
					got.want(t, http.StatusOK)
					return
				}
				got.want(t, http.StatusBadRequest)
				if strings.Contains(got.message, "aGk=") || strings.Contains(got.message, "hi\n") {
					t.Errorf("the refusal shows the value: %s", got.message)
				}
				if spent := token.Operations() - before; spent != 0 {
					t.Errorf("the refusal cost %d operations in the HSM", spent)
				}
			})
		}
	}
	t.Run("in another spelling at unwrap and rewrap", func(t *testing.T) {
		m.write("unwrap/prod", fields{"ciphertext": encrypted}).want(t, http.StatusBadRequest)
		m.write("rewrap/prod", fields{"ciphertext": encrypted}).want(t, http.StatusBadRequest)
		m.write("decrypt/prod", fields{"ciphertext": wrapped}).want(t, http.StatusBadRequest)
		m.write("decrypt/prod", fields{"ciphertext": base64.StdEncoding.EncodeToString([]byte(wrapped))}).want(t, http.StatusBadRequest)
	})
}

// kept is what the store holds of the item.
func kept(t *testing.T, m *mount) store.Entry {
	t.Helper()
	own, err := m.Store(t.Context(), "own")
	if err != nil {
		t.Fatal(err)
	}
	entry, err := own.Get(t.Context(), "material/c/item")
	if err != nil {
		t.Fatal(err)
	}
	return entry
}

// authEnvelope takes the envelope with the authentication key out of a key record.
func authEnvelope(t *testing.T, record string) string {
	t.Helper()
	var parsed struct {
		Versions []struct {
			AuthEnvelope json.RawMessage `json:"auth_envelope"`
		}
	}
	if err := json.Unmarshal([]byte(record), &parsed); err != nil || len(parsed.Versions) == 0 {
		t.Fatalf("the key record %s: %v", record, err)
	}
	return string(parsed.Versions[0].AuthEnvelope)
}

// The sizes that the documentation names.
func TestHowMuchAnItemTakes(t *testing.T) {
	m, _ := newKeeping(t)
	for _, test := range []struct {
		store string
		kib   int
		want  int
	}{
		{"own", 47, http.StatusOK},
		{"own", 49, http.StatusBadRequest},
		{"objects", 34, http.StatusOK},
		{"objects", 36, http.StatusBadRequest},
	} {
		value := base64.StdEncoding.EncodeToString(make([]byte, test.kib<<10))
		got := m.write("material/"+test.store+"/item", fields{"fields": fields{"x": value}, "key": "prod", "store": test.store})
		if got.status != test.want {
			t.Errorf("%d KiB in the store %q: status %d, want %d; %s", test.kib, test.store, got.status, test.want, got.message)
		}
	}
}
