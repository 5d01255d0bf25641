package test

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestAutoUnsealDoesWhatItsPageSays walks through docs/auto-unseal.md by its own commands, with a real Vault and a real server, along
// both ways at the same time.
func TestAutoUnsealDoesWhatItsPageSays(t *testing.T) {
	server := newHouse(t) // the HSMs of tests are known by the environment, so they are made one after the other
	mount := newHouse(t)
	site, _ := newSite(t, vaulttest.SiteOptions{Token: &mount.plug.Token})
	t.Run("ways", func(t *testing.T) {
		t.Run("by the server", func(t *testing.T) {
			t.Parallel()
			server.byTheServer(t)
		})
		t.Run("by the mount", func(t *testing.T) {
			t.Parallel()
			mount.byTheMount(t, site)
		})
	})
}

// byTheServer is the way from nothing to a Vault that unseals itself by `nitroseal serve`, and the rehearsal.
func (h *house) byTheServer(t *testing.T) {
	t.Helper()
	write(t, h.dir, "etc/nitroseal.hcl", h.page["hcl serve"])
	h.must(t, "serve-key")
	h.must(t, "serve-confirm")
	h.must(t, "serve-token")
	must(t, os.Rename(h.file("seal.token"), h.file("vault.d/seal.token")))
	h.signsItself(t)
	if said := h.must(t, "serve-start"); !strings.Contains(said, "prod") {
		t.Errorf("the server says of itself\n%s", said)
	}
	h.stanzas(t, "seal-serve")
	unsealed := regexp.MustCompile(`(?s)Seal Type +transit.*Recovery Seal Type +shamir.*Sealed +false`)
	if said := h.must(t, "serve-init"); !unsealed.MatchString(said) {
		t.Errorf("vault status says\n%s", said)
	}
	h.keys(t, "recovery-keys.json")
	h.fill(t)
	h.must(t, "look")

	h.must(t, "second-cluster")
	h.must(t, "tokens")
	h.must(t, "rehearse-power")
	h.holds(t)
	h.must(t, "rehearse-server")
	h.must(t, "rehearse-diagnose")
	h.holds(t)
	t.Run("the HSM is away", h.theHSMIsAway)

	h.noteSum(h.shell(t, "nitroseal key show prod\n"))
	h.second(t, "second-server")
	h.noteSum(h.must(t, "rotate"))
	h.must(t, "rotate-vault")
	h.holds(t)
	vaulttest.Eventually(t, vaulttest.Patience, "the server to seal with what was rotated", func() error { // it looks each second
		if version := h.status(t).version(t, "prod"); version != 2 {
			return fmt.Errorf("it seals with version %d", version)
		}
		return nil
	})
	if shown := h.second(t, "rotate-others"); !strings.Contains(shown, h.sum) || !strings.Contains(shown, "version 2") {
		t.Errorf("the second server has not the record %s, but\n%s", h.sum, shown)
	}
	h.lease(t)
	t.Run("the server is lost", h.theServerIsLost)
	h.must(t, "rehearse-snapshot")
	h.holds(t)
	t.Run("its recovery keys are in custody", h.recoveryKeys)
	t.Run("the token is revoked", h.theTokenIsRevoked)

	h.page["hcl disabled"] = disabled(h.page["hcl seal-serve"])
	h.stanzas(t, "disabled")
	h.must(t, "to-shamir")
	h.holds(t)
}

// signsItself gives the server the certificate that the page makes, which is its own authority.
func (h *house) signsItself(t *testing.T) {
	t.Helper()
	h.change("DNS:seal.example.org", "IP:127.0.0.1")
	h.must(t, "certificate")
	for _, place := range []string{"etc/serve.pem", "seal-ca.pem", "vault.d/seal-ca.pem"} {
		write(t, h.dir, place, read(t, h.dir, "serve.pem"))
	}
	write(t, h.dir, "etc/serve.key", read(t, h.dir, "serve.key"))
}

// disabled is a stanza of a seal that is left.
func disabled(stanza string) string {
	return strings.Replace(stanza, "\n}", "\n  disabled = \"true\"\n}", 1)
}

