package backend

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	vaultstore "vault-plugin-secrets-nitrokey/internal/store/vault"
)

// unsealKeys are five fields, as an operator would store them.
func unsealKeys() fields {
	return fields{"key_1": "b25l", "key_2": "dHdv", "key_3": "dGhyZWU=", "key_4": "Zm91cg==", "key_5": "Zml2ZQ=="}
}

// newKeeping is a mount with a key "prod" on its HSM and a store of each kind that needs no server.
func newKeeping(t *testing.T) (*mount, *testToken) {
	t.Helper()
	m := newMount(t)
	token := m.addKey("prod")
	m.write("stores/own", fields{"type": "vault"}).ok(t)
	m.write("stores/files", fields{"type": "file", "dir": "prod"}).ok(t)
	m.write("stores/objects", fields{"type": "object", "device": "prod-hsm"}).ok(t)
	return m, token
}

func TestMaterialIsKeptInEveryStoreAndOpensWithOneOperation(t *testing.T) {
	m, token := newKeeping(t)
	for _, store := range []string{"own", "files", "objects"} {
		t.Run(store, func(t *testing.T) {
			item := "material/" + store + "/unseal-keys"
			written := m.write(item, fields{"fields": unsealKeys(), "key": "prod", "store": store}).want(t, http.StatusOK)
			if written.text("generation") != "1" || written.text("state") != "current" || written.text("hsms") != "1" {
				t.Errorf("write = %v", written.data)
			}
			got := m.read(item).want(t, http.StatusOK)
			if got.text("field_names") != "[key_1 key_2 key_3 key_4 key_5]" || got.text("store") != store || got.text("updated_by") == "" {
				t.Errorf("read = %v", got.data)
			}
			m.write("unwrap/prod", fields{"ciphertext": "{}"}) // finds the HSM key, so that the count below is of one opening
			before := token.Operations()
			opened := m.write(item+"/open", nil).want(t, http.StatusOK)
			if operations := token.Operations() - before; operations != 1 {
				t.Errorf("opening five fields cost %d operations", operations)
			}
			if secrets, _ := opened.data["fields"].(map[string]any); secrets["key_3"] != "dGhyZWU=" || len(secrets) != 5 {
				t.Errorf("open = %v", opened.data)
			}
			m.delete(item, nil).want(t, http.StatusNoContent)
			m.read(item).want(t, http.StatusNotFound)
			m.write(item+"/open", nil).want(t, http.StatusNotFound)
			m.delete(item, nil).ok(t)
		})
	}
}

func TestMaterialIsListedByCluster(t *testing.T) {
	m, _ := newKeeping(t)
	m.list("material/").want(t, http.StatusNotFound)
	for _, item := range []string{"b/unseal-keys", "a/root-token", "a/unseal-keys"} {
		m.write("material/"+item, fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "own"}).ok(t)
	}
	if names := m.list("material").ok(t).text("keys"); names != "[a b]" {
		t.Errorf("clusters = %s", names)
	}
	if names := m.list("material/a/").ok(t).text("keys"); names != "[root-token unseal-keys]" {
		t.Errorf("items = %s", names)
	}
	m.list("material/c").want(t, http.StatusNotFound)
}

func TestMaterialGoesToTheDefaults(t *testing.T) {
	m, _ := newKeeping(t)
	m.addKey("other")
	one := fields{"fields": fields{"x": "YQ=="}}
	m.write("material/c/i", one).want(t, http.StatusBadRequest).says(t, "store")
	m.write("config", fields{"default_store": "files"}).ok(t)
	m.write("material/c/i", one).want(t, http.StatusBadRequest).says(t, "key is missing", "default_key")
	m.write("config", fields{"default_key": "prod"}).ok(t)
	if got := m.write("material/c/i", one).ok(t); got.text("key") != "prod" || got.text("store") != "files" {
		t.Errorf("write = %v", got.data)
	}
	// What an item has goes before what the mount prefers.
	m.write("config", fields{"default_key": "other", "default_store": "own"}).ok(t)
	if got := m.write("material/c/i", one).ok(t); got.text("key") != "prod" || got.text("store") != "files" {
		t.Errorf("second write = %v", got.data)
	}
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "store": "own"}).want(t, http.StatusBadRequest).says(t, "files")
}

