package backend

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
)

func TestDeviceIsReadWithoutItsSecrets(t *testing.T) {
	m := newMount(t)
	m.write("devices/card", fields{
		"type": "pkcs11", "module": testModule, "token_label": "prod", "pin": rightPIN, "decrypt_timeout": "30s", "parallel": 2,
	}).want(t, http.StatusNoContent)
	got := m.read("devices/card").want(t, http.StatusOK)
	for field, want := range map[string]string{
		"type": "pkcs11", "module": testModule, "token_label": "prod", "pin_set": "true", "decrypt_timeout": "30", "parallel": "2",
	} {
		if got.text(field) != want {
			t.Errorf("%s = %s, want %s", field, got.text(field), want)
		}
	}
	if _, shown := got.data["pin"]; shown {
		t.Error("the PIN is shown")
	}
	if names := m.list("devices/").ok(t).text("keys"); names != "[card]" {
		t.Errorf("list = %s", names)
	}
	m.delete("devices/card", nil).ok(t)
	m.read("devices/card").want(t, http.StatusNotFound)
	m.list("devices/").want(t, http.StatusNotFound)
}

func TestDeviceWriteKeepsWhatItLeavesOut(t *testing.T) {
	m := newMount(t)
	m.addDevice("card")
	m.write("devices/card", fields{"parallel": 4}).ok(t)
	got := m.read("devices/card")
	if got.text("parallel") != "4" || got.text("serial") != "SN-card" || got.text("pin_set") != "true" {
		t.Errorf("after a partial write: %v", got.data)
	}
}

func TestDeviceWritesThatAreRefused(t *testing.T) {
	whole := func(changes fields) fields {
		device := fields{"module": testModule, "serial": "SN", "pin": rightPIN}
		for field, value := range changes {
			if value == nil {
				delete(device, field)
			} else {
				device[field] = value
			}
		}
		return device
	}
	for name, test := range map[string]struct {
		data fields
		says string
	}{
		"without a module":               {whole(fields{"module": nil}), "module"},
		"with a module by bare name":     {whole(fields{"module": "opensc-pkcs11.so"}), "absolute path"},
		"without a token":                {whole(fields{"serial": nil}), "no token is chosen"},
		"with two ways to the token":     {whole(fields{"token_label": "prod"}), "keep one"},
		"with a negative slot":           {whole(fields{"serial": nil, "slot": -1}), "not a slot number"},
		"without a PIN":                  {whole(fields{"pin": nil}), "no PIN"},
		"with an empty PIN":              {whole(fields{"pin": ""}), "no PIN"},
		"with both PIN and file":         {whole(fields{"pin_file": "pin"}), "keep one"},
		"with a file outside":            {whole(fields{"pin": nil, "pin_file": "/etc/passwd"}), "secrets directory"},
		"with a file that climbs out":    {whole(fields{"pin": nil, "pin_file": "../pin"}), "secrets directory"},
		"with a file that is not there":  {whole(fields{"pin": nil, "pin_file": "no-such"}), "cannot be read"},
		"of type nethsm":                 {whole(fields{"type": "nethsm"}), `"module" belongs to devices of type "pkcs11"`},
		"with a field of a NetHSM":       {whole(fields{"urls": "https://a"}), `"urls" belongs to devices of type "nethsm"`},
		"of an unknown type":             {whole(fields{"type": "tpm"}), "not known"},
		"with too much parallel":         {whole(fields{"parallel": 1000}), "out of range"},
		"with a time limit of an hour":   {whole(fields{"decrypt_timeout": "1h"}), "out of range"},
		"with a field that is not known": {whole(fields{"pim": "123456"}), `unknown field "pim"; this path knows admin_password, admin_password_file`},
		"with another name in the body":  {whole(fields{"name": "other"}), "leave the field out"},
		"with a slot that is no number":  {whole(fields{"serial": nil, "slot": "first"}), "slot"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			got := m.write("devices/card", test.data).want(t, http.StatusBadRequest).says(t, test.says)
			if strings.Contains(got.message, rightPIN) {
				t.Errorf("the message shows the PIN: %s", got.message)
			}
			m.read("devices/card").want(t, http.StatusNotFound)
		})
	}
}

