// Package backend is Vault's face of nitroseal: a secrets engine that wraps, unwraps and keeps unseal material under the
// keys of a hardware security module.
//
// The package is thin on purpose. A path_*.go file declares the paths of one group, turns a request into a call of the
// rooms below (keyring, custody, device, store) and their answer into fields; errors.go alone decides which HTTP code an
// error becomes; guard.go stands before every handler: unknown fields, the request's own deadline, forwarding.
//
// One process serves all mounts of the plugin, and a [logical.Factory] makes one backend for each. The factory touches
// no HSM and no storage: Vault calls it to learn the version while a plugin is being registered. HSMs are opened when a
// request needs them, through the process-wide device registry.
//
// What must outlive a request belongs to the backend, which waits for it in Clean: the making of an HSM key, which takes
// a card half a minute, what is done to a cluster in custody, and the open devices and stores.
package backend

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	vaultstore "vault-plugin-secrets-nitrokey/internal/store/vault"
)

// Version is what the plugin reports of itself to Vault's catalog: "v" and a semantic version. Releases set it with
// -ldflags "-X vault-plugin-secrets-nitrokey/backend.Version=v1.2.3".
var Version = "v0.0.0-dev"

// operationPrefix begins every operation id of the OpenAPI document.
const operationPrefix = "nitrokey"

// Where things lie in the mount's storage.
const (
	configKey      = "config"
	devicesPrefix  = "devices/"
	storesPrefix   = "stores/"
	keysPrefix     = "keys/"     // the keyring's records are "keys/<name>"
	materialPrefix = "material/" // custody's own records: what it expects the stores to hold
	ownStorePrefix = "kept/"     // values of stores of type "vault": kept/<store>/<name>
	clustersPrefix = "clusters/" // how clusters in custody are configured
	custodyPrefix  = "custody/"  // what the custodian notes and holds on this side: intents, answers that no store has yet
)

// Options are what the plugin's process gives to each of its mounts.
type Options struct {
	// Devices opens HSMs for all mounts of the process.
	Devices *device.Registry
	// StateDir is the plugin's -state-dir. Stores of type "file" and the lock files of object stores lie under it; empty
	// where there is none, and then there are no such stores.
	StateDir string
}

// New returns the factory of backends.
func New(options Options) logical.Factory {
	return func(ctx context.Context, config *logical.BackendConfig) (logical.Backend, error) {
		b, err := newBackend(ctx, options, config)
		if err != nil {
			return nil, err
		}
		return b, nil
	}
}

// backend is one mount.
type backend struct {
	*framework.Backend

	options Options
	storage logical.Storage
	// mount names this mount among all that the process serves.
	mount  string
	logger *slog.Logger

	settings settingsCache
	devices  deviceShelf
	stores   storeShelf
	keys     *keyring.Keyring
	keeper   *custody.Keeper
	clusters clusterShelf
	jobs     jobs

	// closing ends when the mount is cleaned up, and every request and job with it.
	closing context.Context
	close   context.CancelFunc
}

func newBackend(ctx context.Context, options Options, config *logical.BackendConfig) (*backend, error) {
	switch {
	case config == nil:
		return nil, errors.New("setting up the backend: no configuration was passed")
	case options.Devices == nil:
		return nil, errors.New("setting up the backend: no device registry was passed")
	}
	b := &backend{
		options: options, storage: mountStorage{config.StorageView}, mount: config.BackendUUID, logger: slog.New(slog.DiscardHandler),
	}
	if config.Logger != nil {
		b.logger = NewLogger(config.Logger)
	}
	b.closing, b.close = context.WithCancel(context.Background())

	locks := new(vaultstore.Locks)
	records := vaultstore.New(b.storage, "", locks)
	b.keys = keyring.New(keyring.Config{
		Records: records, Devices: b, Logger: b.logger, CacheRecords: true, InUse: b.keyUser,
	})
	b.stores.locks = locks
	b.keeper = custody.New(custody.Config{
		Keys: b.keys, Stores: b, Records: records, DefaultStore: b.defaultStore, Logger: b.logger,
	})
	b.clusters.watch.slots = make(chan struct{}, watchParallel)
	b.clusters.custodian = cluster.New(cluster.Config{
		Keeper: b.keeper, Keys: b.keys, Stores: b, Logger: b.logger,
		Local: &mountLocal{Store: vaultstore.New(b.storage, custodyPrefix, locks)},
		Audit: actLog{b.logger},
		// Whichever node of this Vault is active: its storage is the disk.
		Host: "the mount " + b.mount, UserAgent: "vault-plugin-secrets-nitrokey/" + Version, Do: howTo,
	})

	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: Version,
		Help:           strings.TrimSpace(backendHelp),
		Paths:          b.paths(),
		PathsSpecial: &logical.Paths{
			SealWrapStorage: []string{devicesPrefix, storesPrefix, keysPrefix, ownStorePrefix, custodyPrefix},
			LocalStorage:    []string{framework.WALPrefix},
		},
		InitializeFunc:    b.initialize,
		PeriodicFunc:      b.tick,
		Invalidate:        b.invalidate,
		Clean:             b.clean,
		WALRollback:       b.rollback,
		WALRollbackMinAge: walMinAge,
	}
	for _, path := range b.Paths {
		b.guard(path)
	}
	if err := b.Setup(ctx, config); err != nil {
		return nil, err
	}
	return b, nil
}

