// Package cluster takes custody of whole clusters of Vault or OpenBao: it initialises them, joins and unseals their nodes,
// and changes their keys.
//
// What a cluster's custody consists of lies in sealed items of [custody.Keeper]: "unseal" or, for a cluster that unseals
// itself, "recovery", and "root" for as long as a root token is kept. An item holds all shares, so that opening it costs
// one operation in one HSM; with a [Spread] the shares are dealt to several items, each under its own wrapping key, and as
// many HSMs must take part as the spread says. Beside the shares lie the facts of the cluster ([Facts]), which are thereby
// as authentic as they are: what a node must be before it is given a share.
//
// Everything here may be cut off at any point and done again. Creating and changing go by single compare-and-swaps of one
// item; init.go has the table of its steps. Hosts share nothing but the store, and processes of one host the [Local] disk.
//
// A share leaves only for a node that proved by TLS who it is and whose seal is as recorded, and all that is opened is
// wiped when the call ends.
package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Cluster says which nodes form a cluster and how its keys are kept. It is configuration: nothing in it is secret.
type Cluster struct {
	Name string
	// Nodes are the addresses of the nodes, not of a balancer. The first one is the one that is initialised, so every host
	// has to list them in the same order.
	Nodes []string
	TLS   node.TLS
	// Key is the wrapping key that seals the shares, any recipient of which opens them. Spread is given in its place.
	Key    string
	Spread *Spread
	Store  string
	// Shares and Threshold are those of the unseal keys, 5 and 3 where both are 0. RecoveryShares and RecoveryThreshold are
	// used in their place where the cluster unseals itself.
	Shares, Threshold                 int
	RecoveryShares, RecoveryThreshold int
	// People take one share each, the last ones; nitroseal never sees them.
	People []Person
	// RootToken says what becomes of the first root token, "" for RootDiscard. RootPGPKey is whom it is encrypted to with
	// RootPGP, armored or binary.
	RootToken  RootToken
	RootPGPKey []byte
	// RaftLeaderCA is the CA, in PEM, by which a node that joins knows its leader; nil for that of TLS.
	RaftLeaderCA []byte
	// NodeTimeout bounds an ordinary call of a node, 0 for 10 seconds.
	NodeTimeout time.Duration
}

// Person takes a share.
type Person struct {
	Name   string
	PGPKey []byte // armored or binary
}

// RootToken says what becomes of the root token that initialising makes.
type RootToken string

// What becomes of a root token.
const (
	RootDiscard RootToken = "discard" // revoked as soon as a node is active, and kept sealed until then
	RootKeep    RootToken = "keep"    // kept sealed, in the item "root"
	RootPGP     RootToken = "pgp"     // encrypted by Vault to a person; the message is kept and given out
)

// The default numbers of shares.
const (
	DefaultShares    = 5
	DefaultThreshold = 3
)

// MaxShares is the most shares that a set can have: an item has room for two sets, the old one and the new one of a rekey.
const MaxShares = custody.MaxFields/2 - 1

// Kind tells the two kinds of keys that can be in custody from each other.
type Kind string

// The kinds. They name the items, too.
const (
	KindUnseal   Kind = "unseal"
	KindRecovery Kind = "recovery"
)

// itemRoot is the item of the root token.
const itemRoot = "root"

// nodeKind is how package node calls the kind.
func (k Kind) nodeKind() node.KeyKind {
	if k == KindRecovery {
		return node.RecoveryKeys
	}
	return node.UnsealKeys
}

// sizes are the number of shares and the threshold of a kind.
func (c *Cluster) sizes(kind Kind) (shares, threshold int) {
	shares, threshold = c.Shares, c.Threshold
	if kind == KindRecovery {
		shares, threshold = c.RecoveryShares, c.RecoveryThreshold
	}
	if shares == 0 && threshold == 0 {
		return DefaultShares, DefaultThreshold
	}
	return shares, threshold
}

// rootToken is what becomes of the root token.
func (c *Cluster) rootToken() RootToken {
	if c.RootToken == "" {
		return RootDiscard
	}
	return c.RootToken
}

// keys are the wrapping keys that the shares are sealed with.
func (c *Cluster) keys() []string {
	if c.Spread != nil {
		return c.Spread.Keys
	}
	return []string{c.Key}
}

// needed is how many of the keys must take part.
func (c *Cluster) needed() int {
	if c.Spread != nil {
		return c.Spread.Needed
	}
	return 1
}

// item is the name of the item of a kind that is sealed with a wrapping key.
func (c *Cluster) item(kind Kind, key string) string {
	if c.Spread == nil {
		return string(kind)
	}
	return string(kind) + "." + key
}

