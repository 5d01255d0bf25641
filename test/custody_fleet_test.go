package test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// Two hundred clusters and one daemon, without the race detector in it, which takes memory of its own. docs/benchmarks.md has
// the numbers; this is to notice that something big came in.
func TestTwoHundredClustersWatchedByOneDaemon(t *testing.T) {
	const size, memoryLimit, loadLimit = 200, 100_000_000 / 1024, 10 // clusters, KiB, percent of one core, where others work as well
	token, etcd := pkcs11test.SoftHSM(t), etcdtest.Start(t, 1)
	h := vaulttest.NewHostOf(t, vaulttest.Build{Command: "nitroseal", NoRace: true})
	h.Interval(t, "5s") // the default
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

	looks, busy, began := nodes[0].Count("GET", "sys/seal-status"), processorTime(t, d.Process(t)), time.Now()
	vaulttest.Eventually(t, unsealLimit, "some more looks", func() error {
		if nodes[0].Count("GET", "sys/seal-status") < looks+3 {
			return errors.New("too few")
		}
		return nil
	})
	busy, took := processorTime(t, d.Process(t))-busy, time.Since(began)
	load := 100 * busy.Seconds() / took.Seconds()
	t.Logf("the daemon took %.1f %% of one core in %v", load, took)
	if load > loadLimit {
		t.Errorf("%.1f %% of one core when nothing happens, more than %d", load, loadLimit)
	}
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

// processorTime is what a process has spent on processors, in its own code and the kernel's.
func processorTime(t *testing.T, p vaulttest.Process) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	must(t, err)
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const user, system, perSecond = 11, 12, 100 // proc(5), from the state on; USER_HZ is 100 on every Linux that Go knows
	ticks := 0
	for _, field := range []int{user, system} {
		n, err := strconv.Atoi(fields[field])
		must(t, err)
		ticks += n
	}
	return time.Duration(ticks) * time.Second / perSecond
}
