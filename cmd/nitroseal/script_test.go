package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/rogpeppe/go-internal/testscript"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

var update = flag.Bool("update", false, "write the golden parts of the scripts anew")

// TestStories runs testdata/script/*.txtar, what operators do, in a folder with a configuration and real devices. The first
// line of a script names its devices: "# Devices: one two card rack".
//
//	one, two   SoftHSM tokens with the keys "unseal" (RSA, id 01) and "curve" (P-256, id 02), and PINs in secrets/
//	card       a token that locks after three wrong PINs, with the same keys
//	rack       a NetHSM of two nodes with the key "unseal"
//	vault      a Vault that nobody has initialised, as cluster "prod" with a store "here"
//	vaults     three of them
//
// Scripts have a few commands more than testscript's own, see stage.commands. Those of nethsm_*.txtar have others.
func TestStories(t *testing.T) {
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for _, script := range scripts {
		name := strings.TrimSuffix(filepath.Base(script), ".txtar")
		if strings.HasPrefix(name, "nethsm_") {
			continue
		}
		t.Run(name, func(t *testing.T) { // one after the other: SoftHSM is found by the environment
			s := newStage(t, devicesOf(t, script))
			testscript.Run(t, testscript.Params{
				Files: []string{script}, Setup: s.setup, Cmds: s.commands(), RequireExplicitExec: true, UpdateScripts: *update,
			})
		})
	}
}

func devicesOf(t *testing.T, script string) []string {
	t.Helper()
	content, err := os.ReadFile(script)
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(content), "\n")
	devices, found := strings.CutPrefix(first, "# Devices:")
	if !found {
		t.Fatalf("%s does not begin with its devices", script)
	}
	return strings.Fields(devices)
}

// stage is what a script plays on.
type stage struct {
	t        *testing.T
	one, two *pkcs11test.Token
	card     *pkcs11test.SmartCard
	rack     *nethsmtest.HSM
	vaults   *vaulttest.Cluster
	alice    *openpgp.Entity
	secrets  []string // that no output may hold
}

func newStage(t *testing.T, devices []string) *stage {
	t.Helper()
	s := &stage{t: t}
	if slices.Contains(devices, "card") {
		s.card = pkcs11test.Card(t)
		addKeys(t, &s.card.Token)
	} else if slices.Contains(devices, "one") {
		s.one = pkcs11test.SoftHSM(t)
		addKeys(t, s.one)
	}
	if slices.Contains(devices, "two") {
		s.two = s.one.Add(t, "second")
		addKeys(t, s.two)
	}
	if slices.Contains(devices, "rack") {
		s.rack = nethsmtest.Start(t, nethsmtest.Options{Provisioned: true, Nodes: 2})
		_, _, err := s.rack.AddKey(nethsmtest.Key{ID: "unseal", Mechanisms: []string{"RSA_Decryption_OAEP_SHA256"}})
		if err != nil {
			t.Fatal(err)
		}
	}
	switch {
	case slices.Contains(devices, "vault"):
		s.vaults = vaulttest.StartCluster(t, 1, false)
	case slices.Contains(devices, "vaults"):
		s.vaults = vaulttest.StartCluster(t, 3, false)
	}
	return s
}

func addKeys(t *testing.T, token *pkcs11test.Token) {
	t.Helper()
	token.GenerateKey(t, "rsa:2048", "unseal", "01")
	token.GenerateKey(t, "EC:prime256v1", "curve", "02")
}

