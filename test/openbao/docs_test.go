package openbao_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// guide is docs/openbao.md, whose commands and configurations are done here with other paths and another token.
type guide struct {
	text     string
	replaced *strings.Replacer
}

// openGuide reads the guide; pairs are what stands there and what it is here.
func openGuide(t *testing.T, pairs ...string) guide {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(vaulttest.Root(), "docs", "openbao.md"))
	if err != nil {
		t.Fatal(err)
	}
	return guide{string(content), strings.NewReplacer(pairs...)}
}

// configuration is the block ```hcl NAME.
func (g guide) configuration(t *testing.T, name string) string {
	t.Helper()
	_, rest, found := strings.Cut(g.text, "```hcl "+name+"\n")
	if !found {
		t.Fatalf("docs/openbao.md has no configuration %q", name)
	}
	block, _, _ := strings.Cut(rest, "```")
	return g.replaced.Replace(block)
}

// command is the line of the guide that begins like that, as arguments of nitroseal.
func (g guide) command(t *testing.T, begin string) []string {
	t.Helper()
	line := regexp.MustCompile(`(?m)^sudo -u openbao nitroseal (` + regexp.QuoteMeta(begin) + `.*)$`).FindStringSubmatch(g.text)
	if line == nil {
		t.Fatalf("docs/openbao.md has no command %q", begin)
	}
	return strings.Fields(g.replaced.Replace(line[1]))
}

// declared are what OpenBao reads from its configuration: the arguments of the plugin, nil where they are not there, and the
// settings of the seal.
func declared(t *testing.T, source string) (args []string, settings map[string]string) {
	t.Helper()
	file, problems := hclsyntax.ParseConfig([]byte(source), "openbao.hcl", hcl.InitialPos)
	if problems.HasErrors() {
		t.Fatal(problems)
	}
	settings = map[string]string{}
	for _, block := range file.Body.(*hclsyntax.Body).Blocks {
		for name, attribute := range block.Body.Attributes {
			value, problems := attribute.Expr.Value(nil)
			if problems.HasErrors() {
				t.Fatal(problems)
			}
			switch {
			case block.Type == "plugin" && slices.Equal(block.Labels, []string{"kms", "nitrokey"}) && name == "args":
				for _, one := range value.AsValueSlice() {
					args = append(args, one.AsString())
				}
			case block.Type == "seal" && slices.Equal(block.Labels, []string{"nitrokey"}):
				if value.Type().FriendlyName() != "string" {
					t.Errorf("%s is no string", name)
				}
				settings[name] = value.AsString()
			}
		}
	}
	return args, settings
}

// noted is the SHA-256 that the guide has as an example.
var noted = strings.Repeat("0123456789abcdef", 4)[:64]

func TestTheGuideIsDoneAsItStands(t *testing.T) {
	token, netHSM := pkcs11test.SoftHSM(t), nethsmtest.Start(t, nethsmtest.Options{Nodes: 1, Provisioned: true})
	s := newSite(t)
	h := s.host
	h.WithToken(t, token)
	h.Set(t, `device "rack"`, "type = \"nethsm\"\n urls = [%q]\n username = %q\n password_file = \"password\"\n ca_cert_file = \"ca.pem\"",
		netHSM.URLs()[0], nethsmtest.OperatorUser)
	h.Put(t, "password", []byte(nethsmtest.OperatorPassphrase))
	h.Put(t, "ca.pem", netHSM.CA())
	if _, _, err := netHSM.AddKey(nethsmtest.Key{ID: "openbao", Mechanisms: []string{"RSA_Decryption_OAEP_SHA256"}}); err != nil {
		t.Fatal(err)
	}
	g := openGuide(t, "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so", token.Module, "DENK0100001", token.Serial,
		"/etc/nitroseal/nitroseal.hcl", h.File("nitroseal.hcl"), "/etc/nitroseal", h.Dir, "/var/lib/nitroseal", h.File("state"),
		"--label openbao", "--id openbao")

	// The device of the guide's nitroseal.hcl takes the place of the host's own.
	stick := regexp.MustCompile(`(?s)device "stick" \{(.*?)\n\}`).FindStringSubmatch(g.configuration(t, "nitroseal"))
	h.Set(t, `device "stick"`, "%s", stick[1])
	h.Must(t, g.command(t, "key generate")...)
	h.Must(t, g.command(t, "key backup openbao --out /var/lib/nitroseal/openbao.record")...)
	confirmed := func(settings map[string]string) map[string]string {
		if settings["key_record_sha256"] != noted {
			t.Errorf("the guide's SHA-256 is %q", settings["key_record_sha256"])
		}
		settings["key_record_sha256"] = vaulttest.Decode[record](t, h.Must(t, "key", "backup", "openbao", "-o", "json")).SHA256
		return settings
	}

	args, settings := declared(t, g.configuration(t, "openbao"))
	for _, name := range token.Env {
		args, s.env = append(args, "-module-env="+name), append(s.env, name+"="+os.Getenv(name))
	}
	bao := newOpenBao(t, s.binary, args, s.env...)
	w := bao.configured(t, confirmed(settings))
	if err := w.init(t.Context()); err != nil {
		t.Fatal(err)
	}
	first := w.mustEncrypt(t, rootKey, aad)
	w.opens(t, first, aad, rootKey)

	h.Must(t, g.command(t, "key add-recipient")...)
	h.Must(t, g.command(t, "key backup openbao --out /var/lib/nitroseal/openbao-2.record")...)
	_, settings = declared(t, g.configuration(t, "openbao-several"))
	w = bao.configured(t, confirmed(settings))
	w.opens(t, first, aad, rootKey)
	if id, err := w.keyID(t.Context()); err != nil || id != "openbao/v1+1" {
		t.Errorf("KeyId: %q, %v", id, err)
	}

	h.Must(t, g.command(t, "key rotate")...)
	h.Must(t, g.command(t, "key backup openbao --out /var/lib/nitroseal/openbao-3.record")...)
	settings["key_record_file"], settings["key_record_sha256"], settings["accept_single_hsm"] = h.File("state/openbao-3.record"), noted, "true"
	w = bao.configured(t, confirmed(settings))
	w.opens(t, first, aad, rootKey)
	if id, err := w.keyID(t.Context()); err != nil || id != "openbao/v2" {
		t.Errorf("KeyId: %q, %v", id, err)
	}
}

func TestTheGuidesNetHSM(t *testing.T) {
	netHSM := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	s := withNetHSM(t, netHSM)
	h := s.host
	credentials := t.TempDir()
	if err := os.WriteFile(filepath.Join(credentials, "nethsm-password"), []byte(nethsmtest.OperatorPassphrase), 0o400); err != nil {
		t.Fatal(err)
	}
	g := openGuide(t, "https://nethsm-1.example.org:8443", netHSM.URLs()[0], "https://nethsm-2.example.org:8443", netHSM.URLs()[1],
		`"openbao"`, `"prod"`, "/var/lib/nitroseal/openbao.record", h.File("prod.record"),
		"/etc/nitroseal/nethsm-ca.pem", h.File("nethsm-ca.pem"),
		`"operator"`, `"`+nethsmtest.OperatorUser+`"`, noted, s.stanza(t, "prod")["key_record_sha256"])
	_, settings := declared(t, g.configuration(t, "openbao-nethsm"))
	bao := newOpenBao(t, s.binary, nil, "CREDENTIALS_DIRECTORY="+credentials)
	w := bao.configured(t, settings)
	w.opens(t, w.mustEncrypt(t, rootKey, aad), aad, rootKey)
}
