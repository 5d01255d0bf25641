package bench

import (
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

const (
	sealRounds  = 9
	sealLasting = time.Second // of each crowd in a round
	manySeals   = 64
)

// BenchmarkSeals measures only what a seal server does. Run it with -benchtime 1x.
func BenchmarkSeals(b *testing.B) {
	for b.Loop() {
		site := vaulttest.StartSite(b, vaulttest.SiteOptions{})
		vaultTransit(b, site.Server)
		one := vaultTransit(b, site.Server)
		for range 5 {
			for _, n := range []int{1, 8, 64} {
				rate, times := one.crowd(b, n, sealLasting)
				progress("%d clients: %.0f/s p50 %v p99 %v", n, rate, percentile(times, 50), percentile(times, 99))
			}
		}
	}
}

// vaultTransit is the decryption by Vault's own transit engine of what a seal encrypts, with a token that may do what
// a seal needs and no more.
func vaultTransit(b *testing.B, server *vaulttest.Server) *load {
	root := server.Client(b)
	if mounts, err := root.Sys().ListMounts(); err != nil || mounts["transit/"] == nil {
		must(b, root.Sys().Mount("transit", &api.MountInput{Type: "transit"}))
	}
	_, err := root.Logical().WriteWithContext(b.Context(), "transit/keys/seal", nil)
	must(b, err)
	must(b, root.Sys().PutPolicy("seal", `
		path "transit/encrypt/seal" { capabilities = ["update"] }
		path "transit/decrypt/seal" { capabilities = ["update"] }`))
	token, err := root.Auth().Token().CreateOrphan(&api.TokenCreateRequest{Policies: []string{"seal"}, Period: "24h"})
	must(b, err)
	plaintext := vaulttest.Base64(sealed)
	encrypted, err := root.Logical().WriteWithContext(b.Context(), "transit/encrypt/seal", vaulttest.Fields{"plaintext": plaintext})
	must(b, err)
	return newLoad(b, "Vault's transit", target{server.Address, server.CAFile, token.Auth.ClientToken}, "transit/decrypt/seal",
		vaulttest.Fields{"ciphertext": encrypted.Data["ciphertext"]}, plaintext, manySeals)
}

// sealed is as long as what a seal gives away at each unseal: the root key, in JSON.
const sealed = `["QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="]`
