package autounseal

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// mountTales are told of the mount alone.
var mountTales = []tale{
	{"the mount, its policy, its key record, its HSM", func(t testing.TB) func(*testing.T) {
		t.Helper()
		m := newMount(t, newSoftHSM(t))
		return func(t *testing.T) { mountAsASeal(t, m) }
	}},
	{"the mount with a lease", func(t testing.TB) func(*testing.T) {
		t.Helper()
		m := newMount(t, newNetHSM(t))
		return func(t *testing.T) { mountWithALease(t, m) }
	}},
	{"the mount's Vault is killed", func(t testing.TB) func(*testing.T) {
		t.Helper()
		m := newMount(t, &HSM{NetHSM: nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})}) // one node, to hold all
		return func(t *testing.T) { mountIsKilled(t, m) }
	}},
}

func mountAsASeal(t *testing.T, m *mount) {
	t.Run("a token that may do nothing but what the policy says, not even renew itself, is enough", func(t *testing.T) {
		m.AddKey(t, "minimal")
		seal := m.seal(t, "minimal", &api.TokenCreateRequest{Period: "24h", NoDefaultPolicy: true})
		vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
		vault.Restart(t)
		must(t, vault.SealHealthy(t))
	})
	t.Run("a Vault starts while the HSM is away, and is unsealed when that is back", func(t *testing.T) {
		m.AddKey(t, "away")
		seal := m.Seal(t, "away")
		vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
		remember(t, vault, "secret", "kept")
		m.hsm.Away(t)
		vault.Stop(t)
		vault.Up(t) // it exits where it cannot seal
		ciphertext := encrypts(t, seal, "x")
		got := call(t, seal, http.MethodPut, path(seal, "decrypt"), vaulttest.Fields{"ciphertext": ciphertext})
		if got.Code != http.StatusServiceUnavailable || len(got.Errors) == 0 {
			t.Errorf("decrypt without an HSM: %d %s", got.Code, got.Raw)
		}
		if status, err := vault.Anonymous(t).Sys().SealStatus(); err != nil || !status.Sealed {
			t.Errorf("without an HSM it is %+v, %v", status, err)
		}
		m.hsm.Back(t)
		vault.WaitActive(t)
		recalls(t, vault, "secret", "kept")
	})
	t.Run("a version seals when its key record was read, and not before", func(t *testing.T) {
		m.AddKey(t, "unread")
		seal := m.Seal(t, "unread")
		vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
		m.site.Write(t, "nitrokey/keys/unread/rotate", vaulttest.Fields{"generate": true})
		m.site.WaitKey(t, "unread", 2)
		for _, version := range []string{"vault:v1:", "vault:v2:"} {
			if got := encrypts(t, seal, "x"); !strings.HasPrefix(got, version) {
				t.Errorf("encrypt seals with %.9s, want %s", got, version)
			}
			vault.Restart(t)
			m.site.Read(t, "nitrokey/keys/unread/backup")
			m.site.Write(t, "nitrokey/keys/unread", vaulttest.Fields{"accept_single_hsm": true})
		}
	})
}

// mountWithALease: Vault seals its root key anew where the version of the wrapping key has changed, and not where its lease has. So a lease serves
// the Vaults that are initialised, or follow a rotation, after it was set.
func mountWithALease(t *testing.T, m *mount) {
	const key = "leased"
	m.AddKey(t, key)
	seal := m.Seal(t, key)
	before := m.hsm.NetHSM.DecryptCount()
	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
	remember(t, vault, "secret", "kept")
	// A Vault is active, and calls its seal healthy, a moment before it looks at it for the first time.
	costs := func(t *testing.T, before, want int) {
		t.Helper()
		vaulttest.Eventually(t, vaulttest.Patience, "the look at the seal", func() error {
			if cost := m.hsm.NetHSM.DecryptCount() - before; cost < want {
				return fmt.Errorf("the start has cost %d operations as yet, want %d", cost, want)
			}
			return vault.SealHealthy(t)
		})
		if cost := m.hsm.NetHSM.DecryptCount() - before; cost != want {
			t.Errorf("the start cost %d operations, want %d", cost, want)
		}
	}
	restartCosts := func(t *testing.T, want int) {
		t.Helper()
		before := m.hsm.NetHSM.DecryptCount()
		vault.Restart(t)
		recalls(t, vault, "secret", "kept")
		costs(t, before, want)
	}
	costs(t, before, 3) // a trial of the new seal, the root key, and the look at the seal
	restartCosts(t, 2)  // the root key, and the look at the seal

	m.Lease(t, key, "10m")
	sealsLeased(t, seal, true)
	restartCosts(t, 1) // the root key, which is sealed strictly as yet
	m.Rotate(t, key)
	sealsLeased(t, seal, true)
	restartCosts(t, 3) // the root key, and once more with the recovery key, to seal both anew
	restartCosts(t, 0)

	t.Run("the HSM is away, and the lease is open", func(t *testing.T) {
		m.hsm.Away(t)
		restartCosts(t, 0)
	})
	t.Run("the plugin is reloaded, and the lease has ended", func(t *testing.T) {
		_, err := m.site.Client(t).Sys().ReloadPluginWithContext(t.Context(), &api.ReloadPluginInput{Plugin: vaulttest.Name})
		must(t, err)
		vault.Stop(t)
		vault.Up(t)
		got := call(t, seal, http.MethodPut, path(seal, "decrypt"), vaulttest.Fields{"ciphertext": encrypts(t, seal, "x")})
		if got.Code != http.StatusServiceUnavailable {
			t.Errorf("decrypt: %d %s", got.Code, got.Raw)
		}
		if status, err := vault.Anonymous(t).Sys().SealStatus(); err != nil || !status.Sealed {
			t.Errorf("it is %+v, %v", status, err)
		}
		m.hsm.Back(t)
		vault.WaitActive(t)
		recalls(t, vault, "secret", "kept")
	})
}
