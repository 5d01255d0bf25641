package test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// ward is a machine with all that nitroseal can be configured for, and the configuration in parts, so that a test can
// spoil one of them.
type ward struct {
	dir     string
	site    *vaulttest.Site
	cluster *etcdtest.Cluster
	netHSM  *nethsmtest.HSM
	plugin  string // the file that the site's plugin was made from
}

func newWard(t *testing.T) *ward {
	t.Helper()
	w := &ward{dir: t.TempDir(), site: vaulttest.StartSite(t, vaulttest.SiteOptions{}), cluster: etcdtest.Start(t, 1), netHSM: startNetHSM(t, 2)}
	w.plugin = vaulttest.Build{}.Binary(t).Path
	must(t, w.netHSM.AddUser("second-admin", "Administrator", netPassword))
	must(t, w.netHSM.AddUser("second-operator", "Operator", netAdminPassword))
	must(t, os.Mkdir(filepath.Join(w.dir, "state"), 0o700))
	must(t, os.Mkdir(filepath.Join(w.dir, "envelopes"), 0o700))
	for name, content := range map[string][]byte{
		"pin": []byte(w.site.Token.PIN), "password": []byte(netPassword), "admin": []byte(netAdminPassword), "token": []byte(w.site.RootToken),
		"nethsm-ca.pem": w.netHSM.CA(), "client.key": w.cluster.ClientKey,
		"foreign.pem": w.cluster.ForeignCert, "foreign.key": w.cluster.ForeignKey,
	} {
		must(t, os.WriteFile(filepath.Join(w.dir, name), content, 0o600))
	}
	return w
}

// configuration is nitroseal.hcl; each pair of changes replaces one text in it by another.
func (w *ward) configuration(t *testing.T, changes ...string) string {
	t.Helper()
	text := fmt.Sprintf(`
state_dir = "state"
pkcs11 {
  modules = [%q]
  env     = ["SOFTHSM2_CONF", "GORACE"]
}
device "stick" {
  type        = "pkcs11"
  token_label = %q
  pin_file    = "pin"
  parallel    = 8
}
device "rack" {
  type                = "nethsm"
  urls                = ["%s"]
  username            = %q
  password_file       = "password"
  admin_username      = %q
  admin_password_file = "admin"
  ca_cert_file        = "nethsm-ca.pem"
  request_timeout     = "5s"
}
store "cluster" {
  type             = "etcd"
  endpoints        = ["%s"]
  prefix           = "doctor-test"
  ca_cert_file     = %q
  client_cert_file = %q
  client_key_file  = "client.key"
}
store "shelf" {
  type = "file"
  dir  = "envelopes"
}
vault {
  address      = %q
  ca_cert_file = %q
  token_file   = "token"
  plugin_file  = %q
}
`, w.site.Token.Module, w.site.Token.Label, strings.Join(w.netHSM.URLs(), `", "`), netOperator, netAdmin,
		strings.Join(w.cluster.Endpoints, `", "`), w.cluster.CAFile, w.cluster.CertFile, w.site.Address, w.site.CAFile, w.plugin)
	for i := 0; i < len(changes); i += 2 {
		if !strings.Contains(text, changes[i]) {
			t.Fatalf("the configuration lacks %q", changes[i])
		}
		text = strings.ReplaceAll(text, changes[i], changes[i+1])
	}
	path := filepath.Join(w.dir, strings.NewReplacer("/", "-", " ", "-").Replace(t.Name())+".hcl")
	must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// nitroseal runs the command and returns its exit code.
func nitroseal(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	command := exec.CommandContext(t.Context(), vaulttest.Build{Command: "nitroseal"}.Binary(t).Path, args...)
	command.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=20") // or each module host would wait a second at its end
	var out, complaints bytes.Buffer
	command.Stdout, command.Stderr = &out, &complaints
	err := command.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), complaints.String(), command.ProcessState.ExitCode()
}

// examination is what the doctor prints as JSON.
type examination struct {
	Problems, Warnings int
	Findings           []struct{ Subject, Check, Verdict, Seen, Remedy string }
}

