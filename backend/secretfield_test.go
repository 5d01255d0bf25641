package backend

import (
	"context"
	"net/http"
	"testing"
)

// spoilt are secrets as they come out of a shell by accident.
var spoilt = map[string]struct{ secret, says string }{
	"two line breaks":     {rightPIN + "\n\n", "control character"},
	"a line break inside": {"648\n219", "control character"},
	"a tab":               {rightPIN + "\t", "control character"},
	"a NUL":               {rightPIN + "\x00", "control character"},
	"an escape sequence":  {"\x1b[A" + rightPIN, "control character"},
	"a delete":            {rightPIN + "\x7f", "control character"},
	"blanks only":         {"   ", "nothing but blanks"},
	"a line break only":   {"\n", "nothing but blanks"},
}

func TestSecretsFromAFileOrAPipeLoseTheirFinalLineBreak(t *testing.T) {
	for name, ending := range map[string]string{"as Unix writes it": "\n", "as Windows writes it": "\r\n"} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			token := m.rack.add("SN-card")
			m.write("devices/card", fields{"module": testModule, "serial": "SN-card", "pin": rightPIN + ending}).ok(t)
			m.list("devices/card/keys").want(t, http.StatusNotFound) // an empty list: the PIN was right
			m.write("devices/card/pin", fields{"new_pin": "735591" + ending}).ok(t)
			if token.PIN() != "735591" {
				t.Errorf("the token's PIN is %q: no other tool can send that", token.PIN())
			}
			m.write("devices/card/pin", fields{"new_pin": "735591" + ending, "on_token": false}).ok(t)
			m.write("stores/etcd", fields{
				"type": "etcd", "endpoints": "https://127.0.0.1:1", "prefix": "p", "ca_cert": testCA, "username": "u", "password": "pass word" + ending,
			}).ok(t)
			record, err := m.readStore(context.Background(), "etcd")
			if err != nil || record.Password != "pass word" {
				t.Errorf("the password stored is %q (%v)", record.Password, err)
			}
			if token.wrong != 0 {
				t.Errorf("%d wrong PINs were sent", token.wrong)
			}
		})
	}
}

func TestSecretsThatNoOtherToolCanSendAreRefused(t *testing.T) {
	for name, test := range spoilt {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			m.rack.locks = true
			token := m.addDevice("card")
			m.write("devices/card", fields{"pin": test.secret}).want(t, http.StatusBadRequest).says(t, "pin", test.says)
			m.write("devices/card/pin", fields{"new_pin": test.secret}).want(t, http.StatusBadRequest).says(t, "new_pin", test.says)
			m.write("devices/card/pin", fields{"new_pin": test.secret, "on_token": false}).want(t, http.StatusBadRequest).says(t, test.says)
			m.write("devices/card/unlock", fields{"passphrase": test.secret}).want(t, http.StatusBadRequest).says(t, "passphrase", test.says)
			m.write("stores/etcd", fields{
				"type": "etcd", "endpoints": "https://127.0.0.1:1", "prefix": "p", "ca_cert": testCA, "username": "u", "password": test.secret,
			}).want(t, http.StatusBadRequest).says(t, "password", test.says)
			if token.PIN() != rightPIN || token.wrong != 0 {
				t.Errorf("the token's PIN is %q, %d wrong ones were sent", token.PIN(), token.wrong)
			}
		})
	}
	t.Run("in a file", func(t *testing.T) {
		m := newMount(t)
		m.secretFile("pin", "   \n")
		m.write("devices/card", fields{"module": testModule, "serial": "S", "pin_file": "pin"}).want(t, http.StatusBadRequest).says(t, "blanks")
		m.secretFile("pin", "648\t219\n")
		m.write("devices/card", fields{"module": testModule, "serial": "S", "pin_file": "pin"}).want(t, http.StatusBadRequest).says(t, "control character")
	})
}
