package test

import (
	"crypto/ecdh"
	"crypto/x509"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestRecoveryDoesWhatItsPageSays runs the script and the commands of docs/recovery.md as they are printed there.
func TestRecoveryDoesWhatItsPageSays(t *testing.T) {
	page := readPage(t, "recovery.md")
	token := pkcs11test.SoftHSM(t)
	token.GenerateKey(t, "rsa:2048", "rsa", "01")
	token.GenerateKey(t, "EC:prime256v1", "p256", "02")
	token.GenerateKey(t, "EC:secp384r1", "p384", "03")
	rsaKey := readRecipient(t, token, "01", envelope.RSAOAEP)
	p256 := readRecipient(t, token, "02", envelope.ECDHESA256KW)
	p384 := readRecipient(t, token, "03", envelope.ECDHESA256KW)

	for name, test := range map[string]struct {
		recipients []envelope.Recipient
		id         string // of the key that opens
		opener     envelope.Recipient
		block      string // of the page
	}{
		"RSA, one recipient":          {[]envelope.Recipient{rsaKey}, "01", rsaKey, "rsa-oaep"},
		"P-256, one recipient":        {[]envelope.Recipient{p256}, "02", p256, "ecdh-es"},
		"P-384, one recipient":        {[]envelope.Recipient{p384}, "03", p384, "ecdh-es"},
		"RSA among three recipients":  {[]envelope.Recipient{p256, rsaKey, p384}, "01", rsaKey, "rsa-oaep"},
		"P-384 among many recipients": {[]envelope.Recipient{rsaKey, p256, p384}, "03", p384, "ecdh-es"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, "nitroseal-open.py", page["python"])
			auth := envelope.NewAuthKey()
			write(t, dir, "authentication-key", string(auth[:]))
			raw, err := envelope.Seal(envelope.Context{
				Use: envelope.UseMaterial, Key: "prod", Version: 3, Cluster: "eu", Name: "shares", Generation: 7, Caller: []byte("caller"),
			}, test.recipients, auth, []byte(secret))
			if err != nil {
				t.Fatal(err)
			}
			write(t, dir, "envelope", string(raw))

			run := func(block string) (out string, err error) {
				t.Helper()
				script, known := page["sh "+block]
				if !known {
					t.Fatalf("docs/recovery.md has no block %q", block)
				}
				command := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
				command.Dir = dir
				command.Env = append(os.Environ(), "PATH=/usr/bin:"+os.Getenv("PATH"), // Debian's own Python
					"MODULE="+token.Module, "ID="+test.id, "PIN="+token.PIN, "KID="+test.opener.KID)
				text, err := command.CombinedOutput()
				return string(text), err
			}
			must := func(block string) string {
				t.Helper()
				out, err := run(block)
				if err != nil {
					t.Fatalf("%s: %v\n%s", block, err, out)
				}
				return out
			}

			if listed := must("recipients"); !strings.Contains(listed, test.opener.KID+" "+string(test.opener.Algorithm)) {
				t.Errorf("the recipients are listed as\n%s", listed)
			}
			must(test.block)
			if said := must("open"); !strings.Contains(said, "not authenticated") {
				t.Errorf("opening without the authentication key says %q", said)
			}
			if got := read(t, dir, "secret"); got != secret {
				t.Errorf("recovered %q", got)
			}
			must("authenticated")
			if got := read(t, dir, "secret"); got != secret {
				t.Errorf("recovered, authenticated, %q", got)
			}
			write(t, dir, "authentication-key", strings.Repeat("x", len(auth)))
			if said, err := run("authenticated"); err == nil || !strings.Contains(said, "FORGED") {
				t.Errorf("with another authentication key it says %q, %v", said, err)
			}
		})
	}
}

// readPage returns the code blocks of a page under docs/ by what follows their opening fence.
func readPage(t *testing.T, name string) map[string]string {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(vaulttest.Root(), "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	blocks := map[string]string{}
	for _, match := range regexp.MustCompile("(?ms)^```([a-z].*?)\n(.*?)^```$").FindAllStringSubmatch(string(page), -1) {
		blocks[match[1]] = match[2]
	}
	return blocks
}

// readRecipient reads a public key from the token with pkcs11-tool, which cannot export every curve: it prints all points.
func readRecipient(t *testing.T, token *pkcs11test.Token, id string, algorithm envelope.Algorithm) envelope.Recipient {
	t.Helper()
	recipient := envelope.Recipient{Algorithm: algorithm}
	var err error
	if algorithm == envelope.ECDHESA256KW {
		listed := token.Tool(t, "--list-objects", "--type", "pubkey") // all, whatever --id says
		// The point lies inside an OCTET STRING.
		match := regexp.MustCompile(`EC_POINT:\s+04(?:41|61)([0-9a-f]+)\n(?:.*\n){2}\s+ID:\s+` + id).FindStringSubmatch(listed)
		if match == nil {
			t.Fatalf("no point in\n%s", listed)
		}
		point, decodeErr := hex.DecodeString(match[1])
		if decodeErr != nil {
			t.Fatal(decodeErr)
		}
		curve := ecdh.P256()
		if len(point) > 65 {
			curve = ecdh.P384()
		}
		recipient.Public, err = curve.NewPublicKey(point)
	} else {
		file := filepath.Join(t.TempDir(), "public.der")
		token.Tool(t, "--read-object", "--type", "pubkey", "--id", id, "--output-file", file)
		recipient.Public, err = x509.ParsePKIXPublicKey([]byte(read(t, filepath.Dir(file), filepath.Base(file))))
	}
	if err != nil {
		t.Fatal(err)
	}
	if recipient.KID, err = hsm.Fingerprint(recipient.Public); err != nil {
		t.Fatal(err)
	}
	return recipient
}

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, dir, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}
