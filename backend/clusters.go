package backend

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	vaultstore "vault-plugin-secrets-nitrokey/internal/store/vault"
)

// custodian is what the paths under clusters/ ask for. *cluster.Custodian is the real one.
type custodian interface {
	Init(ctx context.Context, c *cluster.Cluster, options cluster.InitOptions) (cluster.InitResult, error)
	TendAll(ctx context.Context, c *cluster.Cluster) []cluster.NodeOutcome
	Look(ctx context.Context, c *cluster.Cluster, address string) (cluster.NodeStatus, error)
	Status(ctx context.Context, c *cluster.Cluster) (cluster.Status, error)
	Rekey(ctx context.Context, c *cluster.Cluster, options cluster.RekeyOptions) (cluster.RekeyResult, error)
	Root(ctx context.Context, c *cluster.Cluster, options cluster.RootOptions) (cluster.RootResult, error)
	ClearAlarm(ctx context.Context, c *cluster.Cluster, address string) error
	Retry(c *cluster.Cluster)
	Close() error
}

// howTo says how a verb is done to a cluster, for the custodian's sentences.
func howTo(verb, name string) string {
	switch verb {
	case "init", "unseal", "rekey", "root":
		return fmt.Sprintf("write %s%s/%s", clustersPrefix, name, verb)
	default:
		return fmt.Sprintf("nitroseal %s %s, the command, which keeps clusters beside this mount", verb, name)
	}
}

// clusterShelf is what a mount knows of the clusters in its custody.
type clusterShelf struct {
	custodian custodian
	acts      acts
	watch     watch
	letters   letters
	// writing is held, for one cluster, while its record is read, changed and written; tending while its nodes are unsealed.
	writing, tending turns
}

// clusterRecord is what "clusters/<name>" holds in the mount's storage. None of it is secret; who may write it decides
// where shares go.
type clusterRecord struct {
	Nodes         []string      `json:"nodes"`
	CACert        string        `json:"ca_cert,omitempty"`
	TLSServerName string        `json:"tls_server_name,omitempty"`
	TLSPins       []string      `json:"tls_pins,omitempty"`
	PlainHTTP     bool          `json:"plain_http,omitempty"`
	RaftLeaderCA  string        `json:"raft_leader_ca_cert,omitempty"`
	Timeout       time.Duration `json:"timeout,omitempty"`

	Key    string `json:"key,omitempty"`
	Spread string `json:"spread,omitempty"`
	Store  string `json:"store"`

	Shares    int `json:"shares"`
	Threshold int `json:"threshold"`
	// 0 for the defaults, where nobody said more: a cluster that does not unseal itself has none.
	RecoveryShares    int `json:"recovery_shares"`
	RecoveryThreshold int `json:"recovery_threshold"`

	// PGPKeys are people's keys by their names, armored or base64, as they were written.
	PGPKeys    map[string]string `json:"pgp_keys,omitempty"`
	RootToken  string            `json:"root_token,omitempty"`
	RootPGPKey string            `json:"root_pgp_key,omitempty"`

	Watch bool `json:"watch"`

	Updated   time.Time `json:"updated"`
	UpdatedBy string    `json:"updated_by"`
	// Accepted is the last time that somebody said that shares may go elsewhere than before.
	Accepted *accepted `json:"accepted,omitempty"`
}

// accepted says who let the shares of a cluster go elsewhere than before, when, and what changed.
type accepted struct {
	Changed []string  `json:"changed"`
	By      string    `json:"by"`
	At      time.Time `json:"at"`
}

// The numbers of shares where a cluster's first write says none.
const (
	defaultShares    = cluster.DefaultShares
	defaultThreshold = cluster.DefaultThreshold
)

// newClusterRecord is what a cluster's first write begins with.
func newClusterRecord() *clusterRecord {
	return &clusterRecord{
		Shares: defaultShares, Threshold: defaultThreshold, RootToken: string(cluster.RootDiscard), Watch: true,
	}
}

