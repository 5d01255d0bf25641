package config

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2/gohcl"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// example is the file that documents all that can be set.
const example = "testdata/nitroseal.hcl"

// write puts a configuration into a folder of its own, with a certificate under the names that it may use.
func write(t testing.TB, source string) (path string) {
	t.Helper()
	dir := t.TempDir()
	path = filepath.Join(dir, "nitroseal.hcl")
	for name, content := range map[string][]byte{
		path: []byte(source), filepath.Join(dir, "ca.pem"): certificate(t), filepath.Join(dir, "client.pem"): certificate(t),
		filepath.Join(dir, "alice.asc"): []byte("alice's key"), filepath.Join(dir, "bob.asc"): []byte("bob's key"),
	} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

var authority []byte

// certificate is the PEM of some authority, the same one each time.
func certificate(t testing.TB) []byte {
	t.Helper()
	if authority != nil {
		return authority
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	authority = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return authority
}

func TestTheExampleIsReadWhole(t *testing.T) {
	source, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	path := write(t, string(source))
	dir := filepath.Dir(path)
	ca := certificate(t)
	slot := uint(0)
	const opensc, softhsm = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so", "/usr/lib/softhsm/libsofthsm2.so"
	want := &Config{
		Path: path, StateDir: "/var/lib/nitroseal", SecretsDir: filepath.Join(dir, "secrets"),
		PKCS11: PKCS11{
			Modules: []string{opensc, softhsm}, Env: []string{"OPENSC_CONF", "SOFTHSM2_CONF"},
			ModuleHost:       "/usr/libexec/nitroseal-glibc",
			ModuleHostSHA256: "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
		},
		Devices: []Device{
			{Name: "stick", Config: device.Config{
				Type: "pkcs11", Module: opensc, Serial: "DENK0100001", PINFile: dir + "/secrets/stick.pin", Parallel: 1,
				DecryptTimeout: 20 * time.Second, GenerateTimeout: 5 * time.Minute,
			}},
			{Name: "laptop", PINEnv: "NITROSEAL_LAPTOP_PIN", Config: device.Config{Type: "pkcs11", Module: softhsm, TokenLabel: "throw-away"}},
			{Name: "reader", PINEnv: "NITROSEAL_READER_PIN", Config: device.Config{Type: "pkcs11", Module: opensc, Slot: &slot}},
			{Name: "rack", Config: device.Config{
				Type: "nethsm", URLs: []string{"https://nethsm-1.example.org", "https://nethsm-2.example.org:8443"},
				Username: "operator", PasswordFile: dir + "/secrets/operator.password",
				AdminUsername: "admin", AdminPasswordFile: dir + "/secrets/admin.password",
				UnlockPassphraseFile: dir + "/secrets/unlock.passphrase",
				CACert:               string(ca), TLSServerName: "nethsm.example.org",
				TLSPins:        []string{"a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90:a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90"},
				RequestTimeout: 10 * time.Second, ObjectStore: true, KeyTags: []string{"nitroseal"},
			}},
			{
				Name: "lab", PasswordEnv: "NITROSEAL_LAB_PASSWORD", AdminPasswordEnv: "NITROSEAL_LAB_ADMIN_PASSWORD",
				UnlockPassphraseEnv: "NITROSEAL_LAB_UNLOCK",
				Config: device.Config{
					Type: "nethsm", URLs: []string{"https://127.0.0.1:8443"}, Username: "operator", AdminUsername: "admin",
				},
			},
		},
		Stores: []Store{
			{
				Name: "cluster", Type: StoreEtcd, Prefix: "nitroseal/prod",
				Endpoints: []string{"https://etcd-1.example.org:2379", "https://etcd-2.example.org:2379"},
				Username:  "nitroseal", PasswordFile: dir + "/secrets/etcd.password",
				CACert: ca, ClientCert: ca, ClientKeyFile: dir + "/secrets/client.key", ServerName: "etcd.example.org",
				RequestTimeout: 10 * time.Second,
			},
			{
				Name: "etcd-by-password", Type: StoreEtcd, Prefix: "nitroseal/test", Endpoints: []string{"https://etcd-1.example.org:2379"},
				Username: "nitroseal", PasswordEnv: "NITROSEAL_ETCD_PASSWORD",
			},
			{Name: "on-the-stick", Type: StoreObject, Device: "stick", Application: "nitroseal"},
			{Name: "here", Type: StoreFile, Dir: "/var/lib/nitroseal/material"},
		},
		Vault: &Vault{
			Address: "https://vault.example.org:8200", CACert: ca, TLSServerName: "vault.example.org",
			TokenFile: dir + "/secrets/vault.token", Mount: "nitrokey", PluginName: "vault-plugin-secrets-nitrokey",
			PluginFile: "/etc/vault/plugins/vault-plugin-secrets-nitrokey",
		},
		Clusters: []Cluster{
			{
				Name:   "prod",
				Nodes:  []string{"https://vault-1.example.org:8200", "https://vault-2.example.org:8200", "https://vault-3.example.org:8200"},
				CACert: ca, TLSServerName: "vault.example.org",
				TLSPins: []string{"a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90:a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90"},
				Key:     "prod", Store: "cluster", Shares: 5, Threshold: 3, RecoveryShares: 5, RecoveryThreshold: 3,
				Persons:   []Person{{"alice", []byte("alice's key")}, {"bob", []byte("bob's key")}},
				RootToken: RootTokenPGP, RootPGPKey: []byte("alice's key"), RaftLeaderCACert: ca, Timeout: 10 * time.Second,
			},
			{
				Name: "bunkered", Nodes: []string{"http://127.0.0.1:8200"}, PlainHTTP: true,
				Spread: "2 of office, bunker, bank", Store: "here", RootToken: RootTokenDiscard,
			},
		},
		Run: Run{
			Listen: "0.0.0.0:9108", TLSCertFile: filepath.Join(dir, "run.pem"), TLSKeyFile: "credential:run.key", Interval: 5 * time.Second,
		},
		Serve: &Serve{
			Listen: "0.0.0.0:8210", TLSCertFile: filepath.Join(dir, "serve.pem"), TLSKeyFile: "credential:serve.key",
			ClientCAFile: filepath.Join(dir, "ca.pem"), ClientCertificates: CertificatesOptional, Mount: "transit", Keys: []string{"prod", "stage"},
			Tokens: "cluster", Rate: 100, Burst: 1000, MaxBody: 256 << 10, MaxConnections: 4096, MetricsListen: "127.0.0.1:9109", MLock: true,
		},
		Audits: []Audit{
			{Kind: AuditFile, Path: "/var/log/nitroseal/audit.log"},
			{Kind: AuditJournal},
			{Kind: AuditSyslog, Address: "/run/systemd/journal/syslog"},
		},
	}
	got, err := Load(path)
	if err != nil {
		t.Fatalf("loading the example: %v", err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the example (-want +got):\n%s", diff)
	}
}

func TestTheExampleNamesEveryAttribute(t *testing.T) {
	source, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	for _, attributes := range []any{
		top{},
		pkcs11Attributes{},
		pkcs11DeviceAttributes{},
		nethsmDeviceAttributes{},
		etcdStoreAttributes{},
		objectStoreAttributes{},
		fileStoreAttributes{},
		vaultAttributes{},
		clusterAttributes{},
		personAttributes{},
		runAttributes{},
		serveAttributes{},
		fileAuditAttributes{},
		syslogAuditAttributes{},
	} {
		schema, _ := gohcl.ImpliedBodySchema(attributes)
		for _, attribute := range schema.Attributes {
			// token_env is the other form of token_file, of which a block takes one
			set := regexp.MustCompile(`(?m)^\s*` + attribute.Name + ` *= `)
			if !set.Match(source) && !strings.Contains(string(source), "or "+attribute.Name) {
				t.Errorf("the example does not name %s of %T", attribute.Name, attributes)
			}
		}
	}
}

// minimal is a configuration around something.
func minimal(around string) string {
	return "state_dir = \"state\"\npkcs11 {\n  modules = [\"/m.so\"]\n}\n" + around
}

func TestComplaintsSayWhereAndWhatToWrite(t *testing.T) {
	for name, test := range map[string]struct {
		source string
		wants  []string // all of them, in this order
	}{
		"an unknown attribute of the file": {
			"state_dir = \"s\"\nsecret_dir = \"x\"\n", []string{":2:1: the file: secret_dir is not known; did you mean secrets_dir?"},
		},
		"an unknown block": {
			minimal("devise \"one\" {\n}\n"), []string{":5:1: the file: a block devise is not known; did you mean device?"},
		},
		"nothing near": {
			minimal("vault {\n  address = \"https://v:8200\"\n  colour = \"red\"\n}\n"),
			[]string{":7:3: vault: colour is not known; known are address, ca_cert_file, mount, plugin_file, plugin_name, tls_server_name, token_env, token_file"},
		},
		"an attribute of the other type of device": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"P\"\n  urls = []\n}\n"),
			[]string{":9:3: device \"one\": urls is not known; known are "},
		},
		"a misspelt attribute": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  token_lable = \"x\"\n  pin_env = \"P\"\n}\n"),
			[]string{":7:3: device \"one\": token_lable is not known; did you mean token_label?"},
		},
		"a PIN in the file": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin = \"648219\"\n}\n"),
			[]string{":8:3: device \"one\": pin would hold a secret, and this file holds none; set pin_file to the path of a file that holds it, " +
				"or pin_env to the name of an environment variable that does"},
		},
		"all secrets of a NetHSM in the file": {
			minimal("device \"one\" {\n  type = \"nethsm\"\n  urls = [\"https://h\"]\n  username = \"o\"\n  password = \"a\"\n  admin_password = \"b\"\n  unlock_passphrase = \"c\"\n}\n"),
			[]string{":9:3: device \"one\": password would hold", ":10:3: device \"one\": admin_password would hold", ":11:3: device \"one\": unlock_passphrase would hold"},
		},
		"a password of etcd in the file": {
			minimal("store \"s\" {\n  type = \"etcd\"\n  endpoints = [\"https://h:2379\"]\n  prefix = \"n\"\n  password = \"a\"\n}\n"),
			[]string{":9:3: store \"s\": password would hold a secret"},
		},
		"a token in the file": {
			minimal("vault {\n  address = \"https://v:8200\"\n  token = \"hvs.x\"\n}\n"), []string{":7:3: vault: token would hold a secret"},
		},
		"a PIN where the name of a variable belongs": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"PIN=648219\"\n}\n"),
			[]string{":8:13: device \"one\": pin_env names an environment variable and does not hold the secret"},
		},
		"a secret twice": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"P\"\n  pin_file = \"p\"\n}\n"),
			[]string{":8:13: device \"one\": both pin_file and pin_env are given; keep one"},
		},
		"no PIN": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n}\n"), []string{":5:1: device \"one\": no PIN is given; set pin_file"},
		},
		"no password": {
			minimal("device \"one\" {\n  type = \"nethsm\"\n  urls = [\"https://h\"]\n  username = \"o\"\n}\n"),
			[]string{":8:14: device \"one\": no password is given; set password_file"},
		},
		"an administrator without a password": {
			minimal("device \"one\" {\n  type = \"nethsm\"\n  urls = [\"https://h\"]\n  username = \"o\"\n  password_env = \"P\"\n  admin_username = \"a\"\n}\n"),
			[]string{":10:20: device \"one\": admin_username and its password belong together"},
		},
		"what package device complains about": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  serial = \"x\"\n  pin_env = \"P\"\n}\n"),
			[]string{":5:1: device \"one\": more than one of"},
		},
		"no type": {
			minimal("device \"one\" {\n}\n"), []string{`:5:1: device "one": type is missing; write type = "pkcs11", or nethsm`},
		},
		"a type that is none": {
			minimal("store \"s\" {\n  type = \"vault\"\n}\n"), []string{`:6:10: store "s": type "vault" is not known; it is one of etcd, object, file`},
		},
		"two devices of one name": {
			minimal(strings.Repeat("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"P\"\n}\n", 2)),
			[]string{":10:1: device \"one\" is there twice; keep one"},
		},
		"a name that is none": {
			minimal("device \"a/b\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"P\"\n}\n"), []string{":5:8: device \"a/b\": the name is not one"},
		},
		"no name":                 {minimal("device {\n}\n"), []string{":5:8: Missing name for device"}},
		"a second block pkcs11":   {minimal("pkcs11 {\n  modules = []\n}\n"), []string{":5:1: pkcs11 is there twice; keep one"}},
		"a block as an attribute": {minimal("vault = {}\n"), []string{":5:1: the file: vault is a block; write vault { … }"}},
		"an attribute as a block": {minimal("secrets_dir {\n}\n"), []string{":5:1: the file: secrets_dir is not a block; write secrets_dir = …"}},
		"no state_dir":            {"", []string{":1:1: the file: state_dir is missing"}},
		"an empty state_dir":      {"state_dir = \"\"\n", []string{":1:13: the file: state_dir is missing"}},
		"a variable":              {minimal("secrets_dir = home\n"), []string{":5:15: the file: secrets_dir is not written out"}},
		"one of the environment":  {minimal("secrets_dir = \"${env.HOME}\"\n"), []string{":5:15: the file: secrets_dir is not written out"}},
		"a function":              {minimal("secrets_dir = upper(\"x\")\n"), []string{":5:15: the file: secrets_dir is not written out"}},
		"a condition":             {minimal("secrets_dir = true ? \"a\" : \"b\"\n"), []string{":5:15: the file: secrets_dir is not written out"}},
		"a text of several lines": {minimal("secrets_dir = <<X\nsecrets\nX\n"), []string{":5:15: the file: secrets_dir is not written out"}},
		"a sum in a list":         {"state_dir = \"s\"\npkcs11 {\n  modules = [\"/m.so\"]\n  env = [1 + 1]\n}\n", []string{":4:9: pkcs11: env is not written out"}},
		"a token over plain http": {
			minimal("vault {\n  address = \"http://vault:8200\"\n}\n"), []string{":6:13: vault: address would send the token in the clear"},
		},
		"a password in an address": {
			minimal("vault {\n  address = \"https://u:648219@vault:8200\"\n}\n"), []string{":6:13: vault: address holds a user or a password"},
		},
		"an address without a host": {
			minimal("vault {\n  address = \"https://:8200\"\n}\n"), []string{":6:13: vault: address is no URL of a server"},
		},
		"a token where the name of a variable belongs": {
			minimal("vault {\n  address = \"https://v:8200\"\n  token_env = \"hvs.x\"\n}\n"), []string{":7:15: vault: token_env names an environment variable"},
		},
		"a PIN alone where the name of a variable belongs": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"648219\"\n}\n"),
			[]string{":8:13: device \"one\": pin_env names an environment variable and does not hold the secret"},
		},
		"a module by bare name":     {"state_dir = \"s\"\npkcs11 {\n  modules = [\"opensc-pkcs11.so\"]\n}\n", []string{":3:13: pkcs11: module \"opensc-pkcs11.so\" is not an absolute path"}},
		"a variable with its value": {"state_dir = \"s\"\npkcs11 {\n  modules = [\"/m.so\"]\n  env = [\"A=b\"]\n}\n", []string{":4:9: pkcs11: env lists the names"}},
		"a host without its hash":   {"state_dir = \"s\"\npkcs11 {\n  modules = [\"/m.so\"]\n  module_host = \"/h\"\n}\n", []string{":4:17: pkcs11: module_host and module_host_sha256 belong together"}},
		"a duration without a unit": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"P\"\n  decrypt_timeout = \"20\"\n}\n"),
			[]string{":9:21: device \"one\": decrypt_timeout is not a duration; write a number with a unit"},
		},
		"a number that is a text": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"P\"\n  parallel = \"many\"\n}\n"), []string{":9:15: Unsuitable value type"},
		},
		"a certificate that is not there": {
			minimal("vault {\n  address = \"https://v:8200\"\n  ca_cert_file = \"nowhere.pem\"\n}\n"), []string{":7:18: vault: ca_cert_file: reading /"},
		},
		"an object store on a device that is not there": {
			minimal("store \"s\" {\n  type = \"object\"\n  device = \"one\"\n}\n"), []string{":7:12: store \"s\": there is no device \"one\" in this file"},
		},
		"a client certificate without its key": {
			minimal("store \"s\" {\n  type = \"etcd\"\n  endpoints = [\"https://h:2379\"]\n  prefix = \"n\"\n  client_cert_file = \"ca.pem\"\n}\n"),
			[]string{":9:22: store \"s\": client_cert_file and client_key_file belong together"},
		},
		"a key of TLS in the file": {
			minimal("run {\n  tls_key = \"648219\"\n}\n"), []string{":6:3: run: tls_key would hold a secret, and this file holds none; set tls_key_file"},
		},
		"a credential that is no file name": {
			minimal("device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_file = \"credential:../pin\"\n}\n"),
			[]string{":8:14: device \"one\": pin_file names the credential \"../pin\", which is no file name; write credential:NAME"},
		},
		"text that is no HCL": {"state_dir = \"s\n", []string{":1:"}},
		"several at once, in the order of the file": {
			"stat_dir = \"s\"\ndevice \"one\" {\n  type = \"tpm\"\n}\nvault {\n}\n",
			[]string{":1:1: the file: stat_dir", ":1:1: the file: state_dir is missing", ":3:10: device \"one\": type", ":5:7: Missing required argument"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, test.source)
			_, err := Load(path)
			var refused *Error
			if !errors.As(err, &refused) || !errors.Is(err, ErrInvalid) {
				t.Fatalf("Load answers %v, want an *Error that is ErrInvalid", err)
			}
			var got []string
			for _, c := range refused.Complaints {
				got = append(got, strings.TrimPrefix(c.String(), path))
			}
			if len(got) < len(test.wants) || name != "text that is no HCL" && len(got) != len(test.wants) {
				t.Fatalf("complaints:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(test.wants, "\n"))
			}
			for i, want := range test.wants {
				if !strings.HasPrefix(got[i], want) {
					t.Errorf("complaint %d is\n%s\nwant\n%s", i, got[i], want)
				}
			}
			for _, secret := range []string{"648219", "hvs.x"} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the secret %q is repeated: %v", secret, err)
				}
			}
		})
	}
}

