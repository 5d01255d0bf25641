package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// minutes lets Vault's timer tick that often, and waits after each tick until the mount has nothing to do.
func (m *mount) minutes(t *testing.T, count int) {
	t.Helper()
	for range count {
		request := &logical.Request{Operation: logical.RollbackOperation, Storage: m.storage}
		if _, err := m.HandleRequest(context.Background(), request); err != nil && !errors.Is(err, logical.ErrUnsupportedOperation) {
			t.Fatal(err)
		}
		synctest.Wait()
		time.Sleep(time.Minute)
	}
}

func TestTheWatchTendsWhatIsToBeWatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		m.write("clusters/watched", clusterOf(t, nil)).ok(t)
		m.write("clusters/left-alone", clusterOf(t, fields{"watch": false})).ok(t)
		m.minutes(t, 3)
		if watched, alone := fake.tended("watched"), fake.tended("left-alone"); watched != 3 || alone != 0 {
			t.Errorf("in three minutes the one was tended %d times and the other %d times", watched, alone)
		}
		m.write("clusters/left-alone", fields{"watch": true}).ok(t)
		m.delete("clusters/watched", nil).ok(t)
		m.minutes(t, 1)
		if watched, alone := fake.tended("watched"), fake.tended("left-alone"); watched != 3 || alone != 1 {
			t.Errorf("after a change the one was tended %d times and the other %d times", watched, alone)
		}
	})
}

func TestTheWatchIsNoBusinessOfANodeThatMayNotWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		m.write("clusters/prod", clusterOf(t, nil)).ok(t)
		m.System().(*logical.StaticSystemView).ReplicationStateVal = consts.ReplicationPerformanceStandby
		m.minutes(t, 2)
		if fake.tended("prod") != 0 {
			t.Error("a standby tended the cluster")
		}
		request := &logical.Request{Operation: logical.ReadOperation, Path: "clusters/prod/status", Storage: m.storage}
		if _, err := m.HandleRequest(context.Background(), request); !errors.Is(err, logical.ErrReadOnly) {
			t.Errorf("status is answered by a node that knows of no act, instead of forwarded: %v", err)
		}
	})
}

func TestALookIsNotBegunWhileTheLastOneLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		m.write("clusters/slow", clusterOf(t, nil)).ok(t)
		m.write("clusters/quick", clusterOf(t, nil)).ok(t)
		fake.tend = func(ctx context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			if c.Name == "slow" {
				select {
				case <-time.After(150 * time.Second):
				case <-ctx.Done():
				}
			}
			return outcomesOf(c, cluster.ActionNone, nil)
		}
		m.minutes(t, 4)
		if slow, quick := fake.tended("slow"), fake.tended("quick"); slow != 2 || quick != 4 {
			t.Errorf("the slow one was tended %d times, want 2; the quick one %d times, want 4", slow, quick)
		}
	})
}

func TestTheWatchAndARequestDoNotTendAtOneTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		m.write("clusters/prod", clusterOf(t, nil)).ok(t)
		var now, most atomic.Int32
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			most.Store(max(most.Load(), now.Add(1)))
			time.Sleep(5 * time.Second)
			now.Add(-1)
			return outcomesOf(c, cluster.ActionNone, nil)
		}
		answered := make(chan reply, 1)
		go func() {
			time.Sleep(time.Second) // the watch has begun
			answered <- m.write("clusters/prod/unseal", nil)
		}()
		m.minutes(t, 1)
		(<-answered).ok(t)
		if fake.tended("prod") != 2 || most.Load() != 1 {
			t.Errorf("%d looks, %d at one time", fake.tended("prod"), most.Load())
		}
	})
}

func TestFewClustersAreTendedAtOneTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		const clusters = 3 * watchParallel
		for i := range clusters {
			m.write(fmt.Sprintf("clusters/c%02d", i), clusterOf(t, nil)).ok(t)
		}
		var now, most, all atomic.Int32
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			most.Store(max(most.Load(), now.Add(1)))
			all.Add(1)
			time.Sleep(time.Second)
			now.Add(-1)
			return outcomesOf(c, cluster.ActionNone, nil)
		}
		m.minutes(t, 1)
		if all.Load() != clusters || most.Load() != watchParallel {
			t.Errorf("%d clusters tended, %d at one time", all.Load(), most.Load())
		}
	})
}

// Clusters whose nodes join, all at once after a power cut, keep nobody waiting while they wait themselves.
func TestClustersThatAreOnTheirWayHinderNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		for i := range watchParallel {
			m.write(fmt.Sprintf("clusters/a%02d", i), clusterOf(t, nil)).ok(t)
		}
		m.write("clusters/sealed", clusterOf(t, nil)).ok(t)
		began := time.Now()
		var others atomic.Int32
		var waited atomic.Int64
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			if c.Name == "sealed" {
				for others.Load() < watchParallel { // it is last in the queue
					time.Sleep(time.Millisecond)
				}
				waited.Store(int64(time.Since(began)))
				return outcomesOf(c, cluster.ActionUnsealed, nil)
			}
			others.Add(1)
			return outcomesOf(c, cluster.ActionWaiting, nil)
		}
		m.minutes(t, 1)
		if waited := time.Duration(waited.Load()); waited > watchAgain/2 {
			t.Errorf("it waited %v for those that wait", waited)
		}
	})
}

// A node that waits for others is looked at again soon; one that is down is left to the next minute.
func TestWhatIsOnItsWayIsLookedAtAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		m.write("clusters/joining", clusterOf(t, nil)).ok(t)
		m.write("clusters/down", clusterOf(t, nil)).ok(t)
		m.write("clusters/people", clusterOf(t, nil)).ok(t)
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			switch c.Name {
			case "joining":
				return outcomesOf(c, cluster.ActionWaiting, nil)
			case "people":
				outcomes := outcomesOf(c, cluster.ActionWaiting, nil)
				outcomes[0].Outcome.People, outcomes[1].Outcome.People = 2, 2
				return outcomes
			default:
				return outcomesOf(c, "", node.ErrUnavailable)
			}
		}
		m.minutes(t, 1)
		if joining, down, people := fake.tended("joining"), fake.tended("down"), fake.tended("people"); joining != watchRounds || down != 1 || people != 1 {
			t.Errorf("within a minute: joining %d times, down %d times, waiting for people %d times", joining, down, people)
		}
	})
}

// Shares that are wrong stay wrong, and every try costs an operation in an HSM: such a node is left alone for longer and longer,
// its neighbours are not.
func TestANodeThatFailsForGoodIsLeftAlone(t *testing.T) {
	for name, failure := range map[string]error{
		"wrong shares":      cluster.ErrWrongShares,
		"a foreign cluster": cluster.ErrForeignCluster,
		"another seal":      cluster.ErrMismatch,
		"a wrong PIN":       &hsm.PINError{TriesLeft: 2, Wrong: true, Detail: "the PIN is wrong"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, fake := newCustody(t)
				m.write("clusters/prod", clusterOf(t, nil)).ok(t)
				const bad = "https://vault-2.example:8200"
				tries, neighbour := 0, 0
				mended := false
				fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
					outcomes := outcomesOf(c, cluster.ActionNone, nil)
					for i := range outcomes {
						if outcomes[i].Address != bad {
							neighbour++
							continue
						}
						tries++
						if !mended {
							outcomes[i].Err = fmt.Errorf("node %s: %w", bad, failure)
						}
					}
					return outcomes
				}
				m.minutes(t, 120)
				if tries < 4 || tries > 16 || neighbour != 120 {
					t.Errorf("in two hours the bad node was tried %d times, and its neighbour %d times", tries, neighbour)
				}
				before := tries
				mended = true
				m.write("clusters/prod/unseal", nil).ok(t) // a person does not wait
				m.minutes(t, 2)
				if tries != before+3 {
					t.Errorf("once mended it was looked at %d times, want 3", tries-before)
				}
			})
		})
	}
}

func TestAChangedConfigurationIsTriedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		m.write("clusters/prod", clusterOf(t, nil)).ok(t)
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			return outcomesOf(c, "", cluster.ErrMismatch)
		}
		m.minutes(t, 10)
		before := fake.tended("prod")
		m.write("clusters/prod", fields{"timeout": 5}).ok(t)
		m.minutes(t, 1)
		if fake.tended("prod") != before+1 {
			t.Error("the change was not tried")
		}
		m.write("clusters/prod/alarm", fields{"node": "https://vault-1.example:8200"}).want(t, 400).says(t, "clear=true")
		m.write("clusters/prod/alarm", fields{"node": "https://vault-7.example:8200", "clear": true}).want(t, 400).says(t, "vault-1")
		m.write("clusters/prod/alarm", fields{"node": "https://vault-1.example:8200", "clear": true}).want(t, 204)
		m.minutes(t, 1)
		if fake.tended("prod") != before+2 || !slices.Equal(fake.cleared, []string{"https://vault-1.example:8200"}) {
			t.Errorf("after the alarm was cleared: %d more looks, cleared %v", fake.tended("prod")-before-1, fake.cleared)
		}
	})
}

func TestTheWatchLogsWhatChangesAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		var log bytes.Buffer
		m.logger = NewLogger(hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Info}))
		data := clusterOf(t, fields{"nodes": "https://vault-1.example:8200"})
		m.write("clusters/prod", data).ok(t)
		count := 0
		say := func(action cluster.Action, err error) {
			fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
				count++
				if err != nil {
					return outcomesOf(c, "", fmt.Errorf("try %d: %w", count, err))
				}
				return outcomesOf(c, action, nil)
			}
		}
		lines := func(minutes int) int {
			log.Reset()
			m.minutes(t, minutes)
			return strings.Count(log.String(), "\n")
		}
		for _, step := range []struct {
			name    string
			action  cluster.Action
			err     error
			minutes int
			lines   int
		}{
			{"unsealed from the beginning", cluster.ActionNone, nil, 5, 0},
			{"it goes away", "", node.ErrUnavailable, 5, 1},
			{"another certificate is there", "", node.ErrIdentity, 5, 1},
			{"it is unsealed again", cluster.ActionNone, nil, 5, 1},
			{"it was unsealed, which the custodian tells", cluster.ActionUnsealed, nil, 1, 0},
			{"it is unsealed", cluster.ActionNone, nil, 5, 0},
			{"it took shares and is another cluster", "", cluster.ErrForeignCluster, 50, 1},
		} {
			say(step.action, step.err)
			if got := lines(step.minutes); got != step.lines {
				t.Errorf("%s: %d lines, want %d:\n%s", step.name, got, step.lines, log.String())
			}
		}
		if !strings.Contains(log.String(), "[ERROR]") || !strings.Contains(log.String(), "rekey") {
			t.Errorf("the alarm is logged as %s", log.String())
		}
	})
}

func TestStatusShowsWhatTheWatchFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newCustody(t)
		m.write("clusters/prod", clusterOf(t, nil)).ok(t)
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			return outcomesOf(c, "", cluster.ErrWrongShares)
		}
		began := time.Now()
		m.minutes(t, 5)
		watch, _ := m.read("clusters/prod/status").ok(t).data["watch"].(map[string]any)
		nodes, _ := watch["nodes"].(map[string]any)
		first, _ := nodes["https://vault-1.example:8200"].(map[string]any)
		if watch["on"] != true || first["since"] != stamp(began) || first["next"] == "" || !strings.Contains(fmt.Sprint(first["error"]), "do not unseal") {
			t.Errorf("watch = %v", watch)
		}
	})
}

func TestABrokenStorageStopsNoTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := newCustody(t)
		m.storage.fail(nil, errStorage)
		if err := m.tick(t.Context(), nil); err != nil {
			t.Error(err)
		}
		m.storage.fail(nil, nil)
	})
}
