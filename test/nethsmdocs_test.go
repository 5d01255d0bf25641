package test

import (
	"context"
	"crypto/rsa"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestTheWayBackWithANetHSMIsOneCurl runs the commands of docs/recovery.md as they are printed there.
func TestTheWayBackWithANetHSMIsOneCurl(t *testing.T) {
	double := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	id, public, err := double.AddKey(nethsmtest.Key{ID: "unseal"})
	must(t, err)
	kid, err := hsm.Fingerprint(public)
	must(t, err)
	recipient := envelope.Recipient{KID: kid, Algorithm: envelope.RSAOAEP256, Public: public.(*rsa.PublicKey)}
	raw, err := envelope.Seal(envelope.Context{Use: envelope.UseWrap, Key: "prod", Version: 1}, []envelope.Recipient{recipient},
		envelope.NewAuthKey(), []byte(secret))
	must(t, err)

	page := readPage(t, "recovery.md")
	d := &desk{dir: t.TempDir(), page: page, env: append(os.Environ(), "PATH=/usr/bin:"+os.Getenv("PATH"), // Debian's own Python
		"NODE="+double.URLs()[0], "ID="+id, "KID="+kid)}
	write(t, d.dir, "nitroseal-open.py", page["python open"])
	write(t, d.dir, "envelope", string(raw))
	write(t, d.dir, "ca.pem", string(double.CA()))
	write(t, d.dir, "operator.curl", curlConfig(nethsmtest.OperatorUser, nethsmtest.OperatorPassphrase))
	d.must(t, "recipients")
	d.must(t, "rsa-oaep-256-nethsm")
	d.must(t, "open")
	if got := read(t, d.dir, "secret"); got != secret {
		t.Errorf("recovered %q", got)
	}
	if double.DecryptCount() != 1 {
		t.Errorf("it took %d operations", double.DecryptCount())
	}
}

// TestACertificateIsRotatedWithoutAGap runs the commands of docs/nethsm.md, while a client with both pins goes on.
func TestACertificateIsRotatedWithoutAGap(t *testing.T) {
	double := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	node := double.Node(0)
	d := &desk{dir: t.TempDir(), page: readPage(t, "nethsm.md"), env: append(os.Environ(), "NODE="+node.URL(), "NAME=127.0.0.1")}
	ca := makePKI(t)
	write(t, d.dir, "ca.key", readFile(t, ca, "ca.key"))
	write(t, d.dir, "ca.pem", readFile(t, ca, "ca.crt"))
	write(t, d.dir, "now.pem", string(double.CA()))
	write(t, d.dir, "admin.curl", strings.Replace(curlConfig(nethsmtest.AdminUser, nethsmtest.AdminPassphrase), "ca.pem", "now.pem", 1))

	d.must(t, "csr")
	_, printed, found := strings.Cut(d.must(t, "pin"), "=")
	if !found {
		t.Fatalf("openssl printed %q", printed)
	}
	pins := []string{node.Pin(), strings.TrimSpace(printed)}
	both := readiness(t, node.URL(), nethsm.TLS{Pins: pins})
	old := readiness(t, node.URL(), nethsm.TLS{Pins: pins[:1]})
	must(t, both())
	must(t, old())

	d.must(t, "install")
	if got := strings.ReplaceAll(pins[1], ":", ""); !strings.EqualFold(got, node.Pin()) {
		t.Errorf("the node shows %s, and the page computed %s", node.Pin(), got)
	}
	for what, ready := range map[string]func() error{
		"both pins":               both,
		"the new pin":             readiness(t, node.URL(), nethsm.TLS{Pins: pins[1:]}),
		"the CA":                  readiness(t, node.URL(), nethsm.TLS{CA: []byte(readFile(t, ca, "ca.crt"))}),
		"both CAs, in one file":   readiness(t, node.URL(), nethsm.TLS{CA: append(double.CA(), readFile(t, ca, "ca.crt")...)}),
		"the CA and the new pins": readiness(t, node.URL(), nethsm.TLS{CA: []byte(readFile(t, ca, "ca.crt")), Pins: pins}),
	} {
		if err := ready(); err != nil {
			t.Errorf("with %s: %v", what, err)
		}
	}
	if err := readiness(t, node.URL(), nethsm.TLS{Pins: pins[:1]})(); err == nil {
		t.Error("a client with the old pin alone still trusts the node")
	}
}

// TestFromNothingToABackupThatWasRestored runs the commands of docs/nethsm.md in their order, with other addresses and folders.
func TestFromNothingToABackupThatWasRestored(t *testing.T) {
	hsm := nethsmtest.Start(t, nethsmtest.Options{})
	spare := nethsmtest.Start(t, nethsmtest.Options{SelfSigned: true})
	dir := t.TempDir()
	change := strings.NewReplacer(
		"--url https://nethsm-1.example.org --generate", "--url "+hsm.URLs()[0]+" --ca-cert ca.pem --generate", // who else would confirm?
		"https://nethsm-1.example.org", hsm.URLs()[0], `, "https://nethsm-2.example.org"`, "", "https://nethsm-9.example.org", spare.URLs()[0],
		"--pin SHA256", "--pin "+spare.Node(0).Pin(), "unlock-of-then", "unlock", "/etc/nitroseal/", dir+"/",
	)
	page := readPage(t, "nethsm.md")
	for name, block := range page {
		page[name] = change.Replace(block)
	}
	d := &desk{dir: dir, page: page, env: append(os.Environ(),
		"PATH="+filepath.Dir(buildCommand(t))+":"+os.Getenv("PATH"), "NITROSEAL_CONFIG="+filepath.Join(dir, "nitroseal.hcl"))}
	write(t, dir, "ca.pem", string(hsm.CA()))
	must(t, os.Mkdir(filepath.Join(dir, "state"), 0o700))
	write(t, dir, "nitroseal.hcl", "state_dir = \"state\"\n"+page["hcl"])

	d.must(t, "provision")
	if said := d.must(t, "setup"); !strings.Contains(said, "Nothing was changed") || len(hsm.KeyIDs()) > 0 {
		t.Errorf("the dry run has made %q; it said\n%s", hsm.KeyIDs(), said)
	}
	page["sh setup"] = strings.Replace(page["sh setup"], "--dry-run", "", 1)
	if said := d.must(t, "setup"); !strings.Contains(said, "the operator opened what was sealed to it") {
		t.Errorf("the setup said\n%s", said)
	}
	d.must(t, "backup")
	page["sh restore"] = strings.Replace(page["sh restore"], "nethsm restore", "nethsm restore --yes", 1)
	d.must(t, "restore")
	if spare.Node(0).State() != nethsmtest.Operational || !slices.Equal(spare.KeyIDs(), hsm.KeyIDs()) {
		t.Errorf("the restored one is %s, with %q", spare.Node(0).State(), spare.KeyIDs())
	}
}

// TestDocumentedFlagsExist compares every nitroseal command that a page or the demo shows with the command's own help.
func TestDocumentedFlagsExist(t *testing.T) {
	program, found := buildCommand(t), 0
	command := regexp.MustCompile("(?m)(?:^\\s*|`|show |fails )nitroseal (import bank-vaults|serve (?:status|token [a-z]+)|(?:(?:nethsm|device|key|config) )?[a-z][-a-z]+)([^\n`|]*)")
	for _, page := range []string{
		"README.md", "docs/nethsm.md", "docs/operations.md", "docs/recovery.md", "docs/bank-vaults.md", "docs/threat-model.md",
		"deploy/nethsm/README.md", "scripts/demo-nethsm",
	} {
		joined := strings.ReplaceAll(readFile(t, vaulttest.Root(), page), "\\\n", " ")
		for _, match := range command.FindAllStringSubmatch(joined, -1) {
			name, rest := match[1], match[2]
			out, err := exec.CommandContext(t.Context(), program, append(strings.Fields(name), "--help")...).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "\n  nitroseal "+name) {
				t.Errorf("%s: there is no nitroseal %s: %v", page, name, err)
				continue
			}
			found++
			for _, flag := range regexp.MustCompile(`--[a-z][-a-z0-9]+`).FindAllString(rest, -1) {
				if !strings.Contains(string(out), " "+flag+" ") {
					t.Errorf("%s: nitroseal %s has no flag %s", page, name, flag)
				}
			}
		}
	}
	if found < 15 {
		t.Errorf("only %d commands were found: do the pages look different now?", found)
	}
}

