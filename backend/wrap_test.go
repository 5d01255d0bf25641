package backend

import (
	"context"
	"crypto/ecdh"
	"encoding/base64"
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func p256() ecdh.Curve { return ecdh.P256() }

func TestWrapTouchesNoHSMAndUnwrapCostsOneOperation(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	before := token.Operations()
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0", "context": "cluster prod"}).want(t, http.StatusOK)
	if token.Operations() != before {
		t.Errorf("wrap cost %d operations", token.Operations()-before)
	}
	opened := m.write("unwrap/prod", fields{"ciphertext": " " + wrapped.text("ciphertext") + "\n", "context": "cluster prod"}).ok(t)
	if opened.text("plaintext") != "c2VjcmV0" || token.Operations() != before+1 {
		t.Errorf("unwrap = %v after %d operations", opened.data, token.Operations()-before)
	}
}

func TestPlaintextMayBeWhatBase64Writes(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	value := strings.Repeat("0123456789", 20)
	encoded := base64.StdEncoding.EncodeToString([]byte(value))
	wrapped := m.write("wrap/prod", fields{"plaintext": encoded[:76] + "\n" + encoded[76:] + "\n"}).ok(t)
	if got := m.write("unwrap/prod", fields{"ciphertext": wrapped.data["ciphertext"]}).ok(t).text("plaintext"); got != encoded {
		t.Errorf("plaintext = %s", got)
	}
}

func TestLargestPlaintextFitsAndOneByteMoreDoesNot(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	for size, status := range map[int]int{0: 200, envelope.MaxPayload: 200, envelope.MaxPayload + 1: 400, 4 * envelope.MaxPayload: 400} {
		got := m.write("wrap/prod", fields{"plaintext": base64.StdEncoding.EncodeToString(make([]byte, size))}).want(t, status)
		if status == http.StatusBadRequest {
			got.says(t, "65536 bytes")
		}
	}
}

func TestWrapsThatAreRefused(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	for name, test := range map[string]struct {
		path   string
		data   fields
		status int
		says   string
	}{
		"without plaintext":       {"wrap/prod", nil, 400, "missing plaintext"},
		"of no base64":            {"wrap/prod", fields{"plaintext": "not base64!"}, 400, "not base64"},
		"of URL base64":           {"wrap/prod", fields{"plaintext": "_-_-"}, 400, "not base64"},
		"with an endless context": {"wrap/prod", fields{"plaintext": "YQ==", "context": strings.Repeat("x", 5000)}, 400, "context"},
		"with a misspelt field":   {"wrap/prod", fields{"plantext": "YQ=="}, 400, `unknown field "plantext"; this path knows context, plaintext`},
		"with a missing key":      {"wrap/none", fields{"plaintext": "YQ=="}, 404, "no such wrapping key"},
	} {
		t.Run(name, func(t *testing.T) { m.write(test.path, test.data).want(t, test.status).says(t, test.says) })
	}
}

func TestEnvelopesThatDoNotOpen(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.addKey("test")
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0", "context": "a"}).ok(t).text("ciphertext")
	transit := m.readyForEncrypt("prod").write("encrypt/prod", fields{"plaintext": "c2VjcmV0"}).ok(t).text("ciphertext")
	inner, err := base64.StdEncoding.DecodeString(strings.Split(transit, ":")[2])
	if err != nil {
		t.Fatal(err)
	}
	tag := strings.LastIndex(wrapped, `"tag":"`) + len(`"tag":"`)
	damaged := wrapped[:tag] + flip(wrapped[tag]) + wrapped[tag+1:]
	for name, test := range map[string]struct {
		path string
		data fields
		says string
	}{
		"nothing":                             {"unwrap/prod", nil, "missing ciphertext"},
		"noise":                               {"unwrap/prod", fields{"ciphertext": "noise", "context": "a"}, "malformed"},
		"a truncated one":                     {"unwrap/prod", fields{"ciphertext": wrapped[:len(wrapped)-20], "context": "a"}, "malformed"},
		"a damaged one":                       {"unwrap/prod", fields{"ciphertext": damaged, "context": "a"}, "does not decrypt"},
		"more than an envelope can be":        {"unwrap/prod", fields{"ciphertext": strings.Repeat("x", envelope.MaxSize+1)}, "malformed"},
		"one of another key":                  {"unwrap/test", fields{"ciphertext": wrapped, "context": "a"}, "wrapping key"},
		"one with another context":            {"unwrap/prod", fields{"ciphertext": wrapped, "context": "b"}, "context"},
		"one without its context":             {"unwrap/prod", fields{"ciphertext": wrapped}, "context"},
		"one of encrypt/":                     {"unwrap/prod", fields{"ciphertext": string(inner)}, "use"},
		"one of encrypt/, as it came":         {"unwrap/prod", fields{"ciphertext": transit}, "malformed"},
		"one of another key, rewrapped":       {"rewrap/test", fields{"ciphertext": wrapped, "context": "a"}, "wrapping key"},
		"one with another context, anew":      {"rewrap/prod", fields{"ciphertext": wrapped, "context": "b"}, "context"},
		"one of encrypt/, rewrapped":          {"rewrap/prod", fields{"ciphertext": string(inner)}, "use"},
		"nothing, rewrapped":                  {"rewrap/prod", fields{"ciphertext": ""}, "missing ciphertext"},
		"one of wrap/ at decrypt/":            {"decrypt/prod", fields{"ciphertext": "vault:v1:" + base64.StdEncoding.EncodeToString([]byte(wrapped))}, "invalid ciphertext"},
		"one of another version's prefix":     {"decrypt/prod", fields{"ciphertext": "vault:v2:" + strings.Split(transit, ":")[2]}, "invalid ciphertext"},
		"one of another key at decrypt/":      {"decrypt/test", fields{"ciphertext": transit}, "invalid ciphertext"},
		"an envelope without the prefix":      {"decrypt/prod", fields{"ciphertext": string(inner)}, "invalid ciphertext: no prefix"},
		"nothing at decrypt/":                 {"decrypt/prod", nil, "missing ciphertext to decrypt"},
		"noise with the prefix":               {"decrypt/prod", fields{"ciphertext": "vault:v1:bm9pc2U="}, "invalid ciphertext"},
		"base64 that is none":                 {"decrypt/prod", fields{"ciphertext": "vault:v1:%%%"}, "could not decode base64"},
		"a missing key at decrypt/":           {"decrypt/none", fields{"ciphertext": transit}, "encryption key not found"},
		"a field of transit that is not ours": {"decrypt/prod", fields{"ciphertext": transit, "nonce": "x"}, "unknown field"},
	} {
		t.Run(name, func(t *testing.T) { m.write(test.path, test.data).want(t, http.StatusBadRequest).says(t, test.says) })
	}
	m.write("unwrap/prod", fields{"ciphertext": wrapped, "context": "a"}).ok(t)
	m.write("decrypt/prod", fields{"ciphertext": transit}).ok(t)
}

func flip(c byte) string {
	if c == 'A' {
		return "B"
	}
	return "A"
}

// readyForEncrypt does what encrypt/ asks for.
func (m *mount) readyForEncrypt(key string) *mount {
	m.t.Helper()
	m.read("keys/" + key + "/backup").ok(m.t)
	m.write("keys/"+key, fields{"accept_single_hsm": true}).ok(m.t)
	return m
}

func TestEncryptWantsAKeyThatSurvives(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	encrypt := fields{"plaintext": "YQ=="} // what a seal asks when it starts
	m.write("encrypt/prod", encrypt).want(t, http.StatusBadRequest).says(t, "its key record was never read")
	m.read("keys/prod/backup").ok(t)
	m.write("encrypt/prod", encrypt).want(t, http.StatusBadRequest).says(t, "one HSM only", "accept_single_hsm=true")
	m.write("keys/prod", fields{"backup_confirmed": true}).ok(t)
	got := m.write("encrypt/prod", encrypt).want(t, http.StatusOK)
	if !strings.HasPrefix(got.text("ciphertext"), "vault:v1:") || strings.Count(got.text("ciphertext"), ":") != 2 || got.text("key_version") != "1" {
		t.Errorf("encrypt = %v", got.data)
	}
	if opened := m.write("decrypt/prod", fields{"ciphertext": got.data["ciphertext"]}).ok(t); opened.text("plaintext") != "YQ==" {
		t.Errorf("decrypt = %v", opened.data)
	}
	m.write("encrypt/prod", nil).want(t, http.StatusBadRequest).says(t, "missing plaintext to encrypt")
	m.write("encrypt/none", encrypt).want(t, http.StatusBadRequest).says(t, "encryption key not found")
	m.write("keys/prod", fields{"deletion_allowed": true}).ok(t)
	m.delete("keys/prod", fields{"delete_hsm_keys": true}).want(t, http.StatusBadRequest).says(t, "served encrypt/")
}

// A Vault that uses the mount as its seal may start at any moment, and seals a test value then.
func TestEncryptGoesOnWhileANewVersionWaitsForItsRecordToBeRead(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.readyForEncrypt("prod")
	encrypt := fields{"plaintext": "YQ=="}
	sealed := m.write("encrypt/prod", encrypt).ok(t).text("ciphertext")
	token.AddRSA(t, "second", "22", 2048)
	rotated := m.write("keys/prod/rotate", fields{"device": "prod-hsm", "key_label": "second"}).ok(t)
	if rotated.text("latest_version") != "2" || rotated.text("encrypt_version") != "1" {
		t.Errorf("rotate = %v", rotated.data)
	}
	if said := strings.Join(rotated.warnings, "\n"); !strings.Contains(said, "version 2 is not used by encrypt/ yet") ||
		!strings.Contains(said, "read keys/prod/backup") {
		t.Errorf("warnings = %v", rotated.warnings)
	}
	if got := m.write("encrypt/prod", encrypt).ok(t); got.text("key_version") != "1" {
		t.Errorf("encrypt = %v", got.data)
	}
	m.write("keys/prod", fields{"min_decryption_version": 2}).want(t, http.StatusBadRequest).says(t, "read keys/prod/backup")
	m.read("keys/prod/backup").ok(t)
	if got := m.write("encrypt/prod", encrypt).ok(t); got.text("key_version") != "2" {
		t.Errorf("encrypt = %v", got.data)
	}
	m.write("decrypt/prod", fields{"ciphertext": sealed}).ok(t)

	m.addDevice("spare").AddEC(t, "spare-key", "77", p256())
	m.write("keys/prod/recipients", fields{"device": "spare", "key_label": "spare-key"}).ok(t)
	if got := m.write("encrypt/prod", encrypt).ok(t); got.text("key_version") != "2" {
		t.Errorf("encrypt = %v", got.data)
	}
	got := m.read("keys/prod").ok(t)
	if said := strings.Join(got.warnings, "\n"); !strings.Contains(said, "changed since it was read") {
		t.Errorf("warnings = %v", got.warnings)
	}
	versions, _ := got.data["versions"].([]any)
	newest, _ := versions[1].(map[string]any)
	if read, _ := newest["record_read"].(map[string]any); len(read) != 2 {
		t.Errorf("version 2 = %v", newest)
	}
}

func TestSealOfAnHSMThatIsAwayIsAnsweredWith503(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.readyForEncrypt("prod")
	sealed := m.write("encrypt/prod", fields{"plaintext": "YQ=="}).ok(t).text("ciphertext")
	for name, failure := range map[string]error{
		"away":           hsm.ErrUnavailable,
		"locked":         hsm.ErrLocked,
		"with a bad PIN": &hsm.PINError{TriesLeft: 2, Barred: true, Detail: "the PIN was wrong before and is not sent again"},
		"without a key":  hsm.ErrNotFound,
	} {
		t.Run(name, func(t *testing.T) {
			token.SetError(failure)
			got := m.write("decrypt/prod", fields{"ciphertext": sealed}).want(t, http.StatusServiceUnavailable)
			if passing := got.headers["Retry-After"] != nil; passing != (name == "away") {
				t.Errorf("Retry-After = %v", got.headers["Retry-After"])
			}
			m.write("encrypt/prod", fields{"plaintext": "YQ=="}).ok(t) // sealing needs no HSM
		})
	}
}

func TestHSMKeyThatWasDeletedOrReplacedDoesNotOpen(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0"}).ok(t).text("ciphertext")
	keys, err := token.FindKeys(context.Background(), hsm.KeyQuery{})
	if err != nil {
		t.Fatal(err)
	}
	if err := token.DeleteKey(context.Background(), keys[0].Ref()); err != nil {
		t.Fatal(err)
	}
	m = m.remount()
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).want(t, http.StatusServiceUnavailable).says(t, "not found on the HSM")
	token.AddRSA(t, "label-prod", "01", 2048) // another key of the same name
	m = m.remount()
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).want(t, http.StatusServiceUnavailable)
	m.write("wrap/prod", fields{"plaintext": "c2VjcmV0"}).ok(t) // still sealed to the recorded key
}

