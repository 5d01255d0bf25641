package test

import (
	"crypto/aes"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/transit"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
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
			auth := envelope.NewAuthKey()
			raw, err := envelope.Seal(envelope.Context{
				Use: envelope.UseMaterial, Key: "prod", Version: 3, Cluster: "eu", Name: "shares", Generation: 7, Caller: []byte("caller"),
			}, test.recipients, auth, []byte(secret))
			if err != nil {
				t.Fatal(err)
			}
			d := newDesk(t, page, token, "ID="+test.id, "KID="+test.opener.KID)
			write(t, d.dir, "authentication-key", string(auth[:]))
			write(t, d.dir, "envelope", string(raw))

			if listed := d.must(t, "recipients"); !strings.Contains(listed, test.opener.KID+" "+string(test.opener.Algorithm)) {
				t.Errorf("the recipients are listed as\n%s", listed)
			}
			d.must(t, test.block)
			d.must(t, "open")
			if got := read(t, d.dir, "secret"); got != secret {
				t.Errorf("recovered %q", got)
			}
			if said := d.must(t, "authenticated"); !strings.Contains(said, "authentic") || !strings.Contains(said, "shares") {
				t.Errorf("an authentic envelope is said to be %q", said)
			}
			write(t, d.dir, "authentication-key", strings.Repeat("x", len(auth)))
			if said, err := d.run(t, "authenticated"); err == nil || !strings.Contains(said, "FORGED") {
				t.Errorf("with another authentication key it says %q, %v", said, err)
			}
		})
	}
}

