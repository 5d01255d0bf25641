// Package daemon is "nitroseal run": it watches every node of every cluster and has the sealed ones unsealed.
//
// A [Site] is what was made of the configuration: a custodian, clusters, devices, stores. Each node has one goroutine, its
// watch, which looks at the node, and a look touches no secret. Where a node is sealed, its watch asks the cluster's
// [tender] to have it unsealed; the tender gathers the nodes of the cluster that are sealed at that moment, so that their
// shares are opened once, and has one act under way for each cluster. How many clusters are tended at one time is bounded
// too, and those that wait take turns in the order in which they came: neither a Vault nor an HSM is hammered.
//
// A watch looks every few seconds (jittered), every second while the node is sealed or has just gone, and ever more seldom
// the longer it does not answer. After an error that only a person can mend (wrong shares, a foreign cluster, a refused
// PIN, see [barTime]) nothing is asked of the custodian for ten minutes, or until the configuration is read anew or the material
// changed; the looking goes on, and the log says it once.
//
// SIGHUP builds a new site. Where that fails the old one stays; else the new one's watches begin, the old one's end, and it
// is closed when the acts that it had under way have ended. A clean stop waits for these as well, and without limit for a window
// that is critical ([Hooks.Critical]): between Vault's answer to an initialisation and our first durable write the process
// holds the only copy of the keys.
package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// ErrConfig is wrapped by every complaint about options and sites: somebody can mend it, trying again does not help.
var ErrConfig = errors.New("invalid configuration of the daemon")

// Custodian is what the daemon wants of the verbs on clusters. [Custody] makes one of package cluster's.
type Custodian interface {
	// Look asks one node how it fares. It touches neither secret nor HSM.
	Look(ctx context.Context, cluster, address string) (State, error)
	// Tend brings the nodes of one cluster on: finishes what is held, joins, unseals what is sealed; the shares are opened
	// once for all of them. It returns one result for each address, in that order. The daemon calls it for one cluster
	// at a time only, and not again before there is reason to.
	Tend(ctx context.Context, cluster string, addresses []string) []Result
	// Generation names the state of the cluster's material in any way that changes with it. It touches no HSM.
	Generation(ctx context.Context, cluster string) (string, error)
}

// State is how a node fares.
type State struct {
	Initialized, Sealed bool
	// Version is the one that the node tells, empty where it does not.
	Version string
	// Alarm is one that was raised before and still stands.
	Alarm Alarm
	// CertificateEnds is when the node's certificate ends, zero where nobody looks at that.
	CertificateEnds time.Time
}

// Result is what came of tending one node.
type Result struct {
	Address string
	// State is the node's after the act, where it is known; Unsealed is true where the act unsealed it.
	State    State
	Unsealed bool
	Note     string // on what the node waits for, "" for nothing
	Err      error
}

// Cluster is a cluster to be watched.
type Cluster struct {
	Name  string
	Nodes []string // addresses
	// Store is where its keys are, for /readyz; "" where nobody knows.
	Store string
}

// Device is an HSM of the configuration. *device.Handle is one.
type Device = monitor.Device

// Store is a store of the configuration, as it came from [Hooks.Store].
type Store struct {
	Name  string
	Store store.Store
	// Probe lets the daemon read a name that does not exist once a minute, to know whether the store answers. It is not for
	// stores on an HSM, which would be kept busy; Store may be nil there, the name is for the metrics.
	Probe bool
}

// Listen is where the daemon answers /healthz, /readyz and /metrics.
type Listen = monitor.Listen

// Site is what was made of one configuration.
type Site struct {
	Custodian Custodian
	Clusters  []Cluster
	Devices   []Device
	Stores    []Store
	Audit     *audit.Log // for the metrics, and to be reopened; nil for none
	Listen    Listen
	Interval  time.Duration // between two looks at a node that is well; 0 for 5 seconds
	// Warm is called once in the background, when the site's nodes begin to be watched: for what unsealing would spend time on
	// that can be spent before. Its error is logged, no more. Nil for nothing.
	Warm func(ctx context.Context) error
	// Close gives back all of it. It is called once, after everything that used the site has ended. Nil for nothing.
	Close func() error
}

// Options are what [Run] needs.
type Options struct {
	// Build makes a site, at the start and at each reload. Where it fails at a reload, the site in use stays. What it makes
	// reports through the hooks.
	Build   func(ctx context.Context, hooks *Hooks) (*Site, error)
	Logger  *slog.Logger // nil for none
	Version string
	// Reload delivers one value for each reload; nil for SIGHUP.
	Reload <-chan os.Signal
	// Listening, where set, is called with each address that the daemon has begun to listen on.
	Listening func(address string)
	// Ready, where set, is called once: every node was looked at.
	Ready func()

	notify      *monitor.Notifier // set by tests
	listenPause time.Duration     // set by tests; 0 for that of everybody
}