func TestMaterialWritesThatAreRefused(t *testing.T) {
	m, _ := newKeeping(t)
	large := base64.StdEncoding.EncodeToString(make([]byte, 40<<10))
	item := func(changes fields) fields {
		all := fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "own"}
		for field, value := range changes {
			all[field] = value
		}
		return all
	}
	for name, test := range map[string]struct {
		data   fields
		status int
		says   string
	}{
		"without fields":               {item(fields{"fields": fields{}}), 400, "fields is missing"},
		"with fields that are no map":  {item(fields{"fields": "x"}), 400, "fields"},
		"with a field of no base64":    {item(fields{"fields": fields{"x": "no base64"}}), 400, "field x is not base64"},
		"with a badly named field":     {item(fields{"fields": fields{"a b": "YQ=="}}), 400, "field name"},
		"with fields that are too big": {item(fields{"fields": fields{"x": large, "y": large}}), 400, "65536"},
		"with a negative cas":          {item(fields{"cas": -1}), 400, "not a generation"},
		"with a cas where none is":     {item(fields{"cas": 3}), 400, "generation"},
		"for a key that is missing":    {item(fields{"key": "none"}), 404, "no such wrapping key"},
		"in a store that is missing":   {item(fields{"store": "none"}), 400, "not configured"},
		"with an unknown field":        {item(fields{"sas": 3}), 400, "unknown field"},
		"of this very Vault in itself": {item(fields{"cluster_id": ownCluster}), 400, "the Vault that this mount lives in"},
	} {
		t.Run(name, func(t *testing.T) {
			m.write("material/c/i", test.data).want(t, test.status).says(t, test.says)
			m.do(logical.ReadOperation, "material/c/i", fields{"store": "own"}).want(t, http.StatusNotFound)
		})
	}
}

func TestStorageOfThisVeryVaultIsWarnedOf(t *testing.T) {
	m, _ := newKeeping(t)
	warned := func(data fields) string {
		return strings.Join(m.write("material/c/i", data).ok(t).warnings, "\n")
	}
	one := fields{"x": "YQ=="}
	if got := warned(fields{"fields": one, "key": "prod", "store": "own"}); !strings.Contains(got, "storage of this very Vault") {
		t.Errorf("warnings = %q", got)
	}
	if got := warned(fields{"fields": one, "cluster_id": "another"}); strings.Contains(got, "this very Vault") {
		t.Errorf("warnings about another cluster = %q", got)
	}
}

func TestOnlyTheExpectedGenerationIsWrittenOver(t *testing.T) {
	m, _ := newKeeping(t)
	write := func(cas int, value string) reply {
		return m.write("material/c/i", fields{"fields": fields{"x": value}, "key": "prod", "store": "files", "cas": cas})
	}
	write(0, "YQ==").ok(t)
	write(0, "Yg==").want(t, http.StatusBadRequest).says(t, "generation")
	write(1, "Yg==").ok(t)
	write(1, "Yw==").want(t, http.StatusBadRequest)
	if secrets, _ := m.write("material/c/i/open", nil).ok(t).data["fields"].(map[string]any); secrets["x"] != "Yg==" {
		t.Errorf("fields = %v", secrets)
	}
	m.delete("material/c/i", fields{"cas": 1}).want(t, http.StatusBadRequest)
	m.delete("material/c/i", fields{"cas": 2}).ok(t)
}

// Whoever can write the store may put an older envelope back, or move one to another name.
func TestEnvelopesThatWereMovedOrPutBackDoNotOpen(t *testing.T) {
	m, _ := newKeeping(t)
	ctx := context.Background()
	write := func(item, value string) {
		m.write("material/"+item, fields{"fields": fields{"x": value}, "key": "prod", "store": "own"}).ok(t)
	}
	write("c/i", "YQ==")
	old := m.entry(t, "kept/own/material/c/i")
	write("c/i", "Yg==")
	write("c/j", "Yw==")
	newest := m.entry(t, "kept/own/material/c/i")

	for name, planted := range map[string]*logical.StorageEntry{
		"an older generation": {Key: newest.Key, Value: old.Value},
		"another item's":      {Key: newest.Key, Value: m.entry(t, "kept/own/material/c/j").Value},
	} {
		t.Run(name, func(t *testing.T) {
			if err := m.storage.Put(ctx, planted); err != nil {
				t.Fatal(err)
			}
			m.write("material/c/i/open", nil).want(t, http.StatusBadRequest)
			m.write("material/c/i/accept-generation", fields{"generation": 7}).want(t, http.StatusBadRequest)
		})
	}
	if err := m.storage.Put(ctx, &logical.StorageEntry{Key: newest.Key, Value: old.Value}); err != nil {
		t.Fatal(err)
	}
	if got := m.read("material/c/i").ok(t); got.text("state") != "stale" || got.text("expected_generation") != "2" || len(got.warnings) == 0 {
		t.Errorf("read = %v", got)
	}
	m.write("material/c/i/accept-generation", nil).want(t, http.StatusBadRequest).says(t, "generation is missing")
	m.write("material/c/i/accept-generation", fields{"generation": 1}).ok(t)
	if secrets, _ := m.write("material/c/i/open", nil).ok(t).data["fields"].(map[string]any); secrets["x"] != "YQ==" {
		t.Errorf("fields = %v", secrets)
	}
}