// deal says which of the wrapping keys has a share: they are dealt to the keys in turn.
func (c *Cluster) deal(index int) string {
	keys := c.keys()
	return keys[index%len(keys)]
}

// Check returns [ErrInvalid] with what to write where the cluster cannot be taken into custody as it is configured. It does
// no I/O.
func (c *Cluster) Check() error {
	if err := c.check(); err != nil {
		return fmt.Errorf("cluster %q: %w", c.Name, err)
	}
	return nil
}

func (c *Cluster) check() error {
	if err := store.CheckName(c.Name); err != nil || strings.Contains(c.Name, "/") || len(c.Name) > 64 {
		return invalid("the name of a cluster has 1 to 64 letters, digits, \".\", \"_\" and \"-\"")
	}
	if err := c.checkNodes(); err != nil {
		return err
	}
	switch {
	case c.Store == "":
		return invalid("store is missing; name the store that its keys are kept in")
	case c.Spread == nil && c.Key == "":
		return invalid("key is missing; name the wrapping key that seals its keys, or give a spread: \"2 of office, bunker, bank\"")
	case c.Spread != nil && c.Key != "":
		return invalid("give key or spread, not both")
	}
	if c.Spread != nil {
		if err := c.Spread.check(); err != nil {
			return err
		}
	}
	if err := c.checkPeople(); err != nil {
		return err
	}
	if err := c.checkShares(KindUnseal); err != nil {
		return err
	}
	if c.RecoveryShares != 0 || c.RecoveryThreshold != 0 {
		if err := c.checkShares(KindRecovery); err != nil {
			return err
		}
	}
	return c.checkRoot()
}

func (c *Cluster) checkNodes() error {
	if len(c.Nodes) == 0 {
		return invalid("nodes is missing; list the addresses of its nodes, https://…:8200 each")
	}
	for i, address := range c.Nodes {
		if slices.Contains(c.Nodes[:i], address) {
			return invalid("the node %s is listed twice", address)
		}
		n, err := node.New(node.Config{Address: address, TLS: c.TLS, Timeout: c.NodeTimeout})
		if err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		n.Close()
	}
	return nil
}

// checkShares checks the numbers of a kind, and that a spread of the shares means what it says.
func (c *Cluster) checkShares(kind Kind) error {
	shares, threshold := c.sizes(kind)
	what := "shares and threshold"
	if kind == KindRecovery {
		what = "recovery_shares and recovery_threshold"
	}
	switch {
	case shares < 1 || shares > MaxShares:
		return invalid("%s: %d shares; 1 to %d are possible", what, shares, MaxShares)
	case threshold < 1 || threshold > shares:
		return invalid("%s: a threshold of %d; with %d shares it is 1 to %d", what, threshold, shares, shares)
	case shares > 1 && threshold == 1:
		return invalid("%s: several shares with a threshold of 1, which Vault refuses; take one share, or a threshold of 2", what)
	case len(c.People) >= shares:
		return invalid("%s: %d people and %d shares leave none for the HSM", what, len(c.People), shares)
	}
	if c.Spread == nil {
		return nil
	}
	return c.checkDeal(what, shares-len(c.People), threshold)
}

// checkDeal wants any Needed of the keys to hold the threshold, and any fewer not to.
func (c *Cluster) checkDeal(what string, dealt, threshold int) error {
	held := make([]int, len(c.Spread.Keys))
	for i := range dealt {
		held[i%len(held)]++
	}
	slices.Sort(held)
	least, most := 0, 0
	for i := range c.Spread.Needed {
		least += held[i]
	}
	for i := range c.Spread.Needed - 1 {
		most += held[len(held)-1-i]
	}
	if least >= threshold && most < threshold {
		return nil
	}
	return invalid("%s: %d shares dealt to %d keys with a threshold of %d are not %q: the %d keys with the fewest hold %d, and %d keys can "+
		"hold %d; take %d shares and a threshold of %d, for example", what, dealt, len(held), threshold, c.Spread, c.Spread.Needed, least,
		c.Spread.Needed-1, most, len(held)+len(c.People), max(c.Spread.Needed, 1))
}

func (c *Cluster) checkPeople() error {
	for i, person := range c.People {
		if person.Name == "" {
			return invalid("person %d has no name", i+1)
		}
		if slices.ContainsFunc(c.People[:i], func(other Person) bool { return other.Name == person.Name }) {
			return invalid("the person %q is listed twice", person.Name)
		}
		key, err := ReadPGPKey(person.PGPKey)
		if err != nil {
			return fmt.Errorf("%w: the key of person %q: %w", ErrInvalid, person.Name, err)
		}
		for _, other := range c.People[:i] {
			if known, err := ReadPGPKey(other.PGPKey); err == nil && known.Fingerprint == key.Fingerprint {
				return invalid("the people %q and %q have one key", other.Name, person.Name)
			}
		}
	}
	return nil
}

