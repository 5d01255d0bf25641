package test

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestEveryNitrosealCommandOfTheGuidesExists looks up each command and flag that a page shows, in a block or within a sentence, in
// the command's own help.
func TestEveryNitrosealCommandOfTheGuidesExists(t *testing.T) {
	pages := []string{"README.md", "docs/custody.md", "docs/recovery.md", "docs/bank-vaults.md", "scripts/demo-custody"}
	more, err := filepath.Glob(filepath.Join(vaulttest.Root(), "deploy", "*", "*.md"))
	must(t, err)
	for _, path := range more {
		page, err := filepath.Rel(vaulttest.Root(), path)
		must(t, err)
		pages = append(pages, page)
	}
	root := readHelp(t, buildCommand(t))
	found := map[string]bool{}
	for _, page := range pages {
		text := readFile(t, vaulttest.Root(), page)
		if strings.HasSuffix(page, ".md") {
			text = strings.Join(codeOf(text), "\n")
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
		"init", "run", "unseal", "status", "verify", "drill", "rekey", "root", "import", "import bank-vaults", "export", "recover", "rewrap", "material open",
		"material accept-generation", "key restore", "key add-recipient", "config check", "doctor", "device pin try",
	} {
		if !found[verb] {
			t.Errorf("no page shows nitroseal %s", verb)
		}
	}
}

// helped is a command as its help tells of it.
type helped struct {
	name  string
	verbs map[string]*helped
	flags []string // with their dashes
}

// readHelp reads the help of a program and of all verbs below it.
func readHelp(t *testing.T, program string, path ...string) *helped {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), program, append(slices.Clone(path), "--help")...).CombinedOutput()
	if err != nil {
		t.Fatalf("nitroseal %v --help: %v\n%s", path, err, out)
	}
	h := &helped{name: strings.Join(path, " "), verbs: map[string]*helped{}}
	_, listed, _ := strings.Cut(string(out), "\nAvailable Commands:\n")
	listed, _, _ = strings.Cut(listed, "\n\n")
	for line := range strings.Lines(listed) {
		if verb := strings.Fields(line); len(verb) > 0 && verb[0] != "help" && verb[0] != "completion" {
			h.verbs[verb[0]] = readHelp(t, program, append(slices.Clone(path), verb[0])...)
		}
	}
	for _, match := range regexp.MustCompile(`(?m)^ +(?:(-[a-z]), +)?(?:    )?(--[a-z][-a-z0-9]*)`).FindAllStringSubmatch(string(out), -1) {
		h.flags = append(h.flags, match[1], match[2])
	}
	return h
}

// check looks up what follows the word nitroseal: verbs, and flags up to the command of somebody else.
func (h *helped) check(given []string) (verb string, err error) {
	for len(given) > 0 && h.verbs[given[0]] != nil {
		h, given = h.verbs[given[0]], given[1:]
	}
	if len(h.verbs) > 0 && len(given) > 0 && !strings.HasPrefix(given[0], "-") && h.name != "import" { // which has a verb and takes a cluster, too
		return h.name, fmt.Errorf("%q is no verb", given[0])
	}
	for _, word := range given {
		if word == "--" {
			break
		}
		name, _, _ := strings.Cut(word, "=")
		if strings.HasPrefix(name, "-") && name != "-" && !slices.Contains(h.flags, name) {
			return h.name, fmt.Errorf("there is no flag %s", name)
		}
	}
	return h.name, nil
}

// codeOf returns what a page shows as code: blocks that a shell reads, and what stands between backquotes in a sentence.
func codeOf(page string) []string {
	var code []string
	block := regexp.MustCompile("(?ms)^ *```([a-z]*)[^\n]*\n(.*?)^ *```$")
	for _, match := range block.FindAllStringSubmatch(page, -1) {
		if slices.Contains([]string{"sh", "shell", "crontab"}, match[1]) {
			code = append(code, match[2])
		}
	}
	for _, match := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(block.ReplaceAllString(page, ""), -1) {
		code = append(code, strings.Join(strings.Fields(match[1]), " "))
	}
	return code
}

