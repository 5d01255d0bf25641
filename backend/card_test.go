package backend

import (
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/device"
)

// cardMount is a mount with a real provider over a module that plays a card with three tries.
type cardMount struct {
	*mount
	card *pkcs11test.SmartCard
}

func newCardMount(t *testing.T) cardMount {
	t.Helper()
	card := pkcs11test.Card(t)
	state := t.TempDir()
	manager := pkcs11.New(pkcs11.Options{Modules: []string{card.Module}, StateDir: state, Env: card.Env})
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Errorf("closing the manager: %v", err)
		}
	})
	storage := &faultyStorage{Storage: new(logical.InmemStorage)}
	return cardMount{mountWith(t, storage, map[string]device.Opener{device.TypePKCS11: device.PKCS11(manager)}, t.TempDir(), state), card}
}

// configure writes the device with a PIN.
func (m cardMount) configure(pin string) {
	m.t.Helper()
	m.write("devices/card", fields{"module": m.card.Module, "serial": m.card.Serial, "pin": pin}).ok(m.t)
}

// works fails where the device does not answer, or not with an empty list of keys.
func (m cardMount) works() {
	m.t.Helper()
	m.list("devices/card/keys").want(m.t, http.StatusNotFound)
}

func (m cardMount) wants(wrong, tries int) {
	m.t.Helper()
	if gotWrong, gotTries := m.card.WrongPINs(m.t), m.card.Tries(m.t); gotWrong != wrong || gotTries != tries {
		m.t.Errorf("the card got %d wrong PINs and leaves %d tries, want %d and %d", gotWrong, gotTries, wrong, tries)
	}
}

func TestAWrongPINOnACardIsMendedByFollowingTheSentences(t *testing.T) {
	m := newCardMount(t)
	m.configure("000000")
	m.list("devices/card/keys").want(t, http.StatusServiceUnavailable).
		says(t, "CKR_PIN_INCORRECT", "not sent again from this machine", "devices/NAME/pin", "on_token=false")
	m.list("devices/card/keys").want(t, http.StatusServiceUnavailable).says(t, "rejected this PIN", "devices/NAME/pin", "on_token=false")
	m.wants(1, 2)

	// The right PIN is not known to be right, and the card shows that a try is missing: a configured one is not sent by itself.
	m.configure(m.card.PIN)
	m.list("devices/card/keys").want(t, http.StatusServiceUnavailable).
		says(t, "not known to be right, so nothing was sent", "devices/NAME/pin", "on_token=false", "devices/NAME/unbar")
	m.wants(1, 2)

	// The one deliberate act.
	m.write("devices/card/pin", fields{"new_pin": m.card.PIN, "on_token": false}).want(t, http.StatusNoContent)
	m.works()
	m.wants(1, 3)
	m.card.SetTries(t, 3)
	m.configure(m.card.PIN) // closes the device: from now on the PIN is known to be right
	m.works()
}

func TestAWrongNewPINDisturbsNothing(t *testing.T) {
	m := newCardMount(t)
	m.configure(m.card.PIN)
	m.works()
	logins := m.card.Calls(t, "C_Login")
	m.write("devices/card/pin", fields{"new_pin": "999999", "on_token": false}).want(t, http.StatusBadRequest).
		says(t, "the stored PIN of device \"card\" was kept", "CKR_PIN_INCORRECT")
	m.works()
	if n := m.card.Calls(t, "C_Login") - logins; n != 1 {
		t.Errorf("%d PINs were sent, want the wrong one alone: the stored one was logged in and stays so", n)
	}
	m.write("devices/card/pin", fields{"new_pin": "999999", "on_token": false}).want(t, http.StatusBadRequest).says(t, "not sent again")
	m.wants(1, m.card.Tries(t))
}

func TestThePINOfACardThatWasChangedElsewhereIsReplaced(t *testing.T) {
	m := newCardMount(t)
	m.configure(m.card.PIN)
	m.works()
	m.card.Tool(t, "--change-pin", "--new-pin", "975310")
	m.write("devices/card/pin", fields{"new_pin": "975310", "on_token": false}).want(t, http.StatusNoContent)
	m.works()
	m.wants(0, 3)
	if got := m.stored()["devices/card"]; !strings.Contains(got, "975310") {
		t.Error("the new PIN is not stored")
	}
}