func (m *mount) entry(t *testing.T, key string) *logical.StorageEntry {
	t.Helper()
	entry, err := m.storage.Get(context.Background(), key)
	if err != nil || entry == nil {
		t.Fatalf("%s: %v, %v; storage has %v", key, entry, err, keysOf(m.stored()))
	}
	return entry
}

func TestMaterialOutlivesItsMount(t *testing.T) {
	m, _ := newKeeping(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	backup := m.read("keys/prod/backup").ok(t)

	other := mountOn(t, &faultyStorage{Storage: new(logical.InmemStorage)}, m.rack, m.secrets, m.state)
	other.write("devices/prod-hsm", fields{"module": testModule, "serial": "SN-prod-hsm", "pin": rightPIN}).ok(t)
	other.write("keys/prod/restore", fields{"key_record": backup.text("key_record"), "sha256": backup.text("sha256")}).ok(t)
	other.write("stores/files", fields{"type": "file", "dir": "prod"}).want(t, http.StatusBadRequest).says(t, "take_over=true")
	other.write("stores/files", fields{"type": "file", "dir": "prod", "take_over": true}).ok(t)
	got := other.do(logical.ReadOperation, "material/c/i", fields{"store": "files"}).ok(t)
	if got.text("state") != "unrecorded" {
		t.Errorf("read = %v", got.data)
	}
	opened := other.write("material/c/i/open", fields{"store": "files"}).ok(t)
	if secrets, _ := opened.data["fields"].(map[string]any); secrets["x"] != "YQ==" || len(opened.warnings) == 0 {
		t.Errorf("open = %v, warnings %v", opened.data, opened.warnings)
	}
	if got := other.read("material/c/i").ok(t); got.text("state") != "current" {
		t.Errorf("read after the first open = %v", got.data)
	}
}

func TestTwoNamesOfOneHSMCountAsOne(t *testing.T) {
	m, token := newKeeping(t)
	token.AddRSA(t, "second", "77", 2048)
	m.write("devices/twin", fields{"module": testModule, "serial": "SN-prod-hsm", "pin": rightPIN}).ok(t)
	m.write("keys/prod/recipients", fields{"device": "twin", "key_id": "77"}).ok(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	got := m.read("material/c/i").ok(t)
	if got.text("hsms") != "1" || !strings.Contains(strings.Join(got.warnings, " "), "opens on one HSM only") {
		t.Errorf("hsms = %s, warnings %v", got.text("hsms"), got.warnings)
	}
}

func TestRotationSealsStoredMaterialAnew(t *testing.T) {
	m, token := newKeeping(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	m.write("keys/prod/rotate", fields{"generate": true}).ok(t)
	m.awaitState("prod", "ready")
	m.awaitRewrap("prod", "done")
	got := m.read("material/c/i").ok(t)
	if got.text("key_version") != "2" || got.text("generation") != "2" || got.text("rewrap_due") != "false" {
		t.Errorf("read = %v", got.data)
	}
	spare := m.addDevice("spare")
	spare.AddRSA(t, "spare", "99", 2048)
	m.write("keys/prod/recipients", fields{"device": "spare", "key_label": "spare"}).ok(t)
	m.awaitRewrap("prod", "done")
	if got := m.read("material/c/i").ok(t); got.text("hsms") != "2" {
		t.Errorf("read = %v", got.data)
	}
	token.SetError(hsm.ErrUnavailable)
	m.write("material/c/i/open", nil).ok(t)
	m.jobs.wait()
	if entries, _ := framework.ListWAL(context.Background(), m.storage); len(entries) != 0 {
		t.Errorf("%d journal entries are left", len(entries))
	}
}

// awaitRewrap waits until the background job is over and compares what it left.
func (m *mount) awaitRewrap(key, state string) map[string]any {
	m.t.Helper()
	m.jobs.wait()
	rewrap, _ := m.read("keys/" + key).ok(m.t).data["rewrap"].(map[string]any)
	if rewrap["state"] != state {
		m.t.Fatalf("rewrap = %v, want state %s", rewrap, state)
	}
	return rewrap
}

func TestSealingAnewGoesOnWhereTheHSMWasAway(t *testing.T) {
	m, token := newKeeping(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	spare := m.addDevice("spare")
	spare.AddRSA(t, "spare", "99", 2048)
	token.SetError(hsm.ErrUnavailable)
	m.write("keys/prod/rotate", fields{"device": "spare", "key_label": "spare"}).ok(t)
	m.awaitRewrap("prod", "incomplete")
	if response := m.rollBack(t); response == nil || !response.IsError() {
		t.Errorf("rollback with the HSM away = %v, want an error", response)
	}
	token.SetError(nil)
	if response := m.rollBack(t); response != nil {
		t.Errorf("rollback = %v", response.Data)
	}
	m.awaitRewrap("prod", "done")
	if got := m.read("material/c/i").ok(t); got.text("key_version") != "2" {
		t.Errorf("read = %v", got.data)
	}
}

func TestSealingAnewGoesOnAfterARestart(t *testing.T) {
	m, _ := newKeeping(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	spare := m.addDevice("spare")
	spare.AddRSA(t, "spare", "99", 2048)
	m.close() // the process dies: no job runs any more
	if _, err := m.keys.Rotate(context.Background(), "prod", rotateTo("spare", "spare")); err != nil {
		t.Fatal(err)
	}
	m.startRewrap(context.Background(), "prod", "test")
	m = m.remount()
	m.awaitRewrap("prod", "done")
	if got := m.read("material/c/i").ok(t); got.text("key_version") != "2" {
		t.Errorf("read = %v", got.data)
	}
}

func TestKeyAndStoreInUseAreDeletedByForceOnly(t *testing.T) {
	m, _ := newKeeping(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	m.write("keys/prod", fields{"deletion_allowed": true}).ok(t)
	m.delete("keys/prod", nil).want(t, http.StatusBadRequest).says(t, "1 items of material", "force=true")
	m.delete("stores/files", nil).want(t, http.StatusBadRequest).says(t, "c/i", "force=true")
	m.delete("stores/own", nil).ok(t)
	m.delete("stores/files", fields{"force": true}).ok(t)
	m.delete("keys/prod", nil).want(t, http.StatusBadRequest).says(t, "not known whether", "force=true")
	if err := m.keys.Delete(context.Background(), "prod", keyring.DeleteRequest{}); !errors.Is(err, keyring.ErrInUse) {
		t.Errorf("the keyring itself does not ask: %v", err)
	}
	m.delete("keys/prod", fields{"force": true}).ok(t)
}

func TestAKeyIsNotSaidToBeInUseWhereAStoreIsAwayForAWhile(t *testing.T) {
	m, _ := newKeeping(t)
	m.write("stores/etcd", fields{"type": "etcd", "endpoints": "http://127.0.0.1:1", "prefix": "p", "request_timeout": 1}).ok(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	m.write("keys/prod", fields{"deletion_allowed": true}).ok(t)
	records := vaultstore.New(m.storage, "", new(vaultstore.Locks))
	record, err := records.Get(t.Context(), "material/c/i")
	if err == nil { // nothing can be written to a store that is away: the item's record is moved there instead
		moved := bytes.Replace(record.Value, []byte(`"store":"files"`), []byte(`"store":"etcd"`), 1)
		_, err = records.Put(t.Context(), "material/c/i", moved, record.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.delete("keys/prod", nil).want(t, http.StatusServiceUnavailable).says(t, "etcd", "try again", "force=true")
	m.read("keys/prod").ok(t)
	m.delete("keys/prod", fields{"force": true}).ok(t)
}

func TestStoreThatIsAwayIsAnsweredWith503(t *testing.T) {
	m, _ := newKeeping(t)
	m.write("stores/etcd", fields{"type": "etcd", "endpoints": "http://127.0.0.1:1", "prefix": "p", "request_timeout": 1}).ok(t)
	m.write("config", fields{"request_timeout": 2}).ok(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "etcd"}).want(t, http.StatusServiceUnavailable)
	stores, _ := m.read("health").ok(t).data["stores"].(map[string]any)
	if etcd, _ := stores["etcd"].(map[string]any); etcd["usable"] != false || etcd["error"] == "" {
		t.Errorf("health of etcd = %v", etcd)
	}
}

func TestTokenWithoutRoomIsAnsweredWith507(t *testing.T) {
	m, token := newKeeping(t)
	token.SetCapacity(1) // the key
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "objects"}).want(t, http.StatusInsufficientStorage).
		says(t, "no room")
}
