package test

import (
	"encoding/base64"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// newOperator is a machine with a token, a wrapping key and a folder as the store "disk", for one Vault that nobody has
// initialised, behind a front that counts shares. more is more of the cluster's block, files lie beside the configuration.
func newOperator(t *testing.T, options vaulttest.Options, more string, files map[string]string) (*vaulttest.Host, *vaulttest.Server, *front) {
	t.Helper()
	options.Bare, options.Authority = true, vaulttest.NewAuthority(t)
	vault := vaulttest.Start(t, options)
	f := newFront(t, vault, options.Authority)
	h := vaulttest.NewHost(t)
	h.WithToken(t, pkcs11test.SoftHSM(t))
	for name, content := range files {
		h.Put(t, name, []byte(content))
	}
	must(t, os.Mkdir(h.File("store"), 0o700))
	h.Set(t, `store "disk"`, "type = \"file\"\n dir = %q", h.File("store"))
	h.WithCluster(t, options.Authority.PEM, []string{f.URL}, "disk", more)
	h.WithKey(t)
	return h, vault, f
}

// A Vault that unseals itself has recovery keys in place of unseal keys. They are kept the same way, and nobody sends them to
// unseal it.
func TestCustodyOfAVaultThatUnsealsItself(t *testing.T) {
	h, vault, f := newOperator(t, vaulttest.Options{Seals: []vaulttest.Seal{vaulttest.StartTransit(t)}}, "recovery_shares = 4\n recovery_threshold = 2", nil)
	h.Must(t, "init", "eu")
	vault.WaitUnsealed(t, unsealLimit)
	kept := func() [][]byte {
		t.Helper()
		return sharesIn(t, h.Must(t, "material", "open", "eu", "recovery", "--reveal-keys", "-o", "json"))
	}
	old := kept()
	if len(old) != 4 {
		t.Fatalf("%d recovery keys are in custody", len(old))
	}
	works := func() { // and no other token lives than the one that is made
		t.Helper()
		client := vault.ClientWithToken(t, rootToken(t, h))
		listed, err := client.Logical().List("auth/token/accessors")
		must(t, err)
		if live := listed.Data["keys"].([]any); len(live) != 1 {
			t.Errorf("%d tokens live, want the one that asks", len(live))
		}
		must(t, client.Auth().Token().RevokeSelf(""))
	}
	works()
	h.Must(t, "verify", "eu", "--prove")
	h.Must(t, "drill", "eu")

	h.Must(t, "rekey", "eu", "--shares", "5", "--threshold", "3")
	now := kept()
	for _, share := range now {
		if slices.ContainsFunc(old, func(o []byte) bool { return slices.Equal(o, share) }) {
			t.Error("a recovery key is one of those before")
		}
	}
	works()
	h.Put(t, "old", []byte(lines(old)))
	if got := h.Try(t, "import", "eu", "--file", h.File("old"), "--recovery", "--replace"); got.Code == vaulttest.ExitOK {
		t.Errorf("the keys before the rekey are imported over those that Vault takes: %s%s", got.Stdout, got.Stderr)
	}
	h.Put(t, "now", []byte(lines(now)))
	h.Must(t, "import", "eu", "--file", h.File("now"), "--recovery", "--replace")
	works()

	_, sent := f.seen()
	vault.Restarted(t)
	h.Must(t, "unseal", "-once", "eu")
	vault.WaitUnsealed(t, unsealLimit)
	if _, after := f.seen(); after != sent {
		t.Errorf("%d shares were sent to unseal a Vault that does it by itself", after-sent)
	}
	h.Must(t, "status")
}

// lines are shares as people note them down, one a line.
func lines(shares [][]byte) string {
	var text strings.Builder
	for _, share := range shares {
		text.WriteString(hex.EncodeToString(share) + "\n")
	}
	return text.String()
}

// Two people take a share each and a third one the root token, as Vault encrypts them: they are of use, and nothing of ours has
// seen them.
func TestPeopleTakeSharesAndTheRootTokenOfAVault(t *testing.T) {
	alice, bob, officer := newPGPPerson(t, "alice"), newPGPPerson(t, "bob"), newPGPPerson(t, "officer")
	h, vault, _ := newOperator(t, vaulttest.Options{},
		"root_token = \"pgp\"\n root_pgp_key_file = \"officer.asc\"\n person \"alice\" {\n pgp_key_file = \"alice.asc\"\n }\n person \"bob\" {\n pgp_key_file = \"bob.asc\"\n }",
		map[string]string{"alice.asc": alice.public, "bob.asc": bob.public, "officer.asc": officer.public})
	letters := h.File("letters")
	h.Must(t, "init", "eu", "--shares-dir", letters)
	hers := alice.read(t, read(t, letters, "eu-alice.asc"))
	his := bob.read(t, read(t, letters, "eu-bob.asc"))
	token := officer.read(t, read(t, letters, "eu-root-token.asc"))
	vault.WaitActive(t)
	if _, err := vault.ClientWithToken(t, token).Sys().ListMounts(); err != nil {
		t.Errorf("the officer's root token is of no use: %v", err)
	}

	held := map[string]string{} // by field
	opened := h.Must(t, "material", "open", "eu", "unseal", "--reveal-keys", "-o", "json")
	for name, value := range vaulttest.Decode[struct {
		Fields map[string]string `json:"fields"`
	}](t, opened).Fields {
		if name != "facts" && !strings.HasSuffix(name, ".pgp") {
			held[name] = value
		}
	}
	if len(held) != 3 {
		t.Fatalf("%d shares are in custody, want the three that no person has", len(held))
	}
	vault.Restarted(t)
	for _, share := range held {
		unsealBy(t, vault, hers, his, share)
		break
	}
	vault.Restarted(t)
	h.Must(t, "unseal", "-once", "eu") // the HSM's three do alone
	vault.WaitUnsealed(t, unsealLimit)

	// The letters are given out again, and what the HSM holds only to somebody by OpenPGP.
	h.Must(t, "export", "eu", "--pgp-key", h.File("officer.asc"), "--each", "--out", h.File("exported"))
	files, err := filepath.Glob(h.File("exported/*"))
	must(t, err)
	var out []string
	for _, file := range files {
		message := read(t, filepath.Dir(file), filepath.Base(file))
		switch {
		case strings.Contains(file, "alice"):
			if alice.read(t, message) != hers {
				t.Error("Alice gets another share than before")
			}
		case strings.Contains(file, "bob"):
			if bob.read(t, message) != his {
				t.Error("Bob gets another share than before")
			}
		default:
			out = append(out, officer.read(t, message))
		}
	}
	if len(files) != 5 || len(out) != 3 {
		t.Fatalf("exported are %q", files)
	}
	vault.Restarted(t)
	unsealBy(t, vault, out...)

	nobodyHas(t, []string{h.Dir}, hers, his, token)
}

// unsealBy gives Vault shares, as people would.
func unsealBy(t *testing.T, vault *vaulttest.Server, shares ...string) {
	t.Helper()
	var status *api.SealStatusResponse
	for _, share := range shares {
		var err error
		status, err = vault.Anonymous(t).Sys().Unseal(share)
		must(t, err)
	}
	if status.Sealed {
		t.Errorf("%d shares leave it at %d of %d", len(shares), status.Progress, status.T)
	}
}

// nobodyHas searches folders for secrets, in all spellings.
func nobodyHas(t *testing.T, folders []string, secrets ...string) {
	t.Helper()
	var never []string
	for _, secret := range secrets {
		never = append(never, secret, base64.StdEncoding.EncodeToString([]byte(secret)))
		if raw, err := hex.DecodeString(secret); err == nil {
			never = append(never, string(raw), base64.StdEncoding.EncodeToString(raw))
		}
	}
	searched := 0
	for _, folder := range folders {
		must(t, filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(path)
			searched += len(content)
			for _, secret := range never {
				if strings.Contains(string(content), secret) {
					t.Errorf("%s holds what only a person may read", path)
				}
			}
			return err
		}))
	}
	if searched < 10_000 {
		t.Errorf("only %d bytes were searched", searched)
	}
}
