package autounseal

import (
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// SealServer unseals the Vaults of the stories.
type SealServer interface {
	// AddKey makes a wrapping key with an HSM key of its own, fit to unseal a cluster: its record is read, its single HSM
	// accepted.
	AddKey(t testing.TB, key string)
	// Seal is the stanza of a cluster that is unsealed with the key, with a new token that may do nothing else.
	Seal(t testing.TB, key string) vaulttest.Seal
	// Rotate makes the next version of the key with a new HSM key. It seals from then on.
	Rotate(t testing.TB, key string)
	// Lease makes the key have a lease, "0" for none.
	Lease(t testing.TB, key, lease string)
	// Minimum makes versions of the key that are older not open any more.
	Minimum(t testing.TB, key string, version int)
	// Lose takes everything from the server but its HSM and the tokens, and brings the keys back from their key records,
	// which were kept elsewhere. Others are gone.
	Lose(t testing.TB, keys ...string)
	// Kill ends the server as a power cut would. Start starts it again where it was, and waits until it serves.
	Kill(t testing.TB)
	Start(t testing.TB)
	// HSM is where its keys are.
	HSM() *HSM
}

// HSM is a token that can be pulled out, or a NetHSM that can be switched off. One of the two is not nil.
type HSM struct {
	Token  *pkcs11test.Plug
	NetHSM *nethsmtest.HSM
}

// Away takes the HSM away from everybody.
func (h *HSM) Away(t testing.TB) {
	t.Helper()
	if h.Token != nil {
		h.Token.Unplug(t)
		return
	}
	for _, node := range h.NetHSM.Nodes() {
		node.Stop()
	}
}

// Back gives it back.
func (h *HSM) Back(t testing.TB) {
	t.Helper()
	if h.Token != nil {
		h.Token.Replug(t)
		return
	}
	for _, node := range h.NetHSM.Nodes() {
		must(t, node.Start())
	}
}

// newSoftHSM plugs a new token in.
func newSoftHSM(t testing.TB) *HSM {
	t.Helper()
	return &HSM{Token: pkcs11test.Unpluggable(t)}
}

// newNetHSM switches a NetHSM of two nodes on, which unlocks itself and has the users of package nethsmtest.
func newNetHSM(t testing.TB) *HSM {
	t.Helper()
	return &HSM{NetHSM: nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true, UnattendedBoot: true})}
}
