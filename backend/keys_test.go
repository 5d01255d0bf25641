package backend

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func TestKeyIsAdoptedAndShown(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.AddRSA(t, "unseal", "0a", 2048)
	got := m.write("keys/prod", fields{"device": "card", "key_label": "unseal"}).want(t, http.StatusOK)
	if got.text("state") != "ready" || got.text("latest_version") != "1" || len(got.text("record_sha256")) != 64 {
		t.Errorf("key = %v", got.data)
	}
	versions, _ := got.data["versions"].([]any)
	recipients, _ := versions[0].(map[string]any)["recipients"].([]any)
	recipient, _ := recipients[0].(map[string]any)
	if recipient["device"] != "card" || recipient["key_id"] != "0a" || !strings.HasPrefix(recipient["public_key"].(string), "-----BEGIN PUBLIC KEY-----") {
		t.Errorf("recipient = %v", recipient)
	}
	if names := m.list("keys").ok(t).text("keys"); names != "[prod]" {
		t.Errorf("list = %s", names)
	}
	if created := got.text("created_by"); created != "token-test (entity e-1)" {
		t.Errorf("created_by = %s", created)
	}
	// A client that lost the answer sends the request again.
	m.write("keys/prod", fields{"device": "card", "key_label": "unseal"}).ok(t)
	m.write("keys/prod", fields{"device": "card", "key_label": "another"}).want(t, http.StatusBadRequest).says(t, "exists already")
}

func TestKeyWritesThatAreRefused(t *testing.T) {
	for name, test := range map[string]struct {
		data   fields
		status int
		says   string
	}{
		"that say nothing":               {fields{}, 400, "nothing to do"},
		"that only name a device":        {fields{"device": "card"}, 400, "label or id"},
		"that name no device":            {fields{"key_label": "unseal"}, 400, "device"},
		"on a device that is not there":  {fields{"device": "none", "key_label": "unseal"}, 400, "no device of that name"},
		"of a label that is not there":   {fields{"device": "card", "key_label": "none"}, 400, "not found"},
		"of a label that two keys have":  {fields{"device": "card", "key_label": "twin"}, 400, "2 keys have it"},
		"of a weak key":                  {fields{"device": "card", "key_label": "weak"}, 400, "accept_weak_key"},
		"that make and adopt":            {fields{"device": "card", "key_id": "0a", "generate": true, "algorithm": "rsa-2048"}, 400, "keep one"},
		"that make they know not what":   {fields{"device": "card", "generate": true}, 400, "algorithm"},
		"that make what nobody knows":    {fields{"device": "card", "generate": true, "algorithm": "rsa-1024"}, 400, "rsa-2048"},
		"that adopt an algorithm":        {fields{"device": "card", "key_label": "unseal", "algorithm": "rsa-2048"}, 400, "leave it out"},
		"that configure what is missing": {fields{"deletion_allowed": true}, 404, "no such wrapping key"},
		"with an endless request id":     {fields{"device": "card", "key_label": "unseal", "request_id": strings.Repeat("x", 129)}, 400, "request_id"},
		"with an unknown field":          {fields{"device": "card", "key_labell": "unseal"}, 400, "unknown field"},
		"that restrict what is unmade": {
			fields{"device": "card", "generate": true, "algorithm": "rsa-2048", "backup_confirmed": true}, 400, "when the key's state is",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			token := m.addDevice("card")
			token.AddRSA(t, "unseal", "0a", 2048)
			token.AddRSA(t, "twin", "0b", 2048)
			token.AddRSA(t, "twin", "0c", 2048)
			token.AddRSA(t, "weak", "0d", 2048)
			token.SetTraits("0d", hsm.Traits{Extractable: true, Sensitive: true})
			m.write("keys/prod", test.data).want(t, test.status).says(t, test.says)
			m.read("keys/prod").want(t, http.StatusNotFound)
			if made := token.Generations(); made != 0 {
				t.Errorf("%d HSM keys were made", made)
			}
		})
	}
}

func TestWeakKeyIsAdoptedWhereThatIsAccepted(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.AddRSA(t, "weak", "0d", 2048)
	token.SetTraits("0d", hsm.Traits{Extractable: true, Sensitive: true})
	got := m.write("keys/prod", fields{"device": "card", "key_label": "weak", "accept_weak_key": true}).ok(t)
	if accepted, _ := got.data["accept_weak_key"].(map[string]any); accepted["by"] != "token-test (entity e-1)" {
		t.Errorf("accept_weak_key = %v", got.data["accept_weak_key"])
	}
}