// setup puts a configuration and its secrets into the script's folder; a script may bring its own files instead.
func (s *stage) setup(env *testscript.Env) error {
	env.Setenv("GORACE", quickEnd)
	env.Setenv("NITROSEAL_CONFIG", filepath.Join(env.WorkDir, "nitroseal.hcl"))
	for _, name := range []string{"SOFTHSM2_CONF", "CARD_CONTROL"} {
		env.Setenv(name, os.Getenv(name))
	}
	for _, folder := range []string{"state", "secrets"} {
		if err := os.Mkdir(filepath.Join(env.WorkDir, folder), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	files := map[string]string{}
	var config strings.Builder
	config.WriteString("state_dir = \"state\"\n\n")
	token := func(name string, t *pkcs11test.Token) {
		files["secrets/"+name+".pin"] = t.PIN + "\n"
		fmt.Fprintf(&config, "\ndevice %q {\n  type     = \"pkcs11\"\n  serial   = %q\n  pin_file = \"secrets/%s.pin\"\n}\n", name, t.Serial, name)
		env.Setenv("MODULE", t.Module)
		env.Setenv(strings.ToUpper(name)+"_SERIAL", t.Serial)
	}
	module := func(t *pkcs11test.Token) {
		fmt.Fprintf(&config, "pkcs11 {\n  modules = [%q]\n  env     = [%s]\n}\n", t.Module, quoted(t.Env))
	}
	switch {
	case s.card != nil:
		module(&s.card.Token)
		token("card", &s.card.Token)
	case s.one != nil:
		module(s.one)
		token("one", s.one)
	}
	if s.two != nil {
		token("two", s.two)
	}
	if s.rack != nil {
		files["ca.pem"] = string(s.rack.CA())
		files["secrets/operator.password"] = nethsmtest.OperatorPassphrase
		files["secrets/admin.password"] = nethsmtest.AdminPassphrase
		files["secrets/unlock.passphrase"] = nethsmtest.UnlockPassphrase
		urls := strings.Join(s.rack.URLs(), `", "`)
		env.Setenv("RACK_URL", s.rack.URLs()[0])
		fmt.Fprintf(&config, `
device "rack" {
  type                = "nethsm"
  urls                = ["%s"]
  username            = "operator"
  password_file       = "secrets/operator.password"
  admin_username      = "admin"
  admin_password_file = "secrets/admin.password"
  ca_cert_file        = "ca.pem"
}
`, urls)
	}
	if err := s.custodyConfig(env, &config, files); err != nil {
		return err
	}
	files["nitroseal.hcl"] = config.String()
	for name, content := range files {
		path := filepath.Join(env.WorkDir, name)
		if _, err := os.Stat(path); err == nil {
			continue // the script's own
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			return err
		}
		if strings.HasPrefix(name, "secrets/") && content != nethsmtest.AdminPassphrase { // which is the name of a role as well
			s.secrets = append(s.secrets, strings.TrimSpace(content))
		}
	}
	return nil
}

// commands are what scripts have besides testscript's own:
//
//	run CODE ARG …        runs nitroseal, which must end with that exit code and show no secret
//	secret VALUE          one more value that no output may hold
//	normal FILE           writes the last standard output to a file, with what varies from run to run replaced
//	mode OCTAL FILE       checks the permissions of a file
//	card tries|wrong N    how many wrong PINs the card still takes, how many it was sent
//	card remove|return    pulls it out and puts it back
//	rack stop|start       ends and begins the service of all nodes
//	rack lock [NODE]      locks all nodes, or one
//	rack decrypts N       how many decryptions it did
//	vault kill|up|restart|anew|freeze|thaw [NODE]
//	                      ends or starts all nodes or one, sealed; anew: with nothing in it
//	vault new|sealed|open [NODE]
//	                      checks how they are
//	vault unsealed        waits until all are
//	alice FILE            opens a message with the key whose public half is in alice.asc
func (s *stage) commands() map[string]func(*testscript.TestScript, bool, []string) {
	return map[string]func(*testscript.TestScript, bool, []string){
		"run": s.run, "secret": s.secret, "normal": normal, "mode": modeCommand, "card": s.cardCommand, "rack": s.rackCommand,
		"vault": s.vaultCommand, "alice": s.aliceReads,
	}
}

func (s *stage) run(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: run CODE ARG …")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec("nitroseal", args[1:]...)
	code := 0
	if failed := (*exec.ExitError)(nil); errors.As(err, &failed) {
		code = failed.ExitCode()
	} else {
		ts.Check(err)
	}
	if code != want {
		ts.Fatalf("nitroseal %s: exit code %d, want %d", strings.Join(args[1:], " "), code, want)
	}
	for _, output := range []string{ts.ReadFile("stdout"), ts.ReadFile("stderr")} {
		for _, secret := range s.secrets {
			if strings.Contains(output, secret) {
				ts.Fatalf("nitroseal %s shows the secret %q", strings.Join(args[1:], " "), secret)
			}
		}
	}
	if code != 0 && strings.Count(ts.ReadFile("stderr"), "nitroseal: ")-strings.Count(ts.ReadFile("stderr"), "nitroseal: warning: ") != 1 {
		ts.Fatalf("an error is told once, as \"nitroseal: …\"")
	}
}

func (s *stage) secret(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: secret VALUE")
	}
	s.secrets = append(s.secrets, args[0])
}

// varying is what differs from run to run, and what stands for it in golden files.
var varying = []struct {
	what *regexp.Regexp
	mark string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`), "TIME"},
	{regexp.MustCompile(`(?s)-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----`), "PEM"},
	{regexp.MustCompile(`"(by|created_by|added_by|updated_by)": "[^"]*"`), `"$1": "WHO"`},
	{regexp.MustCompile(`"round_trip_ms": [0-9.e-]+`), `"round_trip_ms": 0`},
	{regexp.MustCompile(`"mechanisms": \[[^\]]*\]`), `"mechanisms": […]`},
	{regexp.MustCompile(`"firmware": "[^"]+"`), `"firmware": "…"`},
	{regexp.MustCompile(`"envelope": ".*"`), `"envelope": "…"`},
	{regexp.MustCompile(`(?s)"record": \{.*?\n  \}`), `"record": {…}`},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "SHA256"},
	{regexp.MustCompile(`"[A-Za-z0-9_-]{43}"`), `"KID"`},
	{regexp.MustCompile(`\b[0-9a-f]{32}\b`), "ID"},
	{regexp.MustCompile(`\b[0-9a-f]{16}\b`), "SERIAL"},
	{regexp.MustCompile(`ns\.[a-z2-7]{10}\.[A-Za-z0-9_-]{43}`), "TOKEN"},
	{regexp.MustCompile(`"id": "[a-z2-7]{10}"`), `"id": "TOKENID"`},
	{regexp.MustCompile(`https://127\.0\.0\.1:\d+`), "URL"},
}