// theHSMIsAway is the third point of the rehearsal.
func (h *house) theHSMIsAway(t *testing.T) {
	h.plug.Unplug(t)
	h.shell(t, "systemctl stop vault\nsystemctl start vault\n")
	answers := func(query string) string {
		return h.code(t, "'https://"+h.seal+"/v1/sys/health"+query+"'")
	}
	vaulttest.Eventually(t, limit, "the server to say that it cannot open", func() error { return differs(answers(""), "503") })
	if code := answers("?sealedcode=200"); code != "200" {
		t.Errorf("without the HSM a balancer hears %s", code)
	}
	if said := h.shell(t, "vault status || test $? = 2\n"); !regexp.MustCompile(`Sealed +true`).MatchString(said) {
		t.Errorf("without the HSM vault status says\n%s", said)
	}
	h.plug.Replug(t)
	h.holds(t)
}

// second runs a block on a second server, which shares nothing with the first but the HSM, and returns what it has of the key.
func (h *house) second(t *testing.T, block string) string {
	t.Helper()
	own, page := h.env, h.page["sh "+block]
	defer func() { h.env, h.page["sh "+block] = own, page }()
	if err := os.Mkdir(h.file("etc2"), 0o700); !errors.Is(err, os.ErrExist) {
		must(t, errors.Join(err, os.Mkdir(h.file("state2"), 0o700)))
		write(t, h.dir, "etc2/nitroseal.hcl", strings.ReplaceAll(h.page["hcl serve"], h.file("state")+`"`, h.file("state2")+`"`))
	}
	h.env = append(slices.Clone(own), "NITROSEAL_CONFIG="+h.file("etc2/nitroseal.hcl"))
	h.page["sh "+block] = strings.ReplaceAll(page, "SHA256", h.sum)
	h.must(t, block)
	return h.shell(t, "nitroseal key show prod\n")
}

// lease goes through the section about leases.
func (h *house) lease(t *testing.T) {
	t.Helper()
	h.noteSum(h.must(t, "lease"))
	h.must(t, "rotate-vault")
	h.holds(t)
	vaulttest.Eventually(t, limit, "a lease to be open", func() error {
		return contains(h.shell(t, "nitroseal serve status -o json"), `"lease_until"`)
	})
	t.Run("its metrics", h.itsMetrics)
	h.must(t, "end-lease")
	vaulttest.Eventually(t, limit, "the lease to be ended", func() error {
		return contains(read(t, h.dir, "nitroseal-serve.log"), "all leases were ended")
	})
}

// noteSum notes down the SHA-256 of a key record that a command has printed.
func (h *house) noteSum(said string) { h.sum = regexp.MustCompile(`\b[0-9a-f]{64}\b`).FindString(said) }

// moveToServe takes the key of a mount to a server, and Vault with it: nothing is migrated.
func (h *house) moveToServe(t *testing.T, site *vaulttest.Site) {
	t.Helper()
	write(t, h.dir, "etc/nitroseal.hcl", h.page["hcl serve"])
	h.sum, _ = site.Read(t, "nitrokey/keys/prod")["record_sha256"].(string)
	h.shell(t, "nitroseal key restore prod --in prod-key-record.json --rename hsm=stick --sha256 "+h.sum+"\n")
	h.must(t, "serve-confirm")
	must(t, os.Rename(h.file("vault.d/seal.token"), h.file("vault.d/mount.token")))
	h.must(t, "serve-token")
	must(t, os.Rename(h.file("seal.token"), h.file("vault.d/seal.token")))
	h.must(t, "serve-start")
	write(t, h.dir, "vault.d/mount-ca.pem", read(t, h.dir, "vault.d/seal-ca.pem"))
	write(t, h.dir, "vault.d/seal-ca.pem", read(t, h.dir, "seal-ca.pem"))
	h.stanzas(t, "seal-serve")
	h.must(t, "rotate-vault")
	h.holds(t)

	h.shell(t, "systemctl stop nitroseal-serve\nmv vault.d/mount.token vault.d/seal.token\nmv vault.d/mount-ca.pem vault.d/seal-ca.pem\n")
	h.stanzas(t, "seal-mount")
	h.must(t, "rotate-vault")
	h.holds(t)
}