func TestNameThatIsTooLongIsRefused(t *testing.T) {
	m := newMount(t)
	long := strings.Repeat("x", maxName+1)
	for _, path := range []string{"devices/", "stores/", "keys/"} {
		m.write(path+long, fields{"type": "vault"}).want(t, http.StatusBadRequest)
	}
}

func TestKeyIsMadeInTheBackground(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.Delay(50 * time.Millisecond)
	request := fields{"device": "card", "generate": true, "algorithm": "rsa-2048", "request_id": "r1"}
	for range 3 { // an official client sends it three times
		got := m.write("keys/prod", request).want(t, http.StatusOK)
		if state := got.text("state"); state != "generating" && state != "ready" {
			t.Fatalf("state = %s", state)
		}
	}
	m.awaitState("prod", "ready")
	m.write("keys/prod", request).ok(t)
	m.jobs.wait()
	if made := token.Generations(); made != 1 {
		t.Errorf("%d HSM keys were made, want one", made)
	}
	if entries, _ := framework.ListWAL(context.Background(), m.storage); len(entries) != 0 {
		t.Errorf("%d journal entries are left", len(entries))
	}
}

func TestKeyThatIsBeingMadeSaysSo(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.Delay(time.Hour)
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "rsa-2048"}).ok(t)
	if pending, _ := m.read("keys/prod").data["pending"].(map[string]any); pending["algorithm"] != "rsa-2048" {
		t.Errorf("pending = %v", pending)
	}
	m.write("wrap/prod", fields{"plaintext": "YQ=="}).want(t, http.StatusServiceUnavailable).says(t, "is being made")
	m.write("keys/prod", fields{"backup_confirmed": true}).want(t, http.StatusServiceUnavailable)
}

// The plugin may die at any moment while an HSM key is made.
func TestMakingAKeyGoesOnAfterARestart(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.Delay(time.Hour)
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "ecdh-p256"}).ok(t)
	token.Delay(0)
	m = m.remount()
	m.awaitState("prod", "ready")
	m.jobs.wait() // a rollback leaves alone what is in progress
	if made := token.Generations(); made != 1 {
		t.Errorf("%d HSM keys were made, want one", made)
	}
	m.rollBack(t)
	if entries, _ := framework.ListWAL(context.Background(), m.storage); len(entries) != 0 {
		t.Errorf("%d journal entries are left", len(entries))
	}
}

// rollBack does what Vault's rollback manager does with old entries.
func (m *mount) rollBack(t *testing.T) *logical.Response {
	t.Helper()
	response, err := m.HandleRequest(context.Background(), &logical.Request{
		Operation: logical.RollbackOperation, Storage: m.storage, Data: fields{"immediate": true},
	})
	if err != nil {
		t.Fatal(err)
	}
	return response
}

func TestRollbackResumesWhatAnAbsentHSMHeldUp(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.SetError(hsm.ErrUnavailable)
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "rsa-2048"}).ok(t)
	m.jobs.wait()
	if pending, _ := m.read("keys/prod").data["pending"].(map[string]any); pending["last_error"] == "" {
		t.Errorf("pending = %v", pending)
	}
	if response := m.rollBack(t); response == nil || !response.IsError() {
		t.Errorf("rollback with the HSM away = %v, want an error", response)
	}
	token.SetError(nil)
	if response := m.rollBack(t); response != nil {
		t.Errorf("rollback = %v", response)
	}
	m.awaitState("prod", "ready")
}

func TestRollbackUndoesWhatCannotBeMade(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.SetCapacity(0)
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "rsa-2048"}).ok(t)
	m.jobs.wait()
	if response := m.rollBack(t); response != nil {
		t.Errorf("rollback = %v", response)
	}
	m.read("keys/prod").want(t, http.StatusNotFound)
}

func TestKeyThatIsBeingMadeIsUndoneByDeletion(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.SetError(hsm.ErrUnavailable)
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "rsa-2048"}).ok(t)
	m.jobs.wait()
	token.SetError(nil)
	m.delete("keys/prod", nil).ok(t)
	m.read("keys/prod").want(t, http.StatusNotFound)
	if response := m.rollBack(t); response != nil {
		t.Errorf("rollback = %v", response)
	}
}

func TestKeyThatCannotBeJournalledIsNotBegun(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	m.storage.fail(errStorage, nil)
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "rsa-2048"}).want(t, http.StatusInternalServerError)
	m.storage.fail(nil, nil)
	m.jobs.wait()
	if token.Generations() != 0 {
		t.Error("an HSM key was made that nobody remembers")
	}
}

