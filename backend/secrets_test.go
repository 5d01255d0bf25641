package backend

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
)

// Secrets go in, never out: not in a read, not in an error, not in a log line.
func TestNoReadErrorOrLogLineShowsASecret(t *testing.T) {
	const (
		pin      = "planted-pin-1357"
		newPIN   = "planted-pin-2468"
		filePIN  = "planted-pin-file"
		password = "planted-password"
		material = "planted-material"
	)
	encoded := "cGxhbnRlZC1tYXRlcmlhbA==" // of material
	planted := []string{pin, newPIN, filePIN, password, material, encoded, "planted"}

	m := newMount(t)
	var log bytes.Buffer
	m.logger = NewLogger(hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Trace}))
	token := m.rack.add("SN")
	if err := token.ChangePIN(context.Background(), []byte(pin)); err != nil {
		t.Fatal(err)
	}
	token.AddRSA(t, "k", "01", 2048)
	m.secretFile("pin", filePIN)

	var answers []reply
	do := func(operation logical.Operation, path string, data fields) reply {
		got := m.do(operation, path, data)
		answers = append(answers, got)
		return got
	}
	write := func(path string, data fields) reply { return do(logical.UpdateOperation, path, data) }

	write("devices/a", fields{"module": testModule, "serial": "SN", "pin": pin}).ok(t)
	write("devices/b", fields{"module": testModule, "serial": "SN", "pin_file": "pin"}).ok(t)
	write("stores/e", fields{"type": "etcd", "endpoints": "http://127.0.0.1:1", "prefix": "p", "username": "u", "password": password, "request_timeout": 1}).ok(t)
	m.addNetHSM(netURL)
	m.secretFile("unlock", netPassphrase)
	write("devices/n", netHSMFieldsWith(fields{"unlock_passphrase": nil, "unlock_passphrase_file": "unlock"})).ok(t)
	write("stores/own", fields{"type": "vault"}).ok(t)
	write("keys/k", fields{"device": "a", "key_label": "k"}).ok(t)
	write("material/c/i", fields{"fields": fields{"x": encoded}, "key": "k", "store": "own"}).ok(t)
	write("devices/a/pin", fields{"new_pin": newPIN}).ok(t)
	wrapped := write("wrap/k", fields{"plaintext": encoded}).ok(t).text("ciphertext")

	// What goes wrong while secrets are at hand.
	write("devices/a", fields{"pin": pin, "pin_file": "pin"}).want(t, http.StatusBadRequest)
	write("devices/n", netHSMFieldsWith(fields{"password_file": "pin"})).want(t, http.StatusBadRequest)
	write("devices/n", fields{"urls": "https://u:" + password + "@evil.example"}).want(t, http.StatusBadRequest)
	write("devices/n", netHSMFieldsWith(fields{"urls": "https://u:" + password + "@evil.example"})).want(t, http.StatusBadRequest)
	write("devices/n/unlock", fields{"passphrase": password}).want(t, http.StatusBadRequest)
	write("devices/a/pin", fields{"new_pin": pin, "on_token": false}).want(t, http.StatusBadRequest)
	write("devices/b/status", nil)
	write("keys/b", fields{"device": "b", "key_label": "k"}).want(t, http.StatusServiceUnavailable)
	write("stores/e", fields{"password": password, "username": "", "check": true}).want(t, http.StatusBadRequest)
	write("stores/e", fields{"password": password, "check": true}).want(t, http.StatusServiceUnavailable)
	write("stores/f", fields{"type": "etcd", "endpoints": "https://u:" + password + "@127.0.0.1:1", "prefix": "p"}).want(t, http.StatusBadRequest)
	write("material/c/i", fields{"fields": fields{"x": material}, "key": "k", "store": "own"}).want(t, http.StatusBadRequest)
	write("wrap/k", fields{"plaintext": material}).want(t, http.StatusBadRequest)
	write("unwrap/k", fields{"ciphertext": wrapped, "context": "other"}).want(t, http.StatusBadRequest)
	token.SetError(hsm.ErrUnavailable)
	write("unwrap/k", fields{"ciphertext": wrapped}).want(t, http.StatusServiceUnavailable)
	write("devices/a/pin", fields{"new_pin": "planted-pin-third"}).want(t, http.StatusServiceUnavailable)
	token.SetError(nil)

	for _, path := range []string{
		"config", "devices/a", "devices/b", "devices/n", "devices/a/status", "devices/b/status", "devices/n/status", "stores/e", "stores/own", "keys/k", "keys/k/backup",
		"keys/k/public.pem", "material/c/i", "health",
	} {
		do(logical.ReadOperation, path, nil)
	}
	for _, path := range []string{"devices", "devices/a/keys", "stores", "keys", "material", "material/c"} {
		do(logical.ListOperation, path, nil)
	}
	do(logical.UpdateOperation, "unwrap/k", fields{"ciphertext": wrapped}).ok(t)
	answers = answers[:len(answers)-1] // that one may show it

	for _, answer := range answers {
		text := fmt.Sprintf("%s %v %v", answer.message, answer.data, answer.warnings)
		for _, secret := range planted {
			if strings.Contains(text, secret) {
				t.Errorf("an answer shows %q: %s", secret, text)
			}
		}
	}
	for _, secret := range planted {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log shows %q:\n%s", secret, log.String())
		}
	}
	if strings.Contains(m.stored()["kept/own/material/c/i"], encoded) {
		t.Error("the store holds the material in the clear")
	}
}

func TestDamagedRecordsAreReportedWithoutTheirContent(t *testing.T) {
	m := newMount(t)
	for key, path := range map[string]string{"devices/x": "devices/x", "stores/x": "stores/x"} {
		if err := m.storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte(`{"planted-pin`)}); err != nil {
			t.Fatal(err)
		}
		if got := m.read(path).want(t, http.StatusInternalServerError).says(t, "damaged"); strings.Contains(got.message, "planted") {
			t.Errorf("message = %s", got.message)
		}
		m.delete(path, nil).ok(t)
		m.read(path).want(t, http.StatusNotFound)
	}
}

func TestSecretsAreSealWrappedAndTheJournalStaysOnThisCluster(t *testing.T) {
	m := newMount(t)
	special := m.SpecialPaths()
	for _, prefix := range []string{"devices/", "stores/", "keys/", "custody/"} {
		if !strings.Contains(strings.Join(special.SealWrapStorage, " "), prefix) {
			t.Errorf("%s is not seal-wrapped", prefix)
		}
	}
	if strings.Join(special.LocalStorage, " ") != "wal/" {
		t.Errorf("LocalStorage = %v", special.LocalStorage)
	}
	if m.Type() != logical.TypeLogical || m.PluginVersion().Version != "v0.0.0-dev" {
		t.Errorf("type %v, version %v", m.Type(), m.PluginVersion())
	}
}

func TestTwoMountsHaveTheirOwnRecords(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	other := mountOn(t, &faultyStorage{Storage: new(logical.InmemStorage)}, m.rack, m.secrets, m.state)
	other.read("keys/prod").want(t, http.StatusNotFound)
	other.read("devices/prod-hsm").want(t, http.StatusNotFound)
	other.Cleanup(context.Background())
	wrapped := m.write("wrap/prod", fields{"plaintext": "YQ=="}).ok(t).text("ciphertext")
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).ok(t)
}

var _ device.Opener = (*rack)(nil).open
