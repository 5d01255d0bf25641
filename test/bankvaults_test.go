//go:build cgo

package test

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost/bankvaultstest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestTheWayOutOfBankVaults runs docs/bank-vaults.md for a real Vault whose keys lie on a token as Bank-Vaults leaves them.
func TestTheWayOutOfBankVaults(t *testing.T) {
	command := buildCommand(t)
	for name, test := range map[string]struct {
		format bankvaultstest.Format
		flags  string // that the page says such values need
	}{
		"since 1.33":  {bankvaultstest.OAEP, ""},
		"before 1.33": {bankvaultstest.PKCS1v15, " --accept-pkcs1-v15"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWayOut(t, command, test.format)
			if said := w.must(t, "look"); strings.Count(said, "\nvault-unseal-") != 5 || strings.Count(said, "\nvault-test") != 2 || !strings.Contains(said, "vault-root") {
				t.Errorf("what is there is shown as\n%s", said)
			}
			w.must(t, "key")
			if test.flags != "" {
				said, err := w.run(t, "import")
				if err == nil || !strings.Contains(said, "do not all decrypt") || !strings.Contains(said, "--accept-pkcs1-v15") {
					t.Errorf("the older format, not accepted, gives %v\n%s", err, said)
				}
			}
			for _, block := range []string{"import", "delete"} {
				w.page["sh "+block] = strings.Replace(w.page["sh "+block], "--device stick", "--device stick"+test.flags, 1)
			}
			if said := w.must(t, "import"); !strings.Contains(said, "5 unseal keys") || !strings.Contains(said, "the running Vault takes them") {
				t.Errorf("the import says\n%s", said)
			}
			if said := w.must(t, "import"); !strings.Contains(said, "they were there before") {
				t.Errorf("the second import says\n%s", said)
			}
			w.must(t, "prove")
			w.vault.Seal(t)
			w.must(t, "unseal")
			if status, err := w.vault.Anonymous(t).Sys().SealStatus(); err != nil || status.Sealed {
				t.Fatalf("the node is %+v, %v", status, err)
			}
			w.vault.WaitActive(t)
			w.token.Tool(t, "--delete-object", "--type", "data", "--label", "vault-unseal-3") // a deletion that was cut off
			if said := w.must(t, "delete"); strings.Count(said, "deleted") != 6 || !strings.Contains(said, "The root token was left") {
				t.Errorf("the deletion says\n%s", said)
			}
			if left := w.token.Tool(t, "--list-objects", "--type", "data"); strings.Contains(left, "vault-unseal") || strings.Contains(left, "vault-test") ||
				!strings.Contains(left, "vault-root") || !strings.Contains(left, "prod/unseal") {
				t.Errorf("left on the token:\n%s", left)
			}
			w.must(t, "delete") // once more: nothing but the root token is there
			w.token.Tool(t, "--delete-object", "--type", "data", "--label", "vault-root")
			if said := w.must(t, "import"); !strings.Contains(said, "nothing of Bank-Vaults' is left to import") {
				t.Errorf("with nothing left the import says\n%s", said)
			}
		})
	}
}