func (c *Cluster) checkRoot() error {
	switch c.rootToken() {
	case RootDiscard:
	case RootKeep:
		if c.Spread != nil {
			return invalid("root_token is \"keep\" with a spread: one HSM would open the root token, which opens everything; take \"discard\" or \"pgp\"")
		}
	case RootPGP:
		if _, err := ReadPGPKey(c.RootPGPKey); err != nil {
			return fmt.Errorf("%w: root_token is \"pgp\", and the OpenPGP key for it (root_pgp_key): %w", ErrInvalid, err)
		}
		return nil
	default:
		return invalid("root_token is %q; it is one of \"discard\", \"keep\" and \"pgp\"", string(c.RootToken))
	}
	if c.RootPGPKey != nil {
		return invalid("the OpenPGP key for the root token (root_pgp_key) is for root_token \"pgp\"")
	}
	return nil
}

// Spread says that several HSMs must take part: the shares are dealt to the wrapping keys in turn, and any Needed of the keys
// hold enough of them.
type Spread struct {
	Needed int
	Keys   []string
}

// ParseSpread reads "2 of office, bunker, bank".
func ParseSpread(text string) (Spread, error) {
	count, keys, found := strings.Cut(text, " of ")
	needed, err := strconv.Atoi(strings.TrimSpace(count))
	if !found || err != nil {
		return Spread{}, invalid("the spread %q; write it as \"2 of office, bunker, bank\"", text)
	}
	s := Spread{Needed: needed}
	for key := range strings.SplitSeq(keys, ",") {
		s.Keys = append(s.Keys, strings.TrimSpace(key))
	}
	return s, s.check()
}

// String writes what [ParseSpread] reads.
func (s Spread) String() string {
	return fmt.Sprintf("%d of %s", s.Needed, strings.Join(s.Keys, ", "))
}

func (s Spread) check() error {
	if len(s.Keys) < 2 || s.Needed < 1 || s.Needed > len(s.Keys) {
		return invalid("the spread %q; it names two wrapping keys or more, and how many of them are needed: \"2 of office, bunker, bank\"", s)
	}
	for i, key := range s.Keys {
		if err := store.CheckName(key); err != nil || strings.Contains(key, "/") || len(key) > 64 {
			return invalid("the spread %q: %q cannot be the name of a wrapping key", s, key)
		}
		if slices.Contains(s.Keys[:i], key) {
			return invalid("the spread %q names %q twice", s, key)
		}
	}
	return nil
}

// Keys are the wrapping keys. *keyring.Keyring has them.
type Keys interface {
	custody.Keys
	Ready(ctx context.Context, name string, purpose keyring.Purpose) error
}

// Local is the disk of this host, or what stands for it: it outlives the process. *file.Store is one.
type Local interface {
	store.Store
	// Lock waits until no other process of the host, and no other goroutine of this one, holds the lock of that name.
	Lock(ctx context.Context, name string) (unlock func(), err error)
}

// Auditor takes note of acts before they happen. *audit.Log is one.
type Auditor interface {
	Begin(ctx context.Context, act audit.Act) (end func(error), err error)
}

// Config is what a [Custodian] is made of.
type Config struct {
	// Keeper keeps the items. It is Shared where several hosts use one store.
	Keeper *custody.Keeper
	Keys   Keys
	// Stores are the same as the keeper's: intents lie beside the items.
	Stores custody.Stores
	Local  Local
	Audit  Auditor          // nil for none
	Logger *slog.Logger     // nil for none
	Now    func() time.Time // nil for time.Now
	// Host names this host in intents and for the audit log; "" for the host's own name.
	Host      string
	UserAgent string
	// Do says how a person does a verb to a cluster, for sentences that say what to do next: they reach one by Vault's paths,
	// another by a command; nil for that.
	Do func(verb, cluster string) string
	// Transport is set by tests, see [node.Config].
	Transport func(http.RoundTripper) http.RoundTripper
	// Critical is called before a window in which the process must not end on request, and leave after it; nil for none.
	// It may be called by several goroutines at once.
	Critical func(what string) (leave func())
}

// Custodian keeps clusters. Its methods are safe for concurrent use; those that change the keys of a cluster take turns on
// one host.
type Custodian struct {
	keeper    *custody.Keeper
	keyring   Keys
	stores    custody.Stores
	local     Local
	audit     Auditor
	logger    *slog.Logger
	now       func() time.Time
	host      string
	userAgent string
	do        func(verb, cluster string) string
	transport func(http.RoundTripper) http.RoundTripper
	critical  func(what string) (leave func())

	pauses pauses

	mu     sync.Mutex
	nodes  map[nodeName]*knownNode
	memory memory
}

