package openbao_test

import (
	"maps"
	"os"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// site is a machine with an HSM on which an operator made a wrapping key "prod" for a seal: what its stanzas say.
type site struct {
	host   *vaulttest.Host
	binary vaulttest.Binary
	args   []string          // of the plugin stanza
	env    []string          // of the plugin stanza
	device map[string]string // of the seal stanza: what describes the device
	secret []string          // what no log and no error may hold
}

// record is what a key record is confirmed by.
type record struct {
	SHA256 string `json:"record_sha256"`
}

// newSite makes the machine; the device comes from with.
func newSite(t *testing.T) *site {
	t.Helper()
	host := vaulttest.NewHost(t)
	return &site{
		host: host, binary: vaulttest.Build{}.Binary(t),
		args: []string{"-secrets-dir=" + host.Dir, "-state-dir=" + host.File("state")},
	}
}

// withToken makes one with a PKCS#11 token, and the key in it.
func withToken(t *testing.T, token *pkcs11test.Token) *site {
	t.Helper()
	s := newSite(t)
	s.host.WithToken(t, token)
	s.args = append(s.args, "-pkcs11-module="+token.Module)
	for _, name := range token.Env {
		s.args = append(s.args, "-module-env="+name)
		s.env = append(s.env, name+"="+os.Getenv(name))
	}
	s.device = map[string]string{"type": "pkcs11", "serial": token.Serial, "pin_file": s.host.File("pin")}
	s.secret = []string{token.PIN}
	s.host.WithKey(t)
	return s
}

// withNetHSM makes one with a NetHSM of some nodes, and the key in it.
func withNetHSM(t *testing.T, netHSM *nethsmtest.HSM) *site {
	t.Helper()
	s := newSite(t)
	s.host.WithNetHSM(t, netHSM, nethsmtest.OperatorUser, nethsmtest.OperatorPassphrase, nethsmtest.AdminUser, nethsmtest.AdminPassphrase)
	s.device = map[string]string{
		"type": "nethsm", "urls": strings.Join(netHSM.URLs(), ", "), "username": nethsmtest.OperatorUser,
		"password_file": s.host.File("password"), "ca_cert_file": s.host.File("nethsm-ca.pem"),
	}
	s.secret = []string{nethsmtest.OperatorPassphrase}
	s.host.WithKey(t)
	return s
}

// stanza is the seal stanza for a key, with changes; an empty value leaves a setting out.
func (s *site) stanza(t *testing.T, key string, changes ...map[string]string) map[string]string {
	t.Helper()
	file := s.host.File(key + ".record")
	sum := vaulttest.Decode[record](t, s.host.Must(t, "key", "backup", key, "-o", "json")).SHA256
	settings := map[string]string{"key": key, "key_record_file": file, "key_record_sha256": sum, "accept_single_hsm": "true"}
	maps.Copy(settings, s.device)
	for _, changed := range changes {
		maps.Copy(settings, changed)
	}
	maps.DeleteFunc(settings, func(_, value string) bool { return value == "" })
	return settings
}

// openBao starts a server on that machine.
func (s *site) openBao(t *testing.T) *openBao {
	t.Helper()
	return newOpenBao(t, s.binary, s.args, s.env...)
}

// keepsSecrets checks that no secret is in a text.
func (s *site) keepsSecrets(t *testing.T, what, text string) {
	t.Helper()
	for _, secret := range s.secret {
		if strings.Contains(text, secret) {
			t.Errorf("%s holds a secret", what)
		}
	}
}
