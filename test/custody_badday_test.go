package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// unsealLimit is how long a daemon may take to unseal a node that it can unseal. It looks every second, and ever more
// seldom at one that it could not reach.
const unsealLimit = 90 * time.Second

// watched is one Vault, watched by a daemon through a [front].
type watched struct {
	*vaulttest.Host

	authority *vaulttest.Authority
	vault     *vaulttest.Server
	front     *front
	etcd      *etcdtest.Cluster
	card      *pkcs11test.SmartCard
	daemon    *vaulttest.Running
}

func newWatched(t *testing.T) *watched {
	t.Helper()
	w := &watched{Host: vaulttest.NewHost(t), authority: vaulttest.NewAuthority(t), etcd: etcdtest.Start(t, 3), card: pkcs11test.Card(t)}
	w.vault = vaulttest.Start(t, vaulttest.Options{Bare: true, Authority: w.authority})
	w.front = newFront(t, w.vault, w.authority)
	w.WithToken(t, &w.card.Token)
	w.WithEtcd(t, w.etcd)
	w.WithCluster(t, w.authority.PEM, []string{w.front.URL}, "etcd", "timeout = \"2s\"")
	w.WithKey(t)
	w.Must(t, "init", "eu")
	before := w.card.Operations(t)
	w.daemon = w.Host.Daemon(t)
	w.daemon.Ready(t)
	vaulttest.Eventually(t, limit, "the authentication key to be opened", func() error {
		if w.card.Operations(t) != before+1 {
			return errors.New("it was not, or something else was")
		}
		return nil
	})
	return w
}

// stays checks that Vault is sealed while the daemon looks at it some more times, and that no share comes.
func (w *watched) stays(t *testing.T, looks int) {
	t.Helper()
	first, shares := w.front.seen()
	vaulttest.Eventually(t, unsealLimit, "the daemon to look", func() error {
		if now, _ := w.front.seen(); now < first+looks {
			return fmt.Errorf("%d looks", now-first)
		}
		return nil
	})
	w.staysSealed(t, shares)
}

func (w *watched) staysSealed(t *testing.T, shares int) {
	t.Helper()
	status, err := w.vault.Anonymous(t).Sys().SealStatus()
	must(t, err)
	if _, now := w.front.seen(); !status.Sealed || now != shares {
		t.Errorf("sealed: %t, %d shares came", status.Sealed, now-shares)
	}
}

