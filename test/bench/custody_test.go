package bench

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

const (
	unsealRounds = 10
	fleetSize    = 100
	watchedSize  = 200
	quietTime    = 20 * time.Second
	slowRounds   = 5
	// cardTime is how long a Nitrokey HSM 2 takes for a private-key operation. A hundred of them are measured with another
	// time, which is as far above what the rest takes, so that they do not take a minute each round.
	cardTime, quickCardTime = 600 * time.Millisecond, 50 * time.Millisecond
)

// custody measures the way from a node that is up and sealed to one that is unsealed, by `nitroseal run`, against the least
// that it can take: one operation of the HSM and three calls of Vault.
func (t *table) custody(b *testing.B, site *vaulttest.Site, raw *rawLoop) {
	etcd := etcdtest.Start(b, 1)
	one := newUnsealing(b, site.Token, etcd, "custody")
	progress("unsealing one Vault")
	d := one.host.Daemon(b)
	d.Ready(b)
	var ours, least []time.Duration
	for range unsealRounds {
		ours = append(ours, one.byDaemon(b))
		least = append(least, raw.run(b, 1, 1)[1]+one.byCurl(b))
	}
	d.Stop(b)
	t.add("custody: from sealed to unsealed, 5 shares, threshold 3, by the daemon", milliseconds(median(ours)),
		fmt.Sprintf("≤ 1.2 × (the operation + 3 × curl sys/unseal = %s) = %s", milliseconds(median(least)), milliseconds(median(least)*12/10)))

	t.fleet(b, site.Token, etcd, raw)
	t.slowCard(b, etcd) // last: it has an environment of its own
}

// unsealing is a Vault in the custody of a host, behind a gate.
type unsealing struct {
	host   *vaulttest.Host
	vault  *vaulttest.Server
	gate   *vaulttest.Gate
	dir    string
	shares []string // base64
}

func newUnsealing(b *testing.B, token *pkcs11test.Token, etcd *etcdtest.Cluster, name string) *unsealing {
	authority := vaulttest.NewAuthority(b)
	u := &unsealing{host: vaulttest.NewHost(b), vault: vaulttest.Start(b, vaulttest.Options{Bare: true, Authority: authority}), dir: b.TempDir()}
	u.gate = vaulttest.NewGate(b, u.vault.Address)
	u.host.WithToken(b, token)
	u.host.WithEtcdAt(b, etcd, name)
	u.host.WithCluster(b, authority.PEM, []string{u.gate.Address}, "etcd", "")
	u.host.WithKey(b)
	u.host.Must(b, "init", "eu")
	opened := vaulttest.Decode[struct {
		Fields map[string]string `json:"fields"`
	}](b, u.host.Must(b, "material", "open", "eu", "unseal", "--reveal-keys", "-o", "json"))
	for field, value := range opened.Fields {
		if field != "facts" {
			u.shares = append(u.shares, value)
		}
	}
	return u
}

// byDaemon measures the running daemon. The gate is shut while Vault starts anew, and opens when the daemon stands before it.
func (u *unsealing) byDaemon(b *testing.B) time.Duration {
	u.gate.Shut()
	u.vault.Restarted(b)
	vaulttest.Eventually(b, time.Minute, "the daemon to look", func() error {
		if u.gate.Waiting() == 0 {
			return errors.New("not yet")
		}
		return nil
	})
	began := time.Now()
	u.gate.Open()
	return u.unsealed(b).Sub(began)
}

// unsealed returns the moment at which Vault says that it is unsealed.
func (u *unsealing) unsealed(b *testing.B) time.Time {
	client := u.vault.Anonymous(b)
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); <-time.After(time.Millisecond) {
		if status, err := client.Sys().SealStatus(); err == nil && !status.Sealed {
			return time.Now()
		}
	}
	b.Fatal("it is still sealed")
	return time.Time{}
}

// byCurl measures three calls of sys/unseal, each by the clock of a curl of its own.
func (u *unsealing) byCurl(b *testing.B) time.Duration {
	u.gate.Shut()
	u.vault.Restarted(b)
	var total time.Duration
	for i, share := range u.shares[:3] {
		body := filepath.Join(u.dir, "body")
		must(b, os.WriteFile(body, []byte(`{"key":"`+share+`"}`), 0o600))
		command := exec.CommandContext(b.Context(), "curl", "--silent", "--fail", "--noproxy", "*", "--cacert", u.vault.CAFile, "--data", "@"+body,
			"--output", filepath.Join(u.dir, "answer"), "--write-out", "%{time_total}", u.vault.Address+"/v1/sys/unseal")
		seconds, err := command.Output()
		must(b, err)
		took, err := strconv.ParseFloat(strings.TrimSpace(string(seconds)), 64)
		must(b, err)
		total += time.Duration(took * float64(time.Second))
		if answer, err := os.ReadFile(filepath.Join(u.dir, "answer")); err != nil || bytes.Contains(answer, []byte(`"sealed":true`)) != (i < 2) {
			b.Fatalf("share %d was answered with %s, %v", i, answer, err)
		}
	}
	return total
}

