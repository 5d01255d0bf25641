package backend

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	vaultstore "vault-plugin-secrets-nitrokey/internal/store/vault"
)

// plantedKey is no key; nothing here connects to an etcd.
const plantedPassword = "planted-password"

func TestStoresAreConfiguredAndListed(t *testing.T) {
	m := newMount(t)
	m.addDevice("card")
	m.write("stores/etcd", fields{
		"type": "etcd", "endpoints": "https://127.0.0.1:2379,https://127.0.0.2:2379", "prefix": "nitroseal/prod",
		"username": "u", "password": plantedPassword, "server_name": "etcd.example", "request_timeout": "5s",
	}).want(t, http.StatusNoContent)
	m.write("stores/objects", fields{"type": "object", "device": "card"}).ok(t)
	m.write("stores/files", fields{"type": "file", "dir": "prod"}).ok(t)
	if warned := m.write("stores/own", fields{"type": "vault"}).ok(t).warnings; len(warned) != 1 || !strings.Contains(warned[0], "this very Vault") {
		t.Errorf("warnings = %v", warned)
	}
	if names := m.list("stores").ok(t).text("keys"); names != "[etcd files objects own]" {
		t.Errorf("list = %s", names)
	}
	got := m.read("stores/etcd").want(t, http.StatusOK)
	for field, want := range map[string]string{
		"type": "etcd", "endpoints": "[https://127.0.0.1:2379 https://127.0.0.2:2379]", "prefix": "nitroseal/prod",
		"username": "u", "password_set": "true", "client_key_set": "false", "request_timeout": "5",
	} {
		if got.text(field) != want {
			t.Errorf("%s = %s, want %s", field, got.text(field), want)
		}
	}
	if got := m.read("stores/objects"); got.text("application") != "nitroseal" || got.text("device") != "card" {
		t.Errorf("object store = %v", got.data)
	}
	m.delete("stores/own", nil).ok(t)
	m.read("stores/own").want(t, http.StatusNotFound)
	m.delete("stores/own", nil).ok(t)
}