func TestDaemonUnsealsOnABadDay(t *testing.T) {
	whole, w := t, newWatched(t)
	unsealed := func(t *testing.T) {
		t.Helper()
		w.vault.WaitUnsealed(t, unsealLimit)
	}

	t.Run("a restart", func(t *testing.T) {
		before := w.card.Operations(t)
		w.vault.Restarted(t)
		unsealed(t)
		if spent := w.card.Operations(t) - before; spent != 1 {
			t.Errorf("it cost %d operations of the HSM", spent)
		}
	})
	t.Run("down for a while", func(t *testing.T) {
		w.vault.Kill(t)
		first, _ := w.front.seen()
		vaulttest.Eventually(t, limit, "looks at what is down", func() error {
			if now, _ := w.front.seen(); now < first+3 {
				return errors.New("too few")
			}
			return nil
		})
		w.vault.Up(t)
		unsealed(t)
	})
	t.Run("slow: every answer takes a second", func(t *testing.T) {
		w.front.breaks(func(http.ResponseWriter, *http.Request) bool { <-time.After(time.Second); return false })
		w.vault.Restarted(t)
		unsealed(t)
		w.front.breaks(nil)
	})
	for name, fault := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"it hangs":                 func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true },
		"429, with a time to wait": status(http.StatusTooManyRequests, "Retry-After", "1"),
		"503":                      status(http.StatusServiceUnavailable),
		"500":                      status(http.StatusInternalServerError),
		"an answer that is no JSON": func(w http.ResponseWriter, _ *http.Request) bool {
			_, err := w.Write([]byte("<html>"))
			return err == nil
		},
		"403, of a gateway in between": status(http.StatusForbidden),
	} {
		t.Run(name, func(t *testing.T) {
			w.front.breaks(fault)
			w.vault.Restarted(t)
			w.stays(t, 2)
			w.front.breaks(nil)
			unsealed(t)
		})
	}
	t.Run("429 to every fifth request or so", func(t *testing.T) {
		w.front.breaks(func(rw http.ResponseWriter, r *http.Request) bool {
			return rand.IntN(5) == 0 && status(http.StatusTooManyRequests)(rw, r)
		})
		w.vault.Restarted(t)
		unsealed(t)
		w.front.breaks(nil)
	})
	t.Run("a redirect to somewhere else, with a good certificate", func(t *testing.T) {
		elsewhere := newFront(t, w.vault, w.authority)
		w.front.breaks(func(rw http.ResponseWriter, r *http.Request) bool {
			http.Redirect(rw, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return true
		})
		w.vault.Restarted(t)
		w.stays(t, 2)
		if requests, _ := elsewhere.seen(); requests != 0 {
			t.Errorf("%d requests went where the redirect pointed to", requests)
		}
		w.front.breaks(nil)
		unsealed(t)
	})
	t.Run("sealed by a person while the daemon looks", func(t *testing.T) {
		w.vault.RootToken = rootToken(t, w.Host)
		w.vault.Seal(t)
		unsealed(t)
	})
	t.Run("another one began to unseal and stopped", func(t *testing.T) {
		w.daemon.Stop(t)
		w.vault.Restarted(t)
		bogus := strings.Repeat("QUFB", 11) // 33 bytes, as a share
		if _, err := w.vault.Anonymous(t).Sys().Unseal(bogus); err != nil {
			t.Fatal(err)
		}
		w.daemon = w.Host.Daemon(whole)
		unsealed(t)
	})
	t.Run("the HSM is gone, and comes back", func(t *testing.T) {
		w.card.Remove(t, pkcs11test.ReaderRemoved)
		w.vault.Restarted(t)
		w.stays(t, 3)
		w.card.Return(t)
		unsealed(t)
	})
	t.Run("the HSM goes in the middle of the operation", func(t *testing.T) {
		w.card.Remove(t, pkcs11test.LostInACommand)
		w.vault.Restarted(t)
		unsealed(t)
	})
	t.Run("one member of etcd is down", func(t *testing.T) {
		leader := w.etcd.Leader(t)
		w.etcd.Kill(t, leader)
		w.vault.Restarted(t)
		unsealed(t)
		w.etcd.Restart(t, leader)
	})
	t.Run("all of etcd is down, and comes back", func(t *testing.T) {
		for member := range 3 {
			w.etcd.Kill(t, member)
		}
		w.vault.Restarted(t)
		for member := range 3 {
			w.etcd.RestartWithoutWaiting(t, member)
		}
		unsealed(t)
	})
	if tries := w.card.Tries(t); tries != 3 || w.card.WrongPINs(t) != 0 {
		t.Errorf("the card has %d tries left and was sent %d wrong PINs", tries, w.card.WrongPINs(t))
	}
	w.daemon.Stop(t)
}

func TestNoShareLeavesForSomebodyElse(t *testing.T) {
	w := newWatched(t)
	w.daemon.Stop(t)
	// at watches the cluster at another address, and wants no share to arrive there and the log to say the words.
	at := func(t *testing.T, f *front, address string, words ...string) {
		t.Helper()
		w.WithCluster(t, w.authority.PEM, []string{address}, "etcd", "timeout = \"2s\"")
		w.vault.Restarted(t)
		d := w.Host.Daemon(t)
		d.Says(t, 0, words...)
		w.Refused(t, vaulttest.ExitRefused, words, "unseal", "--once", "--timeout", "5s", "eu") // it waits for another certificate until then
		requests, shares := f.seen()
		if shares != 0 {
			t.Errorf("%d shares left", shares)
		}
		t.Logf("%d requests arrived", requests)
		d.Stop(t)
	}
	foreign := vaulttest.NewAuthority(t)
	t.Run("a certificate of a foreign authority", func(t *testing.T) {
		f := newFront(t, w.vault, foreign)
		at(t, f, f.URL, "certificate")
		if requests, _ := f.seen(); requests != 0 {
			t.Errorf("%d requests went to a stranger", requests)
		}
	})
	t.Run("a balancer that ends TLS with a certificate of its own, for the right name", func(t *testing.T) {
		f := newFront(t, w.vault, foreign, "localhost")
		at(t, f, strings.Replace(f.URL, "127.0.0.1", "localhost", 1), "certificate")
	})
	t.Run("a certificate of the cluster's authority, for another name", func(t *testing.T) {
		f := newFront(t, w.vault, w.authority, "db.example.org")
		at(t, f, f.URL, "certificate")
	})
}