// paths lists all paths, the most specific ones first: the first pattern that matches is taken.
func (b *backend) paths() []*framework.Path {
	return framework.PathAppend(
		b.configPaths(),
		b.deviceActionPaths(),
		b.devicePaths(),
		b.storePaths(),
		b.keyActionPaths(),
		b.keyPaths(),
		b.wrapPaths(),
		b.transitPaths(),
		b.materialPaths(),
		b.clusterActionPaths(),
		b.clusterPaths(),
		b.randomPaths(),
		b.healthPaths(),
		b.benchPaths(),
		b.unknownPaths(),
	)
}

// initialize goes on with what an earlier process had begun and not ended.
func (b *backend) initialize(ctx context.Context, _ *logical.InitializationRequest) error {
	if !b.WriteSafeReplicationState() {
		return nil
	}
	b.resumeGeneration(ctx)
	b.resumeRewraps(ctx)
	return b.tick(ctx, nil) // after a power cut the others wait for their keys as well
}

// invalidate forgets what was cached of a record that another node changed.
func (b *backend) invalidate(_ context.Context, key string) {
	switch {
	case key == configKey:
		b.settings.forget()
	case strings.HasPrefix(key, devicesPrefix):
		b.dropDevice(strings.TrimPrefix(key, devicesPrefix))
	case strings.HasPrefix(key, storesPrefix):
		b.dropStore(strings.TrimPrefix(key, storesPrefix))
	case strings.HasPrefix(key, keysPrefix):
		b.keys.Invalidate(strings.TrimPrefix(key, keysPrefix))
	case strings.HasPrefix(key, clustersPrefix):
		b.clusters.watch.forget(strings.TrimPrefix(key, clustersPrefix))
	}
}

// cleanPatience is how long a mount that is being cleaned up waits for what must not be cut off: a Vault that is being
// initialised, whose answer is the only copy of its keys. It is held in the mount's storage one write after it came, so
// this is the time that sys/init takes.
const cleanPatience = 30 * time.Second

// clean ends what the mount still does and gives everything back. Vault holds a lock of all mounts of the process
// meanwhile: nothing here waits for an HSM, because everything that does ends with b.closing. What does not end with it
// is waited for with patience. After that, the mount's storage is gone for it, and the store that the keys belong to is what it
// goes on trying for as long as the process lives.
func (b *backend) clean(context.Context) {
	b.close()
	b.keys.EndLeases() // at once, whatever must be waited for
	ended := make(chan struct{})
	go func() { // ends with the last job
		defer close(ended)
		if err := b.keys.Close(); err != nil { // what still runs uses it without leases
			b.logger.Warn("closing the keyring", "error", err)
		}
		b.jobs.wait()
		if err := b.clusters.custodian.Close(); err != nil {
			b.logger.Warn("closing the connections to clusters", "error", err)
		}
		b.dropStores("")
		b.dropAllDevices()
	}()
	patience := time.NewTimer(cleanPatience)
	defer patience.Stop()
	select {
	case <-ended:
	case <-patience.C:
		b.logger.Error("the mount ends while the keys of a new Vault are not stored; read status of the clusters at once when it is back",
			"clusters", strings.Join(b.clusters.acts.atWork(), ","))
	}
}

// walMinAge is the age at which Vault hands us a journal entry for rollback, which tries again what the HSM's absence
// held up. What is still in progress then is left alone: the rollback sees that.
const walMinAge = 2 * time.Minute

const backendHelp = `
This engine keeps the unseal material of Vault and OpenBao clusters under the keys of a hardware security module: a
Nitrokey HSM 2 or another PKCS#11 token, or a Nitrokey NetHSM. Private keys never leave the HSM; sealing needs their
public half only, and opening costs one operation in the HSM.

Begin with "devices/<name>" (an HSM), then "keys/<name>" (a wrapping key on it). "wrap/<key>" and "unwrap/<key>" seal and
open a value that you keep yourself; "material/<cluster>/<name>" keeps it for you in a store, "stores/<name>";
"encrypt/<key>" and "decrypt/<key>" serve the seal "transit" of other Vaults; "clusters/<name>" takes other Vaults into
custody: it initialises them, keeps their keys and unseals their nodes.
`