func TestStoreWritesThatAreRefused(t *testing.T) {
	etcd := func(changes fields) fields {
		store := fields{"type": "etcd", "endpoints": "https://127.0.0.1:2379", "prefix": "nitroseal"}
		for field, value := range changes {
			store[field] = value
		}
		return store
	}
	for name, test := range map[string]struct {
		data fields
		says string
	}{
		"without a type":              {fields{"dir": "x"}, "type is missing"},
		"of an unknown type":          {fields{"type": "consul"}, "etcd, object, vault, file"},
		"without endpoints":           {fields{"type": "etcd", "prefix": "x"}, "endpoint"},
		"without a prefix":            {fields{"type": "etcd", "endpoints": "https://127.0.0.1:2379"}, "prefix"},
		"with a prefix of NetHSM's":   {etcd(fields{"prefix": "/config"}), "prefix"},
		"with half a user":            {etcd(fields{"username": "u"}), "belong together"},
		"with a bad CA":               {etcd(fields{"ca_cert": "no PEM"}), "PEM"},
		"with a bad client key":       {etcd(fields{"client_cert": "x", "client_key": "y"}), "client certificate"},
		"with an endless timeout":     {etcd(fields{"request_timeout": "2m"}), "out of range"},
		"without TLS":                 {etcd(fields{"endpoints": "http://etcd.example:2379"}), "insecure=true"},
		"insecure with TLS":           {etcd(fields{"insecure": true}), "insecure=false"},
		"with another kind's field":   {etcd(fields{"device": "card"}), `belongs to stores of type "object"`},
		"with a directory outside":    {fields{"type": "file", "dir": "../../etc"}, "not the name of a directory"},
		"with an absolute directory":  {fields{"type": "file", "dir": "/etc"}, "not the name of a directory"},
		"with a directory by link":    {fields{"type": "file", "dir": "link"}, "not a directory of its own"},
		"without a directory":         {fields{"type": "file"}, "not the name of a directory"},
		"on a device that is missing": {fields{"type": "object", "device": "none"}, "not configured"},
		"on no device":                {fields{"type": "object"}, "device is missing"},
		"for a bad application":       {fields{"type": "object", "device": "card", "application": "a b"}, "not a name"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			m.addDevice("card")
			if err := os.MkdirAll(filepath.Join(m.state, "stores"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(t.TempDir(), filepath.Join(m.state, "stores", "link")); err != nil {
				t.Fatal(err)
			}
			m.write("stores/s", test.data).want(t, http.StatusBadRequest).says(t, test.says)
			m.read("stores/s").want(t, http.StatusNotFound)
		})
	}
}

func TestStoreWithoutTLSIsWarnedOf(t *testing.T) {
	m := newMount(t)
	warned := m.write("stores/s", fields{
		"type": "etcd", "endpoints": "http://etcd.example:2379", "prefix": "p", "insecure": true,
	}).want(t, http.StatusOK).warnings
	if len(warned) != 1 || !strings.Contains(warned[0], "without TLS") {
		t.Errorf("warnings = %v", warned)
	}
	if got := m.read("stores/s").ok(t).text("insecure"); got != "true" {
		t.Errorf("insecure = %s", got)
	}
	m.write("stores/s", fields{"endpoints": "https://etcd.example:2379"}).want(t, http.StatusBadRequest).says(t, "insecure=false")
	m.write("stores/s", fields{"endpoints": "https://etcd.example:2379", "insecure": false}).want(t, http.StatusNoContent)
}

func TestStoreKeepsItsType(t *testing.T) {
	m := newMount(t)
	m.write("stores/s", fields{"type": "vault"}).ok(t)
	m.write("stores/s", fields{"type": "file", "dir": "x"}).want(t, http.StatusBadRequest).says(t, "stays so")
}

func TestStoreWhosePasswordWouldGoElsewhereWantsItAgain(t *testing.T) {
	for field, value := range map[string]string{
		"endpoints": "https://127.0.0.9:2379", "server_name": "other", "username": "other", "ca_cert": "",
	} {
		t.Run(field, func(t *testing.T) {
			m := newMount(t)
			m.write("stores/etcd", fields{
				"type": "etcd", "endpoints": "https://127.0.0.1:2379", "prefix": "p", "username": "u", "password": plantedPassword,
				"ca_cert": testCA,
			}).ok(t)
			before := m.stored()["stores/etcd"]
			m.write("stores/etcd", fields{field: value}).want(t, http.StatusBadRequest).says(t, field, "give password in the same write")
			if m.stored()["stores/etcd"] != before {
				t.Error("the refused write changed the record")
			}
			m.write("stores/etcd", fields{"request_timeout": 3}).ok(t)
			m.write("stores/etcd", fields{field: value, "password": plantedPassword}).ok(t)
		})
	}
}

func TestCheckedStoreIsStoredOnlyWhereItWorks(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	m.write("stores/files", fields{"type": "file", "dir": "prod", "check": true}).ok(t)
	m.write("stores/objects", fields{"type": "object", "device": "card", "check": true}).ok(t)
	if left, err := token.Objects(t.Context(), "nitroseal"); err != nil || len(left) != 0 {
		t.Errorf("the check left %v, %v", left, err)
	}
	token.SetError(hsm.ErrUnavailable)
	m.write("stores/other", fields{"type": "object", "device": "card", "check": true}).want(t, http.StatusServiceUnavailable)
	m.write("stores/dead", fields{
		"type": "etcd", "endpoints": "http://127.0.0.1:1", "prefix": "p", "request_timeout": 1, "check": true,
	}).want(t, http.StatusServiceUnavailable).says(t, "nothing was changed")
	token.SetError(nil)
	token.SetCapacity(0)
	m.write("stores/full", fields{"type": "object", "device": "card", "check": true}).want(t, http.StatusInsufficientStorage)
	if names := m.list("stores").text("keys"); names != "[files objects]" {
		t.Errorf("stores = %s", names)
	}
}

// A store that is just being opened may have read where its device was before: it must not be kept.
func TestStoreThatWasBegunBeforeItsDeviceChangedIsNotKept(t *testing.T) {
	m := newMount(t)
	m.addDevice("card")
	drops := m.stores.drops
	m.write("devices/card", fields{"parallel": 2}).ok(t)
	if m.stores.keep("objects", openStore{vaultstore.New(m.storage, "kept/s/", m.stores.locks), "card"}, drops) {
		t.Error("it is kept")
	}
}

func TestStoresThatNeedAStateDirectorySaySo(t *testing.T) {
	m := newMount(t)
	m = mountOn(t, m.storage, m.rack, m.secrets, "")
	m.addDevice("card")
	m.write("stores/f", fields{"type": "file", "dir": "x"}).want(t, http.StatusBadRequest).says(t, "-state-dir")
	m.write("stores/o", fields{"type": "object", "device": "card"}).want(t, http.StatusBadRequest).says(t, "-state-dir")
}
