package device

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
)

func TestValidateNamesTheMistake(t *testing.T) {
	slot := uint(0)
	tests := map[string]struct {
		change func(*Config)
		want   string // part of the complaint, "" where there is none
	}{
		"a complete configuration is fine":          {func(*Config) {}, ""},
		"slot 0 is a slot":                          {func(c *Config) { c.TokenLabel, c.Slot = "", &slot }, ""},
		"a type is needed":                          {func(c *Config) { c.Type = "" }, `"type" is missing`},
		"an unknown type is named":                  {func(c *Config) { c.Type = "tpm" }, `type "tpm" is not known`},
		"a module is needed":                        {func(c *Config) { c.Module = "" }, `"module" is missing`},
		"a bare module name is refused":             {func(c *Config) { c.Module = "opensc.so" }, "not an absolute path"},
		"a token has to be chosen":                  {func(c *Config) { c.TokenLabel = "" }, "no token is chosen"},
		"one way to choose it is enough":            {func(c *Config) { c.Slot = &slot }, "more than one of"},
		"a PIN is needed":                           {func(c *Config) { c.PIN = "" }, "no PIN is given"},
		"a PIN and a PIN file are too much":         {func(c *Config) { c.PINFile = "pin" }, "keep one"},
		"parallel has an upper bound":               {func(c *Config) { c.Parallel = 1000 }, "parallel 1000 is out of range"},
		"a limit that kills a slow card is refused": {func(c *Config) { c.DecryptTimeout = time.Millisecond }, "decrypt_timeout"},
		"a limit of hours is refused as well":       {func(c *Config) { c.GenerateTimeout = 3 * time.Hour }, "generate_timeout"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			config := valid()
			test.change(&config)
			err := config.Validate()
			if test.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want a complaint with %q", err, test.want)
			}
			if strings.Contains(err.Error(), testPIN) {
				t.Fatalf("the complaint shows the PIN: %v", err)
			}
		})
	}
}

// testCA is a certificate of a CA that nobody has the key of.
const testCA = `-----BEGIN CERTIFICATE-----
MIIBezCCASGgAwIBAgIUGxrCYdbM68/fCzFBo6jAo253JgkwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHdGVzdCBDQTAgFw0yNjExMjIwNTQ1NTVaGA8yMTI2MTAyOTA1
NDU1NVowEjEQMA4GA1UEAwwHdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABD0Hdvlc/aa57nHmoHcxVPAdh+j6kbapflG41mSegTPTOZyzFsfZ+aSVs1Gr
6nsMGjHO4Hwn2HpmWwQoGkKqn7WjUzBRMB0GA1UdDgQWBBT7MwFKgkBKE7QGAOnj
WfDlVZspMTAfBgNVHSMEGDAWgBT7MwFKgkBKE7QGAOnjWfDlVZspMTAPBgNVHRMB
Af8EBTADAQH/MAoGCCqGSM49BAMCA0gAMEUCIQDZVT+inFB01rzRyZefcEwqBDot
qIDdP5Yik50GB/JwuAIgah3FGBuwRtjRaLp5aTcF5ma22DjjNngBIlKxAxoUhaw=
-----END CERTIFICATE-----
`

const testPin = "8D:4A:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD:EE:FF:00:11:22:33:44:55:66:77:88:99:AA:BB:CC:DD"

func validNetHSM() Config {
	return Config{
		Type: TypeNetHSM, URLs: []string{"https://a.example:8443", "https://b.example:8443"},
		Username: "unit~operator", Password: "planted-password", AdminUsername: "unit~admin", AdminPassword: "planted-admin",
		UnlockPassphrase: "planted-passphrase",
	}
}