// A certificate that was renewed by the same authority changes nothing; one of another authority needs the configuration to
// say so, and then SIGHUP is enough.
func TestCertificateRenewedWhileTheDaemonRuns(t *testing.T) {
	w := newWatched(t)
	w.WithCluster(t, w.authority.PEM, []string{w.vault.Address}, "etcd", "")
	w.daemon.Signal(t, syscall.SIGHUP)
	w.vault.Renew(t, w.authority)
	w.vault.Restarted(t)
	w.vault.WaitUnsealed(t, unsealLimit)

	other := vaulttest.NewAuthority(t)
	mark := w.daemon.Mark()
	w.vault.Renew(t, other)
	must(t, os.WriteFile(w.vault.CAFile, other.PEM, 0o600)) // for the test's own client
	w.vault.Restarted(t)
	w.daemon.Says(t, mark, "certificate")
	if status, err := w.vault.Anonymous(t).Sys().SealStatus(); err != nil || !status.Sealed || status.Progress != 0 {
		t.Errorf("a node that nobody knows is at %+v, %v", status, err)
	}
	w.WithCluster(t, other.PEM, []string{w.vault.Address}, "etcd", "")
	w.daemon.Signal(t, syscall.SIGHUP)
	w.vault.WaitUnsealed(t, unsealLimit)

	// And by pins alone.
	w.Set(t, `cluster "eu"`, "nodes = [%q]\n tls_pins = [%q]\n key = \"prod\"\n store = \"etcd\"", w.vault.Address, w.vault.Pin(t))
	w.daemon.Signal(t, syscall.SIGHUP)
	w.vault.Restarted(t)
	w.vault.WaitUnsealed(t, unsealLimit)
}

// One full disk keeps nobody sealed; where no sink takes the intent, nothing is done, and it is done when there is room.
func TestAuditDisksAreFull(t *testing.T) {
	one, two := smallDisk(t), smallDisk(t)
	w := newWatched(t)
	w.Set(t, `audit "file"`, "path = %q", filepath.Join(one.dir, "audit.log"))
	w.Set(t, `audit  "file"`, "path = %q", filepath.Join(two.dir, "audit.log")) // another head to Set, the same in the file
	w.daemon.Signal(t, syscall.SIGHUP)
	w.vault.Restarted(t)
	w.vault.WaitUnsealed(t, unsealLimit)
	for _, disk := range []*disk{one, two} {
		vaulttest.Eventually(t, limit, "the act in the audit log", func() error { // its outcome comes when Vault is unsealed
			log := disk.audit(t)
			return errors.Join(contains(log, `"intent"`), contains(log, `"outcome"`), contains(log, `"unseal"`))
		})
	}

	one.fill(t)
	before := strings.Count(two.audit(t), "\n")
	w.vault.Restarted(t)
	w.vault.WaitUnsealed(t, unsealLimit)
	if now := strings.Count(two.audit(t), "\n"); now <= before {
		t.Error("the other sink has taken nothing")
	}

	two.fill(t)
	_, shares := w.front.seen()
	operations := w.card.Operations(t)
	mark := w.daemon.Mark()
	w.vault.Restarted(t)
	w.daemon.Says(t, mark, "audit")
	w.stays(t, 3)
	if _, now := w.front.seen(); now != shares || w.card.Operations(t) != operations {
		t.Errorf("%d shares left and %d operations took place that nobody wrote down", now-shares, w.card.Operations(t)-operations)
	}
	one.free(t)
	w.vault.WaitUnsealed(t, unsealLimit)
	two.free(t)
	w.vault.Restarted(t)
	w.vault.WaitUnsealed(t, unsealLimit)
	for _, disk := range []*disk{one, two} {
		for line := range strings.Lines(disk.audit(t)) {
			if !strings.HasSuffix(line, "}\n") && len(strings.TrimSpace(line)) > 0 && strings.HasPrefix(line, "{") {
				t.Logf("a torn line was closed off: %q", line)
			}
		}
	}
}

// disk is a file system with room for little.
type disk struct{ dir string }

func smallDisk(t *testing.T) *disk {
	t.Helper()
	d := &disk{dir: t.TempDir()}
	must(t, os.Chmod(d.dir, 0o700))
	if err := syscall.Mount("none", d.dir, "tmpfs", 0, "size=64k,mode=0700"); err != nil {
		t.Skipf("a full disk needs a small one, and mounting that needs root: %v", err)
	}
	t.Cleanup(func() { must(t, syscall.Unmount(d.dir, syscall.MNT_DETACH)) })
	return d
}

// fill leaves no room: not in its blocks, and not in the one that the audit log ends in.
func (d *disk) fill(t *testing.T) {
	t.Helper()
	file, err := os.Create(filepath.Join(d.dir, "filling"))
	must(t, err)
	defer file.Close()
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(d.dir, "audit.log"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	defer log.Close()
	for err == nil { // white space is no line
		_, err = log.WriteString(" ")
	}
}

func (d *disk) free(t *testing.T) {
	t.Helper()
	must(t, os.Remove(filepath.Join(d.dir, "filling")))
}

func (d *disk) audit(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(d.dir, "audit.log"))
	must(t, err)
	return string(content)
}
