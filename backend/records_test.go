package backend

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
)

// The records of devices as released versions wrote them. Never change one: add the one of a newer format.
func TestRecordsOfDevicesOfEarlierVersionsAreRead(t *testing.T) {
	for name, test := range map[string]struct {
		shown fields
		after string // the record of the last write, where it is another one
	}{
		"device-pkcs11": {shown: fields{
			"type": "pkcs11", "module": testModule, "serial": "SN-card", "pin_set": "true", "parallel": "2", "decrypt_timeout": "30",
		}},
		"device-pkcs11-changing": {shown: fields{"type": "pkcs11", "serial": "SN-card", "pin_set": "true", "pin_change_pending": "true"}, after: rightPIN},
		"device-nethsm": {shown: fields{
			"type": "nethsm", "urls": "[" + netURL + "]", "username": "operator", "password_set": "true", "admin_username": "admin",
			"unlock_passphrase_file": "unlock", "tls_server_name": "nethsm", "request_timeout": "5", "object_store": "true", "key_tags": "[seal]",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			golden, err := os.ReadFile(filepath.Join("testdata", name+".json"))
			if err != nil {
				t.Fatal(err)
			}
			m := newMount(t)
			m.rack.add("SN-card").AddRSA(t, "k", "k", 2048)
			m.addNetHSM(netURL).AddRSA(t, "k", "k", 2048)
			m.secretFile("unlock", netPassphrase)
			if err := m.storage.Put(context.Background(), &logical.StorageEntry{Key: "devices/old", Value: golden}); err != nil {
				t.Fatal(err)
			}
			got := m.read("devices/old").want(t, http.StatusOK)
			for field, want := range test.shown {
				if got.text(field) != want {
					t.Errorf("%s = %s, want %v", field, got.text(field), want)
				}
			}
			m.list("devices/old/keys").ok(t)
			m.write("devices/old", fields{"type": test.shown["type"]}).ok(t)
			m.list("devices/old/keys").ok(t)
			stored := m.stored()["devices/old"]
			if test.after == "" && strings.TrimSpace(stored) != strings.TrimSpace(string(golden)) || !strings.Contains(stored, test.after) {
				t.Errorf("written again it is\n%s, and was\n%s", stored, golden)
			}
		})
	}
}