func TestDeviceWhoseSecretWouldGoElsewhereWantsItAgain(t *testing.T) {
	for field, value := range map[string]any{
		"module": "/usr/lib/other/module.so", "serial": "SN-other", "token_label": "other", "slot": 3,
	} {
		t.Run(field, func(t *testing.T) {
			m := newMount(t)
			m.addDevice("card")
			before := m.stored()["devices/card"]
			m.write("devices/card", fields{field: value, "parallel": 7}).want(t, http.StatusBadRequest).
				says(t, field, "give pin or pin_file in the same write", "nothing was changed")
			if after := m.stored()["devices/card"]; after != before {
				t.Errorf("the refused write changed the record:\n%s\n%s", before, after)
			}
			m.write("devices/card", fields{field: value, "pin": rightPIN}).ok(t)
		})
	}
}

// A file is a secret as well: whoever may write the configuration must not send what it holds elsewhere unawares.
func TestDeviceWhosePINFileWouldGoElsewhereWantsItAgain(t *testing.T) {
	for field, value := range map[string]any{
		"module": "/usr/lib/other/module.so", "serial": "SN-other", "token_label": "other", "slot": 3,
	} {
		t.Run(field, func(t *testing.T) {
			m := newMount(t)
			m.secretFile("pin", rightPIN)
			m.write("devices/card", fields{"module": testModule, "serial": "SN-card", "pin_file": "pin"}).ok(t)
			before := m.stored()["devices/card"]
			m.write("devices/card", fields{field: value, "parallel": 7}).want(t, http.StatusBadRequest).
				says(t, field, "give pin or pin_file in the same write", "nothing was changed")
			if m.stored()["devices/card"] != before {
				t.Error("the refused write changed the record")
			}
			m.write("devices/card", fields{field: value, "pin_file": "pin"}).ok(t)
		})
	}
}

func TestPINFileUnderTheSecretsDirectoryServes(t *testing.T) {
	m := newMount(t)
	m.rack.add("SN-card").AddRSA(t, "k", "01", 2048)
	m.secretFile("pin", rightPIN+"\n")
	m.write("devices/card", fields{"module": testModule, "serial": "SN-card", "pin_file": "pin"}).ok(t)
	if got := m.read("devices/card"); got.text("pin_file") != "pin" || got.text("pin_set") != "false" {
		t.Errorf("read = %v", got.data)
	}
	if got := m.read("devices/card/status").ok(t); got.text("usable") != "true" || got.text("keys") != "1" {
		t.Errorf("status = %v", got.data)
	}
	m.write("devices/card/pin", fields{"new_pin": "111111"}).want(t, http.StatusBadRequest).says(t, "comes from the file")
}

func TestDeviceStatusSaysWhyADeviceCannotBeUsed(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.SetError(hsm.ErrUnavailable)
	got := m.read("devices/card/status").want(t, http.StatusOK)
	if got.text("usable") != "false" || got.text("error") == "" {
		t.Errorf("status = %v", got.data)
	}
	m.read("devices/other/status").want(t, http.StatusNotFound)
}

func TestKeysOnADeviceAreListed(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.AddRSA(t, "unseal", "0a", 2048)
	token.AddRSA(t, "twin", "0b", 2048)
	token.AddRSA(t, "twin", "0b", 2048)
	got := m.list("devices/card/keys/").want(t, http.StatusOK)
	info, _ := got.data["key_info"].(map[string]any)
	if len(info) != 3 {
		t.Fatalf("list = %v", got.data)
	}
	if entry, _ := info["0a"].(map[string]any); entry["key_label"] != "unseal" {
		t.Errorf("key 0a = %v", entry)
	}
}