// theServerIsLost is the fourth point of the rehearsal.
func (h *house) theServerIsLost(t *testing.T) {
	h.shell(t, "systemctl stop nitroseal-serve\n")
	must(t, os.Rename(h.file("state"), h.file("state.lost")))
	h.change("SHA256", h.sum)
	h.must(t, "rehearse-restore")
	must(t, os.Rename(h.file("seal.token"), h.file("vault.d/seal.token")))
	h.shell(t, "systemctl start nitroseal-serve\n")
	h.must(t, "rotate-vault")
	h.holds(t)
}

// recoveryKeys puts them into custody.
func (h *house) recoveryKeys(t *testing.T) {
	must(t, os.Mkdir(h.file("state/store"), 0o700))
	write(t, h.dir, "etc/vault-ca.pem", read(t, h.dir, "vault.d/ca.pem"))
	_, cluster, _ := strings.Cut(guideBase, "store \"here\"")
	config := h.page["hcl serve"] + strings.NewReplacer("https://vault.example.org:8200", "https://"+h.vault,
		"/etc/nitroseal", h.file("etc"), "/var/lib/nitroseal", h.file("state")).Replace("store \"here\""+cluster)
	write(t, h.dir, "etc/nitroseal.hcl", config)
	if said := h.must(t, "recovery-custody"); !strings.Contains(said, "root") {
		t.Errorf("the root token says of itself\n%s", said)
	}
}

// theTokenIsRevoked is the seventh point of the rehearsal.
func (h *house) theTokenIsRevoked(t *testing.T) {
	id := strings.Split(read(t, h.dir, "vault.d/seal.token"), ".")[1]
	h.change("token revoke ID", "token revoke "+id)
	h.must(t, "revoke")
	if listed := h.shell(t, "nitroseal serve token list\n"); strings.Contains(listed, id) {
		t.Errorf("a revoked token is listed:\n%s", listed)
	}
	taken := func(code string) func() error {
		return func() error {
			const own = `--header "X-Vault-Token: $(cat vault.d/seal.token)" `
			return differs(h.code(t, own+"https://"+h.seal+"/v1/auth/token/lookup-self"), code)
		}
	}
	vaulttest.Eventually(t, limit, "the server to refuse it", taken("403"))
	vault := h.units["vault"]
	vault.stop()
	before := len(read(t, h.dir, "vault.log"))
	_, err := vault.begin()
	must(t, err)
	vaulttest.Eventually(t, limit, "Vault to be refused", func() error {
		return contains(read(t, h.dir, "vault.log")[before:], "permission denied")
	})
	vault.stop()
	h.shell(t, "nitroseal serve token create prod --key prod --out vault.d/next.token\nmv vault.d/next.token vault.d/seal.token\n")
	vaulttest.Eventually(t, limit, "the server to take the next one", taken("200"))
	h.shell(t, "systemctl start vault\n")
	h.holds(t)
}

// code is what the server answers to curl.
func (h *house) code(t *testing.T, arguments string) string {
	t.Helper()
	return h.shell(t, "curl --silent --output /dev/null --write-out '%{http_code}' --cacert seal-ca.pem "+arguments+"\n")
}

// contains and differs say what is wrong with a text, for who waits.
func contains(text, want string) error {
	if strings.Contains(text, want) {
		return nil
	}
	return &unlike{text, want}
}

func differs(text, want string) error {
	if text == want {
		return nil
	}
	return &unlike{text, want}
}

type unlike struct{ text, want string }

func (e *unlike) Error() string { return "it says " + e.text + ", want " + e.want }

