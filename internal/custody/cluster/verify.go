package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// VerifyOptions say how much is asked of Vault.
type VerifyOptions struct {
	By string
	// Prove asks Vault whether it takes the shares, see [Custodian.Prove]. Without it only their numbers are compared.
	Prove bool
}

// VerifyResult is what [Custodian.Verify] found. Problems is empty where all is well.
type VerifyResult struct {
	Cluster string
	Kind    Kind // "" where nothing is in custody
	Items   []VerifiedItem
	Nodes   []NodeStatus // in the order of the configuration
	// Sets are the sets of shares that are kept, without the shares; one where no rekey was cut off.
	Sets []Set
	// Proved is true where Vault said that it takes the shares.
	Proved bool
	// Problems are sentences, each with what to do. Warnings are about what is as somebody has accepted it, as a key on one
	// HSM only.
	Problems, Warnings []string
}

// VerifiedItem is an item that was opened, or could not be.
type VerifiedItem struct {
	Item string
	custody.Metadata
	// Err is why it could not be opened; nil where it was.
	Err  error
	Took time.Duration // to open it
}

// Verify opens everything that is in custody of a cluster and compares it with its nodes and its configuration. It changes
// nothing, neither in the store nor in Vault, and tells all problems that it finds. An error is returned only where it could not
// look at all.
func (k *Custodian) Verify(ctx context.Context, c *Cluster, options VerifyOptions) (result VerifyResult, err error) {
	if err := c.Check(); err != nil {
		return VerifyResult{}, err
	}
	end, err := k.act(ctx, "verify", c, "", options.By, nil)
	if err != nil {
		return VerifyResult{}, err
	}
	defer func() { end(err) }()
	v := &verification{k: k, c: c, options: options, result: VerifyResult{Cluster: c.Name}}
	defer func() { v.m.wipe() }()
	if err := v.items(ctx); err != nil {
		return v.result, err
	}
	v.nodes(ctx)
	v.numbers()
	v.leftovers(ctx)
	if options.Prove && v.m != nil {
		v.prove(ctx)
	}
	return v.result, nil
}

// verification is one call of Verify.
type verification struct {
	k       *Custodian
	c       *Cluster
	options VerifyOptions
	m       *material // nil where it could not be opened
	whole   bool      // all items were opened
	result  VerifyResult
}

func (v *verification) problem(format string, arguments ...any) {
	v.result.Problems = append(v.result.Problems, fmt.Sprintf(format, arguments...))
}

// items opens all items of the cluster, one after the other.
func (v *verification) items(ctx context.Context) error {
	refs, warnings, err := v.k.keeper.List(ctx, v.c.Name)
	if err != nil {
		return err
	}
	v.result.Problems = append(v.result.Problems, warnings...)
	expected := map[Kind][]string{}
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		for _, key := range v.c.keys() {
			expected[kind] = append(expected[kind], v.c.item(kind, key))
		}
	}
	names := []string{}
	for _, ref := range refs {
		names = append(names, ref.Name)
	}
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		for _, name := range expected[kind] { // of which this host may have no record
			if !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	parts := map[Kind][]*material{}
	for _, name := range names {
		v.item(ctx, name, expected, parts)
	}
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		if len(parts[kind]) == 0 {
			continue
		}
		if v.result.Kind != "" {
			v.problem("There are unseal keys and recovery keys; a cluster has one of them. Delete the items of the other kind.")
			wipeMaterial(parts[kind])
			continue
		}
		v.result.Kind = kind
		v.assemble(ctx, kind, parts[kind])
	}
	if len(v.result.Items) == 0 {
		v.problem("No keys of the cluster are in custody: initialise or import it.")
	}
	return nil
}

func wipeMaterial(parts []*material) {
	for _, part := range parts {
		part.wipe()
	}
}