// cluster is the record as the custodian takes it, checked.
func (r *clusterRecord) cluster(name string) (*cluster.Cluster, error) {
	c := &cluster.Cluster{
		Name: name, Nodes: slices.Clone(r.Nodes), Key: r.Key, Store: r.Store,
		TLS:    node.TLS{CA: given(r.CACert), ServerName: r.TLSServerName, Pins: slices.Clone(r.TLSPins), PlainHTTP: r.PlainHTTP},
		Shares: r.Shares, Threshold: r.Threshold, RecoveryShares: r.RecoveryShares, RecoveryThreshold: r.RecoveryThreshold,
		RootToken: cluster.RootToken(r.RootToken), RaftLeaderCA: given(r.RaftLeaderCA), NodeTimeout: r.Timeout,
	}
	var err error
	if c.RootPGPKey, err = pgpKey("root_pgp_key", r.RootPGPKey); err != nil {
		return nil, err
	}
	if r.Spread != "" {
		spread, err := cluster.ParseSpread(r.Spread)
		if err != nil {
			return nil, err
		}
		c.Spread = &spread
	}
	for _, person := range slices.Sorted(maps.Keys(r.PGPKeys)) {
		key, err := pgpKey("the key of "+person+" in pgp_keys", r.PGPKeys[person])
		if err != nil {
			return nil, err
		}
		c.People = append(c.People, cluster.Person{Name: person, PGPKey: key})
	}
	return c, c.Check()
}

// given is nil for an empty text.
func given(text string) []byte {
	if text == "" {
		return nil
	}
	return []byte(text)
}

// pgpKey reads an OpenPGP key as Vault's own paths take them: base64 of its binary form, or armored.
func pgpKey(field, text string) ([]byte, error) {
	text = strings.TrimSpace(text)
	if text == "" || strings.Contains(text, "-----BEGIN") {
		return given(text), nil
	}
	binary, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(text), ""))
	if err != nil {
		return nil, mistake("%s is neither armored nor base64; export it with gpg --armor --export NAME", field)
	}
	return binary, nil
}

// keys are the wrapping keys that a cluster's material is, or is to be, sealed with.
func (r *clusterRecord) keys() []string {
	if r.Spread == "" {
		return []string{r.Key}
	}
	spread, err := cluster.ParseSpread(r.Spread)
	if err != nil {
		return nil // it was checked when it was written
	}
	return spread.Keys
}

// moved names the fields by which shares would go elsewhere than another record says: to other servers, to whoever is
// taken for them, under other HSMs, or to other people.
func (r *clusterRecord) moved(from *clusterRecord) []string {
	var fields []string
	note := func(field string, same bool) {
		if !same {
			fields = append(fields, field)
		}
	}
	note("nodes", slices.Equal(sorted(r.Nodes), sorted(from.Nodes)))
	note("ca_cert", r.CACert == from.CACert)
	note("tls_server_name", r.TLSServerName == from.TLSServerName)
	note("tls_pins", slices.Equal(sorted(r.TLSPins), sorted(from.TLSPins)))
	note("plain_http", r.PlainHTTP == from.PlainHTTP)
	note("raft_leader_ca_cert", r.RaftLeaderCA == from.RaftLeaderCA)
	note("key", r.Key == from.Key)
	note("spread", r.Spread == from.Spread)
	note("store", r.Store == from.Store)
	note("pgp_keys", maps.Equal(r.PGPKeys, from.PGPKeys))
	return fields
}

func sorted(list []string) []string { return slices.Sorted(slices.Values(list)) }

// readCluster returns a cluster's record, nil where there is none.
func (b *backend) readCluster(ctx context.Context, name string) (*clusterRecord, error) {
	entry, err := b.storage.Get(ctx, clustersPrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading the record of cluster %q: %w", name, err)
	}
	if entry == nil {
		return nil, nil //nolint:nilnil // "absent" is an ordinary answer, and Vault's own: a nil response is 404
	}
	record := new(clusterRecord)
	if err := json.Unmarshal(entry.Value, record); err != nil {
		return nil, fmt.Errorf("reading the record of cluster %q: it is damaged; delete the cluster, its material stays, and write it again: %w", name, err)
	}
	return record, nil
}

