// Package nethsmtest is a NetHSM without hardware: an http.Handler that answers as a real one does, statuses, headers,
// bodies and the order of its checks included, with real cryptography behind it.
//
// A [HSM] is a cluster of one or more nodes. All nodes share one database (keys, users, namespaces, the backup
// passphrase); each has its own lock, unlock passphrase, TLS certificate, rate limits, faults and counters, as in the
// original. [Start] runs it over TLS on loopback for a test, [Serve] for a demonstration, [New] gives handlers alone.
//
// What it knows was taken from a recording of a real server (testdata/nethsm-exchanges.jsonl), which TestConformance
// replays against it. Every request goes through one order of checks (machine.go) over a table of resources (routes.go);
// what a resource does is in the file of its noun.
//
// It differs from the original on purpose in these points: private keys lie in the clear in its directory; scrypt runs
// with a smaller cost unless [Options].RealCosts; RSA keys come from a pool shared by the doubles of one process, real
// keys that no two open doubles hold at the same time, because generating them would be most of a test's time;
// secp256k1 and Brainpool keys are refused; a reboot takes no time.
//
// # The same test against a real NetHSM
//
// TestConformance runs against a NetHSM instead of the double where these variables are set:
//
//	NITROSEAL_NETHSM_URL   https://host[:port]
//	NITROSEAL_NETHSM_CA    absolute path of a file with the CA of its certificate (PEM), or
//	NITROSEAL_NETHSM_PIN   SHA-256 of its certificate, in hexadecimal
//
// and one of two things besides:
//
//	NITROSEAL_NETHSM_ADMIN, NITROSEAL_NETHSM_ADMIN_PASSWORD_FILE
//	    an Administrator of a NetHSM in use, of a namespace at best. What harms nobody is replayed, under ids that begin
//	    with "nitroseal-test-" and such that the NetHSM makes up, by a user with a random passphrase, and all of it is
//	    removed again, after Ctrl-C as well. What a run that was killed has left is removed by the next.
//	NITROSEAL_NETHSM_MAY_ERASE=yes
//	    the whole recording. The NetHSM must be Unprovisioned, else nothing is sent to it; it is provisioned with
//	    passphrases that everybody knows, used, rebooted twice, and RESET TO FACTORY SETTINGS at the end and after Ctrl-C.
//	    A run that was killed leaves it provisioned: reset it by hand.
//
// A real reboot takes minutes: give go test a -timeout of an hour, and -count=1, or it repeats what an earlier run said.
package nethsmtest

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"
)

// Users and passphrases of a double that starts provisioned.
const (
	AdminUser          = "admin"
	AdminPassphrase    = "Administrator"
	OperatorUser       = "operator"
	OperatorPassphrase = "OperatorPassphrase"
	MetricsUser        = "metrics"
	MetricsPassphrase  = "MetricsPassphrase"
	// BackupUser may ask for a backup; BackupPassphrase is what this user logs in with. BackupFilePassphrase is for whoever
	// configures one to encrypt the files with: a double has none yet, because it costs half a second.
	BackupUser           = "backup"
	BackupPassphrase     = "BackupUserPassphrase"
	BackupFilePassphrase = "BackupPassphrase"
	UnlockPassphrase     = "UnlockPassphrase"
)

// State is what /health/state says.
type State string

// The states of a node.
const (
	Unprovisioned State = "Unprovisioned"
	Locked        State = "Locked"
	Operational   State = "Operational"
	Failed        State = "Failed"
)

// Options say what kind of NetHSM is wanted. The zero value is one node, not provisioned, in memory.
type Options struct {
	// Nodes is how many nodes share the database; 0 means one.
	Nodes int
	// Dir keeps the database between runs; empty keeps it in memory. One double at a time may use a directory. What lies
	// there wins over Provisioned and UnattendedBoot.
	Dir string
	// Provisioned makes the users and passphrases of this package's constants and starts Operational.
	Provisioned bool
	// UnattendedBoot switches it on at every node; without it a restarted node is Locked.
	UnattendedBoot bool
	// Container makes it refuse what the software container cannot do: network, factory reset, reboot, shutdown, update.
	Container bool
	// Now is the clock of rate limits, of a lost etcd and of certificates; nil means time.Now. Latency and service time
	// always run on the real one.
	Now func() time.Time
	// ServiceTime is how long a private-key operation and a request for random bytes take at least, the real work included.
	ServiceTime time.Duration
	// Parallel is how many of those run at a time on one node; others wait. 0 means no limit.
	Parallel int
	// RealCosts runs scrypt for unlock passphrases with the original's parameters, about half a second for each.
	RealCosts bool
	// FreshKeys makes every RSA key anew instead of taking it from the pool of the process.
	FreshKeys bool
	// SelfSigned gives each node a self-signed certificate, as a NetHSM has until one is set, instead of one of [HSM.CA].
	SelfSigned bool
	// Listen is the address of the first node for Serve and Start; further nodes take the next ports. Empty, or port 0,
	// takes free ports of 127.0.0.1.
	Listen string
}

