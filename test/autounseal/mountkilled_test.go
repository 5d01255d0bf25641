package autounseal

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// mountIsKilled ends the Vault of the mount while it works for the sealed one. The NetHSM holds an operation, so that the test
// knows where.
func mountIsKilled(t *testing.T, m *mount) {
	t.Helper()
	const key = "killed"
	m.AddKey(t, key)
	node := m.hsm.NetHSM.Node(0)
	gate := vaulttest.NewGate(t, m.site.Address)
	direct := m.Seal(t, key)
	seal := direct
	seal.Address = gate.Address
	vault := vaulttest.Start(t, vaulttest.Options{Bare: true, Seals: []vaulttest.Seal{seal}})

	// holds makes the NetHSM hold the operation that follows so many others.
	holds := func(others int) {
		t.Helper()
		operation := nethsmtest.Fault{Method: http.MethodPost, Path: "/keys/"}
		if others > 0 {
			passes := operation
			passes.Times, passes.Latency = others, 1 // strikes, and does no harm
			node.Inject(passes)
		}
		operation.Hang = true
		node.Inject(operation)
	}
	held := func() {
		t.Helper()
		vaulttest.Eventually(t, vaulttest.Patience, "the operation", func() error {
			if node.Held() == 0 {
				return errors.New("the NetHSM holds nothing")
			}
			return nil
		})
	}
	// killed replaces the server. Who is before the gate waits meanwhile.
	killed := func() {
		t.Helper()
		gate.Hold()
		m.Kill(t)
		node.ClearFaults()
		m.Start(t)
		gate.Open()
	}

	type result struct {
		answer *api.InitResponse
		err    error
	}
	t.Run("during init", func(t *testing.T) {
		holds(0)
		initialised := make(chan result, 1)
		client := vault.Anonymous(t)
		go func() { // ends with its answer, which is waited for below
			answer, err := client.Sys().Init(&api.InitRequest{RecoveryShares: 1, RecoveryThreshold: 1})
			initialised <- result{answer, err}
		}()
		held()
		killed()
		done := <-initialised
		must(t, done.err)
		vault.RootToken, vault.RecoveryKey = done.answer.RootToken, done.answer.RecoveryKeysB64[0]
		vault.WaitActive(t)
		remember(t, vault, "secret", "kept")
	})
	t.Run("during an unsealing", func(t *testing.T) {
		vault.Kill(t)
		holds(0)
		vault.Launch(t)
		held()
		killed()
		vault.WaitActive(t)
		recalls(t, vault, "secret", "kept")
	})
	t.Run("during a rotation, when the HSM makes the key", func(t *testing.T) {
		holds(0)
		m.site.Write(t, "nitrokey/keys/"+key+"/rotate", vaulttest.Fields{"generate": true})
		held()
		killed()
		m.site.WaitKey(t, key, 2) // goes on by itself
		if got := encrypts(t, direct, "x"); !strings.HasPrefix(got, "vault:v1:") {
			t.Errorf("encrypt seals with %.9s, whose key record nobody has read", got)
		}
		m.site.Read(t, "nitrokey/keys/"+key+"/backup")
		m.site.Write(t, "nitrokey/keys/"+key, vaulttest.Fields{"accept_single_hsm": true})
	})
	t.Run("during a rotation, when Vault seals its root key anew", func(t *testing.T) {
		vault.Kill(t)
		holds(1)
		vault.Launch(t)
		held()
		killed()
		vault.WaitActive(t)
		recalls(t, vault, "secret", "kept")
		vault.Restart(t)
		m.Minimum(t, key, 2)
		vault.Restart(t)
		recalls(t, vault, "secret", "kept")
		vault.RecoversARootToken(t)
	})
}