func (b *backend) putCluster(ctx context.Context, name string, record *clusterRecord) error {
	entry, err := logical.StorageEntryJSON(clustersPrefix+name, record)
	if err != nil {
		return fmt.Errorf("encoding the record of cluster %q: %w", name, err)
	}
	if err := b.storage.Put(ctx, entry); err != nil {
		return fmt.Errorf("writing the record of cluster %q: %w", name, err)
	}
	b.clusters.watch.forget(name) // whatever kept the watch from trying may be mended
	return nil
}

// knownCluster returns the cluster that a request names; 404 where it is not configured.
func (b *backend) knownCluster(ctx context.Context, name string) (*cluster.Cluster, error) {
	record, err := b.readCluster(ctx, name)
	switch {
	case err != nil:
		return nil, err
	case record == nil:
		return nil, absent("cluster %q is not configured in this mount; write clusters/%s first", name, name)
	}
	return record.cluster(name)
}

// clusterMaterial names what is kept of a cluster's keys: what this mount has records of, and what lies without any in the stores
// of the cluster, as it does after the mount was lost. A store that cannot be looked into is an error then.
func (b *backend) clusterMaterial(ctx context.Context, name string, stores ...string) ([]string, error) {
	items, _, err := b.keeper.List(ctx, name)
	if err != nil {
		return nil, err
	}
	var kept []string
	for _, item := range items {
		if isCustodyItem(item.Name) {
			kept = append(kept, item.Name)
		}
	}
	held, err := b.storage.List(ctx, custodyPrefix+"held/"+name+"/")
	if err != nil {
		return nil, fmt.Errorf("looking for what is held of cluster %q: %w", name, err)
	}
	if len(held) > 0 { // by the initialisation that made it
		kept = append(kept, "what the store has not taken yet")
	}
	for _, from := range stores {
		if len(kept) > 0 {
			break
		}
		if from == "" {
			continue
		}
		opened, err := b.Store(ctx, from)
		if errors.Is(err, errNoStore) {
			continue
		}
		var paths []string
		if err == nil {
			paths, err = opened.List(ctx, materialPrefix+name+"/") // as the keeper names its envelopes
		}
		if err != nil {
			return nil, fmt.Errorf("looking in store %q for keys of cluster %q: %w", from, name, err)
		}
		for _, path := range paths {
			if item := strings.TrimPrefix(path, materialPrefix+name+"/"); isCustodyItem(item) {
				kept = append(kept, item)
			}
		}
	}
	return kept, nil
}

// isCustodyItem tells what custody keeps of a cluster from what people keep beside it. What it holds, until the store has it, is
// sealed for the names held.*, and opens under no other.
func isCustodyItem(name string) bool {
	kind, _, _ := strings.Cut(name, ".")
	return cluster.IsItem(name) || kind == "held"
}

// ofCustody tells whether an item is what a cluster in custody is opened with: the cluster is configured, or was, and the item
// holds the facts of it.
func (b *backend) ofCustody(ctx context.Context, name, item string, data *framework.FieldData) (bool, error) {
	if !isCustodyItem(item) {
		return false, nil
	}
	if configured, err := b.exists(ctx, clustersPrefix+name); err != nil || configured {
		return configured, err
	}
	metadata, err := b.keeper.Get(ctx, name, item, readOptions(nil, data))
	if errors.Is(err, custody.ErrNotFound) {
		return false, nil
	}
	return slices.Contains(metadata.Fields, "facts"), err
}

// checkReferences refuses a cluster whose keys or store are not there, and returns warnings about those that could not be
// used yet.
func (b *backend) checkReferences(ctx context.Context, record *clusterRecord) (warnings []string, err error) {
	for _, key := range record.keys() {
		switch err := b.keys.Ready(ctx, key, keyring.PurposeCluster); {
		case errors.Is(err, keyring.ErrKeyNotFound):
			return nil, mistake("%w; write keys/%s first", err, key)
		case errors.Is(err, keyring.ErrNotReady), errors.Is(err, keyring.ErrGenerating):
			warnings = append(warnings, "init waits for this: "+err.Error())
		case err != nil:
			return nil, err
		}
	}
	kept, err := b.readStore(ctx, record.Store)
	switch {
	case err != nil:
		return nil, err
	case kept == nil:
		return nil, mistake("store %q: %w; write stores/%s first", record.Store, errNoStore, record.Store)
	}
	return warnings, nil
}