// TestTheWayOutFromASecret is the same for values that lie in a Kubernetes Secret, with the root token kept and the old key
// refused.
func TestTheWayOutFromASecret(t *testing.T) {
	w := newWayOut(t, buildCommand(t), bankvaultstest.OAEP)
	w.configure(t, `root_token = "keep"`)
	w.must(t, "key")
	var secret strings.Builder
	secret.WriteString("apiVersion: v1\nkind: Secret\nmetadata: {name: vault-unseal-keys, namespace: default}\ndata:\n")
	for _, name := range slices.Sorted(maps.Keys(w.blocks)) {
		fmt.Fprintf(&secret, "  %s: %s\n", name, vaulttest.Base64(string(w.blocks[name])))
	}
	write(t, w.dir, "secret.yaml", secret.String())
	w.page["sh secret"] = strings.Replace(w.page["sh secret"], "kubectl get secret vault-unseal-keys --output yaml", "cat secret.yaml", 1)
	if said := w.must(t, "secret"); !strings.Contains(said, "the root token are in custody") {
		t.Errorf("the import says\n%s", said)
	}

	w.page["sh legacy"] = "nitroseal key adopt old --device stick --label bank-vaults --accept-weak-key\nnitroseal key backup old --out old.json\n" +
		"nitroseal key configure old --accept-single-hsm\nsed -i 's/= \"prod\"$/= \"old\"/' nitroseal.hcl\n"
	w.must(t, "legacy")
	if said, err := w.run(t, "import"); err == nil || !strings.Contains(said, "the very key that Bank-Vaults used") || !strings.Contains(said, "--accept-legacy-key") {
		t.Errorf("with Bank-Vaults' own key as wrapping key: %v\n%s", err, said)
	}
	w.page["sh accepted"] = "nitroseal import bank-vaults prod --device stick --accept-legacy-key --replace\n"
	if said := w.must(t, "accepted"); !strings.Contains(said, "in custody") {
		t.Errorf("with --accept-legacy-key it says\n%s", said)
	}
}

// TestTheWayOutIsRefusedWhereTheKeysAreNotTheVaults: another Vault answers, and nothing is stored or deleted.
func TestTheWayOutIsRefusedWhereTheKeysAreNotTheVaults(t *testing.T) {
	w := newWayOut(t, buildCommand(t), bankvaultstest.OAEP)
	w.must(t, "key")
	other := vaulttest.Start(t, vaulttest.Options{Bare: true, Storage: vaulttest.InMem})
	initialise(t, other)
	config := read(t, w.dir, "nitroseal.hcl")
	config = strings.ReplaceAll(strings.ReplaceAll(config, w.vault.Address, other.Address), w.vault.CAFile, other.CAFile)
	write(t, w.dir, "nitroseal.hcl", config)
	if said, err := w.run(t, "delete"); err == nil || !strings.Contains(said, "nothing was stored") {
		t.Errorf("it says %v\n%s", err, said)
	}
	w.configure(t, "")
	w.replace(t, "vault-unseal-4", strings.Repeat("5a", 33))
	if said, err := w.run(t, "delete"); err == nil || !strings.Contains(said, "is not the cluster's") || !strings.Contains(said, "from number 2 on") {
		t.Errorf("with one key that is another's it says %v\n%s", err, said)
	}
	if left := w.token.Tool(t, "--list-objects", "--type", "data"); strings.Count(left, "vault-") < 8 || strings.Contains(left, "prod/unseal") {
		t.Errorf("left on the token:\n%s", left)
	}
}

// TestNothingIsDeletedThatTheVaultDidNotTake: a Vault that is sealed proves as many keys as it takes to unseal it, and the others
// wait until it can be asked about them.
func TestNothingIsDeletedThatTheVaultDidNotTake(t *testing.T) {
	w := newWayOut(t, buildCommand(t), bankvaultstest.OAEP)
	w.must(t, "key")
	w.replace(t, "vault-unseal-4", strings.Repeat("5a", 33))
	w.vault.Seal(t)
	said, err := w.run(t, "import")
	if err == nil && !strings.Contains(said, "was not asked about every key") || err != nil && !strings.Contains(said, "is not the cluster's") {
		t.Errorf("while the Vault is sealed it says %v\n%s", err, said)
	}
	w.vault.WaitActive(t)
	if said, err := w.run(t, "delete"); err == nil || !strings.Contains(said, "is not the cluster's") || !strings.Contains(said, "nothing was deleted") {
		t.Errorf("with one key that is another's it says %v\n%s", err, said)
	}
	if left := w.token.Tool(t, "--list-objects", "--type", "data"); strings.Count(left, "vault-unseal-") < 5 {
		t.Errorf("left on the token:\n%s", left)
	}
	w.page["sh without"] = strings.TrimSuffix(w.page["sh delete"], "\n") + " --without vault-unseal-4\n"
	if said := w.must(t, "without"); strings.Count(said, "deleted") != 6 || !strings.Contains(said, "the running Vault takes them") {
		t.Errorf("without it it says\n%s", said)
	}
}

