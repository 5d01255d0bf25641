package test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// Two hundred clusters and one daemon, without the race detector in it, which takes memory of its own. docs/benchmarks.md has
// the numbers; this is to notice that something big came in.
func TestTwoHundredClustersWatchedByOneDaemon(t *testing.T) {
	const size, memoryLimit = 200, 100_000_000 / 1024 // clusters, KiB
	token, etcd := pkcs11test.SoftHSM(t), etcdtest.Start(t, 1)
	h := vaulttest.NewHostOf(t, vaulttest.Build{Command: "nitroseal", NoRace: true})
	h.WithToken(t, token)
	h.WithEtcd(t, etcd)
	h.WithKey(t)
	began := time.Now()
	nodes := h.Fleet(t, token, etcd, size)
	t.Logf("%d clusters were initialised in %v", size, time.Since(began))

	d := h.Daemon(t)
	d.Ready(t)
	for _, n := range nodes {
		n.Restart()
	}
	began = time.Now()
	vaulttest.Eventually(t, unsealLimit, "all nodes to be unsealed", func() error {
		sealed := 0
		for _, n := range nodes {
			if n.Sealed() {
				sealed++
			}
		}
		if sealed > 0 {
			return fmt.Errorf("%d are sealed", sealed)
		}
		return nil
	})
	t.Logf("all were unsealed in %v", time.Since(began))

	before := nodes[0].Count("GET", "sys/seal-status")
	vaulttest.Eventually(t, unsealLimit, "some more looks", func() error {
		if nodes[0].Count("GET", "sys/seal-status") < before+5 {
			return errors.New("too few")
		}
		return nil
	})
	total := d.Process(t).ResidentKiB(t)
	for _, child := range d.Children() {
		total += child.ResidentKiB(t)
	}
	if own := d.Process(t).ResidentKiB(t); own > memoryLimit {
		t.Errorf("the daemon has %d KiB in memory, more than %d", own, memoryLimit)
	}
	t.Logf("the daemon has %d KiB in memory, %d with its module host", d.Process(t).ResidentKiB(t), total)
	for _, n := range nodes {
		if n.Sealed() {
			t.Errorf("%s is sealed again", n.Address())
		}
	}
	d.Stop(t)
}