// byTheMount is the way from Shamir to the plugin's mount, through a new root key, to the server and back, to another transit and
// back to Shamir.
func (h *house) byTheMount(t *testing.T, site *vaulttest.Site) {
	t.Helper()
	site.AddKey(t, "old", "hsm", "rsa-2048") // of the other transit
	write(t, h.dir, "vault.d/seal-ca.pem", readFile(t, filepath.Dir(site.CAFile), filepath.Base(site.CAFile)))
	h.change("https://seal-vault.example.org:8200", site.Address, "https://old.example.org:8200", site.Address)

	own := h.env
	h.env = append(slices.Clone(own), "VAULT_ADDR="+site.Address, "VAULT_CACERT="+site.CAFile, "VAULT_TOKEN="+site.RootToken)
	h.must(t, "mount")
	must(t, os.Rename(h.file("seal.token"), h.file("vault.d/seal.token")))
	h.env = own

	h.stanzas(t)
	h.shell(t, "systemctl start vault\nvault operator init -format=json > keys\n")
	h.keys(t, "keys")
	h.shell(t, "for key in $KEY_1 $KEY_2 $KEY_3; do vault operator unseal $key; done\n")
	h.fill(t)

	h.stanzas(t, "seal-mount")
	if said := h.must(t, "from-shamir"); !strings.Contains(said, "transit") {
		t.Errorf("vault status says\n%s", said)
	}
	h.holds(t)
	h.must(t, "new-root-key")
	if !strings.Contains(read(t, h.dir, "vault.log"), "security barrier rekeyed: stored=1") {
		t.Error("there is no new root key")
	}
	h.must(t, "rehearse-power")
	h.holds(t)

	t.Run("to the server and back", func(t *testing.T) { h.moveToServe(t, site) })

	// The same mount with another key is another transit. Then it is "old", and out.
	h.page["hcl seal-both"] = strings.NewReplacer("transit/", "nitrokey/", "old.token", "seal.token", "https://"+h.seal, site.Address,
		`key_name    = "old"`, `key_name    = "prod"`, `key_name    = "prod"`, `key_name    = "old"`).Replace(h.page["hcl seal-both"])
	must(t, site.Client(t).Sys().PutPolicy("unsealer-prod", `path "nitrokey/+/+" { capabilities = ["update"] }`))
	site.Read(t, "nitrokey/keys/old/backup")
	site.Write(t, "nitrokey/keys/old", vaulttest.Fields{"accept_single_hsm": true})
	h.stanzas(t, "seal-both")
	h.must(t, "from-transit")
	h.holds(t)

	h.page["hcl disabled"] = disabled(strings.ReplaceAll(h.page["hcl seal-mount"], `"prod"`, `"old"`))
	h.stanzas(t, "disabled")
	if said := h.must(t, "to-shamir"); !strings.Contains(said, "shamir") {
		t.Errorf("vault status says\n%s", said)
	}
	h.holds(t)
}

// TestEveryCommandOfTheAutoUnsealGuideExists looks up each command of nitroseal and each path of the mount that the page shows.
func TestEveryCommandOfTheAutoUnsealGuideExists(t *testing.T) {
	root := readHelp(t, buildCommand(t))
	found := map[string]bool{}
	for _, page := range []string{
		"docs/auto-unseal.md", "scripts/demo-seal", "README.md", "deploy/kubernetes/README.md", "deploy/systemd/README.md",
	} {
		text := readFile(t, vaulttest.Root(), page)
		if strings.HasSuffix(page, ".md") {
			text = strings.Join(codeOf(text), "\n") + "\n" + strings.Join(namedBlocks(text), "\n")
		}
		for _, given := range commandsIn(text, root) {
			verb, err := root.check(given)
			if err != nil {
				t.Errorf("%s: nitroseal %s: %v", page, strings.Join(given, " "), err)
			}
			found[verb] = true
		}
	}
	for _, verb := range []string{
		"serve", "serve token create", "serve token list", "serve token revoke", "serve status", "key configure", "key restore", "key rotate",
	} {
		if !found[verb] {
			t.Errorf("no page shows nitroseal %s", verb)
		}
	}
}

// namedBlocks are the blocks of a page that a shell reads and that have a name.
func namedBlocks(page string) (blocks []string) {
	for _, match := range regexp.MustCompile("(?ms)^```sh [a-z-]+\n(.*?)^```$").FindAllStringSubmatch(page, -1) {
		blocks = append(blocks, match[1])
	}
	return blocks
}