func TestRandomBytesComeFromTheHSM(t *testing.T) {
	m := newMount(t)
	m.write("random", nil).want(t, http.StatusBadRequest).says(t, "no device")
	m.addDevice("card")
	got := m.write("random", nil).want(t, http.StatusOK)
	if raw, err := base64.StdEncoding.DecodeString(got.text("random_bytes")); err != nil || len(raw) != 32 || got.text("device") != "card" {
		t.Errorf("random = %v", got.data)
	}
	if got := m.write("random", fields{"bytes": 4, "format": "hex"}).ok(t).text("random_bytes"); len(got) != 8 {
		t.Errorf("random_bytes = %s", got)
	}
	m.addDevice("spare")
	m.write("random", nil).want(t, http.StatusBadRequest).says(t, "device=card or device=spare")
	m.write("random", fields{"device": "spare", "bytes": 0}).want(t, http.StatusBadRequest)
	m.write("random", fields{"device": "spare", "bytes": 1025}).want(t, http.StatusBadRequest)
	m.write("random", fields{"device": "spare", "format": "octal"}).want(t, http.StatusBadRequest)
	m.write("random", fields{"device": "none"}).want(t, http.StatusBadRequest).says(t, "no device of that name")
}

func TestHealthIs503WhereNoDeviceCanOpen(t *testing.T) {
	m := newMount(t)
	m.read("health").want(t, http.StatusServiceUnavailable).says(t, "no device")
	token := m.addKey("prod")
	m.addDevice("spare")
	m.write("stores/own", fields{"type": "vault"}).ok(t)
	m.rack.tokens["SN-spare"].SetError(hsm.ErrUnavailable)
	got := m.read("health").want(t, http.StatusOK)
	devices, _ := got.data["devices"].(map[string]any)
	stores, _ := got.data["stores"].(map[string]any)
	if len(devices) != 2 || devices["spare"].(map[string]any)["usable"] != false || stores["own"].(map[string]any)["usable"] != true {
		t.Errorf("health = %v", got.data)
	}
	m = m.remount() // forgets the probe's result
	token.SetError(hsm.ErrUnavailable)
	got = m.read("health").want(t, http.StatusServiceUnavailable).says(t, "no device of this mount can open")
	if devices, _ := got.data["devices"].(map[string]any); len(devices) != 2 {
		t.Errorf("the 503 lacks the data: %v", got.data)
	}
}

func TestPathsThatDoNotExistAreNamed(t *testing.T) {
	m := newMount(t)
	for path, says := range map[string]string{
		"device/card":          "path-help",
		"devices/card/statsu":  "status, keys, unlock",
		"keys/-bad-":           "letters, digits",
		"wrap":                 "wrap/KEY",
		"clusters/prod/unsaal": "init, unseal, status",
		"material/a/b/c/d":     "material/CLUSTER/NAME",
		"transit/encrypt/prod": "path-help",
	} {
		for _, got := range []reply{m.read(path), m.write(path, fields{"x": 1}), m.delete(path, nil), m.list(path)} {
			got.want(t, http.StatusNotFound).says(t, path, says)
			if len(got.warnings) != 1 {
				t.Errorf("%s: the CLI's read would show nothing: %v", path, got)
			}
		}
	}
}