// ownVaultTimeout is how long a write waits for the nodes that it names to say whose they are.
const ownVaultTimeout = 5 * time.Second

// errOwnVault is wrapped where a cluster is the Vault that this mount lives in.
var errOwnVault = errors.New("it is the Vault that this mount lives in")

// checkOwnVault refuses the Vault that this mount lives in: while it is sealed, nothing here can unseal it. A node tells
// its cluster's id while it is unsealed, and this Vault is, or nobody would ask. Unasked are the nodes that could not say.
func (b *backend) checkOwnVault(ctx context.Context, c *cluster.Cluster) (unasked []string, err error) {
	own, err := b.System().ClusterID(ctx)
	if err != nil || own == "" { // not every host answers that
		b.logger.Warn("asking the host for the id of its cluster", "error", err)
		return c.Nodes, nil
	}
	ctx, cancel := context.WithTimeout(ctx, ownVaultTimeout)
	defer cancel()
	answers := askAll(c.Nodes, func(address string) map[string]any {
		status, err := b.clusters.custodian.Look(ctx, c, address)
		return map[string]any{"id": status.Seal.ClusterID, "err": errors.Join(err, status.Err)}
	})
	for _, address := range c.Nodes {
		answer := answers[address].(map[string]any)
		if answer["id"] == own {
			return nil, mistake("node %s of cluster %q: %w: what unseals it would lie behind the door that it opens; keep its keys with `nitroseal` "+
				"beside it, or in another Vault", address, c.Name, errOwnVault)
		}
		if err, _ := answer["err"].(error); err != nil {
			unasked = append(unasked, address)
		}
	}
	return unasked, nil
}

// checkPresent refuses to change the keys of a raft cluster while a node of it is sealed or away: it has its own copy of how
// it is unsealed, which it brings up to date only once it is unsealed, so it would want the old keys, and nobody has them then.
func (b *backend) checkPresent(ctx context.Context, c *cluster.Cluster) error {
	ctx, cancel := context.WithTimeout(ctx, ownVaultTimeout)
	defer cancel()
	var mu sync.Mutex
	raft := false
	var absent []string
	askAll(c.Nodes, func(address string) map[string]any {
		status, err := b.clusters.custodian.Look(ctx, c, address)
		mu.Lock()
		defer mu.Unlock()
		raft = raft || status.Seal.StorageType == "raft"
		if err != nil || status.Seal.Sealed || !status.Seal.Initialized {
			absent = append(absent, address)
		}
		return nil
	})
	if !raft || len(absent) == 0 || len(absent) == len(c.Nodes) { // of no node at all the custodian says more
		return nil
	}
	slices.Sort(absent)
	return fmt.Errorf("changing the keys of cluster %q: %w: %s sealed or away, and a raft node that is, while the keys change, can be unsealed with the old "+
		"ones only, which are gone then; unseal it first, or take it off the cluster and off nodes; nothing was changed", c.Name, errAbsent, summarise(absent))
}

// errAbsent is wrapped where nodes have to be there and are not. It passes once they are.
var errAbsent = errors.New("not all of its nodes are there")

// clustersUsing names the configured clusters that a predicate holds of.
func (b *backend) clustersUsing(ctx context.Context, uses func(*clusterRecord) bool) ([]string, error) {
	names, err := b.storage.List(ctx, clustersPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the clusters: %w", err)
	}
	var users []string
	for _, name := range names {
		record, err := b.readCluster(ctx, name)
		if err != nil {
			return nil, err
		}
		if record != nil && uses(record) {
			users = append(users, clustersPrefix+name)
		}
	}
	return users, nil
}

// mountLocal is the custodian's own memory in the mount's storage. It is the one of all hosts that may become active:
// only the active node writes, and there one process serves the mount, whose locks are in memory.
type mountLocal struct {
	*vaultstore.Store
	locks turns
}

// Lock waits for the lock of a name until ctx ends.
func (l *mountLocal) Lock(ctx context.Context, name string) (unlock func(), err error) {
	return l.locks.take(ctx, cmp.Or(strings.TrimSpace(name), "custody"))
}
