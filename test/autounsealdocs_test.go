package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestAutoUnsealByTheMountDoesWhatItsPageSays walks from Shamir to the plugin's mount, to another transit and back to Shamir, by
// the commands of docs/auto-unseal.md.
func TestAutoUnsealByTheMountDoesWhatItsPageSays(t *testing.T) {
	h := newHouse(t)
	site, _ := newSite(t, vaulttest.SiteOptions{})
	site.AddKey(t, "old", "hsm", "rsa-2048") // of the other transit
	write(t, h.dir, "vault.d/seal-ca.pem", readFile(t, filepath.Dir(site.CAFile), filepath.Base(site.CAFile)))
	h.change("https://seal-vault.example.org:8200", site.Address, "https://old.example.org:8200", site.Address)

	own := h.env
	h.env = append(h.env, "VAULT_ADDR="+site.Address, "VAULT_CACERT="+site.CAFile, "VAULT_TOKEN="+site.RootToken)
	h.must(t, "mount")
	must(t, os.Rename(h.file("seal.token"), h.file("vault.d/seal.token")))
	h.env = own

	h.stanzas(t)
	h.shell(t, "systemctl start vault\nvault operator init -format=json > keys || true\n")
	h.keys(t, "keys")
	h.shell(t, "for key in $KEY_1 $KEY_2 $KEY_3; do vault operator unseal $key; done\n")
	h.fill(t)

	h.stanzas(t, "seal-mount")
	if said := h.must(t, "from-shamir"); !strings.Contains(said, "transit") {
		t.Errorf("vault status says\n%s", said)
	}
	h.holds(t)
	h.must(t, "rehearse-power")
	h.holds(t)

	h.must(t, "new-root-key")
	if !strings.Contains(read(t, h.dir, "vault.log"), "security barrier rekeyed: stored=1") {
		t.Error("there is no new root key")
	}
	h.must(t, "rehearse-power")
	h.holds(t)

	// The same mount with another key is another transit. Then it is "old", and out.
	h.page["hcl seal-both"] = strings.NewReplacer("transit/", "nitrokey/", "old.token", "seal.token", "https://"+h.seal, site.Address,
		`key_name    = "old"`, `key_name    = "prod"`, `key_name    = "prod"`, `key_name    = "old"`).Replace(h.page["hcl seal-both"])
	must(t, site.Client(t).Sys().PutPolicy("unsealer-prod", `path "nitrokey/+/+" { capabilities = ["update"] }`))
	site.Read(t, "nitrokey/keys/old/backup")
	site.Write(t, "nitrokey/keys/old", vaulttest.Fields{"accept_single_hsm": true})
	h.stanzas(t, "seal-both")
	h.must(t, "from-transit")
	h.holds(t)

	write(t, h.dir, "disabled", strings.ReplaceAll(h.page["hcl seal-mount"], `"prod"`, `"old"`))
	h.page["hcl disabled"] = strings.Replace(read(t, h.dir, "disabled"), "\n}", "\n  disabled = \"true\"\n}", 1)
	h.stanzas(t, "disabled")
	if said := h.must(t, "to-shamir"); !strings.Contains(said, "shamir") {
		t.Errorf("vault status says\n%s", said)
	}
	h.holds(t)
}