func (w *ward) doctor(t *testing.T, configuration string, code int) examination {
	t.Helper()
	stdout, stderr, got := nitroseal(t, "doctor", "--config", configuration, "--output", "json")
	if got != code {
		t.Fatalf("exit code %d, want %d\n%s\n%s", got, code, stdout, stderr)
	}
	for _, planted := range []string{w.site.Token.PIN, netPassword, netAdminPassword, w.site.RootToken} {
		if strings.Contains(stdout+stderr, planted) {
			t.Errorf("the doctor says a secret aloud: %s", planted)
		}
	}
	var seen examination
	must(t, json.Unmarshal([]byte(stdout), &seen))
	return seen
}

// want fails unless a finding of that subject and check has that verdict and speaks of the words.
func (e examination) want(t *testing.T, subject, check, verdict string, words ...string) {
	t.Helper()
	for _, f := range e.Findings {
		if !strings.Contains(f.Subject, subject) || f.Check != check || f.Verdict != verdict {
			continue
		}
		missing := ""
		for _, word := range words {
			if !strings.Contains(f.Seen+" "+f.Remedy, word) {
				missing = word
			}
		}
		if missing == "" {
			return
		}
	}
	text, _ := json.MarshalIndent(e, "", "  ")
	t.Errorf("no finding about %q, %q is a %s that speaks of %q:\n%s", subject, check, verdict, words, text)
}