func TestKeyIsDeletedOnlyWhereThatIsAllowed(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "ecdh-p256"}).ok(t)
	m.awaitState("prod", "ready")
	m.delete("keys/prod", nil).want(t, http.StatusBadRequest).says(t, "deletion_allowed=true")
	m.write("keys/prod", fields{"deletion_allowed": true}).ok(t)
	m.delete("keys/prod", fields{"delete_hsm_keys": true}).want(t, http.StatusNoContent)
	m.read("keys/prod").want(t, http.StatusNotFound)
	m.delete("keys/prod", nil).ok(t)
	if keys, err := token.FindKeys(context.Background(), hsm.KeyQuery{}); err != nil || len(keys) != 0 {
		t.Errorf("the HSM still has %d keys, %v", len(keys), err)
	}
}

// recipient returns the first recipient of a key's first version.
func (r reply) recipient(t testing.TB) map[string]any {
	t.Helper()
	return r.ok(t).data["versions"].([]any)[0].(map[string]any)["recipients"].([]any)[0].(map[string]any)
}

// Whoever may write another mount's configuration needs the PIN to adopt an HSM key, and no more.
func TestHSMKeyThatAnotherMountNeedsIsNotDestroyed(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	sealed := m.write("wrap/prod", fields{"plaintext": "aGVsbG8="}).ok(t).text("ciphertext")
	recipient := m.read("keys/prod").recipient(t)
	if recipient["generated"] != false {
		t.Errorf("an adopted key is shown as generated = %v", recipient["generated"])
	}
	other := mountOn(t, &faultyStorage{Storage: new(logical.InmemStorage)}, m.rack, t.TempDir(), t.TempDir())
	other.write("devices/d", fields{"module": testModule, "serial": "SN-prod-hsm", "pin": rightPIN}).ok(t)
	other.write("keys/mine", fields{"device": "d", "key_id": recipient["key_id"]}).ok(t)
	other.write("keys/mine", fields{"deletion_allowed": true}).ok(t)
	other.delete("keys/mine", fields{"delete_hsm_keys": true}).want(t, http.StatusBadRequest).says(t, "adopted", "pkcs11-tool --delete-object")
	m.write("unwrap/prod", fields{"ciphertext": sealed}).ok(t)
	other.delete("keys/mine", nil).ok(t)
	m.write("unwrap/prod", fields{"ciphertext": sealed}).ok(t)
}

func TestHSMKeyThatServedEncryptIsNotDestroyedInTwoSteps(t *testing.T) {
	m := newMount(t)
	m.addDevice("card")
	m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "ecdh-p256"}).ok(t)
	recipient := m.awaitState("prod", "ready").recipient(t)
	if recipient["generated"] != true {
		t.Errorf("a key that was made is shown as generated = %v", recipient["generated"])
	}
	m.read("keys/prod/backup").ok(t)
	m.write("keys/prod", fields{"accept_single_hsm": true, "deletion_allowed": true}).ok(t)
	m.write("encrypt/prod", fields{"plaintext": "YQ=="}).ok(t)
	m.delete("keys/prod", fields{"delete_hsm_keys": true}).want(t, http.StatusBadRequest).says(t, "served encrypt/")
	m.delete("keys/prod", nil).ok(t)
	m.write("keys/again", fields{"device": "card", "key_id": recipient["key_id"]}).ok(t)
	m.write("keys/again", fields{"deletion_allowed": true}).ok(t)
	m.delete("keys/again", fields{"delete_hsm_keys": true}).want(t, http.StatusBadRequest).says(t, "adopted")
}

func TestRequestToMakeAKeyIsNotAnsweredByOneThatWasAdopted(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	request := fields{"device": "prod-hsm", "generate": true, "algorithm": "rsa-2048", "key_label": "label-prod"}
	m.write("keys/prod", request).want(t, http.StatusBadRequest).says(t, "exists already")
}