func TestDeviceInUseIsDeletedByForceOnly(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.write("stores/objects", fields{"type": "object", "device": "prod-hsm"}).ok(t)
	m.delete("devices/prod-hsm", nil).want(t, http.StatusBadRequest).says(t, "keys/prod, stores/objects", "force=true")
	m.read("devices/prod-hsm").ok(t)
	m.delete("devices/prod-hsm", fields{"force": true}).ok(t)
	m.read("devices/prod-hsm").want(t, http.StatusNotFound)
}

func TestTokensHaveNoLock(t *testing.T) {
	m := newMount(t)
	m.addDevice("card")
	m.write("devices/card/unlock", fields{"passphrase": "x"}).want(t, http.StatusBadRequest).says(t, "PKCS#11 token")
	m.write("devices/card/lock", nil).want(t, http.StatusBadRequest).says(t, "PKCS#11 token")
	m.write("devices/none/lock", nil).want(t, http.StatusNotFound)
}

func TestBarIsLiftedOnRequest(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	token.SetError(&hsm.PINError{TriesLeft: 2, Barred: true, Detail: "the PIN of token SN-card was wrong before and is not sent again"})
	m.list("devices/card/keys/").want(t, http.StatusServiceUnavailable).says(t, "not sent again")
	m.write("devices/card/unbar", nil).ok(t)
	token.AddRSA(t, "k", "01", 2048)
	m.list("devices/card/keys/").ok(t)
}

func TestPINIsChangedOnTheTokenAndInTheRecord(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.write("devices/prod-hsm/pin", fields{"new_pin": "735591"}).want(t, http.StatusNoContent)
	if token.PIN() != "735591" {
		t.Errorf("the token's PIN is %s", token.PIN())
	}
	m = m.remount()
	m.list("devices/prod-hsm/keys/").ok(t)
	if token.wrong != 0 {
		t.Errorf("%d wrong PINs were sent", token.wrong)
	}
}

func TestPINThatTheTokenHasAlreadyReplacesTheStoredOne(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	if err := token.ChangePIN(context.Background(), []byte("735591")); err != nil { // by another program
		t.Fatal(err)
	}
	m.write("devices/prod-hsm/pin", fields{"new_pin": "999999", "on_token": false}).want(t, http.StatusBadRequest).says(t, "was kept", "wrong")
	m.write("devices/prod-hsm/pin", fields{"new_pin": "735591", "on_token": false}).ok(t)
	m.list("devices/prod-hsm/keys/").ok(t)
	if token.wrong != 1 {
		t.Errorf("%d wrong PINs were sent, want the one that was wrong", token.wrong)
	}
}

// A change of the PIN touches the token and the record, and the process may die between the two.
func TestPINChangeThatWasCutShortIsSettledByTheNextUse(t *testing.T) {
	for name, changed := range map[string]bool{"after the token took it": true, "before the token took it": false} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			token := m.addKey("prod")
			record, err := m.readDevice(context.Background(), "prod-hsm")
			if err != nil {
				t.Fatal(err)
			}
			record.NextPIN = "735591"
			if err := m.putDevice(context.Background(), "prod-hsm", record); err != nil {
				t.Fatal(err)
			}
			want, wrong := rightPIN, 1
			if changed {
				want, wrong = "735591", 0
				if err := token.ChangePIN(context.Background(), []byte(want)); err != nil {
					t.Fatal(err)
				}
			}
			m = m.remount()
			if got := m.read("devices/prod-hsm"); got.text("pin_change_pending") != "true" {
				t.Errorf("before the first use: %v", got.data)
			}
			m.list("devices/prod-hsm/keys/").ok(t)
			if got := m.read("devices/prod-hsm"); got.text("pin_change_pending") != "false" {
				t.Errorf("after the first use: %v", got.data)
			}
			if stored := m.stored()["devices/prod-hsm"]; !strings.Contains(stored, want) || token.wrong != wrong {
				t.Errorf("%d wrong PINs were sent, want %d; the record holds the right one: %v", token.wrong, wrong, strings.Contains(stored, want))
			}
		})
	}
}

