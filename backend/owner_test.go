package backend

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
)

// neighbour is another mount of the same plugin, with the same HSMs and -state-dir.
func (m *mount) neighbour() *mount {
	m.t.Helper()
	other := mountOn(m.t, &faultyStorage{Storage: new(logical.InmemStorage)}, m.rack, m.secrets, m.state)
	other.write("devices/prod-hsm", fields{"module": testModule, "serial": "SN-prod-hsm", "pin": rightPIN}).ok(m.t)
	return other
}

var item = fields{"fields": fields{"k": "aGVsbG8="}, "key": "prod", "store": "s"}

func TestStoreOfAnotherMountIsNotShared(t *testing.T) {
	for kind, test := range map[string]struct {
		store fields
		// whenUsed is set where only the first use can find out.
		whenUsed bool
	}{
		"file":                 {fields{"type": "file", "dir": "prod"}, false},
		"file with a check":    {fields{"type": "file", "dir": "prod", "check": true}, false},
		"objects":              {fields{"type": "object", "device": "prod-hsm"}, true},
		"objects with a check": {fields{"type": "object", "device": "prod-hsm", "check": true}, false},
	} {
		t.Run(kind, func(t *testing.T) {
			m := newMount(t)
			m.addKey("prod")
			m.write("stores/s", test.store).ok(t)
			m.write("material/c/unseal", item).ok(t)
			other := m.neighbour()
			if test.whenUsed {
				other.write("stores/s", test.store).ok(t)
			} else {
				other.write("stores/s", test.store).want(t, http.StatusBadRequest).says(t, "belongs to another mount", "take_over=true")
				other.read("stores/s").want(t, http.StatusNotFound)
			}
			other.delete("material/c/unseal", fields{"store": "s", "cas": 1}).want(t, http.StatusBadRequest)
			m.write("material/c/unseal/open", nil).ok(t)
			m = m.remount()
			m.write("stores/s", test.store).ok(t) // it is still ours
			m.write("stores/twin", test.store).ok(t)
			m.write("material/c/unseal/open", nil).ok(t)
		})
	}
}

func TestStoreOfALostMountIsTakenOverAndItsOldOwnerWritesNoMore(t *testing.T) {
	for kind, store := range map[string]fields{
		"file":    {"type": "file", "dir": "prod"},
		"objects": {"type": "object", "device": "prod-hsm"},
	} {
		t.Run(kind, func(t *testing.T) {
			m := newMount(t)
			m.addKey("prod")
			m.write("stores/s", store).ok(t)
			m.write("material/c/unseal", item).ok(t)
			backup := m.read("keys/prod/backup").ok(t)
			other := m.neighbour()
			other.write("keys/prod/restore", fields{"key_record": backup.text("key_record"), "sha256": backup.text("sha256")}).ok(t)
			takeOver := fields{"take_over": true}
			for field, value := range store {
				takeOver[field] = value
			}
			if kind == "objects" { // the token must tell its serial number
				m.rack.tokens["SN-prod-hsm"].SetError(hsm.ErrUnavailable)
				other.write("stores/s", takeOver).want(t, http.StatusServiceUnavailable)
				m.rack.tokens["SN-prod-hsm"].SetError(nil)
			}
			m.write("material/c/unseal/open", nil).ok(t)
			other.write("stores/s", takeOver).ok(t)
			other.write("stores/s", takeOver).ok(t) // sent again
			other.write("material/c/unseal/open", fields{"store": "s"}).ok(t)
			m.write("material/c/unseal", item).want(t, http.StatusBadRequest).says(t, "belongs to another mount")
			m.delete("material/c/unseal", nil).want(t, http.StatusBadRequest).says(t, "belongs to another mount")
			other.write("material/c/unseal", item).ok(t)
		})
	}
}

func TestTakeOverThatFailsItsCheckLeavesTheOwner(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.write("stores/s", fields{"type": "object", "device": "prod-hsm"}).ok(t)
	m.write("material/c/unseal", item).ok(t)
	token.SetCapacity(1)
	m.neighbour().write("stores/s", fields{"type": "object", "device": "prod-hsm", "take_over": true, "check": true}).
		want(t, http.StatusInsufficientStorage)
	token.SetCapacity(100)
	m.write("material/c/unseal", item).ok(t)
}

func TestTakeOverIsForStoresThatMountsCouldShare(t *testing.T) {
	m := newMount(t)
	m.write("stores/s", fields{"type": "vault", "take_over": true}).want(t, http.StatusBadRequest).says(t, "file and object")
}

func TestTroubleOfTheMachineIsNoFaultOfThePlugin(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	in := func(name string) string { return filepath.Join(m.state, name) }
	if err := os.WriteFile(in("stores"), nil, 0o600); err != nil { // where a directory belongs
		t.Fatal(err)
	}
	if err := os.WriteFile(in("owners"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m.write("stores/f", fields{"type": "file", "dir": "x"}).want(t, http.StatusServiceUnavailable).says(t, "directory of the file stores")
	m.write("stores/s", fields{"type": "object", "device": "prod-hsm"}).ok(t)
	m.write("material/c/unseal", item).want(t, http.StatusServiceUnavailable).says(t, "whose the application")
}

func TestTokenWithoutASerialNumberIsRefusedForDataObjects(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.rack.tokens["SN-prod-hsm"].unnumbered = true
	m.write("stores/s", fields{"type": "object", "device": "prod-hsm", "check": true}).want(t, http.StatusBadRequest).says(t, "serial number")
}

// What is damaged is mended from a backup; it is no fault of the plugin, and no mistake of whoever reads it.
func TestDamagedRecordsAndEnvelopesAre503(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.write("stores/s", fields{"type": "file", "dir": "prod"}).ok(t)
	m.write("material/c/unseal", item).ok(t)
	m.write("material/c/other", item).ok(t)
	file := filepath.Join(m.state, "stores", "prod", "material+c+unseal")
	if err := os.Truncate(file, 100); err != nil {
		t.Fatal(err)
	}
	damage := func(key string) {
		t.Helper()
		entry, err := m.storage.Get(t.Context(), key)
		if err != nil || entry == nil {
			t.Fatalf("%s: %v, %v", key, entry, err)
		}
		damaged := strings.Replace(string(entry.Value), `"value":"`, `"value":"AAAA`, 1)
		if err := m.storage.Put(t.Context(), &logical.StorageEntry{Key: key, Value: []byte(damaged)}); err != nil {
			t.Fatal(err)
		}
	}
	damage("material/c/other")
	damage("keys/prod")
	m = m.remount()
	m.write("material/c/unseal/open", nil).want(t, http.StatusServiceUnavailable).says(t, "damaged")
	m.write("material/c/other/open", nil).want(t, http.StatusServiceUnavailable).says(t, "malformed")
	m.read("keys/prod").want(t, http.StatusServiceUnavailable).says(t, "malformed")
	m.write("wrap/prod", fields{"plaintext": "YQ=="}).want(t, http.StatusServiceUnavailable).says(t, "malformed")
}
