package kmsplugin

import (
	"errors"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// sum is some SHA-256.
var sum = strings.Repeat("0f", 32)

func TestStanzasAreRead(t *testing.T) {
	slot := uint(0x10)
	key := map[string]string{"key": "prod", "key_record_file": "/etc/nitroseal/prod.record", "key_record_sha256": sum}
	for name, test := range map[string]struct {
		settings map[string]string
		want     stanza
	}{
		"a token by its serial": {
			map[string]string{"type": "pkcs11", "serial": "DENK0100001", "pin_file": "pin", "accept_single_hsm": "true"},
			stanza{acceptSingleHSM: true, device: device.Config{Type: "pkcs11", Serial: "DENK0100001", PINFile: "pin"}},
		},
		"a token by its slot, with all that there is": {
			map[string]string{
				"type": "pkcs11", "module": "/usr/lib/x.so", "slot": "0x10", "pin_file": "credential:pin", "parallel": "8", "decrypt_timeout": "40s",
				"device": "stick", "backup_confirmed": "true", "accept_single_hsm": "false",
			},
			stanza{backupConfirmed: true, name: "stick", device: device.Config{
				Type: "pkcs11", Module: "/usr/lib/x.so", Slot: &slot, PINFile: "credential:pin", Parallel: 8, DecryptTimeout: 40 * time.Second,
			}},
		},
		"a NetHSM with all that there is": {
			map[string]string{
				"type": "nethsm", "urls": "https://a:8443, https://b", "username": "operator", "password_file": "/s/password",
				"unlock_passphrase_file": "/s/unlock", "ca_cert_file": "/s/../s/ca.pem", "tls_pins": "aa,bb", "tls_server_name": "nethsm",
				"tls_insecure":    "true",
				"request_timeout": "5s",
			},
			stanza{caCert: "/s/ca.pem", device: device.Config{
				Type: "nethsm", URLs: []string{"https://a:8443", "https://b"}, Username: "operator", PasswordFile: "/s/password",
				UnlockPassphraseFile: "/s/unlock", TLSPins: []string{"aa", "bb"}, TLSServerName: "nethsm", Insecure: true,
				RequestTimeout: 5 * time.Second,
			}},
		},
		"several HSMs in a file": {
			map[string]string{"config": "/etc/nitroseal/nitroseal.hcl"}, stanza{config: "/etc/nitroseal/nitroseal.hcl"},
		},
		"truths without quotation marks, which OpenBao hands over as numbers": {
			map[string]string{"config": "/c.hcl", "accept_single_hsm": "1", "backup_confirmed": "0"}, stanza{config: "/c.hcl", acceptSingleHSM: true},
		},
		"blanks around a value": {
			map[string]string{"type": " nethsm ", "urls": " https://a ", "username": " operator "},
			stanza{device: device.Config{Type: "nethsm", URLs: []string{"https://a"}, Username: "operator"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			settings := maps.Clone(key)
			maps.Copy(settings, test.settings)
			test.want.key, test.want.record, test.want.recordSHA256 = "prod", "/etc/nitroseal/prod.record", sum
			got, err := parseStanza(settings)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(stanza{})); diff != "" {
				t.Errorf("stanza (-want +got):\n%s", diff)
			}
		})
	}
}

func TestWrongStanzasAreExplained(t *testing.T) {
	good := map[string]string{
		"key": "prod", "key_record_file": "/etc/prod.record", "key_record_sha256": sum, "type": "pkcs11", "serial": "1", "pin_file": "pin",
	}
	for name, test := range map[string]struct {
		name, value string
		says        string
	}{
		"a setting of OpenBao's own seal":     {"key_label", "x", `"key_label" is no setting of this seal; it has key, key_record_file`},
		"a PIN in the clear":                  {"pin", "648219", `put it into a file and name that in "pin_file"`},
		"a password in the clear":             {"password", "648219", `"password_file"`},
		"an empty value":                      {"serial", " ", `"serial" is empty; leave it out`},
		"a value of several lines":            {"serial", "a\nb", `"serial" holds a control character`},
		"a value without end":                 {"serial", strings.Repeat("x", 20<<10), `"serial" is longer than`},
		"a hash that is too short":            {"key_record_sha256", "abcd", `"key_record_sha256" is not a SHA-256`},
		"a hash that is none":                 {"key_record_sha256", strings.Repeat("z", 64), "is not a SHA-256"},
		"a record by a relative path":         {"key_record_file", "prod.record", `"key_record_file" is not an absolute path`},
		"a module by a relative path":         {"module", "opensc-pkcs11.so", `"module" is not an absolute path`},
		"a truth that is none":                {"accept_single_hsm", "yes", `is neither "true" nor "false"`},
		"a slot that is none":                 {"slot", "-1", `"slot" is not the number of a slot`},
		"a slot beyond all slots":             {"slot", "0x1ffffffff", `"slot" is not the number of a slot`},
		"no operation at a time":              {"parallel", "0", `"parallel" is not a number of operations`},
		"a duration without a unit":           {"decrypt_timeout", "30", `"decrypt_timeout" is not a duration`},
		"a duration before now":               {"decrypt_timeout", "-1s", `"decrypt_timeout" is not a duration`},
		"a list with a hole":                  {"urls", "https://a,,https://b", `"urls" has an empty place`},
		"a file beside the device's settings": {"config", "/etc/nitroseal.hcl", `"serial" describes a device, and "config"`},
		"a certificate for a token":           {"ca_cert_file", "/etc/ca.pem", `"ca_cert_file" belongs to devices of type "nethsm"`},
		"no kind of device":                   {"type", "", `"type" is missing`},
		"no key":                              {"key", "", `"key" is missing`},
		"no record":                           {"key_record_file", "", "nitroseal key backup"},
	} {
		t.Run(name, func(t *testing.T) {
			settings := maps.Clone(good)
			settings[test.name] = test.value
			if test.value == "" {
				delete(settings, test.name)
			}
			_, err := parseStanza(settings)
			if !errors.Is(err, errStanza) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v; want one that says %q", err, test.says)
			}
			if err != nil && strings.Contains(err.Error(), "648219") {
				t.Errorf("the error quotes a secret: %v", err)
			}
		})
	}
	t.Run("all that is wrong is said at once", func(t *testing.T) {
		_, err := parseStanza(map[string]string{"type": "pkcs11", "parallel": "x", "slot": "x", "nonsense": "x"})
		for _, name := range []string{"nonsense", "parallel", "slot"} {
			if !strings.Contains(err.Error(), `"`+name+`"`) {
				t.Errorf("it says nothing of %s: %v", name, err)
			}
		}
	})
}

