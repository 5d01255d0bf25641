package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// The daemon with many clusters is measured in a process of its own, and so are the nodes that it watches: three processes of
// this test binary. The first starts the others and plays none of the parts.
const (
	partEnv  = "NITROSEAL_TEST_PART"
	fieldEnv = "NITROSEAL_TEST_FIELD" // a file with the nodes

	manyClusters = 200
	measured     = 10 * time.Second
	maxMemory    = 100 << 20 // bytes resident
	maxLoad      = 0.05      // of one core
)

// played is a node of the field.
type played struct{ Address, CA string }

// usage is what the daemon took.
type usage struct {
	Resident int64         // bytes
	CPU      time.Duration // in the time measured
	Looks    int
}

func TestManyClustersAreWatchedLightly(t *testing.T) {
	switch {
	case os.Getenv(partEnv) != "":
		t.Skip("a part in the test of another process")
	case raceDetector:
		t.Skip("the race detector takes more of everything")
	case testing.Short():
		t.Skip("it takes a while")
	}
	field := t.TempDir() + "/field.json"
	nodes := part(t, "nodes", field)
	nodes.line(t) // they are up
	daemon := part(t, "daemon", field)
	var took usage
	must(t, json.Unmarshal([]byte(daemon.line(t)), &took))
	load := took.CPU.Seconds() / measured.Seconds()
	t.Logf("%d clusters: %d MiB resident, %.1f %% of a core, %d looks in %v", manyClusters, took.Resident>>20, 100*load, took.Looks, measured)
	if took.Resident > maxMemory || load > maxLoad {
		t.Errorf("more than %d MiB or %.0f %% of a core", maxMemory>>20, 100*maxLoad)
	}
	if want := int(manyClusters * measured / defaultInterval); took.Looks < want*7/10 || took.Looks > want*13/10 {
		t.Errorf("%d looks, about %d were expected", took.Looks, want)
	}
}

// process is a process of this test binary.
type process struct {
	lines *bufio.Scanner
}

// line returns the next line that the process says about its part.
func (p *process) line(t *testing.T) string {
	t.Helper()
	for p.lines.Scan() {
		if said, ok := strings.CutPrefix(p.lines.Text(), "said: "); ok {
			return said
		}
		t.Log(p.lines.Text())
	}
	t.Fatal("the process ended")
	return ""
}

// part starts a process with a part. It ends with the test, or when this process does.
func part(t *testing.T, name, field string) *process {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestPart$", "-test.v", "-test.timeout=2m")
	cmd.Env = append(os.Environ(), partEnv+"="+name, fieldEnv+"="+field)
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = cmd.Stdout
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = stdin.Close() // it ends then
		_, _ = io.Copy(io.Discard, stdout)
		_ = cmd.Wait()
	})
	return &process{bufio.NewScanner(stdout)}
}

// TestPart plays a part in the process that [part] starts.
func TestPart(t *testing.T) {
	switch os.Getenv(partEnv) {
	case "nodes":
		playNodes(t)
	case "daemon":
		playDaemon(t)
	default:
		t.Skip("no part to play")
	}
}

func say(t *testing.T, text string) {
	t.Helper()
	_, err := fmt.Fprintln(os.Stdout, "\nsaid: "+text)
	must(t, err)
}

// playNodes runs unsealed nodes until stdin ends.
func playNodes(t *testing.T) {
	t.Helper()
	authority := nodetest.NewAuthority(t)
	var all []played
	for range manyClusters {
		n := nodetest.Start(t, nodetest.Options{Kind: nodetest.Alone, Authority: authority})
		client := n.Client(t)
		answer, err := client.Init(t.Context(), node.InitRequest{Shares: 1, Threshold: 1})
		must(t, err)
		_, err = client.Unseal(t.Context(), answer.Shares[0])
		must(t, err)
		all = append(all, played{n.Address(), string(authority.PEM)})
	}
	text, err := json.Marshal(all)
	must(t, err)
	must(t, os.WriteFile(os.Getenv(fieldEnv), text, 0o600))
	say(t, "up")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// oneStore is the only store there is.
type oneStore struct{ only store.Store }

func (s oneStore) Store(context.Context, string) (store.Store, error) { return s.only, nil }

// playDaemon watches the field with the real custodian and says what that takes.
func playDaemon(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile(os.Getenv(fieldEnv))
	must(t, err)
	var field []played
	must(t, json.Unmarshal(text, &field))
	var clusters []*cluster.Cluster
	for i, n := range field {
		clusters = append(clusters, &cluster.Cluster{
			Name: fmt.Sprintf("c%d", i), Nodes: []string{n.Address}, TLS: node.TLS{CA: []byte(n.CA)}, Key: "key", Store: "local",
		})
	}
	open := func() *file.Store {
		opened, err := file.Open(t.TempDir())
		must(t, err)
		return opened
	}
	kept := oneStore{open()}
	custodian := cluster.New(cluster.Config{
		Keeper: custody.New(custody.Config{Stores: kept, Records: open(), Shared: true}), Stores: kept, Local: open(),
	})
	ctx, stop := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	counting := &countingCustodian{Custodian: Custody(custodian, clusters)}
	go func() {
		ended <- Run(ctx, Options{
			Build: func(context.Context, *Hooks) (*Site, error) {
				return &Site{
					Custodian: counting, Clusters: Watched(clusters), Close: custodian.Close, Listen: Listen{Address: "127.0.0.1:0"},
				}, nil
			},
			Ready: func() { close(ready) },
		})
	}()
	<-ready
	settled := time.NewTimer(3 * time.Second) // the acts of the start
	<-settled.C
	cpu, looks := cpuTime(t), counting.looks.Load()
	measuring := time.NewTimer(measured)
	<-measuring.C
	answer, err := json.Marshal(usage{resident(t), cpuTime(t) - cpu, int(counting.looks.Load() - looks)})
	must(t, err)
	say(t, string(answer))
	stop()
	must(t, <-ended)
}

// countingCustodian counts the looks.
type countingCustodian struct {
	Custodian

	looks atomic.Int64
}

func (c *countingCustodian) Look(ctx context.Context, cluster, address string) (State, error) {
	c.looks.Add(1)
	return c.Custodian.Look(ctx, cluster, address)
}

// cpuTime is what this process took of the CPUs.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var used syscall.Rusage
	must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &used))
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// resident is the memory of this process, in bytes.
func resident(t *testing.T) int64 {
	t.Helper()
	text, err := os.ReadFile("/proc/self/statm")
	must(t, err)
	var size, pages int64
	_, err = fmt.Sscan(string(text), &size, &pages)
	must(t, err)
	return pages * int64(os.Getpagesize())
}
