package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func TestOnceUnsealsWhatIsSealedAndEndsWhenAllIsWell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		y.operation = time.Second
		a, b := y.cluster("a", 3), y.cluster("b", 1)
		y.seal(a.Nodes[0], a.Nodes[2])
		y.away[b.Nodes[0]] = errAway
		site := &Site{Custodian: y, Clusters: []Cluster{a, b}}
		go func() {
			<-time.After(20 * time.Second)
			y.set(func() { delete(y.away, b.Nodes[0]) })
			y.seal(b.Nodes...)
		}()
		begun := time.Now()
		report, err := Once(t.Context(), site, OnceOptions{Wait: time.Hour})
		must(t, err)
		if took := time.Since(begun); took > time.Minute {
			t.Errorf("took %v", took)
		}
		var told []string
		for _, n := range report.Nodes {
			told = append(told, fmt.Sprint(n.Cluster, n.Unsealed, n.State.Sealed, n.Err))
		}
		if got := strings.Join(told, " "); got != "atrue false <nil> afalse false <nil> atrue false <nil> btrue false <nil>" {
			t.Errorf("report: %s", got)
		}
	})
}

func TestOnceEndsAtItsDeadlineWithWhatIsWrong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		a, b := y.cluster("a", 1), y.cluster("b", 1)
		y.set(func() { *y.nodes[b.Nodes[0]] = State{} }) // not initialised
		y.refused[b.Nodes[0]] = fmt.Errorf("node %s: %w", b.Nodes[0], cluster.ErrNotInitialized)
		y.away[a.Nodes[0]] = errAway
		site := &Site{Custodian: y, Clusters: []Cluster{a, b}}
		begun := time.Now()
		report, err := Once(t.Context(), site, OnceOptions{Wait: time.Minute})
		if took := time.Since(begun); took != time.Minute {
			t.Errorf("took %v", took)
		}
		if !errors.Is(err, ErrSealed) || !errors.Is(err, errAway) || !errors.Is(err, cluster.ErrNotInitialized) || len(report.Nodes) != 2 {
			t.Errorf("got %v, %+v", err, report)
		}
		if n := strings.Count(err.Error(), a.Nodes[0]) + strings.Count(err.Error(), b.Nodes[0]); n != 2 {
			t.Errorf("it names the nodes %d times: %v", n, err)
		}

		begun = time.Now()
		if _, err = Once(t.Context(), site, OnceOptions{Clusters: []string{"b"}}); errors.Is(err, errAway) || !errors.Is(err, cluster.ErrNotInitialized) {
			t.Errorf("cluster b alone: %v", err)
		}
		if took := time.Since(begun); took != 0 {
			t.Errorf("one try took %v", took)
		}
		if _, err = Once(t.Context(), site, OnceOptions{Clusters: []string{"c"}}); !errors.Is(err, ErrConfig) {
			t.Errorf("a cluster that is not there: %v", err)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err = Once(ctx, site, OnceOptions{Wait: time.Minute}); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, ErrSealed) {
			t.Errorf("interrupted: %v", err)
		}
	})
}

func TestOnceDoesNotWaitForWhatOnlyAPersonCanMend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		a := y.cluster("a", 1)
		y.seal(a.Nodes...)
		y.refused[a.Nodes[0]] = cluster.ErrWrongShares
		begun := time.Now()
		_, err := Once(t.Context(), &Site{Custodian: y, Clusters: []Cluster{a}}, OnceOptions{Wait: time.Hour})
		if took := time.Since(begun); took > time.Second || !errors.Is(err, cluster.ErrWrongShares) {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

func TestOnceReportsAnActThatOutlivedTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		y.operation = 5 * time.Second
		a := y.cluster("a", 1)
		y.seal(a.Nodes...)
		report, err := Once(t.Context(), &Site{Custodian: y, Clusters: []Cluster{a}}, OnceOptions{Wait: time.Second})
		if err != nil || !report.Nodes[0].Unsealed {
			t.Errorf("got %v, %+v", err, report)
		}
	})
}

func TestOnceSaysTheSameCauseOnce(t *testing.T) {
	away := errors.New("the token labelled two is not there")
	for name, test := range map[string]struct {
		refused func(i int, address string) error
		said    []string // each once; %1 to %3 are the nodes of cluster a
	}{
		"nodes of a cluster with one cause": {func(int, string) error { return fmt.Errorf("opening the unseal keys: %w", away) }, []string{
			`nodes %1, %2 and %3 of cluster "a": opening the unseal keys: the token labelled two is not there`,
		}},
		"each names itself": {func(_ int, address string) error { return fmt.Errorf("node %s: refused: %w", address, away) }, []string{
			`nodes %1, %2 and %3 of cluster "a": refused: the token labelled two is not there`,
		}},
		"the first had its PIN refused, the others were not let try": {func(i int, _ string) error {
			return fmt.Errorf("device two: %w", &hsm.PINError{TriesLeft: 2, Barred: i != 1, Detail: fmt.Sprintf("refused at %d", i)})
		}, []string{`nodes %1, %2 and %3 of cluster "a": device two: refused at 1`}},
		"two causes": {func(i int, _ string) error {
			if i == 1 {
				return cluster.ErrWrongShares
			}
			return away
		}, []string{`nodes %1 and %3 of cluster "a": the token labelled two is not there`, `node %2 of cluster "a": ` + cluster.ErrWrongShares.Error()}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				y := newYard()
				a, b := y.cluster("a", 3), y.cluster("b", 1)
				y.seal(a.Nodes...)
				for i, address := range a.Nodes {
					y.refused[address] = test.refused(i, address)
				}
				report, err := Once(t.Context(), &Site{Custodian: y, Clusters: []Cluster{a, b}}, OnceOptions{})
				if err == nil || len(report.Nodes) != 4 {
					t.Fatalf("got %v, %+v", err, report)
				}
				for i, address := range a.Nodes {
					if report.Nodes[i].Err == nil || !errors.Is(err, report.Nodes[i].Err) {
						t.Errorf("node %s: %v", address, report.Nodes[i].Err)
					}
				}
				for _, said := range test.said {
					sentence := strings.NewReplacer("%1", a.Nodes[0], "%2", a.Nodes[1], "%3", a.Nodes[2]).Replace(said)
					if strings.Count(err.Error(), sentence) != 1 {
						t.Errorf("it does not say %q once: %v", sentence, err)
					}
				}
				if n := strings.Count(err.Error(), "\n"); n != len(test.said) {
					t.Errorf("%d lines after the first: %v", n, err)
				}
			})
		})
	}
}

// What a daemon does when it is told to is nothing that a run of its own can be told.
func TestOnceSpeaksOfNoDaemon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		y := newYard()
		a := y.cluster("a", 3)
		y.seal(a.Nodes...)
		for i, address := range a.Nodes {
			y.refused[address] = fmt.Errorf("device two: %w", &hsm.PINError{TriesLeft: 2, Detail: fmt.Sprintf("refused at %d", i)})
		}
		var log strings.Builder
		logger := slog.New(slog.NewTextHandler(&log, nil))
		if _, err := Once(t.Context(), &Site{Custodian: y, Clusters: []Cluster{a}}, OnceOptions{Logger: logger}); err == nil {
			t.Error("it is unsealed")
		}
		if strings.Contains(log.String(), "SIGHUP") || strings.Count(log.String(), "only a person can mend") != 1 {
			t.Errorf("the log says:\n%s", log.String())
		}
	})
}