// slowCard measures with a device as slow as a Nitrokey HSM 2, and counts what it is asked to do.
func (t *table) slowCard(b *testing.B, etcd *etcdtest.Cluster) {
	progress("unsealing one Vault with a card that takes %v", cardTime)
	card := pkcs11test.Card(b)
	u := newUnsealing(b, &card.Token, etcd, "card")
	card.Fault(b, pkcs11test.Slow(cardTime))
	var warm, cold []time.Duration
	var warmOperations, coldOperations []int
	for range slowRounds {
		u.vault.Restarted(b)
		before := card.Operations(b)
		began := time.Now()
		d := u.host.Daemon(b)
		cold = append(cold, u.unsealed(b).Sub(began))
		coldOperations = append(coldOperations, card.Operations(b)-before)
		d.Ready(b)
		before = card.Operations(b)
		warm = append(warm, u.byDaemon(b))
		warmOperations = append(warmOperations, card.Operations(b)-before)
		d.Stop(b)
	}
	t.add(fmt.Sprintf("custody: the same with a card whose operation takes %v", cardTime),
		fmt.Sprintf("%s, %d operation", milliseconds(median(warm)), median(warmOperations)), "≤ 1 s, 1 operation")
	t.add("custody: the same from the start of the daemon",
		fmt.Sprintf("%s, %d operations", milliseconds(median(cold)), median(coldOperations)), "≤ 1.6 s, 2 operations")

	progress("%d clusters with a card that takes %v", fleetSize, quickCardTime)
	card.Mend(b, pkcs11test.Slow(cardTime))
	h := vaulttest.NewHost(b)
	h.WithToken(b, &card.Token)
	h.WithEtcdAt(b, etcd, "fleet-of-the-card")
	h.WithKey(b)
	nodes := h.Fleet(b, &card.Token, etcd, fleetSize)
	card.Fault(b, pkcs11test.Slow(quickCardTime))
	d := h.Daemon(b)
	d.Ready(b)
	sealedAtOnce(b, nodes[:1]) // the authentication key is opened
	before := card.Operations(b)
	took := sealedAtOnce(b, nodes)
	t.add(fmt.Sprintf("custody: %d sealed nodes of %d clusters at once, with a card whose operation takes %v", fleetSize, fleetSize, quickCardTime),
		fmt.Sprintf("%s, %d operations", milliseconds(took), card.Operations(b)-before),
		"≤ 1.2 × 100 × the operation = "+milliseconds(fleetSize*quickCardTime*12/10)+", 100 operations")
	d.Stop(b)
}

// fleet measures many clusters: of doubles, because as many real Vaults do not fit into this machine.
func (t *table) fleet(b *testing.B, token *pkcs11test.Token, etcd *etcdtest.Cluster, raw *rawLoop) {
	progress("%d clusters", watchedSize)
	h := vaulttest.NewHost(b)
	h.Interval(b, "5s") // the default
	h.WithToken(b, token)
	h.WithEtcd(b, etcd)
	h.WithKey(b)
	nodes := h.Fleet(b, token, etcd, watchedSize)
	d := h.Daemon(b)
	d.Ready(b)

	sealing := nodes[:fleetSize]
	var all, operation []time.Duration
	for range slowRounds {
		operation = append(operation, raw.run(b, perPart, 1)[1:]...)
		all = append(all, sealedAtOnce(b, sealing))
	}
	t.add(fmt.Sprintf("custody: %d sealed nodes of %d clusters at once", fleetSize, fleetSize), milliseconds(median(all)),
		fmt.Sprintf("≤ 1.2 × %d × the operation (%s) = %s", fleetSize, milliseconds(median(operation)), milliseconds(median(operation)*fleetSize*12/10)))

	processes := append(d.Children(), d.Process(b))
	daemon := processes[len(processes)-1]
	<-time.After(10 * time.Second) // what the unsealing has left behind settles
	before := cpuTime(b, daemon)
	<-time.After(quietTime)
	busy := cpuTime(b, daemon) - before
	t.add(fmt.Sprintf("custody: memory of a daemon that watches %d clusters", watchedSize), megabytes(daemon.ResidentKiB(b)), "≤ 100 MB")
	for _, child := range d.Children() {
		t.add("custody: memory of its module host", megabytes(child.ResidentKiB(b)), "≤ 40 MB")
	}
	t.add(fmt.Sprintf("custody: its time on a processor in %v when nothing happens, a look at each node every 5 s", quietTime),
		fmt.Sprintf("%.1f %% of one core", 100*busy.Seconds()/quietTime.Seconds()), "≤ 5 %")
	d.Stop(b)
}

// sealedAtOnce restarts nodes, holds back the answer to the daemon's next look at each, lets all go at one moment, and measures
// until all are unsealed.
func sealedAtOnce(b *testing.B, nodes []*nodetest.Node) time.Duration {
	goOn, waiting := make(chan struct{}), make(chan struct{}, len(nodes))
	for _, n := range nodes {
		n.Break("sys/seal-status", 1, func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
			waiting <- struct{}{}
			<-goOn
			serve.ServeHTTP(w, r)
		})
		n.Restart()
	}
	for range nodes {
		<-waiting
	}
	began := time.Now()
	close(goOn)
	for _, n := range nodes {
		for n.Sealed() {
			<-time.After(time.Millisecond)
		}
	}
	return time.Since(began)
}

// cpuTime is the time that a process has spent on processors, in its own code and the kernel's.
func cpuTime(b *testing.B, p vaulttest.Process) time.Duration {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	must(b, err)
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const user, system, perSecond = 11, 12, 100 // proc(5), from the state on; USER_HZ is 100 on every Linux that Go knows
	ticks := 0
	for _, field := range []int{user, system} {
		n, err := strconv.Atoi(fields[field])
		must(b, err)
		ticks += n
	}
	return time.Duration(ticks) * time.Second / perSecond
}