// A client repeats by itself what was answered with 5xx, and a fast HSM has made the key by then.
func TestARotationThatIsSentAgainMakesNoSecondKey(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	for range 3 {
		m.write("keys/prod/rotate", fields{"generate": true}).ok(t)
		m.jobs.wait()
	}
	if got := m.read("keys/prod"); got.text("latest_version") != "2" || token.Generations() != 1 {
		t.Errorf("version %s after %d generations", got.text("latest_version"), token.Generations())
	}
	m.write("keys/prod/rotate", fields{"generate": true, "request_id": "once more"}).ok(t)
	m.jobs.wait()
	if got := m.read("keys/prod"); got.text("latest_version") != "3" {
		t.Errorf("a request_id of its own gave version %s", got.text("latest_version"))
	}
	key, err := m.keys.Get(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	newest := key.Versions[2]
	again := &keyring.RotateRequest{Generate: &keyring.GenerateRequest{
		Device: newest.Recipients[0].Device, Algorithm: newest.Recipients[0].Kind, By: newest.CreatedBy,
	}}
	if !isRepeatedRotation(key, again, newest.Created.Add(59*time.Second)) || isRepeatedRotation(key, again, newest.Created.Add(time.Minute)) {
		t.Error("a minute is not where it ends")
	}
	again.Generate.By = "somebody else"
	if isRepeatedRotation(key, again, newest.Created) {
		t.Error("another caller's request was taken for a repetition")
	}
}

func TestKeyIsRotatedAndOldEnvelopesOpen(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	old := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0"}).ok(t).text("ciphertext")

	m.write("keys/prod/rotate", fields{}).want(t, http.StatusBadRequest).says(t, "generate=true")
	m.write("keys/none/rotate", fields{"generate": true}).want(t, http.StatusNotFound)
	m.write("keys/prod/rotate", fields{"generate": true, "request_id": "r"}).ok(t) // device and algorithm as before
	m.awaitState("prod", "ready")
	m.write("keys/prod/rotate", fields{"generate": true, "request_id": "r"}).ok(t)
	m.jobs.wait()
	if got := m.read("keys/prod"); got.text("latest_version") != "2" || token.Generations() != 1 {
		t.Errorf("key = %v, %d HSM keys made", got.data, token.Generations())
	}

	opened := m.write("unwrap/prod", fields{"ciphertext": old}).ok(t)
	if opened.text("plaintext") != "c2VjcmV0" || opened.text("key_version") != "1" || opened.text("rewrap_due") != "true" {
		t.Errorf("unwrap = %v", opened.data)
	}
	fresh := m.write("rewrap/prod", fields{"ciphertext": old}).ok(t)
	if fresh.text("key_version") != "2" || fresh.text("changed") != "true" {
		t.Errorf("rewrap = %v", fresh.data)
	}
	before := token.Operations()
	unchanged := m.write("rewrap/prod", fields{"ciphertext": fresh.text("ciphertext")}).ok(t)
	if unchanged.text("changed") != "false" || token.Operations() != before {
		t.Errorf("a second rewrap = %v, %d operations", unchanged.data, token.Operations()-before)
	}
	m.write("keys/prod", fields{"min_decryption_version": 2}).ok(t)
	m.write("unwrap/prod", fields{"ciphertext": old}).want(t, http.StatusBadRequest).says(t, "min_decryption_version")

	token.AddRSA(t, "third", "33", 2048)
	if got := m.write("keys/prod/rotate", fields{"device": "prod-hsm", "key_label": "third"}).ok(t); got.text("latest_version") != "3" {
		t.Errorf("after adopting a third: %v", got.data)
	}
	again := m.write("keys/prod/rotate", fields{"device": "prod-hsm", "key_label": "third"}).ok(t) // its answer was lost
	if again.text("latest_version") != "3" {
		t.Errorf("after the same rotation again: %v", again.data)
	}
	m.write("keys/prod/rotate", fields{"device": "prod-hsm", "key_label": "label-prod"}).want(t, http.StatusBadRequest).says(t, "another HSM key")
	m.write("keys/prod/rotate", fields{"device": "prod-hsm", "key_label": "none"}).want(t, http.StatusBadRequest)
}

func TestSecondHSMOpensWhereTheFirstIsAway(t *testing.T) {
	m := newMount(t)
	first := m.addKey("prod")
	second := m.addDevice("spare")
	second.AddEC(t, "spare-key", "77", p256())
	m.write("keys/prod/recipients", fields{"device": "spare", "key_label": "none"}).want(t, http.StatusBadRequest)
	m.write("keys/prod/recipients", fields{"device": "spare", "key_label": "spare-key"}).ok(t)
	m.write("keys/prod/recipients", fields{"device": "spare", "key_label": "spare-key"}).ok(t) // its answer was lost
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0"}).ok(t)
	if wrapped.text("recipients") != "2" {
		t.Errorf("wrap = %v", wrapped.data)
	}
	first.SetError(hsm.ErrUnavailable)
	m.write("unwrap/prod", fields{"ciphertext": wrapped.data["ciphertext"]}).ok(t)
	second.SetError(hsm.ErrUnavailable)
	m.write("unwrap/prod", fields{"ciphertext": wrapped.data["ciphertext"]}).want(t, http.StatusServiceUnavailable)
}

func TestKeyRecordBringsAKeyBackInAnotherMount(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0", "context": "prod"}).ok(t).text("ciphertext")
	backup := m.read("keys/prod/backup").ok(t)
	if backup.text("sha256") != m.read("keys/prod").text("record_sha256") {
		t.Error("the SHA-256 of the backup is not the one that the key shows")
	}

	other := mountOn(t, &faultyStorage{Storage: new(logical.InmemStorage)}, m.rack, m.secrets, m.state)
	other.write("devices/new-name", fields{"module": testModule, "serial": "SN-prod-hsm", "pin": rightPIN}).ok(t)
	restore := fields{"key_record": backup.text("key_record"), "sha256": backup.text("sha256"), "devices": fields{"prod-hsm": "new-name"}}

	other.write("keys/prod/restore", fields{"sha256": "x"}).want(t, http.StatusBadRequest).says(t, "key_record is missing")
	other.write("keys/prod/restore", fields{"key_record": "x"}).want(t, http.StatusBadRequest).says(t, "sha256 is missing")
	wrong := fields{"key_record": backup.text("key_record"), "sha256": strings.Repeat("0", 64), "devices": fields{"prod-hsm": "new-name"}}
	other.write("keys/prod/restore", wrong).want(t, http.StatusBadRequest).says(t, "not the confirmed one")
	other.write("keys/else/restore", restore).want(t, http.StatusBadRequest)
	other.write("keys/prod/restore", restore).ok(t)
	other.write("keys/prod/restore", restore).ok(t) // sent again
	if got := other.write("unwrap/prod", fields{"ciphertext": wrapped, "context": "prod"}).ok(t); got.text("plaintext") != "c2VjcmV0" {
		t.Errorf("unwrap = %v", got.data)
	}
}

func TestAChangedKeyRecordIsTakenOverTheKeyOfAnotherMount(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	other := mountOn(t, &faultyStorage{Storage: new(logical.InmemStorage)}, m.rack, m.secrets, m.state)
	other.write("devices/prod-hsm", fields{"module": testModule, "serial": "SN-prod-hsm", "pin": rightPIN}).ok(t)
	restore := func(accept bool) reply {
		backup := m.read("keys/prod/backup").ok(t)
		return other.write("keys/prod/restore", fields{
			"key_record": backup.text("key_record"), "sha256": backup.text("sha256"), "accept_recipients": accept,
		})
	}
	old := m.read("keys/prod/backup").ok(t)
	restore(false).ok(t)
	restore(false).ok(t) // it brings nothing
	other.write("stores/files", fields{"type": "file", "dir": "other"}).ok(t)
	other.write("keys/prod", fields{"accept_single_hsm": true}).ok(t)
	other.write("material/site/code", fields{"fields": fields{"code": "YQ=="}, "key": "prod", "store": "files"}).ok(t)

	m.addDevice("second").AddRSA(t, "spare", "99", 2048)
	other.write("devices/second", fields{"module": testModule, "serial": "SN-second", "pin": rightPIN}).ok(t)
	m.write("keys/prod/rotate", fields{"device": "second", "key_label": "spare"}).ok(t)
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0"}).ok(t).text("ciphertext")
	restore(false).want(t, http.StatusBadRequest).says(t, "accept_recipients=true").says(t, `"second"`)
	if got := other.read("keys/prod").ok(t); got.text("latest_version") != "1" {
		t.Errorf("a recipient came unasked: %v", got.data)
	}
	if got := restore(true).ok(t); got.text("latest_version") != "2" || got.data["accept_single_hsm"] == nil {
		t.Errorf("restored: %v", got.data)
	}
	other.write("unwrap/prod", fields{"ciphertext": wrapped}).ok(t)
	other.awaitRewrap("prod", "done")
	if got := other.read("material/site/code").ok(t); got.text("key_version") != "2" {
		t.Errorf("the material is sealed with version %s", got.text("key_version"))
	}
	other.write("keys/prod/restore", fields{"key_record": old.text("key_record"), "sha256": old.text("sha256")}).
		want(t, http.StatusBadRequest).says(t, "it lacks version 2")
}

func TestPublicKeysAreReadAsPEM(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	got := m.read("keys/prod/public.pem").ok(t)
	if !strings.HasPrefix(got.text("public_key"), "-----BEGIN PUBLIC KEY-----") || got.text("version") != "1" {
		t.Errorf("public.pem = %v", got.data)
	}
	m.do(logical.ReadOperation, "keys/prod/public.pem", fields{"version": 2}).want(t, http.StatusNotFound)
}

func rotateTo(device, label string) keyring.RotateRequest {
	return keyring.RotateRequest{Adopt: &keyring.AdoptRequest{Device: device, Label: label}}
}
