package test

import (
	"slices"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// The same on three nodes, where others than the first one have a part: a crash in the middle of each verb, and all nodes are
// restarted before the next run.
func TestKilledOnARaftClusterOfThreeNodes(t *testing.T) {
	vaults := vaulttest.StartCluster(t, 3, false)
	y := &yard{etcd: etcdtest.Start(t, 1)}
	l := y.lane(t, vaults.Servers...)
	restart := func() {
		vaults.Kill(t)
		vaults.Up(t)
	}
	// crash kills the verb after a step, and runs it again.
	crash := func(t *testing.T, verb, after string, between func()) *outcome {
		t.Helper()
		first := l.run(t, order{Verb: verb, AtName: after})
		if first.outcome != nil {
			t.Fatalf("no step ends in %q: %q, %+v\n%s", after, first.steps, first.outcome, first.log)
		}
		between()
		second := l.run(t, order{Verb: verb, Finish: true, TendFirst: verb == verbRekey || verb == verbRewrap})
		if second.outcome == nil || second.Error != "" {
			t.Fatalf("the next run: %+v\n%s\nlog of the first one:\n%s", second.outcome, second.log, first.log)
		}
		vaults.WaitUnsealed(t, unsealLimit)
		l.orderly(t, second.outcome)
		if t.Failed() {
			t.Fatalf("steps\n%q\nand then\n%q\n%s", first.steps, second.steps, second.log)
		}
		return second.outcome
	}

	l.fresh(t)
	told := crash(t, verbInit, "sys/storage/raft/join", restart)
	l.shares = told.shares(t)
	if live := l.liveTokens(t, l.shares); live != 0 {
		t.Errorf("%d tokens live that nobody holds", live)
	}

	before := l.shares
	told = crash(t, verbRekey, "sys/rekey/verify", restart)
	l.shares = told.shares(t)
	if slices.EqualFunc(before, l.shares, slices.Equal[[]byte]) {
		t.Error("the shares are those before the rekey")
	}
	l.token = l.root(t, l.shares) // or they are not those of Vault
	l.revoke(t)

	l.mustRun(t, order{Verb: verbRotate})
	told = crash(t, verbRewrap, "etcd: put material/eu/unseal", restart)
	l.same(t, told)
	if told.Key["unseal"] != 2 {
		t.Errorf("it is sealed with version %d of the wrapping key", told.Key["unseal"])
	}

	l.fresh(t)
	l.importing = l.shares
	told = crash(t, verbImport, "etcd: put material/eu/unseal", restart)
	l.same(t, told)
}