func TestValidateNamesTheMistakeWithANetHSM(t *testing.T) {
	tests := map[string]struct {
		change func(*Config)
		want   string // part of the complaint, "" where there is none
	}{
		"a complete configuration is fine": {func(*Config) {}, ""},
		"an Operator alone is enough":      {func(c *Config) { c.AdminUsername, c.AdminPassword = "", "" }, ""},
		"without a passphrase it is fine":  {func(c *Config) { c.UnlockPassphrase = "" }, ""},
		"files do as well": {func(c *Config) {
			c.Password, c.PasswordFile, c.AdminPassword, c.AdminPasswordFile = "", "p", "", "a"
			c.UnlockPassphrase, c.UnlockPassphraseFile = "", "u"
		}, ""},
		"a path of the API is fine":               {func(c *Config) { c.URLs = []string{"https://a.example/api/v1/"} }, ""},
		"http is fine on this machine":            {func(c *Config) { c.URLs = []string{"http://127.0.0.1:8080", "http://[::1]", "http://localhost"} }, ""},
		"a CA, pins and a name are fine":          {func(c *Config) { c.CACert, c.TLSPins, c.TLSServerName = testCA, []string{testPin}, "nethsm" }, ""},
		"insecure alone is fine":                  {func(c *Config) { c.Insecure = true }, ""},
		"objects, tags and a limit are fine":      {func(c *Config) { c.ObjectStore, c.KeyTags, c.RequestTimeout = true, []string{"seal"}, time.Minute }, ""},
		"a node is needed":                        {func(c *Config) { c.URLs = nil }, `"urls" is missing`},
		"hundreds of nodes are a mistake":         {func(c *Config) { c.URLs = make([]string, 300) }, "300 nodes"},
		"a node twice is a mistake":               {func(c *Config) { c.URLs = []string{"https://a.example", "https://A.example:443/api/v1"} }, "twice"},
		"a bare host is no URL":                   {func(c *Config) { c.URLs = []string{"a.example"} }, "write https://"},
		"a host and a port are no URL":            {func(c *Config) { c.URLs = []string{"a.example:8443"} }, "write https://"},
		"another scheme is refused":               {func(c *Config) { c.URLs = []string{"ftp://a.example"} }, `scheme "ftp"`},
		"http beyond this machine is refused":     {func(c *Config) { c.URLs = []string{"http://a.example"} }, "in the clear"},
		"a host that only looks local is refused": {func(c *Config) { c.URLs = []string{"http://localhost.example"} }, "in the clear"},
		"a path is refused":                       {func(c *Config) { c.URLs = []string{"https://a.example/api/v2"} }, "path or a query"},
		"a query is refused":                      {func(c *Config) { c.URLs = []string{"https://a.example?x=y"} }, "path or a query"},
		"a password in the URL is not quoted":     {func(c *Config) { c.URLs = []string{"https://u:planted-password@a.example"} }, `url 1 of "urls" holds a user`},
		"nor where the URL is none":               {func(c *Config) { c.URLs = []string{"https://u:planted-password@a.example:port"} }, `url 1 of "urls" is not a URL`},
		"a user is needed":                        {func(c *Config) { c.Username = "" }, `"username" is missing`},
		"a user with a colon is refused":          {func(c *Config) { c.Username = "a:b" }, "not the name of a user"},
		"a password is needed":                    {func(c *Config) { c.Password = "" }, "no password is given"},
		"a password and a file are too much":      {func(c *Config) { c.PasswordFile = "p" }, "keep one"},
		"an admin password and a file as well":    {func(c *Config) { c.AdminPasswordFile = "p" }, "keep one"},
		"a passphrase and a file as well":         {func(c *Config) { c.UnlockPassphraseFile = "p" }, "keep one"},
		"an Administrator needs a password":       {func(c *Config) { c.AdminPassword = "" }, "without its password"},
		"a password needs its Administrator":      {func(c *Config) { c.AdminUsername = "" }, `without "admin_username"`},
		"one user has one role":                   {func(c *Config) { c.AdminUsername = c.Username }, "one role"},
		"namespaces must be equal":                {func(c *Config) { c.AdminUsername = "other~admin" }, "different namespaces"},
		"the root namespace is one, too":          {func(c *Config) { c.AdminUsername = "admin" }, "different namespaces"},
		"objects need an Administrator": {func(c *Config) {
			c.ObjectStore, c.AdminUsername, c.AdminPassword = true, "", ""
		}, `"object_store" needs "admin_username"`},
		"insecure and a CA contradict":          {func(c *Config) { c.Insecure, c.CACert = true, testCA }, "check nothing"},
		"insecure and a pin contradict":         {func(c *Config) { c.Insecure, c.TLSPins = true, []string{testPin} }, "check nothing"},
		"a CA must be a certificate":            {func(c *Config) { c.CACert = "/etc/ca.pem" }, "no certificate in PEM"},
		"a pin must be a SHA-256":               {func(c *Config) { c.TLSPins = []string{"abcd"} }, "not a SHA-256"},
		"a tag has letters and digits":          {func(c *Config) { c.KeyTags = []string{"a b"} }, "not a tag"},
		"a limit of milliseconds is refused":    {func(c *Config) { c.RequestTimeout = time.Millisecond }, "request_timeout"},
		"a limit of hours is refused":           {func(c *Config) { c.RequestTimeout = time.Hour }, "request_timeout"},
		"a module is no field of a NetHSM":      {func(c *Config) { c.Module = "/m.so" }, `"module" belongs to devices of type "pkcs11"`},
		"nor is a PIN":                          {func(c *Config) { c.PIN = testPIN }, `"pin" belongs to devices of type "pkcs11"`},
		"nor is a file of one":                  {func(c *Config) { c.PINFile = "pin" }, `"pin_file" belongs to devices of type "pkcs11"`},
		"and a node is no field of a token":     {func(c *Config) { *c = valid(); c.URLs = []string{"https://a"} }, `"urls" belongs to devices of type "nethsm"`},
		"nor is a password":                     {func(c *Config) { *c = valid(); c.Password = "p" }, `"password" belongs to devices of type "nethsm"`},
		"a slot, even 0, is none of a NetHSM's": {func(c *Config) { c.Slot = new(uint) }, `"slot" belongs to devices of type "pkcs11"`},
	}
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() { must(t, manager.Close()) })
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			config := validNetHSM()
			test.change(&config)
			err := config.Validate()
			if test.want == "" {
				must(t, err)
				secrets := Secrets{Password: []byte("password"), UnlockPassphrase: []byte("passphrase")}
				if config.AdminUsername != "" {
					secrets.AdminPassword = []byte("password")
				}
				device, err := NetHSM(manager)(t.Context(), "mount", config, secrets)
				must(t, err) // what is right here the provider takes
				must(t, device.Close())
				return
			}
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want a complaint with %q", err, test.want)
			}
			if strings.Contains(err.Error(), "planted") || strings.Contains(err.Error(), testPIN) {
				t.Fatalf("the complaint shows a secret: %v", err)
			}
		})
	}
}