// commandsIn finds nitroseal's commands: what follows the name where a command can begin, or where a verb of it follows.
func commandsIn(code string, root *helped) [][]string {
	var found [][]string
	code = regexp.MustCompile(`\\\n\s*`).ReplaceAllString(code, " ")
	code = regexp.MustCompile(`(?m)(^|\s)#.*$`).ReplaceAllString(code, "")
	command := regexp.MustCompile(`(?m)(^\s*|[|;&(]\s*| -- |show |fails |until )?\bnitroseal ([^\n|;&)<>]+)`)
	for _, match := range command.FindAllStringSubmatchIndex(code, -1) {
		begins := match[2] >= 0
		words := strings.Fields(strings.NewReplacer("'", "", `"`, "").Replace(code[match[4]:match[5]]))
		if i := slices.Index(words, "nitroseal"); i >= 0 { // a user of that name, before the command
			words = words[i+1:]
		}
		if len(words) > 0 && (begins || root.verbs[words[0]] != nil) {
			found = append(found, words)
		}
	}
	return found
}

// TestTheConfigurationsOfTheGuidesAreRead loads every configuration of the pages, with the files that it names in another folder.
func TestTheConfigurationsOfTheGuidesAreRead(t *testing.T) {
	dir, program := t.TempDir(), buildCommand(t)
	writeTrust(t, dir)
	whole, pieces := 0, 0
	for _, page := range []string{"docs/custody.md", "docs/bank-vaults.md", "README.md"} {
		for _, match := range configurations.FindAllStringSubmatch(readFile(t, vaulttest.Root(), page), -1) {
			if match[1] == "" {
				whole++
			} else {
				pieces++
			}
			text := strings.ReplaceAll(completed(match[1], match[2]), "/etc/nitroseal/", dir+"/")
			path := filepath.Join(dir, "nitroseal.hcl")
			write(t, dir, "nitroseal.hcl", text)
			read, err := config.Load(path)
			if err != nil {
				t.Errorf("%s: %v, in\n%s", page, err, text)
				continue
			}
			if len(read.Clusters) != 1 {
				t.Errorf("%s: it has %d clusters\n%s", page, len(read.Clusters), text)
			}
			if out, err := exec.CommandContext(t.Context(), program, "config", "check", "--config", path).CombinedOutput(); err != nil {
				t.Errorf("%s: nitroseal config check: %v\n%s\n%s", page, err, out, text)
			}
		}
	}
	if whole < 4 || pieces < 4 {
		t.Errorf("only %d configurations and %d pieces were found: do the pages look different now?", whole, pieces)
	}
}

// configurations are blocks of a page: whole ones, or pieces for a cluster or of more blocks.
var configurations = regexp.MustCompile("(?ms)^```hcl ?([a-z]*)\n(.*?)^```$")

// completed puts a piece of a configuration into a whole one.
func completed(kind, text string) string {
	switch {
	case kind == "":
		return text
	case kind == "more":
		return guideBase + text
	case strings.Contains(text, "spread"):
		return strings.Replace(guideBase, "key          = \"prod\"", text, 1)
	default:
		return strings.Replace(guideBase, "store        = \"here\"", "store = \"here\"\n"+text, 1)
	}
}

// guideBase is what pieces of the page are put into.
const guideBase = `
state_dir = "/var/lib/nitroseal"

pkcs11 {
  modules = ["/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"]
}

device "stick" {
  type     = "pkcs11"
  serial   = "DENK0100001"
  pin_file = "/etc/nitroseal/pin"
}

store "here" {
  type = "file"
  dir  = "/var/lib/nitroseal/store"
}

cluster "prod" {
  nodes        = ["https://vault.example.org:8200"]
  ca_cert_file = "/etc/nitroseal/vault-ca.pem"
  key          = "prod"
  store        = "here"
}
`