// A PIN that proves right settles a change that was cut short, also where neither of its two PINs may be tried any more.
func TestPINChangeThatWasCutShortIsSettledByAPINThatIsRight(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	record, err := m.readDevice(context.Background(), "prod-hsm")
	if err != nil {
		t.Fatal(err)
	}
	record.NextPIN = "735591"
	if err := m.putDevice(context.Background(), "prod-hsm", record); err != nil {
		t.Fatal(err)
	}
	if err := token.ChangePIN(context.Background(), []byte("111111")); err != nil { // by another program
		t.Fatal(err)
	}
	m = m.remount()
	m.write("devices/prod-hsm/pin", fields{"new_pin": "111111", "on_token": false}).ok(t)
	m.list("devices/prod-hsm/keys/").ok(t)
	if got := m.read("devices/prod-hsm"); got.text("pin_change_pending") != "false" || token.wrong != 0 {
		t.Errorf("after it: %v, %d wrong PINs were sent", got.data, token.wrong)
	}
}

// Another mount may be logged in with the old PIN, so that the new one cannot be tried.
func TestPINChangeThatWasCutShortIsSettledByTheOldPINWhereTheNewOneIsBarred(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	record, err := m.readDevice(context.Background(), "prod-hsm")
	if err != nil {
		t.Fatal(err)
	}
	record.NextPIN = "735591"
	if err := m.putDevice(context.Background(), "prod-hsm", record); err != nil {
		t.Fatal(err)
	}
	m.rack.barred = "735591"
	m = m.remount()
	m.list("devices/prod-hsm/keys/").ok(t)
	if got := m.read("devices/prod-hsm"); got.text("pin_change_pending") != "false" || token.wrong != 0 {
		t.Errorf("after the first use: %v, %d wrong PINs were sent", got.data, token.wrong)
	}
}

func TestPINChangeWhoseRecordCannotBeWrittenTouchesNoToken(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.storage.fail(errStorage, nil)
	m.write("devices/prod-hsm/pin", fields{"new_pin": "735591"}).want(t, http.StatusInternalServerError)
	if token.PIN() != rightPIN {
		t.Error("the token's PIN was changed although nobody could remember it")
	}
}

func TestOnlyAPINChangeThatMayHaveHappenedKeepsBothPINs(t *testing.T) {
	for name, test := range map[string]struct {
		fails error
		code  int
		says  string
		kept  bool
	}{
		"the token is away":     {hsm.ErrUnavailable, http.StatusServiceUnavailable, "it was not changed", false},
		"the token refuses it":  {hsm.ErrUnsupported, http.StatusBadRequest, "the token refused", false},
		"the answer was lost":   {fmt.Errorf("%w: %w", hsm.ErrUnavailable, hsm.ErrMayHaveHappened), http.StatusServiceUnavailable, "both are kept", true},
		"the old PIN was wrong": {&hsm.PINError{TriesLeft: 2, Wrong: true, Detail: "wrong"}, http.StatusBadRequest, "wrong", false},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			token := m.addKey("prod")
			m.rack.changing = func(context.Context) error { return test.fails }
			m.write("devices/prod-hsm/pin", fields{"new_pin": "735591"}).want(t, test.code).says(t, test.says)
			if stored := m.stored()["devices/prod-hsm"]; strings.Contains(stored, "735591") != test.kept {
				t.Errorf("the new PIN is kept: %v", !test.kept)
			}
			m.list("devices/prod-hsm/keys/").ok(t)
			stored := m.stored()["devices/prod-hsm"]
			if !strings.Contains(stored, rightPIN) || strings.Contains(stored, "735591") {
				t.Error("the record does not hold the one right PIN")
			}
			if wrong := token.wrong; wrong > 0 != test.kept {
				t.Errorf("%d wrong PINs were sent", wrong)
			}
		})
	}
}