func TestRedactedShowsEveryFieldOfItsTypeButTheSecrets(t *testing.T) {
	netHSM := validNetHSM()
	netHSM.UnlockPassphrase, netHSM.UnlockPassphraseFile = "", "unlock"
	for name, test := range map[string]struct {
		config Config
		want   map[string]any
	}{
		"a token": {valid(), map[string]any{
			"type": "pkcs11", "module": "/usr/lib/module.so", "serial": "", "token_label": "unseal", "pin_set": true, "pin_file": "",
			"parallel": 1, "decrypt_timeout": int64(0), "generate_timeout": int64(0),
		}},
		"a NetHSM": {netHSM, map[string]any{
			"type": "nethsm", "urls": []string{"https://a.example:8443", "https://b.example:8443"},
			"username": "unit~operator", "password_set": true, "password_file": "",
			"admin_username": "unit~admin", "admin_password_set": true, "admin_password_file": "",
			"unlock_passphrase_set": false, "unlock_passphrase_file": "unlock",
			"ca_cert": "", "tls_pins": []string{}, "tls_server_name": "", "tls_insecure": false,
			"request_timeout": int64(0), "object_store": false, "key_tags": []string{},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, test.config.Redacted()); diff != "" {
				t.Errorf("shown (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRedactedNeverShowsThePIN(t *testing.T) {
	shown := valid().Redacted()
	if shown["pin_set"] != true {
		t.Error("pin_set is not true")
	}
	for field, value := range shown {
		if value == testPIN || field == "pin" {
			t.Errorf("field %q shows the PIN", field)
		}
	}
}

func TestDestinationChanged(t *testing.T) {
	one, two, again := uint(1), uint(2), uint(1)
	base := valid()
	base.TokenLabel, base.Slot = "", &one
	tests := map[string]struct {
		change func(*Config)
		want   string
	}{
		"the same configuration keeps it":      {func(*Config) {}, ""},
		"an equal slot behind another pointer": {func(c *Config) { c.Slot = &again }, ""},
		"another slot moves it":                {func(c *Config) { c.Slot = &two }, "slot"},
		"another module moves it":              {func(c *Config) { c.Module = "/tmp/evil.so" }, "module"},
		"a slot given up for a label moves it": {func(c *Config) { c.Slot, c.TokenLabel = nil, "x" }, "token_label slot"},
		"a longer limit keeps it":              {func(c *Config) { c.DecryptTimeout = time.Minute }, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			config := base
			test.change(&config)
			if got := strings.Join(config.DestinationChanged(base), " "); got != test.want {
				t.Fatalf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestDestinationOfANetHSMChanged(t *testing.T) {
	base := validNetHSM()
	base.TLSPins = []string{"aa", "bb"}
	tests := map[string]struct {
		change func(*Config)
		want   string
	}{
		"the same configuration keeps it": {func(*Config) {}, ""},
		"another order of nodes keeps it": {func(c *Config) { c.URLs = []string{c.URLs[1], c.URLs[0]} }, ""},
		"another order of pins keeps it":  {func(c *Config) { c.TLSPins = []string{"bb", "aa"} }, ""},
		"limit, tags and objects keep it": {func(c *Config) { c.RequestTimeout, c.KeyTags, c.ObjectStore = time.Minute, []string{"a"}, true }, ""},
		"a changed secret keeps it":       {func(c *Config) { c.Password = "other" }, ""},
		"one more node moves it":          {func(c *Config) { c.URLs = append(c.URLs[:2:2], "https://evil.example") }, "urls"},
		"one node less moves it":          {func(c *Config) { c.URLs = c.URLs[:1] }, "urls"},
		"another user moves it":           {func(c *Config) { c.Username = "unit~other" }, "username"},
		"another Administrator moves it":  {func(c *Config) { c.AdminUsername = "unit~other" }, "admin_username"},
		"another CA moves it":             {func(c *Config) { c.CACert = testCA }, "ca_cert"},
		"one more pin moves it":           {func(c *Config) { c.TLSPins = []string{"aa", "bb", "cc"} }, "tls_pins"},
		"one pin less moves it":           {func(c *Config) { c.TLSPins = []string{"aa"} }, "tls_pins"},
		"another name moves it":           {func(c *Config) { c.TLSServerName = "evil.example" }, "tls_server_name"},
		"any certificate moves it":        {func(c *Config) { c.Insecure, c.TLSPins = true, nil }, "tls_pins tls_insecure"},
		"another type moves it":           {func(c *Config) { *c = valid() }, "type module token_label urls username admin_username tls_pins"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			config := base
			test.change(&config)
			if got := strings.Join(config.DestinationChanged(base), " "); got != test.want {
				t.Fatalf("got %q, want %q", got, test.want)
			}
		})
	}
}

// Every field is known to the list that validates, shows and guards: one that is not would be shown to nobody, or sent to
// everybody.
func TestEveryFieldOfTheConfigurationIsListed(t *testing.T) {
	var listed []string
	for _, field := range (Config{}).fields() {
		listed = append(listed, field.name)
	}
	structure := reflect.TypeFor[Config]()
	for i := range structure.NumField() {
		name, _, _ := strings.Cut(structure.Field(i).Tag.Get("json"), ",")
		if name != "type" && !slices.Contains(listed, name) {
			t.Errorf("field %q is not in the list", name)
		}
	}
	if len(listed) != structure.NumField()-1 {
		t.Errorf("%d fields are listed, the configuration has %d and its type", len(listed), structure.NumField()-1)
	}
}

func TestPlaceNamesAClusterAndANamespace(t *testing.T) {
	base := validNetHSM()
	for name, test := range map[string]struct {
		change func(*Config)
		same   bool
	}{
		"another order of nodes":     {func(c *Config) { c.URLs = []string{c.URLs[1], c.URLs[0]} }, true},
		"another spelling of a node": {func(c *Config) { c.URLs = []string{"https://A.Example:8443/api/v1", c.URLs[1]} }, true},
		"another user":               {func(c *Config) { c.Username = "unit~other" }, true},
		"another password":           {func(c *Config) { c.Password = "other" }, true},
		"another node":               {func(c *Config) { c.URLs = []string{c.URLs[0], "https://c.example"} }, false},
		"another namespace":          {func(c *Config) { c.Username = "other~operator" }, false},
	} {
		t.Run(name, func(t *testing.T) {
			config := base
			test.change(&config)
			if same := config.Place() == base.Place(); same != test.same {
				t.Errorf("the same place: %v, want %v", same, test.same)
			}
		})
	}
	some := base
	some.URLs = []string{"https://c.example", "https://B.example:8443/"}
	if places := base.Places(); len(places) != 2 || places[0] == places[1] || some.Places()[1] != places[1] || some.Places()[0] == places[0] {
		t.Errorf("the places of the nodes: %q and %q", places, some.Places())
	}
	if place := base.Place(); !strings.HasPrefix(place, "nethsm-") || len(place) != len("nethsm-")+16 {
		t.Errorf("Place = %q", place)
	}
}

func TestOnlyAllowedNetHSMsAreOpened(t *testing.T) {
	opener := func(context.Context, string, Config, Secrets) (hsm.Device, error) { return &fakeDevice{}, nil }
	for name, test := range map[string]struct {
		allowed []string
		ok      bool
	}{
		"none is named, so any is":     {nil, true},
		"both are":                     {[]string{"https://A.example:8443/api/v1", "https://b.example:8443", "https://c.example"}, true},
		"one is not":                   {[]string{"https://a.example:8443"}, false},
		"another port is another node": {[]string{"https://a.example:8443", "https://b.example"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			registry := New(Options{
				Openers: map[string]Opener{TypeNetHSM: opener, TypePKCS11: opener}, NetHSMs: test.allowed,
			})
			must(t, registry.Check(valid())) // a token has no URL
			checked := registry.Check(validNetHSM())
			handle, opened := registry.Open("mount", "net", validNetHSM())
			for _, err := range []error{checked, opened} {
				if test.ok != (err == nil) {
					t.Errorf("got %v", err)
				}
				if err != nil && (!errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "-nethsm-url=https://b.example:8443")) {
					t.Errorf("the complaint is %v", err)
				}
			}
			if handle != nil {
				must(t, handle.Close())
			}
		})
	}
}

// Naming a file is no proof of knowing what it holds: a server of their own would tell strangers.
func TestNoFileGoesToANetHSMThatStrangersName(t *testing.T) {
	opener := func(context.Context, string, Config, Secrets) (hsm.Device, error) { return &fakeDevice{}, nil }
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "secret"), []byte("planted-secret"), 0o600))
	inFile := func(file func(*Config) *string) Config {
		config := validNetHSM()
		*file(&config) = "secret"
		for _, secret := range config.SecretFields() {
			if *secret.File != "" {
				*secret.Value = ""
			}
		}
		return config
	}
	token := valid()
	token.PIN, token.PINFile = "", "secret"
	for name, test := range map[string]struct {
		config    Config
		allowed   []string
		strangers bool
		ok        bool
	}{
		"a password, and no node is allowed":     {inFile(func(c *Config) *string { return &c.PasswordFile }), nil, true, false},
		"of the Administrator":                   {inFile(func(c *Config) *string { return &c.AdminPasswordFile }), nil, true, false},
		"a passphrase":                           {inFile(func(c *Config) *string { return &c.UnlockPassphraseFile }), nil, true, false},
		"a password, to nodes that are allowed":  {inFile(func(c *Config) *string { return &c.PasswordFile }), validNetHSM().URLs, true, true},
		"a password, of whoever chose the files": {inFile(func(c *Config) *string { return &c.PasswordFile }), nil, false, true},
		"no file":                                {validNetHSM(), nil, true, true},
		"the PIN of a token":                     {token, nil, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			registry := New(Options{
				Openers: map[string]Opener{TypeNetHSM: opener, TypePKCS11: opener}, Secrets: SecretFiles{Dir: dir},
				NetHSMs: test.allowed, Strangers: test.strangers,
			})
			err := registry.Check(test.config)
			switch {
			case test.ok != (err == nil):
				t.Errorf("got %v", err)
			case err != nil && (!errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "-nethsm-url=https://a.example:8443") ||
				strings.Contains(err.Error(), "planted")):
				t.Errorf("the complaint is %v", err)
			}
		})
	}
}

// Whatever is taken for the URL of a node leads to a host by TLS, or stays on this machine; and no complaint quotes it.
func FuzzURLOfANode(f *testing.F) {
	for _, seed := range []string{
		"https://a.example", "https://a.example:8443/api/v1", "http://127.0.0.1:8080", "http://[::1]", "https://u:planted@a", "https://a?x", "a:1",
		"https://a.example:", "HTTPS://A", "https://[::1%25lo]:1", "http://localhost.", "http://127.0.0.1.example", "https:///api/v1", "//a", "",
		"https://\xc6", "https://ä.example", "https://a b", "https://a%41",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		node, err := parseNode(text)
		if err != nil {
			if strings.Contains(text, "planted") && strings.Contains(err.Error(), "planted") {
				t.Errorf("the complaint about %q quotes it: %v", text, err)
			}
			return
		}
		if !strings.HasPrefix(node, "https://") && !strings.HasPrefix(node, "http://127.") && !strings.HasPrefix(node, "http://[") &&
			!strings.HasPrefix(node, "http://localhost:") {
			t.Errorf("%q is taken for %q", text, node)
		}
		if again, err := parseNode(node); err != nil || again != node {
			t.Errorf("%q is taken for %q, and that for %q, %v", text, node, again, err)
		}
		// What was allowed is what is asked.
		client, err := nethsm.New(nethsm.Options{URLs: []string{text}})
		if err != nil {
			return
		}
		if asked := client.URLs(); len(asked) != 1 || asked[0] != node {
			t.Errorf("%q is allowed as %q, and the client asks %q", text, node, asked)
		}
		must(t, client.Close())
	})
}