// TestTheAutoUnsealGuideTellsEveryAttribute wants each attribute of the block serve in its table, and no other one.
func TestTheAutoUnsealGuideTellsEveryAttribute(t *testing.T) {
	page := readFile(t, vaulttest.Root(), "docs/auto-unseal.md")
	_, section, _ := strings.Cut(page, "\n### The block serve\n")
	section, _, _ = strings.Cut(section, "\n#")
	known := attributesOf(t, "serveAttributes")
	var told []string
	for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+) \|`).FindAllStringSubmatch(section, -1) {
		for _, name := range regexp.MustCompile("`([a-z_]+)`").FindAllStringSubmatch(row[1], -1) {
			told = append(told, name[1])
		}
	}
	slices.Sort(known)
	slices.Sort(told)
	if !slices.Equal(known, told) {
		t.Errorf("the block serve has %v, and the page tells of %v", known, told)
	}
}

// TestTheConfigurationsOfTheAutoUnsealGuideAreRead loads those that its walk does not use.
func TestTheConfigurationsOfTheAutoUnsealGuideAreRead(t *testing.T) {
	dir := t.TempDir()
	writeTrust(t, dir)
	authority := vaulttest.NewAuthority(t)
	certificate, key := authority.Issue(t)
	write(t, dir, "serve.pem", string(certificate))
	write(t, dir, "serve.key", string(key))
	page := readPage(t, "auto-unseal.md")
	beginning, _, _ := strings.Cut(page["hcl serve"], "serve {")
	readme := regexp.MustCompile("(?ms)^```hcl serve-block\n(.*?)^```$").FindStringSubmatch(readFile(t, vaulttest.Root(), "README.md"))
	if page["hcl servers"] == "" || readme == nil {
		t.Fatal("a configuration is gone: do the pages look different now?")
	}
	for name, text := range map[string]string{
		"one server": page["hcl serve"], "two servers": beginning + page["hcl servers"], "the README": beginning + readme[1],
	} {
		write(t, dir, "nitroseal.hcl", strings.ReplaceAll(text, "/etc/nitroseal/", dir+"/"))
		if read, err := config.Load(filepath.Join(dir, "nitroseal.hcl")); err != nil || read.Serve == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTheDropInOfTheGuideIsTheOneThatIsShipped compares what the page shows with what it is about.
func TestTheDropInOfTheGuideIsTheOneThatIsShipped(t *testing.T) {
	shown := readPage(t, "auto-unseal.md")["ini"]
	for _, unit := range []string{"vault", "openbao"} {
		shipped := readFile(t, vaulttest.Root(), "deploy/systemd/"+unit+".service.d/nitroseal.conf")
		if shipped = regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(shipped, ""); strings.TrimSpace(shipped) != strings.TrimSpace(shown) {
			t.Errorf("%s: shipped is\n%s", unit, shipped)
		}
	}
}

// served is what `nitroseal serve status` tells, as JSON.
type served struct {
	Keys []struct {
		Name    string `json:"name"`
		Version int    `json:"version"`
	} `json:"keys"`
}

func (h *house) status(t *testing.T) (s served) {
	t.Helper()
	must(t, json.Unmarshal([]byte(h.shell(t, "nitroseal serve status -o json")), &s))
	return s
}

func (s served) version(t *testing.T, key string) int {
	t.Helper()
	for _, k := range s.Keys {
		if k.Name == key {
			return k.Version
		}
	}
	t.Errorf("key %s is not served: %+v", key, s)
	return 0
}

// itsMetrics compares what the running server tells with what the dashboard, the alerts and the page say of it. It has a lease open.
func (h *house) itsMetrics(t *testing.T) {
	known := map[string][]string{} // labels of each
	scraped := h.shell(t, "curl --silent http://"+h.metrics+"/metrics\n")
	for _, sample := range regexp.MustCompile(`(?m)^([a-z_]+)(?:\{(.*)\})? `).FindAllStringSubmatch(scraped, -1) {
		known[sample[1]] = nil
		for _, label := range regexp.MustCompile(`([a-z_]+)="`).FindAllStringSubmatch(sample[2], -1) {
			known[sample[1]] = append(known[sample[1]], label[1])
		}
	}
	for _, file := range []string{"nitroseal-serve.json", "nitroseal-serve-alerts.yaml", "README.md"} {
		text := readFile(t, vaulttest.Root(), "deploy/grafana/"+file)
		metric := regexp.MustCompile(`\b(nitroseal_serve_[a-z_]+|process_[a-z_]+)(?:\{([a-z_]+)[=!])?`)
		for _, used := range metric.FindAllStringSubmatch(text, -1) {
			if labels, there := known[used[1]]; !there || used[2] != "" && !slices.Contains(labels, used[2]) {
				t.Errorf("deploy/grafana/%s: there is no metric %s with a label %q", file, used[1], used[2])
			}
		}
	}
	page := readFile(t, vaulttest.Root(), "docs/auto-unseal.md")
	rows := regexp.MustCompile("(?m)^\\| (`nitroseal_serve_[^|]+) \\|([^|]*)\\|").FindAllStringSubmatch(page, -1)
	told := map[string]bool{}
	for _, row := range rows {
		for _, name := range regexp.MustCompile("[a-z_]+").FindAllString(row[1], -1) {
			told[name] = true
			labels, there := known[name]
			if bucket, histogram := known[name+"_bucket"]; histogram {
				labels, there = bucket, true
			}
			for label := range strings.SplitSeq(strings.TrimSpace(row[2]), ", ") {
				// A row of two metrics names the labels that the one of them has.
				if !there || label != "" && !slices.Contains(labels, label) && !strings.Contains(row[1], "`, `") {
					t.Errorf("docs/auto-unseal.md: there is no metric %s with a label %q", name, label)
				}
			}
		}
	}
	for name := range known {
		family := regexp.MustCompile("_(bucket|sum|count)$").ReplaceAllString(name, "")
		if strings.HasPrefix(name, "nitroseal_") && !told[name] && !told[family] {
			t.Errorf("docs/auto-unseal.md does not tell of %s", name)
		}
	}
	if len(told) < 20 || len(known) < 40 {
		t.Errorf("only %d metrics are told of, of %d", len(told), len(known))
	}
}