func TestTheGuideNamesEverySetting(t *testing.T) {
	guide, err := os.ReadFile("../../docs/openbao.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names() {
		if !strings.Contains(string(guide), "`"+name+"`") {
			t.Errorf("docs/openbao.md does not name %s", name)
		}
	}
}

// FuzzStanza reads settings written as lines of name=value, beside a secret or not.
func FuzzStanza(f *testing.F) {
	for _, lines := range []string{
		"key=prod\nkey_record_file=/r\nkey_record_sha256=" + sum + "\ntype=pkcs11\nserial=1\npin_file=/p",
		"key=prod\nkey_record_file=/r\nkey_record_sha256=" + sum + "\ntype=nethsm\nurls=https://a,https://b\nusername=o\npassword_file=p",
		"config=/etc/nitroseal.hcl\npassphrase=x", "slot=0x1\nparallel=8\ndecrypt_timeout=1h\ntls_insecure=true\ntls_pins=aa, bb",
	} {
		f.Add(lines, false)
		f.Add(lines, true)
	}
	f.Fuzz(func(t *testing.T, lines string, beside bool) {
		settings := map[string]string{}
		for line := range strings.SplitSeq(lines, "\n") {
			name, value, _ := strings.Cut(line, "=")
			settings[name] = value
		}
		const hidden = "what nobody may see: 648219"
		if beside {
			settings["pin"] = hidden
		}
		got, err := parseStanza(settings)
		if err != nil {
			if !errors.Is(err, errStanza) {
				t.Errorf("the error is none about the stanza: %v", err)
			}
			if beside && !strings.Contains(lines, hidden) && strings.Contains(err.Error(), hidden) {
				t.Errorf("the error quotes a secret: %v", err)
			}
			return
		}
		if beside || got.key == "" || got.record == "" || len(got.recordSHA256) != 64 || (got.config == "") == (got.device.Type == "") {
			t.Errorf("taken for a stanza: %+v", got)
		}
		if got.device.PIN != "" || got.device.Password != "" || got.device.UnlockPassphrase != "" {
			t.Error("a secret came from the stanza itself")
		}
	})
}