// item opens one item. Those that are expected and not there are told by assemble.
func (v *verification) item(ctx context.Context, name string, expected map[Kind][]string, parts map[Kind][]*material) {
	began := time.Now() // what a clock on the wall would show
	fields, metadata, err := v.k.keeper.Open(ctx, v.c.Name, name, custody.ReadOptions{Store: v.c.Store, By: v.k.host})
	if errors.Is(err, custody.ErrNotFound) {
		return
	}
	opened := VerifiedItem{Item: name, Metadata: metadata, Err: err, Took: time.Since(began)}
	defer func() { v.result.Items = append(v.result.Items, opened) }()
	if err != nil {
		v.problem("%q does not open: %v.", name, err)
		return
	}
	defer fields.Wipe()
	for _, warning := range metadata.Warnings {
		v.result.Warnings = append(v.result.Warnings, fmt.Sprintf("%q: %s", name, warning))
	}
	kind, isKeys := kindOfItem(name)
	switch {
	case name == itemRoot:
		v.root(fields)
	case strings.HasPrefix(name, itemFormer) && IsItem(name):
		v.former(name, fields)
	case !isKeys: // somebody else's secret, kept beside
	default:
		item := materialItem{name: name, key: metadata.Key, generation: metadata.Generation, foreign: !slices.Contains(expected[kind], name)}
		key := metadata.Key
		if item.foreign {
			v.problem("%q belongs to another key or spread than the configuration names: %s deals the shares anew, to %s.", name, v.k.do("rekey", v.c.Name),
				strings.Join(v.c.keys(), ", "))
		} else {
			key = v.c.keys()[slices.Index(expected[kind], name)]
			item.key = key
		}
		part, err := readItem(v.c.Name, kind, item, fields)
		if err != nil {
			opened.Err = err
			v.problem("%q opens and cannot be used: %v.", name, err)
			return
		}
		parts[kind] = append(parts[kind], part)
		if metadata.Key != key {
			v.problem("%q is sealed with the key %q and the configuration names %q: `nitroseal rewrap --stored` seals it anew.", name, metadata.Key, key)
		} else if metadata.LatestVersion > metadata.Version {
			v.problem("%q is sealed with version %d of the key %q, whose newest is %d: `nitroseal rewrap --stored` seals it anew.", name, metadata.Version,
				metadata.Key, metadata.LatestVersion)
		}
	}
}

// kindOfItem says whether an item holds keys, and which.
func kindOfItem(name string) (Kind, bool) {
	head, _, _ := strings.Cut(name, ".")
	return Kind(head), head == string(KindUnseal) || head == string(KindRecovery)
}

// former looks at an item with keys from before the last rekey.
func (v *verification) former(name string, fields custody.Fields) {
	kind := KindUnseal
	if strings.HasPrefix(name, itemFormerRecovery) {
		kind = KindRecovery
	}
	part, err := readItem(v.c.Name, kind, materialItem{name: name, foreign: true}, fields)
	if err != nil {
		v.problem("%q opens and cannot be used: %v.", name, err)
		return
	}
	part.wipe()
}

func (v *verification) root(fields custody.Fields) {
	root, err := parseRoot(v.c.Name, fields)
	if err != nil {
		v.problem("%q opens and cannot be used: %v.", itemRoot, err)
		return
	}
	defer root.wipe()
	if root.Purpose == RootDiscard {
		v.problem("The first root token of the cluster is still there, although it is to be revoked: run `nitroseal unseal %s` while the cluster is unsealed.",
			v.c.Name)
	}
}

// assemble puts the opened items together.
func (v *verification) assemble(ctx context.Context, kind Kind, parts []*material) {
	var missing []string
	for _, key := range v.c.keys() {
		name := v.c.item(kind, key)
		if !slices.ContainsFunc(parts, func(part *material) bool { return part.items[0].name == name }) {
			missing = append(missing, name)
		}
	}
	m, err := assemble(v.c, kind, parts, nil)
	if err == nil {
		m, err = v.k.withActive(m, nil)
	}
	if len(missing) > 0 && (err != nil || !m.dealtOtherwise()) { // else it was told of each
		v.problem("Of %d items %d could be opened; missing: %s. Any %d unseal the cluster; put a backup of the store back, or bring the HSM back.",
			len(v.c.keys()), len(parts), strings.Join(missing, ", "), v.c.needed())
	}
	if err != nil {
		v.problem("%v.", err)
		wipeMaterial(parts)
		return
	}
	v.whole = len(missing) == 0
	v.m, v.result.Sets = m, slices.Clone(m.Sets)
	if !m.inHand(m.active()) {
		v.problem("The cluster would not be unsealed: %d items open and %d are needed.", len(parts), v.c.needed())
	}
	if err := v.k.ready(ctx, v.c); err != nil {
		v.problem("%v.", err)
	}
}