// TestTheAutoUnsealGuidesQuoteWhatIsSaid wants what stands between quotation marks in the tables of bad days to be in the source, but
// for what Vault and OpenBao say themselves.
func TestTheAutoUnsealGuidesQuoteWhatIsSaid(t *testing.T) {
	vaultsOwn := []string{
		"error parsing Seal configuration: … connection refused", "fetching stored unseal keys failed", "failed to unseal core",
		"seal backend is completely unhealthy", "x509: certificate signed by unknown authority", "x509: certificate is valid for",
		"x509: certificate has expired", "tls: certificate required", "checksums did not match",
	}
	source := strings.ReplaceAll(sources(t, "internal", "hsm", "nethsm", "cmd"), `" +`, `"+`)
	source = regexp.MustCompile(`"\+\n\s*"`).ReplaceAllString(source, "") // one sentence on several lines
	for page, least := range map[string]int{"docs/auto-unseal.md": 60, "docs/openbao.md": 20} {
		_, table, _ := strings.Cut(readFile(t, vaulttest.Root(), page), "\n## Bad days\n")
		table, _, _ = strings.Cut(table, "\n## ")
		quoted := 0
		for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+) \|`).FindAllStringSubmatch(table, -1) {
			for _, quote := range regexp.MustCompile(`"([^"]+)"`).FindAllStringSubmatch(row[1], -1) {
				quoted++
				if !strings.Contains(source, quote[1]) && !slices.Contains(vaultsOwn, quote[1]) {
					t.Errorf("%s: nobody says %q", page, quote[1])
				}
			}
		}
		if quoted < least {
			t.Errorf("%s: only %d quotations were found", page, quoted)
		}
	}
}

// TestTheCapacityOfTheGuideIsItsFormula works out the table.
func TestTheCapacityOfTheGuideIsItsFormula(t *testing.T) {
	page := readFile(t, vaulttest.Root(), "docs/auto-unseal.md")
	rows := regexp.MustCompile(`(?m)^\| [^|]+ \| ([0-9.]+) s \| (\d+) \| ([0-9,]+) \|$`).FindAllStringSubmatch(page, -1)
	for _, row := range rows {
		seconds, err := strconv.ParseFloat(row[1], 64)
		must(t, err)
		parallel, err := strconv.Atoi(row[2])
		must(t, err)
		vaults, err := strconv.Atoi(strings.ReplaceAll(row[3], ",", ""))
		must(t, err)
		if want := int(math.Round(90 * float64(parallel) / seconds)); vaults != want {
			t.Errorf("%s: want %d", row[0], want)
		}
	}
	if len(rows) < 3 || !strings.Contains(page, "N = 90 · p / t") {
		t.Errorf("only %d rows were found", len(rows))
	}
}