// TestDoctorOnAWholeMachine: what is well is found well, and everything that an operator gets wrong is found and comes
// with a way to mend it.
func TestDoctorOnAWholeMachine(t *testing.T) {
	w := newWard(t)
	healthy := w.configuration(t)
	for _, key := range []string{"stick", "rack"} {
		if _, stderr, code := nitroseal(t, "--config", healthy, "key", "generate", key, "--device", key, "--algorithm", "rsa-2048"); code != 0 {
			t.Fatalf("generating a key on %s: %s", key, stderr)
		}
	}

	t.Run("all is well but for what one HSM alone holds", func(t *testing.T) {
		seen := w.doctor(t, healthy, 0)
		for subject, checks := range map[string][]string{
			`device "stick"`:   {"module", "token", "PIN", "round trip"},
			`device "rack"`:    {"trust", "round trip", "state", "certificate", "role", "clock"},
			`key "stick"`:      {"round trip v1 on stick"},
			`key "rack"`:       {"round trip v1 on rack"},
			`store "cluster"`:  {"write, read, delete"},
			`store "shelf"`:    {"write, read, delete"},
			"vault":            {"state", "clock", "checksum"},
			"machine":          {"state directory"},
			w.netHSM.URLs()[1]: {"state", "certificate"},
		} {
			for _, check := range checks {
				seen.want(t, subject, check, "ok")
			}
		}
		seen.want(t, `key "stick"`, "record", "warning", "one HSM only")
		seen.want(t, `store "cluster"`, "certificate", "warning", "ends in 0 days")
		seen.want(t, `device "rack"`, "role", "warning", "leave admin_username out")
	})
	t.Run("--quiet shows only what needs somebody", func(t *testing.T) {
		stdout, stderr, code := nitroseal(t, "doctor", "--config", healthy, "--quiet")
		if code != 0 || strings.Contains(stdout, "  ok ") || !strings.Contains(stdout, "WARNING") {
			t.Errorf("exit code %d\n%s\n%s", code, stdout, stderr)
		}
	})

	module := w.site.Token.Module
	other := filepath.Join(w.dir, "other-plugin")
	must(t, os.WriteFile(other, []byte("another file"), 0o600))
	must(t, os.WriteFile(filepath.Join(w.dir, "wrong-password"), []byte("not the password"), 0o600))
	for name, c := range map[string]struct {
		changes               []string
		subject, check, speak string
	}{
		"a module that is not there":              {[]string{module, "/usr/lib/none/opensc-pkcs11.so"}, `device "stick"`, "module", "not there"},
		"a token that is not there":               {[]string{w.site.Token.Label, "no such token"}, `device "stick"`, "token", "plug it in"},
		"a NetHSM that another authority vouches": {[]string{`"nethsm-ca.pem"`, fmt.Sprintf("%q", w.site.CAFile)}, `device "rack"`, "state", "certificate"},
		"a NetHSM that is not checked at all":     {[]string{`ca_cert_file        = "nethsm-ca.pem"`, "tls_insecure = true"}, `device "rack"`, "trust", "tls_insecure"},
		"an administrator as operator":            {[]string{fmt.Sprintf("%q", netOperator), `"second-admin"`}, `device "rack"`, "role", "Operator"},
		"an operator with a wrong password":       {[]string{`"password"`, `"wrong-password"`}, `device "rack"`, "round trip", "password"},
		"an operator as administrator":            {[]string{fmt.Sprintf("%q", netAdmin), `"second-operator"`}, `device "rack"`, "role", "role Operator"},
		"an etcd that refuses our certificate":    {[]string{w.cluster.CertFile, "foreign.pem", `"client.key"`, `"foreign.key"`}, `store "cluster"`, "write, read, delete", "certificate"},
		"an etcd of another authority":            {[]string{w.cluster.CAFile, "nethsm-ca.pem"}, `store "cluster"`, "write, read, delete", "authority"},
		"a plugin file that Vault does not run":   {[]string{w.plugin, other}, "vault", "checksum", "vault plugin register"},
		"a Vault of another authority":            {[]string{w.site.CAFile, "nethsm-ca.pem"}, "vault", "address", "authority"},
		"a Vault that is not there":               {[]string{w.site.Address, "https://127.0.0.1:1"}, "vault", "address", "refused"},
		"a folder of envelopes that is gone":      {[]string{`"envelopes"`, `"none"`}, `store "shelf"`, "write, read, delete", "none"},
	} {
		t.Run(name, func(t *testing.T) {
			w.doctor(t, w.configuration(t, c.changes...), 1).want(t, c.subject, c.check, "problem", c.speak)
		})
	}

	t.Run("a node that is away, one that is locked", func(t *testing.T) {
		w.netHSM.Node(0).Stop()
		w.netHSM.Node(1).SetState(nethsmtest.Locked)
		seen := w.doctor(t, healthy, 1)
		seen.want(t, w.netHSM.URLs()[0], "state", "problem", "refused")
		seen.want(t, w.netHSM.URLs()[1], "state", "problem", "nitroseal nethsm unlock")
		seen.want(t, `device "stick"`, "round trip", "ok")
		seen.want(t, `key "rack"`, "round trip v1 on rack", "problem")
		w.netHSM.Node(1).SetState(nethsmtest.Failed)
		w.doctor(t, healthy, 1).want(t, w.netHSM.URLs()[1], "state", "problem", "etcd")
		must(t, w.netHSM.Node(0).Start())
		w.netHSM.Node(1).SetState(nethsmtest.Operational)
	})
	t.Run("a clock that is ten minutes ahead", func(t *testing.T) {
		client, err := nethsm.New(nethsm.Options{URLs: w.netHSM.URLs()[1:], TLS: nethsm.TLS{CA: w.netHSM.CA()}})
		must(t, err)
		defer func() { must(t, client.Close()) }()
		administrator := client.As(nethsm.Credentials{Username: netAdmin, Password: []byte(netAdminPassword)})
		must(t, administrator.SetTime(t.Context(), time.Now().Add(10*time.Minute)))
		seen := w.doctor(t, healthy, 1)
		seen.want(t, w.netHSM.URLs()[0], "clock", "ok")
		seen.want(t, w.netHSM.URLs()[1], "clock", "problem", "away from this machine")
		must(t, administrator.SetTime(t.Context(), time.Now()))
	})
	t.Run("a certificate that has ended", func(t *testing.T) {
		must(t, w.netHSM.Node(0).ReplaceCertificate(nethsmtest.Expired))
		w.doctor(t, healthy, 1).want(t, w.netHSM.URLs()[0], "state", "problem", "ended on")
		must(t, w.netHSM.Node(0).ReplaceCertificate(nethsmtest.Renewed))
	})
	t.Run("a wrong PIN is sent once, whatever the doctor is asked", func(t *testing.T) {
		must(t, os.WriteFile(filepath.Join(w.dir, "pin"), []byte("000000"), 0o600))
		w.doctor(t, healthy, 1).want(t, `device "stick"`, "PIN", "problem", "right PIN")
		w.doctor(t, healthy, 1).want(t, `device "stick"`, "PIN", "problem", "not sent again")
	})
}
