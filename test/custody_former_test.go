package test

import (
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// A raft node that answers nobody while its cluster gets new keys reads from its own disk, after its restart, that the old ones
// unseal it. They are kept for that, and once it is unsealed it learns of the new ones.
func TestANodeThatMissedARekeyIsUnsealedWithTheKeysFromBefore(t *testing.T) {
	vaults := vaulttest.StartCluster(t, 3, false)
	h := vaulttest.NewHost(t)
	h.WithToken(t, pkcs11test.SoftHSM(t))
	h.WithEtcd(t, etcdtest.Start(t, 1))
	h.WithCluster(t, vaults.PEM, vaults.Addresses(), "etcd", "timeout = \"2s\"")
	h.WithKey(t)
	h.Must(t, "init", "eu")
	vaults.WaitUnsealed(t, unsealLimit)

	follower := vaults.Servers[2]
	follower.Freeze(t)
	h.Must(t, "rekey", "eu", "--shares", "4", "--threshold", "2")
	follower.Restarted(t)
	status, err := follower.Anonymous(t).Sys().SealStatus()
	must(t, err)
	if !status.Sealed || status.N != 5 || status.T != 3 {
		t.Fatalf("the node that missed the rekey wants %d of %d (sealed: %t)", status.T, status.N, status.Sealed)
	}
	answer := h.Try(t, "unseal", "eu")
	if !strings.Contains(answer.Stderr, "from before the last rekey") {
		t.Errorf("nothing says why: %+v", answer)
	}
	follower.WaitUnsealed(t, unsealLimit)

	vaults.Kill(t)
	vaults.Up(t)
	h.Must(t, "unseal", "eu")
	vaults.WaitUnsealed(t, unsealLimit)
	if shown := h.Must(t, "status", "eu"); !strings.Contains(shown, "former") {
		t.Errorf("the status does not show the keys from before:\n%s", shown)
	}
	h.Refused(t, 2, []string{"--reveal-keys"}, "material", "open", "eu", "former")
}