// HSM is a NetHSM, or a cluster of them.
type HSM struct {
	options Options
	now     func() time.Time
	store   *store
	nodes   []*Node
	ca      *authority
	lent    *loan

	// owned are goroutines that outlive their request: nodes that were told to shut down.
	owned sync.WaitGroup
	close sync.Once
}

// New makes a double that does not listen: its nodes are handlers. Close it to give its keys back to the pool.
func New(o Options) (*HSM, error) {
	if o.Nodes < 0 || o.Parallel < 0 || o.ServiceTime < 0 {
		return nil, errors.New("making a NetHSM double: Nodes, Parallel and ServiceTime must not be negative")
	}
	o.Nodes = max(o.Nodes, 1)
	h := &HSM{options: o, now: o.Now, lent: &loan{fresh: o.FreshKeys || o.Dir != ""}}
	if h.now == nil {
		h.now = time.Now
	}
	if err := h.open(); err != nil {
		return nil, fmt.Errorf("making a NetHSM double: %w", err)
	}
	return h, nil
}

// open reads or makes the database, then the nodes.
func (h *HSM) open() error {
	var err error
	if h.store, err = openStore(h.options.Dir); err != nil {
		return err
	}
	fresh := h.store.record.Authority == nil
	if h.ca, err = openAuthority(h.store.record.Authority, h.now()); err != nil {
		return err
	}
	h.store.record.Authority = h.ca.record()
	for len(h.store.record.Nodes) < h.options.Nodes {
		h.store.record.Nodes = append(h.store.record.Nodes, newNodeRecord())
	}
	for i := range h.options.Nodes {
		n, err := newNode(h, i)
		if err != nil {
			return err
		}
		h.nodes = append(h.nodes, n)
	}
	if fresh && h.options.Provisioned {
		if err := h.provisionAll(); err != nil {
			return err
		}
	}
	for _, n := range h.nodes {
		n.boot()
		if fresh && h.options.Provisioned {
			n.unlocked()
		}
	}
	return h.store.update(func(*record) error { return nil })
}

// provisionAll makes the users and passphrases of the constants.
func (h *HSM) provisionAll() error {
	domain := random(32)
	return h.store.update(func(r *record) error {
		r.DomainKey = domain
		for i := range h.options.Nodes {
			lock, err := sealDomainKey(domain, []byte(UnlockPassphrase), h.options.RealCosts)
			if err != nil {
				return err
			}
			r.Nodes[i].Lock = lock
			r.Nodes[i].UnattendedBoot = h.options.UnattendedBoot
		}
		r.Users[AdminUser] = newUser("admin", roleAdministrator, []byte(AdminPassphrase))
		r.Users[OperatorUser] = newUser("operator", roleOperator, []byte(OperatorPassphrase))
		r.Users[MetricsUser] = newUser("metrics", roleMetrics, []byte(MetricsPassphrase))
		r.Users[BackupUser] = newUser("backup", roleBackup, []byte(BackupPassphrase))
		return nil
	})
}

// Serve makes a double and lets every node listen over TLS. The caller closes it.
func Serve(o Options) (*HSM, error) {
	h, err := New(o)
	if err != nil {
		return nil, err
	}
	for i, n := range h.nodes {
		if err := n.listen(o.Listen, i); err != nil {
			h.Close()
			return nil, fmt.Errorf("starting a NetHSM double: %w", err)
		}
	}
	return h, nil
}

// Start serves a double until the test ends.
func Start(t testing.TB, o Options) *HSM {
	t.Helper()
	h, err := Serve(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// Close stops every node, waits for the requests in flight to end, and gives the keys back.
func (h *HSM) Close() {
	h.close.Do(func() {
		for _, n := range h.nodes {
			n.Stop()
		}
		h.owned.Wait()
		h.flush()
		h.lent.giveBack()
	})
}

// flush writes down how often keys were used, as the original does when it shuts down.
func (h *HSM) flush() {
	// Nobody is left to be told; without this write only the numbers of operations are old.
	_ = h.store.update(func(r *record) error {
		for name, k := range r.Keys {
			r.Keys[name] = k.with(k.Revision, func(*keyRecord) {})
		}
		return nil
	})
}

// URLs are the addresses of the nodes, https://127.0.0.1:port without a path, in their order; a node that never listened
// has none.
func (h *HSM) URLs() []string {
	var urls []string
	for _, n := range h.nodes {
		if url := n.URL(); url != "" {
			urls = append(urls, url)
		}
	}
	return urls
}

// CA is the certificate (PEM) of the authority that issued the nodes' certificates.
func (h *HSM) CA() []byte { return slices.Clone(h.ca.pem) }

// Node is the i-th node, counted from zero.
func (h *HSM) Node(i int) *Node { return h.nodes[i] }

// Nodes are all nodes.
func (h *HSM) Nodes() []*Node { return slices.Clone(h.nodes) }

// DecryptCount is how many decryptions all nodes carried out, failed ones included.
func (h *HSM) DecryptCount() int {
	total := 0
	for _, n := range h.nodes {
		total += n.Decrypts()
	}
	return total
}

// ServeHTTP lets a double of one node be used as a handler.
func (h *HSM) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.nodes[0].ServeHTTP(w, r) }
