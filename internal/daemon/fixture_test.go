package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errAway = errors.New("connection refused")

// yard is a fake custodian with nodes that a test seals and breaks. Its HSM does one operation at a time.
type yard struct {
	mu         sync.Mutex
	nodes      map[string]*State // by address
	away       map[string]error  // why a node does not answer
	refused    map[string]error  // why an act on a node fails
	looks      map[string][]time.Time
	acts       []act
	under      int // acts under way
	most       int // of them at one time
	generation string
	operation  time.Duration // of the HSM, one for each act with a sealed node
	hsm        chan struct{}
	during     func(ctx context.Context, cluster string) // of each act, after the HSM
}

// act is a call of Tend.
type act struct {
	at        time.Time
	cluster   string
	addresses string
}

func newYard() *yard {
	return &yard{
		nodes: map[string]*State{}, away: map[string]error{}, refused: map[string]error{}, looks: map[string][]time.Time{},
		generation: "1", hsm: make(chan struct{}, 1),
	}
}

func (y *yard) Look(ctx context.Context, _, address string) (State, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.looks[address] = append(y.looks[address], time.Now())
	if err := y.away[address]; err != nil {
		return State{}, err
	}
	if err := ctx.Err(); err != nil {
		return State{}, err
	}
	return *y.nodes[address], nil
}

func (y *yard) Tend(ctx context.Context, cluster string, addresses []string) []Result {
	y.mu.Lock()
	y.acts = append(y.acts, act{time.Now(), cluster, strings.Join(addresses, " ")})
	y.under++
	y.most = max(y.most, y.under)
	operation := time.Duration(0)
	for _, address := range addresses {
		if y.nodes[address].Sealed && y.refused[address] == nil {
			operation = y.operation
		}
	}
	y.mu.Unlock()
	var err error
	if operation > 0 {
		y.hsm <- struct{}{}
		if !monitor.Sleep(ctx, operation) {
			err = ctx.Err()
		}
		<-y.hsm
	}
	if y.during != nil {
		y.during(ctx, cluster)
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	y.under--
	var results []Result
	for _, address := range addresses {
		node := y.nodes[address]
		r := Result{Address: address, Err: errors.Join(err, y.refused[address])}
		if r.Err == nil && node.Sealed {
			node.Sealed, r.Unsealed = false, true
		}
		r.State = *node
		results = append(results, r)
	}
	return results
}

func (y *yard) Generation(context.Context, string) (string, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	return y.generation, nil
}

// set changes the yard.
func (y *yard) set(change func()) {
	y.mu.Lock()
	defer y.mu.Unlock()
	change()
}

// seal seals nodes.
func (y *yard) seal(addresses ...string) {
	y.set(func() {
		for _, address := range addresses {
			y.nodes[address].Sealed = true
		}
	})
}

// sealed lists the nodes that are sealed.
func (y *yard) sealed() (addresses []string) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for address, state := range y.nodes {
		if state.Sealed {
			addresses = append(addresses, address)
		}
	}
	slices.Sort(addresses)
	return addresses
}

// since counts the looks at a node since a time, and the acts that it was part of.
func (y *yard) since(at time.Time, address string) (looks, acts int) {
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, look := range y.looks[address] {
		if !look.Before(at) {
			looks++
		}
	}
	for _, a := range y.acts {
		if !a.at.Before(at) && slices.Contains(strings.Fields(a.addresses), address) {
			acts++
		}
	}
	return looks, acts
}

// forget forgets looks and acts.
func (y *yard) forget() {
	y.set(func() { y.looks, y.acts, y.most = map[string][]time.Time{}, nil, 0 })
}

// cluster adds a cluster with n unsealed nodes to the yard.
func (y *yard) cluster(name string, n int) Cluster {
	c := Cluster{Name: name}
	for i := range n {
		address := fmt.Sprintf("https://%s-%d:8200", name, i)
		c.Nodes = append(c.Nodes, address)
		y.nodes[address] = &State{Initialized: true, Version: "1.21.0"}
	}
	return c
}

// running is a daemon in a test.
type running struct {
	yard   *yard
	reload chan os.Signal
	logged *log
	told   *log // what systemd was told
	stop   context.CancelFunc
	ended  chan error
	hooks  *Hooks
}

// log is lines that goroutines write.
type log struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *log) count(text string) int { return strings.Count(l.String(), text) }

// start runs a daemon that watches a yard. Build, where it is nil, watches the clusters; stop ends it.
func start(t *testing.T, y *yard, build func(ctx context.Context, hooks *Hooks) (*Site, error), clusters ...Cluster) *running {
	t.Helper()
	r := &running{yard: y, reload: make(chan os.Signal), logged: &log{}, told: &log{}, ended: make(chan error, 1)}
	if build == nil {
		build = func(context.Context, *Hooks) (*Site, error) { return &Site{Custodian: y, Clusters: clusters}, nil }
	}
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	options := Options{
		Build: func(ctx context.Context, hooks *Hooks) (*Site, error) {
			r.hooks = hooks
			return build(ctx, hooks)
		},
		Logger: slog.New(slog.NewTextHandler(r.logged, &slog.HandlerOptions{Level: slog.LevelDebug})), Reload: r.reload, Version: "1.2.3",
		notify: &monitor.Notifier{Send: func(state string) { _, _ = fmt.Fprintln(r.told, strings.ReplaceAll(state, "\n", " ")) }, Interval: 20 * time.Second},
	}
	go func() { r.ended <- Run(ctx, options) }()
	return r
}

// end stops the daemon and wants a clean stop.
func (r *running) end(t *testing.T) {
	t.Helper()
	r.stop()
	if err := <-r.ended; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func (r *running) hangUp() {
	r.reload <- syscall.SIGHUP
	synctest.Wait()
}

// pass lets time pass in a bubble.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
