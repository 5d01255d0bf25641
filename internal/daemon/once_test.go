package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

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