// wayOut is a Vault in the custody of Bank-Vaults, and the page that tells how it gets out.
type wayOut struct {
	*desk
	vault  *vaulttest.Server
	token  *pkcs11test.Token
	public *rsa.PublicKey
	blocks map[string][]byte // what Bank-Vaults wrote, by its name
}

func newWayOut(t *testing.T, command string, format bankvaultstest.Format) *wayOut {
	t.Helper()
	w := &wayOut{vault: vaulttest.Start(t, vaulttest.Options{Bare: true, Storage: vaulttest.InMem}), token: pkcs11test.SoftHSM(t)}
	values := initialise(t, w.vault)
	session := bankvaultstest.Open(t, w.token.Module, w.token.Serial, w.token.PIN)
	w.public = session.GenerateKey(t, bankvaultstest.KeyLabel)
	w.blocks = map[string][]byte{}
	for name, value := range values {
		w.blocks[name] = session.Encrypt(t, format, value)
		session.Put(t, name, w.blocks[name], bankvaultstest.LikeOpenSC(name)...)
	}
	session.Put(t, "vault-test", session.Encrypt(t, format, "vault-test"))
	session.Close(t)

	w.desk = &desk{dir: t.TempDir(), page: readPage(t, "bank-vaults.md")}
	w.env = append(os.Environ(), "PATH="+filepath.Dir(command)+":"+os.Getenv("PATH"), "NITROSEAL_CONFIG="+filepath.Join(w.dir, "nitroseal.hcl"))
	must(t, os.Mkdir(filepath.Join(w.dir, "state"), 0o700))
	write(t, w.dir, "stick.pin", w.token.PIN)
	w.configure(t, "")
	return w
}

// replace puts a value of somebody else's in place of what Bank-Vaults wrote. Its public key is public.
func (w *wayOut) replace(t *testing.T, name, value string) {
	t.Helper()
	w.token.Tool(t, "--delete-object", "--type", "data", "--label", name)
	block, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, w.public, []byte(value), nil)
	must(t, err)
	w.token.WriteForeignObject(t, name, block)
}

// configure writes the page's configuration, with more in the cluster's block, for this Vault and this token.
func (w *wayOut) configure(t *testing.T, more string) {
	t.Helper()
	write(t, w.dir, "nitroseal.hcl", strings.NewReplacer(
		"/var/lib/nitroseal", "state", `["/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"]`, fmt.Sprintf("[%q]\n  env = [\"SOFTHSM2_CONF\"]", w.token.Module),
		"DENK0100001", w.token.Serial, "https://vault-0.vault-internal:8200", w.vault.Address, "vault-ca.pem", w.vault.CAFile,
		"  threshold    = 3\n", "  threshold    = 3\n  "+more+"\n",
	).Replace(w.page["hcl"]))
}

// initialise makes a Vault of five keys and returns what Bank-Vaults keeps of it, in the clear.
func initialise(t *testing.T, vault *vaulttest.Server) map[string]string {
	t.Helper()
	client := vault.Anonymous(t)
	made, err := client.Sys().Init(&api.InitRequest{SecretShares: 5, SecretThreshold: 3})
	must(t, err)
	values := map[string]string{"vault-root": made.RootToken, "vault-test": "vault-test"}
	for i, key := range made.Keys {
		values[fmt.Sprintf("vault-unseal-%d", i)] = key
		if i < 3 {
			_, err := client.Sys().Unseal(key)
			must(t, err)
		}
	}
	vault.RootToken = made.RootToken
	vault.WaitActive(t)
	return values
}