// writeTrust writes the files that the page's configurations name.
func writeTrust(t *testing.T, dir string) {
	t.Helper()
	server := httptest.NewTLSServer(http.NotFoundHandler())
	server.Close()
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	for _, name := range []string{"vault-ca.pem", "etcd-ca.pem", "etcd-client.pem"} {
		write(t, dir, name, string(certificate))
	}
	key, err := x509.MarshalPKCS8PrivateKey(server.TLS.Certificates[0].PrivateKey)
	must(t, err)
	write(t, dir, "etcd-client.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})))
	for _, name := range []string{"pin", "stick.pin"} {
		write(t, dir, name, "648219\n")
	}
	for _, name := range []string{"alice", "bob"} {
		write(t, dir, name+".asc", string(publicKey(t, name)))
	}
}

// publicKey makes somebody's OpenPGP key and returns its public half, armored.
func publicKey(t *testing.T, name string) []byte {
	t.Helper()
	person, err := openpgp.NewEntity(name, "", name+"@example.org", nil)
	must(t, err)
	var public bytes.Buffer
	armored, err := armor.Encode(&public, openpgp.PublicKeyType, nil)
	must(t, err)
	must(t, person.Serialize(armored))
	must(t, armored.Close())
	return public.Bytes()
}

// TestTheGuideTellsEveryAttribute wants each attribute of the blocks of custody in the guide, and no other one in its tables.
func TestTheGuideTellsEveryAttribute(t *testing.T) {
	page := readFile(t, vaulttest.Root(), "docs/custody.md")
	known := map[string][]string{
		"cluster": attributesOf(t, "clusterAttributes"), "person": attributesOf(t, "personAttributes"), "run": attributesOf(t, "runAttributes"),
		"audit": append(attributesOf(t, "fileAuditAttributes"), attributesOf(t, "syslogAuditAttributes")...),
	}
	for block, attributes := range known {
		if len(attributes) == 0 {
			t.Errorf("the block %s has no attributes: are its types called otherwise now?", block)
		}
		for _, attribute := range attributes {
			if !strings.Contains(page, "`"+attribute+"`") && !strings.Contains(page, "`"+attribute+" ") {
				t.Errorf("docs/custody.md does not tell of %s in the block %s", attribute, block)
			}
		}
	}
	for _, block := range []string{"cluster", "run"} {
		_, section, found := strings.Cut(page, "\n### "+block+"\n")
		if !found {
			t.Fatalf("docs/custody.md has no section %s", block)
		}
		section, _, _ = strings.Cut(section, "\n#")
		for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+) \|`).FindAllStringSubmatch(section, -1) {
			for _, name := range regexp.MustCompile("`([a-z_]+)[` ]").FindAllStringSubmatch(row[1], -1) {
				if !slices.Contains(known[block], name[1]) {
					t.Errorf("docs/custody.md: the block %s has no attribute %s, but %v", block, name[1], known[block])
				}
			}
		}
	}
}

// attributesOf reads the names of attributes and blocks from the tags of a type of package config.
func attributesOf(t *testing.T, typeName string) []string {
	t.Helper()
	var names []string
	paths, err := filepath.Glob(filepath.Join(vaulttest.Root(), "internal", "config", "*.go"))
	must(t, err)
	for _, path := range paths {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		must(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok || spec.Name.Name != typeName {
				return true
			}
			for _, field := range spec.Type.(*ast.StructType).Fields.List {
				tag, err := strconv.Unquote(field.Tag.Value)
				must(t, err)
				name, _, _ := strings.Cut(reflect.StructTag(tag).Get("hcl"), ",")
				names = append(names, name)
			}
			return false
		})
	}
	return names
}

// TestTheGuideNamesTheMetricsThatThereAre compares the guide with the daemon's source, in both directions.
func TestTheGuideNamesTheMetricsThatThereAre(t *testing.T) {
	named := map[string]bool{}
	for _, name := range regexp.MustCompile(`nitroseal_[a-z_]+`).FindAllString(readFile(t, vaulttest.Root(), "docs/custody.md"), -1) {
		named[name] = true
	}
	there := map[string]bool{}
	source := sources(t, "internal/daemon")
	for _, match := range regexp.MustCompile(`Name: "(nitroseal_[a-z_]+)"`).FindAllStringSubmatch(source, -1) {
		there[match[1]] = true
	}
	for _, match := range regexp.MustCompile(`describe\("([a-z_]+)"|describe\(\s*"([a-z_]+)"`).FindAllStringSubmatch(source, -1) {
		there["nitroseal_"+match[1]+match[2]] = true
	}
	if len(there) < 15 {
		t.Fatalf("only %d metrics were found in the daemon", len(there))
	}
	for name := range named {
		if !there[name] {
			t.Errorf("docs/custody.md names the metric %s, which the daemon does not have", name)
		}
	}
	for name := range there {
		if !named[name] {
			t.Errorf("docs/custody.md does not name the metric %s", name)
		}
	}
}

// sources are the Go files below folders, without tests, one after the other.
func sources(t *testing.T, folders ...string) string {
	t.Helper()
	var all strings.Builder
	for _, folder := range folders {
		must(t, filepath.WalkDir(filepath.Join(vaulttest.Root(), folder), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			content, err := os.ReadFile(path)
			all.Write(content)
			return err
		}))
	}
	return all.String()
}

// TestTheGuideQuotesWhatIsSaid wants what stands between quotation marks in the table of bad days to be in the source, but for
// what "…" stands for.
func TestTheGuideQuotesWhatIsSaid(t *testing.T) {
	page := readFile(t, vaulttest.Root(), "docs/custody.md")
	source := regexp.MustCompile(`"\+\n\s*"`).ReplaceAllString(strings.ReplaceAll(sources(t, "internal", "hsm", "nethsm", "cmd"), `" +`, `"+`), "")
	_, table, _ := strings.Cut(page, "\n## Bad days\n")
	table, _, _ = strings.Cut(table, "\n## ")
	quoted := 0
	for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+) \|`).FindAllStringSubmatch(table, -1) {
		for _, quote := range regexp.MustCompile(`"([^"]+)"`).FindAllStringSubmatch(row[1], -1) {
			quoted++
			for piece := range strings.SplitSeq(quote[1], "…") {
				if piece = strings.TrimSpace(piece); !strings.Contains(source, piece) && !slices.Contains([]string{"no space left on device"}, piece) {
					t.Errorf("docs/custody.md: nobody says %q", piece)
				}
			}
		}
	}
	if quoted < 10 {
		t.Errorf("only %d quotations were found", quoted)
	}
}

// TestTheNumbersOfTheGuideFitItsSpreads checks the table of spreads.
func TestTheNumbersOfTheGuideFitItsSpreads(t *testing.T) {
	keys := []string{"office", "bunker", "bank", "home", "van"}
	rows := regexp.MustCompile("(?m)^\\| `(\\d) of` (\\d) keys \\| ([^|]+) \\|").FindAllStringSubmatch(readFile(t, vaulttest.Root(), "docs/custody.md"), -1)
	if len(rows) < 5 {
		t.Fatalf("only %d spreads were found", len(rows))
	}
	for _, row := range rows {
		of, err := strconv.Atoi(row[2])
		must(t, err)
		spread, err := cluster.ParseSpread(row[1] + " of " + strings.Join(keys[:of], ", "))
		must(t, err)
		for _, numbers := range regexp.MustCompile(`(\d+)/(\d+)`).FindAllStringSubmatch(row[3], -1) {
			shares, err := strconv.Atoi(numbers[1])
			must(t, err)
			threshold, err := strconv.Atoi(numbers[2])
			must(t, err)
			c := &cluster.Cluster{
				Name: "prod", Nodes: []string{"http://127.0.0.1:8200"}, TLS: node.TLS{PlainHTTP: true}, Store: "here", Spread: &spread,
				Shares: shares, Threshold: threshold,
			}
			if err := c.Check(); err != nil {
				t.Errorf("%s: %d shares with a threshold of %d: %v", spread, shares, threshold, err)
			}
		}
	}
}

// TestTheGuideShowsHowAPinIsMade runs the page's command against a server.
func TestTheGuideShowsHowAPinIsMade(t *testing.T) {
	server := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(server.Close)
	script := strings.Replace(readPage(t, "custody.md")["sh pin"], "vault-1.example.org:8200", server.Listener.Addr().String(), 1)
	d := &desk{dir: t.TempDir(), page: map[string]string{"sh pin": script}, env: os.Environ()}
	printed := d.must(t, "pin")
	sum := sha256.Sum256(server.Certificate().RawSubjectPublicKeyInfo)
	if want := hex.EncodeToString(sum[:]); !strings.Contains(printed, want) || node.Pin(server.Certificate()) != want {
		t.Errorf("it printed %q, want %s", printed, want)
	}
}

// TestTheAuditLogIsAsTheGuideShowsIt compares the verbs and the members of the lines that the page shows with the source.
func TestTheAuditLogIsAsTheGuideShowsIt(t *testing.T) {
	page := readFile(t, vaulttest.Root(), "docs/custody.md")
	source := sources(t, "internal/custody/cluster")
	_, verbs, found := strings.Cut(page, "\nVerbs: ")
	verbs, _, _ = strings.Cut(verbs, ", and ")
	if !found {
		t.Fatal("docs/custody.md lists no verbs")
	}
	told := regexp.MustCompile("`([a-z-]+)`").FindAllStringSubmatch(verbs, -1)
	for _, verb := range told {
		if !strings.Contains(source, `k.act(ctx, "`+verb[1]+`"`) {
			t.Errorf("no act has the verb %q", verb[1])
		}
	}
	for _, verb := range regexp.MustCompile(`k\.act\(ctx, "([a-z-]+)"`).FindAllStringSubmatch(source, -1) {
		if !strings.Contains(verbs, "`"+verb[1]+"`") {
			t.Errorf("docs/custody.md does not tell of the verb %q", verb[1])
		}
	}
	record := sources(t, "internal/audit")
	for _, member := range regexp.MustCompile(`[{,]"([a-z]+)":`).FindAllStringSubmatch(readPage(t, "custody.md")["json"], -1) {
		if !strings.Contains(record, `json:"`+member[1]) && !slices.Contains([]string{"set", "shares", "threshold"}, member[1]) {
			t.Errorf("no line has the member %q", member[1])
		}
	}
}

// TestTheDaemonLooksAsOftenAsTheGuideSays compares the pauses that the page tells with those of the daemon.
func TestTheDaemonLooksAsOftenAsTheGuideSays(t *testing.T) {
	source := sources(t, "internal/daemon")
	for constant, told := range map[string]string{
		"defaultInterval = 5 * time.Second": "every 5 seconds", "firstPause      = time.Second": "after 1 second", "longestPause    = 30 * time.Second": "up to 30",
		"growth          = 1.5": "1.5, 2.25", "barTime = 10 * time.Minute": "ten minutes",
	} {
		if !strings.Contains(source, constant) {
			t.Errorf("the daemon has no %q any more: correct docs/custody.md", constant)
		}
		if !strings.Contains(readFile(t, vaulttest.Root(), "docs/custody.md"), told) {
			t.Errorf("docs/custody.md does not say %q", told)
		}
	}
	if cluster.DefaultShares != 5 || cluster.DefaultThreshold != 3 || node.DefaultTimeout != 10*time.Second || config.DefaultListen != "127.0.0.1:9108" {
		t.Error("a default is another one than docs/custody.md says")
	}
}
