package test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// Another cluster at the address takes the shares and then shows who it is: an alarm, and nothing more goes there, whatever
// restarts in between, until a person says so.
func TestAnotherClusterThatTakesTheSharesIsAnAlarm(t *testing.T) {
	n := nodetest.Start(t, nodetest.Options{})
	h := vaulttest.NewHost(t)
	h.WithToken(t, pkcs11test.SoftHSM(t))
	h.WithEtcd(t, etcdtest.Start(t, 1))
	h.WithCluster(t, n.Authority().PEM, []string{n.Address()}, "etcd", "")
	h.WithKey(t)
	h.Must(t, "init", "eu")
	own := n.ClusterID()
	looks := func() int { return n.Count("GET", "sys/seal-status") }
	shares := func() int { return n.Count("PUT", "sys/unseal") + n.Count("POST", "sys/unseal") }

	n.SetClusterID("11111111-2222-3333-4444-555555555555")
	n.Restart()
	before := shares()
	d := h.Daemon(t)
	d.Says(t, 0, "ALARM")
	if sent := shares() - before; sent != crashNeeded {
		t.Errorf("%d shares were sent, want the %d that it took to learn who it is", sent, crashNeeded)
	}
	before = shares()
	stays := func(what string) {
		t.Helper()
		n.Restart()
		first := looks()
		vaulttest.Eventually(t, unsealLimit, "some more looks", func() error {
			if looks() < first+3 {
				return errors.New("too few")
			}
			return nil
		})
		if sent := shares() - before; sent != 0 || !n.Sealed() {
			t.Errorf("%s: %d shares were sent after the alarm", what, sent)
		}
	}
	stays("the same daemon")
	d.Stop(t)
	d = h.Daemon(t)
	stays("the next daemon")
	h.Refused(t, vaulttest.ExitRefused, []string{"another cluster"}, "unseal", "eu")
	if sent := shares() - before; sent != 0 {
		t.Errorf("%d shares were sent by a command", sent)
	}

	n.SetClusterID(own)
	h.Must(t, "unseal", "eu", "--clear-alarm", n.Address())
	if n.Sealed() {
		t.Error("it is still sealed")
	}
	d.Stop(t)
}

// A Vault of the same CA and the same numbers, whose keys are others: it gets the shares once, because nothing tells it apart
// while it is sealed, and not again and again.
func TestAVaultWithOtherKeysIsNotHammered(t *testing.T) {
	w := newWatched(t)
	other := vaulttest.Start(t, vaulttest.Options{Bare: true, Authority: w.authority})
	_, err := other.Anonymous(t).Sys().Init(&api.InitRequest{SecretShares: crashShares, SecretThreshold: crashNeeded})
	must(t, err)
	w.vault = other
	f := newFront(t, other, w.authority)
	w.daemon.Stop(t)
	w.front = f
	w.WithCluster(t, w.authority.PEM, []string{f.URL}, "etcd", "")
	d := w.Host.Daemon(t)
	d.Says(t, 0, "do not unseal")
	operations := w.card.Operations(t)
	w.stays(t, 5)
	if _, sent := f.seen(); sent != crashNeeded {
		t.Errorf("%d shares were sent", sent)
	}
	if now := w.card.Operations(t); now != operations {
		t.Errorf("the HSM was asked %d times more", now-operations)
	}
	d.Stop(t)
}

// Two of three HSMs must take part: any two open, one alone does not.
func TestSpreadNeedsTwoOfThreeHSMs(t *testing.T) {
	authority := vaulttest.NewAuthority(t)
	vault := vaulttest.Start(t, vaulttest.Options{Bare: true, Authority: authority})
	h := vaulttest.NewHost(t)
	token := pkcs11test.SoftHSM(t)
	h.WithToken(t, token)
	h.WithEtcd(t, etcdtest.Start(t, 1))
	places := []string{"office", "bunker", "bank"}
	folders := filepath.Join(filepath.Dir(os.Getenv("SOFTHSM2_CONF")), "tokens")
	known := map[string]bool{}
	where := map[string]string{} // the folder of each token
	find := func(place string) {
		entries, err := os.ReadDir(folders)
		must(t, err)
		for _, entry := range entries {
			if !known[entry.Name()] {
				known[entry.Name()] = true
				where[place] = filepath.Join(folders, entry.Name())
			}
		}
	}
	find("hsm")
	for _, place := range places {
		added := token.Add(t, place)
		find(place)
		h.Set(t, fmt.Sprintf("device %q", place), "type = \"pkcs11\"\n serial = %q\n pin_file = \"pin\"", added.Serial)
		h.Must(t, "key", "generate", place, "--device", place, "--algorithm", "ecdh-p256")
		h.Must(t, "key", "backup", place, "--out", h.File(place+".record"))
		h.Must(t, "key", "configure", place, "--accept-single-hsm")
	}
	h.Put(t, "ca.pem", authority.PEM)
	h.Set(t, `cluster "eu"`, "nodes = [%q]\n ca_cert_file = \"ca.pem\"\n store = \"etcd\"\n spread = \"2 of office, bunker, bank\"\n"+
		" shares = 6\n threshold = 3", vault.Address)
	h.Must(t, "init", "eu")

	away := func(places ...string) (back func()) {
		for _, place := range places {
			must(t, os.Rename(where[place], filepath.Join(filepath.Dir(folders), place)))
		}
		return func() {
			for _, place := range places {
				must(t, os.Rename(filepath.Join(filepath.Dir(folders), place), where[place]))
			}
		}
	}
	for _, one := range places {
		back := away(one)
		vault.Restarted(t)
		h.Must(t, "unseal", "eu")
		vault.WaitUnsealed(t, unsealLimit)
		back()
	}
	back := away("office", "bank")
	vault.Restarted(t)
	if got := h.Try(t, "unseal", "eu", "--timeout", "5s"); got.Code == vaulttest.ExitOK {
		t.Errorf("one HSM of three unsealed it: %s%s", got.Stdout, got.Stderr)
	}
	status, err := vault.Anonymous(t).Sys().SealStatus()
	must(t, err)
	if !status.Sealed || status.Progress >= crashNeeded {
		t.Errorf("Vault is at %+v", status)
	}
	back()
	h.Must(t, "unseal", "eu")
	vault.WaitUnsealed(t, unsealLimit)
}
