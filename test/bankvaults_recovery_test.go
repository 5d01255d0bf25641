//go:build cgo

package test

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost/bankvaultstest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestTheWayOutOfBankVaultsWithRecoveryKeys: of a Vault that unseals itself Bank-Vaults kept vault-recovery-N. They are taken
// over as recovery keys, proved at the running Vault, and what was left is deleted.
func TestTheWayOutOfBankVaultsWithRecoveryKeys(t *testing.T) {
	authority := vaulttest.NewAuthority(t)
	vault := vaulttest.Start(t, vaulttest.Options{Bare: true, Storage: vaulttest.InMem, Authority: authority, Seals: []vaulttest.Seal{vaulttest.StartTransit(t)}})
	made, err := vault.Anonymous(t).Sys().Init(&api.InitRequest{RecoveryShares: 3, RecoveryThreshold: 2})
	must(t, err)
	vault.RootToken = made.RootToken
	vault.WaitActive(t)

	token := pkcs11test.SoftHSM(t)
	session := bankvaultstest.Open(t, token.Module, token.Serial, token.PIN)
	session.GenerateKey(t, bankvaultstest.KeyLabel)
	for i, key := range made.RecoveryKeys {
		name := fmt.Sprintf("vault-recovery-%d", i)
		session.Put(t, name, session.Encrypt(t, bankvaultstest.OAEP, key), bankvaultstest.LikeOpenSC(name)...)
	}
	session.Put(t, "vault-test", session.Encrypt(t, bankvaultstest.OAEP, "vault-test"))
	session.Close(t)

	h := vaulttest.NewHost(t)
	h.WithToken(t, token)
	must(t, os.Mkdir(h.File("store"), 0o700))
	h.Set(t, `store "disk"`, "type = \"file\"\n dir = %q", h.File("store"))
	h.WithCluster(t, authority.PEM, []string{vault.Address}, "disk", "")
	h.WithKey(t)
	if said := h.Must(t, "import", "bank-vaults", "eu", "--device", "hsm"); !strings.Contains(said, "3 recovery keys") {
		t.Errorf("the import says\n%s", said)
	}
	if kept := sharesIn(t, h.Must(t, "material", "open", "eu", "recovery", "--reveal-keys", "-o", "json")); len(kept) != 3 {
		t.Errorf("%d recovery keys are in custody", len(kept))
	}
	h.Must(t, "verify", "eu", "--prove")
	client := vault.ClientWithToken(t, rootToken(t, h)) // made with them
	must(t, client.Auth().Token().RevokeSelf(""))
	h.Must(t, "import", "bank-vaults", "eu", "--device", "hsm", "--delete-old")
	if left := token.Tool(t, "--list-objects", "--type", "data"); strings.Contains(left, "vault-recovery") {
		t.Errorf("left on the token:\n%s", left)
	}
}