func normal(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: normal FILE")
	}
	text := strings.ReplaceAll(ts.ReadFile("stdout"), ts.Getenv("WORK"), "$WORK")
	for _, v := range varying {
		text = v.what.ReplaceAllString(text, v.mark)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
}

func (s *stage) cardCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: card tries|wrong N, or card remove|return")
	}
	count := func(got int) {
		want, err := strconv.Atoi(args[1])
		ts.Check(err)
		if got != want {
			ts.Fatalf("card %s: %d, want %d", args[0], got, want)
		}
	}
	switch args[0] {
	case "tries":
		count(s.card.Tries(s.t))
	case "wrong":
		count(s.card.WrongPINs(s.t))
	case "remove":
		s.card.Remove(s.t, pkcs11test.CardRemoved)
	case "return":
		s.card.Return(s.t)
	default:
		ts.Fatalf("card %s is not known", args[0])
	}
}

func (s *stage) rackCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: rack stop|start|lock|decrypts …")
	}
	nodes := s.rack.Nodes()
	if args[0] == "lock" && len(args) > 1 {
		i, err := strconv.Atoi(args[1])
		ts.Check(err)
		nodes = nodes[i : i+1]
	}
	switch args[0] {
	case "stop":
		for _, n := range nodes {
			n.Stop()
		}
	case "start":
		for _, n := range nodes {
			ts.Check(n.Start())
		}
	case "lock":
		for _, n := range nodes {
			n.SetState(nethsmtest.Locked)
		}
	case "decrypts":
		if want, err := strconv.Atoi(args[1]); err != nil || s.rack.DecryptCount() != want {
			ts.Fatalf("rack decrypts: %d, want %s", s.rack.DecryptCount(), args[1])
		}
	default:
		ts.Fatalf("rack %s is not known", args[0])
	}
}