func TestTheOnlyModuleNeedsNoName(t *testing.T) {
	path := write(t, "state_dir = \"state\"\ndevice \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_env = \"P\"\n}\npkcs11 {\n  modules = [\"/m.so\"]\n}\n")
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.Devices[0].Module != "/m.so" || got.StateDir != filepath.Join(filepath.Dir(path), "state") || got.SecretsDir != "/" {
		t.Errorf("read %+v", got)
	}
}

func TestAFileThatOthersMayWriteIsRefused(t *testing.T) {
	for name, mode := range map[string]os.FileMode{"its group": 0o660, "everybody": 0o606} {
		t.Run(name, func(t *testing.T) {
			path := write(t, minimal(""))
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(path); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "chmod go-w") {
				t.Errorf("Load answers %v", err)
			}
		})
	}
	t.Run("a certificate that others may write", func(t *testing.T) {
		path := write(t, minimal("vault {\n  address = \"https://v:8200\"\n  ca_cert_file = \"ca.pem\"\n}\n"))
		if err := os.Chmod(filepath.Join(filepath.Dir(path), "ca.pem"), 0o666); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "chmod go-w") {
			t.Errorf("Load answers %v", err)
		}
	})
}

func TestAFileThatCannotBeReadIsTold(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big.hcl")
	if err := os.WriteFile(big, bytes.Repeat([]byte("#\n"), maxFile), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct{ path, says string }{
		"none":     {filepath.Join(dir, "none.hcl"), "--config"},
		"a folder": {dir, "not a regular file"},
		"too big":  {big, "larger than"},
		"binary":   {write(t, "state_dir = \"a\x00b\"\n"), "NUL"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Load(test.path); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("Load answers %v, want ErrInvalid with %q", err, test.says)
			}
		})
	}
}