// New returns a custodian. It does no I/O.
func New(config Config) *Custodian {
	k := &Custodian{
		keeper:    config.Keeper,
		keyring:   config.Keys,
		stores:    config.Stores,
		local:     config.Local,
		audit:     config.Audit,
		logger:    config.Logger,
		now:       config.Now,
		host:      config.Host,
		userAgent: config.UserAgent,
		do:        config.Do,
		transport: config.Transport,
		critical:  config.Critical,
		pauses:    ordinaryPauses,
		nodes:     map[nodeName]*knownNode{},
	}
	if k.audit == nil {
		k.audit = noAudit{}
	}
	if k.logger == nil {
		k.logger = slog.New(slog.DiscardHandler)
	}
	if k.now == nil {
		k.now = time.Now
	}
	if k.host == "" {
		k.host, _ = os.Hostname() // one without a name is told apart by its random id
	}
	if k.do == nil {
		k.do = func(verb, cluster string) string { return "nitroseal " + verb + " " + cluster }
	}
	if k.critical == nil {
		k.critical = func(string) func() { return func() {} }
	}
	return k
}

// pauses are the times that are waited.
type pauses struct {
	look                time.Duration // for others who unseal a node to go on
	settle              time.Duration // at most, for a node to do what it was just told to
	poll, pollLast      time.Duration // between looks at that, growing
	wait                time.Duration // between looks at another host that initialises
	keepFirst, keepLast time.Duration // between tries to keep new keys, growing
	lock                time.Duration // at most, for another process of this host, where it is not worth waiting
}

var ordinaryPauses = pauses{
	look: time.Second, settle: 20 * time.Second, poll: 50 * time.Millisecond, pollLast: time.Second, wait: 2 * time.Second,
	keepFirst: time.Second, keepLast: 30 * time.Second, lock: 100 * time.Millisecond,
}

// Close gives back the connections to the nodes. Calls that are under way go on.
func (k *Custodian) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, known := range k.nodes {
		known.Close()
	}
	clear(k.nodes)
	return nil
}

type noAudit struct{}

func (noAudit) Begin(context.Context, audit.Act) (func(error), error) { return func(error) {}, nil }

// act announces an act to the audit log; where that fails the act must not happen. end is called with its outcome.
func (k *Custodian) act(ctx context.Context, verb string, c *Cluster, address, by string, detail map[string]string) (end func(error), err error) {
	return k.audit.Begin(ctx, audit.Act{Verb: verb, Cluster: c.Name, Node: address, By: by, Detail: detail})
}

// nodeName is a node of a cluster.
type nodeName struct{ cluster, address string }

// knownNode is the client of a node, which keeps a connection, and what it was made of.
type knownNode struct {
	*node.Node

	made [sha256.Size]byte
}

// node returns the client of a node. It is made anew where the configuration of the cluster has changed.
func (k *Custodian) node(c *Cluster, address string) (*node.Node, error) {
	if !slices.Contains(c.Nodes, address) {
		return nil, fmt.Errorf("cluster %q: %w", c.Name, invalid("%s is none of its nodes, which are %s", address, strings.Join(c.Nodes, ", ")))
	}
	described, err := json.Marshal(struct {
		TLS     node.TLS
		Timeout time.Duration
	}{c.TLS, c.NodeTimeout})
	if err != nil {
		return nil, fmt.Errorf("cluster %q: describing the node %s: %w", c.Name, address, err)
	}
	made := sha256.Sum256(described)
	k.mu.Lock()
	defer k.mu.Unlock()
	name := nodeName{c.Name, address}
	if known := k.nodes[name]; known != nil && known.made == made {
		return known.Node, nil
	}
	n, err := node.New(node.Config{
		Address: address, TLS: c.TLS, Timeout: c.NodeTimeout, UserAgent: k.userAgent, Transport: k.transport,
	})
	if err != nil {
		return nil, fmt.Errorf("cluster %q: %w: %w", c.Name, ErrInvalid, err)
	}
	if old := k.nodes[name]; old != nil {
		old.Close()
	}
	k.nodes[name] = &knownNode{n, made}
	return n, nil
}

// store opens the store of a cluster.
func (k *Custodian) store(ctx context.Context, c *Cluster) (store.Store, error) {
	s, err := k.stores.Store(ctx, c.Store)
	if err != nil {
		return nil, fmt.Errorf("opening store %q of cluster %q: %w", c.Store, c.Name, err)
	}
	return s, nil
}