func TestTheLastTryOfACardIsSpentByForceOnly(t *testing.T) {
	m := newCardMount(t)
	m.configure("000000")
	m.card.SetTries(t, 1)
	m.write("devices/card/pin", fields{"new_pin": m.card.PIN, "on_token": false}).want(t, http.StatusBadRequest).
		says(t, "the next wrong PIN locks it", "force=true spends the last try on it")
	m.write("devices/card/pin", fields{"new_pin": m.card.PIN, "force": true}).want(t, http.StatusBadRequest).says(t, "on_token=false")
	if n := m.card.Calls(t, "C_Login"); n != 0 {
		t.Errorf("%d PINs were sent, want none", n)
	}
	m.write("devices/card/pin", fields{"new_pin": m.card.PIN, "on_token": false, "force": true}).want(t, http.StatusNoContent)
	m.card.SetTries(t, 3)
	m.works()
}

func TestUnbarAtTheLastTryOfACardDoesNotLockIt(t *testing.T) {
	m := newCardMount(t)
	m.configure("000000")
	m.list("devices/card/keys").want(t, http.StatusServiceUnavailable)
	m.card.SetTries(t, 1)
	if got := m.write("devices/card/pin", fields{"new_pin": "000000", "on_token": false}).want(t, http.StatusBadRequest); strings.Contains(got.message, "spends") {
		t.Errorf("force=true is promised to help a barred PIN: %s", got.message)
	}
	m.write("devices/card/unbar", nil).want(t, http.StatusBadRequest).says(t, "the bar stays", "on_token=false force=true")
	m.list("devices/card/keys").want(t, http.StatusServiceUnavailable)
	m.wants(1, 1)
	m.write("devices/card/pin", fields{"new_pin": m.card.PIN, "on_token": false, "force": true}).want(t, http.StatusNoContent)
	m.works()
}

func TestStatusAfterAnUnbarIsNotTheOneFromBefore(t *testing.T) {
	m := newCardMount(t)
	m.configure(m.card.PIN)
	m.card.SetTries(t, 2)
	if got := m.read("devices/card/status").ok(t); got.text("usable") != "false" {
		t.Fatalf("with a try missing: %v", got.data)
	}
	m.write("devices/card/unbar", nil).ok(t)
	if got := m.read("devices/card/status").ok(t); got.text("usable") != "true" {
		t.Errorf("right after the unbar: %v", got.data)
	}
}

func TestAPINChangeThatTheCardDidNotMakeCostsNoTryAfterwards(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(*pkcs11test.SmartCard)
		mend  func(*pkcs11test.SmartCard)
		pin   string
		code  int
	}{
		"it is too short": {pin: "12", code: http.StatusBadRequest},
		"it is too weak": {
			func(c *pkcs11test.SmartCard) { c.Fault(t, pkcs11test.Fails("C_SetPIN", 0x1B8)) },
			func(c *pkcs11test.SmartCard) { c.Mend(t, pkcs11test.Fails("C_SetPIN", 0x1B8)) }, "777777", http.StatusBadRequest,
		},
		"the session was lost": {
			func(c *pkcs11test.SmartCard) { c.Fault(t, pkcs11test.Fails("C_SetPIN", 0xB3)) },
			func(c *pkcs11test.SmartCard) { c.Mend(t, pkcs11test.Fails("C_SetPIN", 0xB3)) }, "777777", http.StatusServiceUnavailable,
		},
		"the card is away": {
			func(c *pkcs11test.SmartCard) { c.Remove(t, pkcs11test.ReaderRemoved) },
			func(c *pkcs11test.SmartCard) { c.Return(t) }, "777777", http.StatusServiceUnavailable,
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newCardMount(t)
			m.configure(m.card.PIN)
			m.works()
			if test.spoil != nil {
				test.spoil(m.card)
			}
			m.write("devices/card/pin", fields{"new_pin": test.pin}).want(t, test.code)
			if test.mend != nil {
				test.mend(m.card)
			}
			if got := m.read("devices/card"); got.text("pin_change_pending") != "false" {
				t.Errorf("afterwards: %v", got.data)
			}
			m.works()
			m.wants(0, 3)
		})
	}
}