func TestSecretsOfTheEnvironmentAreFilledIn(t *testing.T) {
	d := Device{
		Name: "lab", Config: device.Config{Type: "nethsm"},
		PINEnv: "A", PasswordEnv: "B", AdminPasswordEnv: "C", UnlockPassphraseEnv: "D",
	}
	set := map[string]string{"A": "1", "B": "2", "C": "3", "D": "4"}
	lookup := func(name string) (string, bool) { value, ok := set[name]; return value, ok }
	got, err := d.WithEnvironment(lookup)
	if err != nil {
		t.Fatal(err)
	}
	want := device.Config{Type: "nethsm", PIN: "1", Password: "2", AdminPassword: "3", UnlockPassphrase: "4"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("filled in (-want +got):\n%s", diff)
	}
	if d.PIN != "" {
		t.Error("the device keeps the secret")
	}
	for _, spoilt := range []string{" \t", "se\ncret", "\n", "secret\x1b[D"} {
		set["C"] = spoilt
		if _, err := d.WithEnvironment(lookup); !errors.Is(err, device.ErrConfig) || strings.Contains(err.Error(), "cret\x1b") {
			t.Errorf("%q: %v", spoilt, err)
		}
	}
	set["C"] = "3\r\n" // a line break at the end is cut off, as in a file: sent, it would cost a try
	if again, err := d.WithEnvironment(lookup); err != nil || again.AdminPassword != "3" {
		t.Errorf("with a line break: %v", err)
	}
	for name, spoil := range map[string]func(){"a variable that is empty": func() { set["C"] = "" }, "one that is not set": func() { delete(set, "C") }} {
		spoil()
		if _, err := d.WithEnvironment(lookup); !errors.Is(err, device.ErrConfig) || !strings.Contains(err.Error(), "variable C ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	source, err := os.ReadFile(example)
	if err != nil {
		f.Fatal(err)
	}
	for part := range strings.SplitSeq(string(source), "\n}\n") { // a block each: Go's fuzzer takes minutes to cut down long inputs
		f.Add([]byte(part + "\n}\n"))
	}
	f.Add([]byte(minimal("device \"one\" {\n  type = \"pkcs11\"\n  pin = \"648219\"\n}\n")))
	f.Add([]byte("a = \"${b}\"\n<<X\nX\n"))
	f.Add([]byte("device \"a\" \"b\" { type = [1] }\nstore { dir = null }\npkcs11 { modules = null }"))
	f.Fuzz(func(t *testing.T, source []byte) {
		config, err := parse("/nowhere/nitroseal.hcl", source)
		if (config == nil) == (err == nil) {
			t.Fatalf("parse answers %v and %v", config, err)
		}
		var refused *Error
		if err != nil && (!errors.As(err, &refused) || len(refused.Complaints) == 0 || err.Error() == "") {
			t.Fatalf("parse answers %v, which is no list of complaints", err)
		}
	})
}