// nodes looks at all nodes at once.
func (v *verification) nodes(ctx context.Context) {
	v.result.Nodes = v.k.lookAll(ctx, v.c)
	for _, n := range v.result.Nodes {
		switch {
		case n.Alarm != nil:
			v.problem("%v.", n.Alarm.err())
		case n.Err != nil:
			v.problem("Node %s could not be asked: %v.", n.Address, n.Err)
		case !n.Seal.Initialized:
			v.problem("Node %s is not initialised; it has to join its cluster.", n.Address)
		case n.Seal.Sealed:
			v.problem("Node %s is sealed; `nitroseal unseal %s` unseals it.", n.Address, v.c.Name)
		}
		if v.m != nil && n.Err == nil && n.Seal.Initialized {
			if _, sentence := v.m.fits(n.Seal); sentence != "" {
				v.problem("Node %s does not match what is kept: %s; it gets no shares. Find out what is at that address, or rekey.", n.Address, sentence)
			}
		}
	}
}

// lookAll looks at all nodes of a cluster at once.
func (k *Custodian) lookAll(ctx context.Context, c *Cluster) []NodeStatus {
	all := make([]NodeStatus, len(c.Nodes))
	var group sync.WaitGroup
	for i, address := range c.Nodes {
		group.Go(func() {
			st, err := k.Look(ctx, c, address)
			if st.Address == "" {
				st.Address = address
			}
			if st.Err == nil {
				st.Err = err
			}
			all[i] = st
		})
	}
	group.Wait()
	return all
}

// numbers compares the sets with the configuration.
func (v *verification) numbers() {
	if v.m == nil {
		return
	}
	active := v.m.active()
	if pending := v.m.pending(); pending != nil || len(v.m.Sets) > 1 {
		v.problem("A rekey was cut off and two sets of shares are kept: `nitroseal rekey %s` finishes or undoes it.", v.c.Name)
	}
	if held := len(v.m.take(active, active.Shares)); held < active.Threshold && v.whole {
		v.problem("The HSM holds %d of the %d shares that unseal; %s would have to give theirs after every restart.", held, active.Threshold,
			people(active.Threshold-held))
	}
	shares, threshold := v.c.sizes(v.result.Kind)
	if (v.c.Shares != 0 || v.result.Kind == KindRecovery && v.c.RecoveryShares != 0) && (shares != active.Shares || threshold != active.Threshold) {
		v.problem("The cluster has %d shares with a threshold of %d, and the configuration says %d and %d: correct it, or rekey with --shares and --threshold.",
			active.Shares, active.Threshold, shares, threshold)
	}
	for _, person := range v.c.People {
		key, err := ReadPGPKey(person.PGPKey)
		if err == nil && !slices.ContainsFunc(active.People, func(has PersonShare) bool { return has.Fingerprint == key.Fingerprint }) {
			v.problem("Person %q of the configuration has no share: `nitroseal rekey %s` makes new ones.", person.Name, v.c.Name)
		}
	}
}

// leftovers tells what was begun and did not end.
func (v *verification) leftovers(ctx context.Context) {
	if held, err := v.k.heldItems(ctx, v.c); err != nil {
		v.problem("%v.", err)
	} else if len(held) > 0 {
		v.problem("Keys are held on the local disk that the store has not taken: %s. `nitroseal unseal %s` stores them.", strings.Join(held, ", "), v.c.Name)
	}
	if found, err := v.k.ImportLeft(ctx, v.c); err != nil {
		v.problem("%v.", err)
	} else if found {
		v.problem("An import was cut off: `nitroseal import %s` finishes it.", v.c.Name)
	}
	switch _, err := v.k.local.Get(ctx, leftTokenPath(v.c)); {
	case err == nil:
		v.problem("A root token that was used is still to be revoked: `nitroseal root %s --revoke`.", v.c.Name)
	case !errors.Is(err, store.ErrNotFound):
		v.problem("Looking for a root token that is left: %v.", err)
	}
}

// prove asks Vault about the active set.
func (v *verification) prove(ctx context.Context) {
	active := v.m.active()
	shares := v.m.take(active, active.Threshold)
	if len(shares) < active.Threshold {
		v.problem("The shares could not be proved: the HSM holds %d of the %d that are needed.", len(shares), active.Threshold)
		return
	}
	switch err := v.k.proveMaterial(ctx, v.c, v.m, v.options.By); {
	case err == nil:
		v.result.Proved = true
	case errors.Is(err, ErrWrongShares):
		v.problem("Vault does not take the shares: %v. Whoever rekeyed the cluster has the new ones: import them with --replace.", err)
	case errors.Is(err, node.ErrSealed):
		v.problem("The shares could not be proved while the cluster is sealed; `nitroseal unseal %s` proves them.", v.c.Name)
	default:
		v.problem("The shares could not be proved: %v.", err)
	}
}