// TestRecoveryOfWhatWasSealedInALease takes the HSM's part once, for the key encryption key that the envelope carries.
func TestRecoveryOfWhatWasSealedInALease(t *testing.T) {
	page := readPage(t, "recovery.md")
	token := pkcs11test.SoftHSM(t)
	token.GenerateKey(t, "rsa:2048", "rsa", "01")
	token.GenerateKey(t, "EC:prime256v1", "p256", "02")
	rsaKey := readRecipient(t, token, "01", envelope.RSAOAEP)
	p256 := readRecipient(t, token, "02", envelope.ECDHESA256KW)
	for name, test := range map[string]struct {
		recipients []envelope.Recipient
		id         string
		opener     envelope.Recipient
		block      string
	}{
		"RSA, one recipient":      {[]envelope.Recipient{rsaKey}, "01", rsaKey, "rsa-oaep"},
		"P-256, among recipients": {[]envelope.Recipient{rsaKey, p256}, "02", p256, "ecdh-es"},
	} {
		t.Run(name, func(t *testing.T) {
			auth := envelope.NewAuthKey()
			raw := sealInLease(t, test.recipients, auth)
			d := newDesk(t, page, token, "ID="+test.id, "KID="+test.opener.KID)
			write(t, d.dir, "authentication-key", string(auth[:]))
			write(t, d.dir, "envelope", transit.Format(1, raw))
			if listed := d.must(t, "recipients"); !strings.HasSuffix(listed, " A256KW\n") {
				t.Errorf("the recipients are listed as\n%s", listed)
			}
			d.must(t, "leased")
			if listed := d.must(t, "recipients"); !strings.Contains(listed, test.opener.KID+" "+string(test.opener.Algorithm)) {
				t.Errorf("the recipients of the key encryption key are listed as\n%s", listed)
			}
			for _, block := range []string{test.block, "open", "authenticated", "a256kw", "open"} {
				d.must(t, block)
			}
			if got := read(t, d.dir, "secret"); got != secret {
				t.Errorf("recovered %q", got)
			}
			if said := d.must(t, "authenticated"); !strings.Contains(said, "authentic") || !strings.Contains(said, "transit") {
				t.Errorf("an authentic envelope is said to be %q", said)
			}
		})
	}
	t.Run("with a software copy of the key", func(t *testing.T) {
		private, err := rsa.GenerateKey(rand.Reader, 2048)
		must(t, err)
		kid, err := hsm.Fingerprint(&private.PublicKey)
		must(t, err)
		der, err := x509.MarshalPKCS8PrivateKey(private)
		must(t, err)
		d := &desk{dir: t.TempDir(), page: page, env: append(os.Environ(), "PATH=/usr/bin:"+os.Getenv("PATH"))}
		d.scripts(t)
		write(t, d.dir, "envelope", string(sealInLease(t,
			[]envelope.Recipient{{KID: kid, Algorithm: envelope.RSAOAEP256, Public: &private.PublicKey}}, envelope.NewAuthKey())))
		write(t, d.dir, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
		for _, block := range []string{"recipients", "leased", "jwcrypto", "a256kw", "open"} {
			d.must(t, block)
		}
		if got := read(t, d.dir, "secret"); got != secret {
			t.Errorf("recovered %q", got)
		}
	})
}

// sealInLease seals the secret as a keyring does while a lease is open.
func sealInLease(t *testing.T, to []envelope.Recipient, auth *envelope.AuthKey) []byte {
	t.Helper()
	key := envelope.NewKEK()
	kek, err := envelope.SealKEK("prod", 1, to, auth, key)
	must(t, err)
	block, err := aes.NewCipher(key)
	must(t, err)
	raw, err := envelope.SealLeased(envelope.Context{Use: envelope.UseTransit, Key: "prod", Version: 1}, kek, block, auth, []byte(secret))
	must(t, err)
	return raw
}

// TestRecoveryScriptsAreShort: who types them in on the worst day must be able to.
func TestRecoveryScriptsAreShort(t *testing.T) {
	found := 0
	for name, script := range readPage(t, "recovery.md") {
		if !strings.HasPrefix(name, "python") {
			continue
		}
		found++
		if lines := strings.Count(script, "\n"); lines > 20 {
			t.Errorf("%s has %d lines", name, lines)
		}
	}
	if found != 3 {
		t.Errorf("%d scripts", found)
	}
}

// TestRecoveryWithASoftwareCopyOfTheKey needs Debian's JOSE library and no HSM.
func TestRecoveryWithASoftwareCopyOfTheKey(t *testing.T) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	point, err := ecdh.P256().GenerateKey(rand.Reader)
	must(t, err)
	var recipients []envelope.Recipient
	for _, r := range []envelope.Recipient{
		{Public: &private.PublicKey, Algorithm: envelope.RSAOAEP256}, {Public: point.PublicKey(), Algorithm: envelope.ECDHESA256KW},
	} {
		r.KID, err = hsm.Fingerprint(r.Public)
		must(t, err)
		recipients = append(recipients, r)
	}
	for name, test := range map[string]struct {
		key        any
		recipients []envelope.Recipient
	}{
		"RSA":                              {private, recipients[:1]},
		"P-256":                            {point, recipients[1:]},
		"one of two, on the transit wire":  {private, recipients},
		"the other, from a file of stores": {point, recipients},
	} {
		t.Run(name, func(t *testing.T) {
			raw, err := envelope.Seal(envelope.Context{Use: envelope.UseTransit, Key: "prod", Version: 1}, test.recipients, envelope.NewAuthKey(), []byte(secret))
			must(t, err)
			text := string(raw)
			if strings.Contains(name, "transit") {
				text = transit.Format(1, raw)
			} else if strings.Contains(name, "stores") {
				text = "nitroseal1 ABCDEFGHIJKLMNOPQRSTUVWXYZ 0011223344556677\n" + text
			}
			der, err := x509.MarshalPKCS8PrivateKey(test.key)
			must(t, err)
			d := &desk{dir: t.TempDir(), page: readPage(t, "recovery.md"), env: append(os.Environ(), "PATH=/usr/bin:"+os.Getenv("PATH"))}
			d.scripts(t)
			write(t, d.dir, "envelope", text)
			write(t, d.dir, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
			d.must(t, "jwcrypto")
			if got := read(t, d.dir, "secret"); got != secret {
				t.Errorf("recovered %q", got)
			}
		})
	}
}

// TestRecoveredSharesUnsealAVault takes the item of a real cluster from the envelope to an unsealed node.
func TestRecoveredSharesUnsealAVault(t *testing.T) {
	vault := vaulttest.Start(t, vaulttest.Options{Bare: true, Storage: vaulttest.InMem})
	init, err := vault.Anonymous(t).Sys().Init(&api.InitRequest{SecretShares: 3, SecretThreshold: 2})
	must(t, err)
	fields := map[string]string{"facts": vaulttest.Base64(`{"format":1,"cluster":"eu","kind":"unseal","seal":"shamir","sets":[` +
		`{"id":"0a1b2c3d","shares":3,"threshold":2,"state":"active","indices":[0,1,2]},` +
		`{"id":"4e5f6a7b","shares":3,"threshold":2,"state":"pending","indices":[0,1,2]}]}`)}
	for i, share := range init.KeysB64 {
		fields[fmt.Sprintf("0a1b2c3d.%d", i)] = share
		fields[fmt.Sprintf("4e5f6a7b.%d", i)] = vaulttest.Base64("of a rekey that was cut off")
	}
	payload, err := json.Marshal(fields)
	must(t, err)

	token := pkcs11test.SoftHSM(t)
	token.GenerateKey(t, "rsa:2048", "rsa", "01")
	key := readRecipient(t, token, "01", envelope.RSAOAEP)
	raw, err := envelope.Seal(envelope.Context{Use: envelope.UseMaterial, Key: "prod", Version: 1, Cluster: "eu", Name: "unseal", Generation: 1},
		[]envelope.Recipient{key}, envelope.NewAuthKey(), payload)
	must(t, err)
	tools := t.TempDir()
	must(t, os.Symlink(vaulttest.Tool(t, "vault"), filepath.Join(tools, "vault")))
	d := newDesk(t, readPage(t, "recovery.md"), token, "ID=01", "KID="+key.KID, "VAULT_ADDR="+vault.Address, "VAULT_CACERT="+vault.CAFile,
		"PATH=/usr/bin:"+tools+":"+os.Getenv("PATH"))
	// As it lies on the disk of a host whose store was away.
	write(t, d.dir, "held", "nitroseal1 ABCDEFGHIJKLMNOPQRSTUVWXYZ 0011223344556677\n"+
		`{"format":1,"cluster":"eu","origin":"00","items":[{"item":"unseal","envelope":`+string(raw)+`}]}`)
	d.must(t, "held")
	must(t, os.Rename(filepath.Join(d.dir, "envelope.unseal"), filepath.Join(d.dir, "envelope")))
	for _, block := range []string{"recipients", "rsa-oaep", "open", "shares", "unseal"} {
		d.must(t, block)
	}
	status, err := vault.Anonymous(t).Sys().SealStatus()
	if err != nil || status.Sealed {
		t.Errorf("the node is %+v, %v", status, err)
	}
}

// TestRecoverDoesWhatItsPageSays runs the one-line commands of the page.
func TestRecoverDoesWhatItsPageSays(t *testing.T) {
	page := readPage(t, "recovery.md")
	command := filepath.Dir(buildCommand(t))
	t.Run("a token", func(t *testing.T) {
		token := pkcs11test.SoftHSM(t)
		token.GenerateKey(t, "rsa:2048", "unseal", "01")
		state := filepath.Join(t.TempDir(), "state")
		must(t, os.Mkdir(state, 0o700))
		d := newDesk(t, page, token, "PATH="+command+":"+os.Getenv("PATH"), "SERIAL="+token.Serial, "STATE="+state,
			"NITROSEAL_CONFIG="+filepath.Join(state, "nitroseal.hcl"))
		write(t, d.dir, "pin", token.PIN)
		write(t, state, "nitroseal.hcl", fmt.Sprintf("state_dir = %q\npkcs11 {\n  modules = [%q]\n  env = [\"SOFTHSM2_CONF\"]\n}\n"+
			"device \"stick\" {\n  type = \"pkcs11\"\n  serial = %q\n  pin_file = %q\n}\nstore \"disk\" {\n  type = \"file\"\n  dir = %q\n}\n",
			state, token.Module, token.Serial, filepath.Join(d.dir, "pin"), d.dir))
		page["sh keep"] = "nitroseal key adopt prod --device stick --label unseal\nnitroseal key backup prod --out key.json\n" +
			"printf %s \"$SECRET\" | nitroseal material put eu licence --key prod --store disk value=-\nmv ./*licence envelope\n" +
			"rm \"$NITROSEAL_CONFIG\"\ntr -d '\\n' < key.json | sha256sum | cut -d' ' -f1\n"
		d.env = append(d.env, "SECRET="+secret)
		lines := strings.Fields(d.must(t, "keep"))
		d.env = append(d.env, "SHA256="+lines[len(lines)-1])
		// What a real token does not need: the module's own variable.
		page["sh recover"] = strings.Replace(page["sh recover"], "nitroseal recover", "nitroseal recover --module-env SOFTHSM2_CONF", 1)
		d.must(t, "recover")
		if got := read(t, filepath.Join(d.dir, "fields"), "value"); got != secret {
			t.Errorf("recovered %q", got)
		}
	})
	t.Run("a NetHSM", func(t *testing.T) {
		double := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
		_, public, err := double.AddKey(nethsmtest.Key{ID: "unseal"})
		must(t, err)
		kid, err := hsm.Fingerprint(public)
		must(t, err)
		raw, err := envelope.Seal(envelope.Context{Use: envelope.UseWrap, Key: "prod", Version: 1},
			[]envelope.Recipient{{KID: kid, Algorithm: envelope.RSAOAEP256, Public: public.(*rsa.PublicKey)}}, envelope.NewAuthKey(), []byte(secret))
		must(t, err)
		d := &desk{dir: t.TempDir(), page: page, env: append(os.Environ(), "PATH="+command+":"+os.Getenv("PATH"), "NODE="+double.URLs()[0])}
		write(t, d.dir, "ca.pem", string(double.CA()))
		write(t, d.dir, "password", nethsmtest.OperatorPassphrase)
		leased := sealInLease(t, []envelope.Recipient{{KID: kid, Algorithm: envelope.RSAOAEP256, Public: public.(*rsa.PublicKey)}}, envelope.NewAuthKey())
		for how, text := range map[string]string{"to the HSM": string(raw), "in a lease": transit.Format(1, leased)} {
			write(t, d.dir, "envelope", text)
			if said := d.must(t, "recover-nethsm"); !strings.Contains(said, "NOT AUTHENTICATED") {
				t.Errorf("sealed %s: it says %q", how, said)
			}
			if got := read(t, d.dir, "secret"); got != secret {
				t.Errorf("sealed %s: recovered %q", how, got)
			}
		}
	})
}

// TestRecoveryOfWhatWasReallyKept opens what a mount has left in its stores, on the wire of seal "transit", and in files.
func TestRecoveryOfWhatWasReallyKept(t *testing.T) {
	page := readPage(t, "recovery.md")
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	site.Write(t, "nitrokey/stores/token", vaulttest.Fields{"type": "object", "device": "hsm"})
	site.Write(t, "nitrokey/stores/disk", vaulttest.Fields{"type": "file", "dir": "envelopes"})
	putMaterial(t, site, "token", "eu", "on-token")
	putMaterial(t, site, "disk", "eu", "on-disk")
	encrypted := site.Write(t, "nitrokey/encrypt/prod", vaulttest.Fields{"plaintext": vaulttest.Base64(secret)})["ciphertext"].(string)

	key := site.Read(t, "nitrokey/keys/prod/backup")["key_record"].(string)
	id := regexp.MustCompile(`ID:\s+([0-9a-f]+)`).FindStringSubmatch(site.Token.Tool(t, "--list-objects", "--type", "privkey"))[1]
	listed := site.Token.Tool(t, "--list-objects", "--type", "data")
	label := regexp.MustCompile(`label:\s+'(.*on-token.*)'`).FindStringSubmatch(listed)
	if label == nil {
		t.Fatalf("the token lists\n%s", listed)
	}
	files, err := filepath.Glob(filepath.Join(site.StateDir, "stores", "envelopes", "*on-disk"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the file store holds %v, %v", files, err)
	}

	open := func(t *testing.T, from, raw string) string {
		t.Helper()
		d := newDesk(t, page, site.Token, "ID="+id, "NAME="+label[1])
		if from == "token" {
			d.must(t, "object")
		} else {
			write(t, d.dir, "envelope", raw)
		}
		fields := strings.Fields(d.must(t, "recipients"))
		leased := strings.HasSuffix(strings.Join(fields, " "), " A256KW")
		if leased != (from == "lease") {
			t.Fatalf("what comes from %s has the recipients %q", from, fields)
		}
		if leased {
			d.must(t, "leased")
			fields = strings.Fields(d.must(t, "recipients"))
		}
		if len(fields) != 2 || !strings.Contains(key, fields[0]) {
			t.Fatalf("the recipients are listed as %q", fields)
		}
		d.env = append(d.env, "KID="+fields[0])
		d.must(t, strings.ToLower(fields[1]))
		d.must(t, "open")
		if leased {
			d.must(t, "a256kw")
			d.must(t, "open")
		}
		return read(t, d.dir, "secret")
	}
	t.Run("from wrap/", func(t *testing.T) {
		if got := open(t, "wrap", wrapped); got != secret {
			t.Errorf("recovered %q", got)
		}
	})
	t.Run("from encrypt/", func(t *testing.T) {
		if got := open(t, "encrypt", encrypted); got != secret {
			t.Errorf("recovered %q", got)
		}
	})
	t.Run("from encrypt/ in a lease", func(t *testing.T) {
		site.Write(t, "nitrokey/keys/prod", vaulttest.Fields{"lease": "10m"})
		vaulttest.Eventually(t, time.Minute, "an envelope that is sealed in a lease", func() error {
			encrypted = site.Write(t, "nitrokey/encrypt/prod", vaulttest.Fields{"plaintext": vaulttest.Base64(secret)})["ciphertext"].(string)
			_, raw, err := transit.Parse(encrypted)
			must(t, err)
			sealed, err := envelope.Parse(raw)
			must(t, err)
			if _, leased := sealed.KEKID(); !leased {
				return errors.New("it is sealed to the HSM")
			}
			return nil
		})
		if got := open(t, "lease", encrypted); got != secret {
			t.Errorf("recovered %q", got)
		}
	})
	for from, file := range map[string]string{"token": "", "disk": files[0]} {
		t.Run("from a store on "+from, func(t *testing.T) {
			raw := ""
			if file != "" {
				raw = read(t, filepath.Dir(file), filepath.Base(file))
			}
			got := open(t, from, raw)
			for _, value := range materialFields {
				if !strings.Contains(got, vaulttest.Base64(value)) {
					t.Errorf("recovered %q, without %q", got, value)
				}
			}
		})
	}
}

// TestRecoveryWithSHA256 needs a module that does OAEP with it, as OpenSC does and SoftHSM does not.
func TestRecoveryWithSHA256(t *testing.T) {
	card := pkcs11test.Card(t)
	card.GenerateKey(t, "rsa:2048", "rsa", "01")
	key := readRecipient(t, &card.Token, "01", envelope.RSAOAEP256)
	raw, err := envelope.Seal(envelope.Context{Use: envelope.UseWrap, Key: "prod", Version: 1}, []envelope.Recipient{key},
		envelope.NewAuthKey(), []byte(secret))
	must(t, err)
	d := newDesk(t, readPage(t, "recovery.md"), &card.Token, "ID=01", "KID="+key.KID)
	write(t, d.dir, "envelope", string(raw))
	d.must(t, "recipients")
	d.must(t, "rsa-oaep-256")
	d.must(t, "open")
	if got := read(t, d.dir, "secret"); got != secret {
		t.Errorf("recovered %q", got)
	}
}

// desk is a folder in which envelopes are opened as docs/recovery.md says.
type desk struct {
	dir  string
	page map[string]string
	env  []string // NAME=VALUE for the page's commands
}

func newDesk(t *testing.T, page map[string]string, token *pkcs11test.Token, env ...string) *desk {
	t.Helper()
	d := &desk{dir: t.TempDir(), page: page, env: append(os.Environ(),
		"PATH=/usr/bin:"+os.Getenv("PATH"), // Debian's own Python
		"MODULE="+token.Module, "PIN="+token.PIN)}
	d.env = append(d.env, env...)
	d.scripts(t)
	return d
}

// scripts writes the page's scripts to the files that it names.
func (d *desk) scripts(t *testing.T) {
	t.Helper()
	for _, name := range []string{"open", "agree", "check"} {
		write(t, d.dir, "nitroseal-"+name+".py", d.page["python "+name])
	}
}

// run runs a block of the page, by the name after its opening fence.
func (d *desk) run(t *testing.T, block string) (out string, err error) {
	t.Helper()
	script, known := d.page["sh "+block]
	if !known {
		t.Fatalf("docs/recovery.md has no block %q", block)
	}
	command := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", script)
	command.Dir, command.Env = d.dir, d.env
	text, err := command.CombinedOutput()
	return string(text), err
}

func (d *desk) must(t *testing.T, block string) string {
	t.Helper()
	out, err := d.run(t, block)
	if err != nil {
		t.Fatalf("%s: %v\n%s", block, err, out)
	}
	return out
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
