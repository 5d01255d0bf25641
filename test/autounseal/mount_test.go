package autounseal

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// mount is a Vault with the plugin at nitrokey/. Somebody unseals it when it comes up.
type mount struct {
	site *vaulttest.Site
	hsm  *HSM
}

func newMount(t testing.TB, hsm *HSM) *mount {
	t.Helper()
	options := vaulttest.SiteOptions{NoToken: hsm.Token == nil}
	if hsm.Token != nil {
		options.Token = &hsm.Token.Token
	}
	m := &mount{site: vaulttest.StartSite(t, options), hsm: hsm}
	m.addDevice(t)
	return m
}

func (m *mount) addDevice(t testing.TB) {
	t.Helper()
	if m.hsm.Token != nil {
		m.site.AddDevice(t, "hsm")
		return
	}
	netHSM := m.hsm.NetHSM
	m.site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{
		"type": "nethsm", "urls": strings.Join(netHSM.URLs(), ","), "ca_cert": string(netHSM.CA()), "request_timeout": "5s",
		"username": nethsmtest.OperatorUser, "password": nethsmtest.OperatorPassphrase,
		"admin_username": nethsmtest.AdminUser, "admin_password": nethsmtest.AdminPassphrase,
	})
}

// AddKey implements [SealServer].
func (m *mount) AddKey(t testing.TB, key string) {
	t.Helper()
	m.site.AddKey(t, key, "hsm", "rsa-2048")
}

// sealPolicy is what a seal needs: two paths, and of them update alone.
const sealPolicy = `
path "nitrokey/encrypt/%[1]s" { capabilities = ["update"] }
path "nitrokey/decrypt/%[1]s" { capabilities = ["update"] }
`

// Seal implements [SealServer].
func (m *mount) Seal(t testing.TB, key string) vaulttest.Seal {
	t.Helper()
	return m.seal(t, key, &api.TokenCreateRequest{Period: "24h"})
}

// seal is a stanza with a token that the request describes, of the policy alone, and of the default one unless the request
// says otherwise: that lets a token renew itself.
func (m *mount) seal(t testing.TB, key string, request *api.TokenCreateRequest) vaulttest.Seal {
	t.Helper()
	client, policy := m.site.Client(t), "autounseal-"+key
	must(t, client.Sys().PutPolicyWithContext(t.Context(), policy, fmt.Sprintf(sealPolicy, key)))
	request.Policies = []string{policy}
	token, err := client.Auth().Token().CreateOrphanWithContext(t.Context(), request)
	must(t, err)
	return vaulttest.Seal{
		Address: m.site.Address, CAFile: m.site.CAFile, Mount: "nitrokey/", Key: key, Token: token.Auth.ClientToken,
	}
}

// Rotate implements [SealServer].
func (m *mount) Rotate(t testing.TB, key string) {
	t.Helper()
	before := m.site.Read(t, "nitrokey/keys/"+key)
	var version int
	_, err := fmt.Sscan(fmt.Sprint(before["latest_version"]), &version)
	must(t, err)
	m.site.Write(t, "nitrokey/keys/"+key+"/rotate", vaulttest.Fields{"generate": true, "request_id": fmt.Sprintf("rotation-%d", version)})
	m.site.WaitKey(t, key, version+1)
	m.site.Read(t, "nitrokey/keys/"+key+"/backup")
	m.site.Write(t, "nitrokey/keys/"+key, vaulttest.Fields{"accept_single_hsm": true})
}

// Lease implements [SealServer].
func (m *mount) Lease(t testing.TB, key, lease string) {
	t.Helper()
	m.site.Write(t, "nitrokey/keys/"+key, vaulttest.Fields{"lease": lease})
	m.site.Read(t, "nitrokey/keys/"+key+"/backup")
}

// Minimum implements [SealServer].
func (m *mount) Minimum(t testing.TB, key string, version int) {
	t.Helper()
	m.site.Write(t, "nitrokey/keys/"+key, vaulttest.Fields{"min_decryption_version": version})
}

// Lose implements [SealServer].
func (m *mount) Lose(t testing.TB, keys ...string) {
	t.Helper()
	records := map[string]vaulttest.Fields{}
	for _, key := range keys {
		records[key] = m.site.Read(t, "nitrokey/keys/"+key+"/backup")
	}
	must(t, m.site.Client(t).Sys().UnmountWithContext(t.Context(), "nitrokey"))
	m.site.Enable(t, "nitrokey", "")
	m.addDevice(t)
	for key, record := range records {
		m.site.Write(t, "nitrokey/keys/"+key+"/restore", record)
		m.site.Read(t, "nitrokey/keys/"+key+"/backup")
		m.site.Write(t, "nitrokey/keys/"+key, vaulttest.Fields{"accept_single_hsm": true})
	}
}

// Kill implements [SealServer].
func (m *mount) Kill(t testing.TB) {
	t.Helper()
	m.site.Kill(t)
}

// Start implements [SealServer].
func (m *mount) Start(t testing.TB) {
	t.Helper()
	m.site.Resume(t)
}

// HSM implements [SealServer].
func (m *mount) HSM() *HSM { return m.hsm }