// TestEveryLinkOfTheGuidesLeadsSomewhere follows the links within the repository, to the headings too.
func TestEveryLinkOfTheGuidesLeadsSomewhere(t *testing.T) {
	var pages []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/decisions/*.md", "deploy/*/*.md"} {
		found, err := filepath.Glob(filepath.Join(vaulttest.Root(), pattern))
		must(t, err)
		pages = append(pages, found...)
	}
	followed := 0
	for _, page := range pages {
		content, err := os.ReadFile(page)
		must(t, err)
		for _, link := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(string(content), -1) {
			target, heading, _ := strings.Cut(link[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			followed++
			there := page
			if target != "" {
				there = filepath.Join(filepath.Dir(page), target)
			}
			read, err := os.ReadFile(there)
			if info, missing := os.Stat(there); missing != nil || err != nil && !info.IsDir() {
				t.Errorf("%s: there is no %s", page, link[1])
			} else if heading != "" && !slices.Contains(anchors(string(read)), heading) {
				t.Errorf("%s: %s has no heading %q", page, filepath.Base(there), heading)
			}
		}
	}
	if len(pages) < 20 || followed < 150 {
		t.Errorf("only %d links of %d pages were found", followed, len(pages))
	}
}

// anchors are what the headings of a page are called in links.
func anchors(page string) (names []string) {
	page = regexp.MustCompile("(?ms)^ *```.*?^ *```$").ReplaceAllString(page, "")
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		name := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(heading[1]), "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

// TestTheServersDashboardAndAlertsAreWellFormed reads them as Grafana and the Prometheus operator do; which metrics they name is
// compared with a running server.
func TestTheServersDashboardAndAlertsAreWellFormed(t *testing.T) {
	var dashboard struct {
		UID    string `json:"uid"`
		Panels []struct {
			ID      int    `json:"id"`
			Type    string `json:"type"`
			Title   string `json:"title"`
			Targets []any  `json:"targets"`
		} `json:"panels"`
	}
	must(t, json.Unmarshal([]byte(readFile(t, vaulttest.Root(), "deploy/grafana/nitroseal-serve.json")), &dashboard))
	for i, panel := range dashboard.Panels {
		if panel.ID != i+1 || panel.Title == "" || panel.Type != "row" && len(panel.Targets) == 0 {
			t.Errorf("panel %d is %+v", i, panel)
		}
	}
	if dashboard.UID == "nitroseal" || len(dashboard.Panels) < 20 {
		t.Errorf("the dashboard %q has %d panels", dashboard.UID, len(dashboard.Panels))
	}
	var rules struct {
		APIVersion string         `json:"apiVersion"`
		Kind       string         `json:"kind"`
		Metadata   map[string]any `json:"metadata"`
		Spec       struct {
			Groups []struct {
				Name  string `json:"name"`
				Rules []struct {
					Alert       string            `json:"alert"`
					Expr        string            `json:"expr"`
					For         string            `json:"for"`
					Labels      map[string]string `json:"labels"`
					Annotations map[string]string `json:"annotations"`
				} `json:"rules"`
			} `json:"groups"`
		} `json:"spec"`
	}
	decodeStrictly(t, filepath.Join(vaulttest.Root(), "deploy/grafana/nitroseal-serve-alerts.yaml"), &rules)
	if len(rules.Spec.Groups) != 1 || len(rules.Spec.Groups[0].Rules) < 10 {
		t.Fatalf("the alerts are %+v", rules)
	}
	for _, rule := range rules.Spec.Groups[0].Rules {
		severe := slices.Contains([]string{"critical", "warning"}, rule.Labels["severity"])
		if _, err := time.ParseDuration(cmp.Or(rule.For, "0s")); err != nil || !severe || rule.Expr == "" || rule.Annotations["summary"] == "" {
			t.Errorf("%s is %+v: %v", rule.Alert, rule, err)
		}
	}
}