// buildCommand builds nitroseal as users get it, once for all tests.
func buildCommand(t *testing.T) string {
	t.Helper()
	return vaulttest.Build{Command: "nitroseal", NoRace: true}.Binary(t).Path
}

// curlConfig is what the pages tell to write into a file for curl.
func curlConfig(user, password string) string {
	return fmt.Sprintf("user = %q\ncacert = \"ca.pem\"\n", user+":"+password)
}

// readiness asks a node with the same client whether it is ready.
func readiness(t *testing.T, url string, trust nethsm.TLS) func() error {
	t.Helper()
	client, err := nethsm.New(nethsm.Options{URLs: []string{url}, TLS: trust})
	must(t, err)
	t.Cleanup(func() { must(t, client.Close()) })
	return func() error { return client.Ready(context.Background()) } // the client has a limit
}

// TestAHealthCheckTellsAFailedNetHSMFromOneThatWaits runs the checks of the compose files, as Docker would in the container.
func TestAHealthCheckTellsAFailedNetHSMFromOneThatWaits(t *testing.T) {
	double := nethsmtest.Start(t, nethsmtest.Options{})
	node := double.Node(0)
	for _, name := range []string{"unix", "unikernel", "testing"} {
		test := readCompose(t, name).Services["nethsm"].Healthcheck.Test
		if len(test) != 2 || test[0] != "CMD-SHELL" {
			t.Fatalf("compose.%s.yaml: the check is %q", name, test)
		}
		script := strings.NewReplacer("$$", "$", "127.0.0.1:8443", node.Address(), "192.168.1.1:$$port", node.Address()).Replace(test[1])
		if !strings.Contains(script, node.Address()) {
			t.Fatalf("compose.%s.yaml: the check asks somebody else:\n%s", name, script)
		}
		for _, program := range []string{"curl", "wget"} {
			for state, well := range map[nethsmtest.State]bool{
				nethsmtest.Operational: true, nethsmtest.Locked: true, nethsmtest.Unprovisioned: true, nethsmtest.Failed: false,
			} {
				node.SetState(state)
				command := exec.CommandContext(t.Context(), "sh", "-c", script)
				command.Env = []string{"PATH=" + only(t, program)}
				if out, err := command.CombinedOutput(); (err == nil) != well {
					t.Errorf("compose.%s.yaml, with %s: %s is found well: %v, %v\n%s", name, program, state, err == nil, err, out)
				}
			}
			node.SetState("")
		}
	}
	node.Stop()
	script := strings.ReplaceAll(readCompose(t, "unix").Services["nethsm"].Healthcheck.Test[1], "$$", "$")
	command := exec.CommandContext(t.Context(), "sh", "-c", strings.Replace(script, "127.0.0.1:8443", node.Address(), 1))
	if out, err := command.CombinedOutput(); err == nil {
		t.Errorf("a NetHSM that does not run is found well\n%s", out)
	}
}

// only is a PATH with one program in it.
func only(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	must(t, err)
	dir := t.TempDir()
	must(t, os.Symlink(path, filepath.Join(dir, program)))
	return dir
}