func TestPINChangeThatSurelyDidNotHappenLeavesNothingForACallerWhoHasGone(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.list("devices/prod-hsm/keys/").ok(t)
	m.write("config", fields{"request_timeout": 1}).ok(t)
	m.rack.changing = func(ctx context.Context) error { // it waits for its turn
		<-ctx.Done()
		return ctx.Err()
	}
	m.write("devices/prod-hsm/pin", fields{"new_pin": "735591"}).want(t, http.StatusServiceUnavailable).says(t, "it was not changed")
	if strings.Contains(m.stored()["devices/prod-hsm"], "735591") {
		t.Error("the record still holds the PIN that was not set")
	}
	m.list("devices/prod-hsm/keys/").ok(t)
	if token.wrong != 0 {
		t.Errorf("%d wrong PINs were sent", token.wrong)
	}
}

// A new PIN that expired, or that a locked token did not look at, may be the token's all the same.
func TestPINChangeThatWasCutShortIsNotSettledByARefusalThatDoesNotNameThePINWrong(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	record, err := m.readDevice(t.Context(), "prod-hsm")
	if err != nil {
		t.Fatal(err)
	}
	record.NextPIN = "735591"
	if err := m.putDevice(t.Context(), "prod-hsm", record); err != nil {
		t.Fatal(err)
	}
	m.rack.refused = &hsm.PINError{TriesLeft: -1, Detail: "the PIN has expired"}
	m = m.remount()
	m.list("devices/prod-hsm/keys/").want(t, http.StatusServiceUnavailable).says(t, "finding out which PIN")
	if !strings.Contains(m.stored()["devices/prod-hsm"], "735591") {
		t.Error("the new PIN was forgotten")
	}
}

func TestChangedRecordsOfOtherNodesTakeEffect(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.list("devices/prod-hsm/keys/").ok(t)
	if err := m.storage.Delete(context.Background(), "devices/prod-hsm"); err != nil {
		t.Fatal(err)
	}
	m.InvalidateKey(context.Background(), "devices/prod-hsm")
	m.list("devices/prod-hsm/keys/").want(t, http.StatusNotFound)
}

func TestDeviceWithALockIsUnlockedAndLocked(t *testing.T) {
	m := newMount(t)
	m.rack.locks = true
	m.addKey("prod")
	wrapped := m.write("wrap/prod", fields{"plaintext": "YQ=="}).ok(t).data["ciphertext"]
	m.write("devices/prod-hsm/lock", nil).want(t, http.StatusNoContent)
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).want(t, http.StatusServiceUnavailable).says(t, "locked")
	m.write("devices/prod-hsm/unlock", nil).want(t, http.StatusBadRequest).says(t, "passphrase is missing")
	m.write("devices/prod-hsm/unlock", fields{"passphrase": "wrong"}).want(t, http.StatusBadRequest).says(t, "passphrase is wrong")
	m.write("devices/prod-hsm/unlock", fields{"passphrase": "open sesame"}).want(t, http.StatusNoContent)
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).ok(t)
}

func TestModuleThatIsNotAllowedIsRefusedWhereItIsConfigured(t *testing.T) {
	m := newMount(t)
	m.addDevice("card")
	m.rack.refused = fmt.Errorf("%w: the PKCS#11 module is not among those that the plugin was started with", device.ErrConfig)
	m.write("devices/card", fields{"parallel": 2}).want(t, http.StatusBadRequest).says(t, "not among those")
	if got := m.read("devices/card").text("parallel"); got != "1" {
		t.Errorf("parallel = %s after a refused write", got)
	}
	// One that was allowed when it was configured and is not any more: nobody's mistake in this request.
	m.remount().list("devices/card/keys").want(t, http.StatusServiceUnavailable).says(t, "not among those")
}
