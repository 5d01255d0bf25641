package cluster

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// idSize is the length of ids of sets and intents, in bytes.
const idSize = 16

// newID returns a random id.
func newID() string {
	id := make([]byte, idSize)
	_, _ = rand.Read(id) // never fails, says its documentation
	return hex.EncodeToString(id)
}

// material is what the items of one kind hold, opened. Where a spread has several items, it is what those of them hold that
// were opened. Whoever got it wipes it.
type material struct {
	// Facts have the sets of all opened items, each with the indices and the people of all of them.
	Facts

	items  []materialItem // those that were opened, in the order of the wrapping keys
	whole  bool           // all items of the cluster were opened
	shares map[shareName][]byte
	// messages are the shares of people, which only they can open.
	messages map[shareName][]byte
}

// materialItem is an item that was opened, or is to be made.
type materialItem struct {
	name, key  string
	generation uint64 // 0 for none yet
	// sets say which sets it holds, and as what. While a rekey is written, the items of a spread differ.
	sets map[string]SetState
}

// shareName names a share.
type shareName struct {
	set   string
	index int
}

// wipe overwrites the shares.
func (m *material) wipe() {
	if m == nil {
		return
	}
	for _, share := range m.shares {
		clear(share)
	}
}

// newMaterial begins the material of a cluster that has none. Its items are those of the configuration. origin is the id of
// what begins it, st a node of the cluster.
func (k *Custodian) newMaterial(c *Cluster, kind Kind, origin string, st node.Status, by string) *material {
	m := &material{
		Facts: Facts{
			Format: factsFormat, Cluster: c.Name, Kind: kind, Origin: origin, Made: k.today(), MadeBy: by, Host: k.host,
			SealType: st.Type, RecoverySeal: st.RecoverySeal, StorageType: st.StorageType,
			ClusterName: st.ClusterName, ClusterID: st.ClusterID,
		},
		whole:    true,
		shares:   map[shareName][]byte{},
		messages: map[shareName][]byte{},
	}
	if c.Spread != nil {
		m.Spread = c.Spread.String()
	}
	for _, key := range c.keys() {
		m.items = append(m.items, materialItem{name: c.item(kind, key), key: key, sets: map[string]SetState{}})
	}
	return m
}

// today is the time for records, to the second.
func (k *Custodian) today() time.Time { return k.now().UTC().Truncate(time.Second) }

// add takes a set of shares into the material: the HSM's own by their indices, and the messages of people. The shares are
// the material's from then on, and wiped with it. Set.Indices and Set.People are those of all items together; they are dealt
// to the items when the material is saved.
func (m *material) add(set Set, shares, messages map[int][]byte) {
	set.Indices = slices.Sorted(maps.Keys(shares))
	for index, share := range shares {
		m.shares[shareName{set.ID, index}] = share
	}
	for index, message := range messages {
		m.messages[shareName{set.ID, index}] = message
	}
	m.Sets = append(m.Sets, set)
	for i := range m.items {
		m.items[i].sets[set.ID] = set.State
	}
}

// set returns a set by its id, nil where there is none.
func (m *material) set(id string) *Set {
	i := slices.IndexFunc(m.Sets, func(s Set) bool { return s.ID == id })
	if i < 0 {
		return nil
	}
	return &m.Sets[i]
}

// everywhere tells whether all opened items hold a set. A rekey tells Vault that a set was kept only when they do.
func (m *material) everywhere(id string) bool {
	return !slices.ContainsFunc(m.items, func(item materialItem) bool { _, held := item.sets[id]; return !held })
}

// inState returns the set in that state that all opened items hold, nil for none.
func (m *material) inState(state SetState) *Set {
	for i := range m.Sets {
		if m.Sets[i].State == state && m.everywhere(m.Sets[i].ID) {
			return &m.Sets[i]
		}
	}
	return nil
}

// active is the set that Vault takes, pending the one that it takes after a rekey that did not end; nil for none.
func (m *material) active() *Set  { return m.inState(SetActive) }
func (m *material) pending() *Set { return m.inState(SetPending) }

// promote makes a set the active one in all opened items and drops the other.
func (m *material) promote(id string) {
	for i := range m.items {
		m.items[i].sets = map[string]SetState{id: SetActive}
	}
	if set := m.set(id); set != nil {
		set.State, set.VerificationNonce = SetActive, ""
	}
	m.forget(func(set string) bool { return set != id })
}

// drop takes a set out of all opened items.
func (m *material) drop(id string) {
	for i := range m.items {
		delete(m.items[i].sets, id)
	}
	m.forget(func(set string) bool { return set == id })
}

func (m *material) forget(gone func(set string) bool) {
	for name, share := range m.shares {
		if gone(name.set) {
			clear(share)
			delete(m.shares, name)
		}
	}
	maps.DeleteFunc(m.messages, func(name shareName, _ []byte) bool { return gone(name.set) })
	m.Sets = slices.DeleteFunc(m.Sets, func(s Set) bool { return gone(s.ID) })
}

// take returns up to count shares of a set, in the order of their indices. They stay the material's.
func (m *material) take(set *Set, count int) [][]byte {
	var shares [][]byte
	for _, index := range set.Indices {
		if share := m.shares[shareName{set.ID, index}]; share != nil && len(shares) < count {
			shares = append(shares, share)
		}
	}
	return shares
}

// fields are the fields of one item. Their values are the material's; nothing of them is wiped but with it.
func (m *material) fields(c *Cluster, item materialItem) (custody.Fields, error) {
	facts := m.Facts
	facts.Sets = nil
	fields := custody.Fields{}
	for _, set := range m.Sets {
		state, held := item.sets[set.ID]
		if !held {
			continue
		}
		own := set
		own.State = state
		own.Indices = slices.DeleteFunc(slices.Clone(set.Indices), func(index int) bool { return c.deal(index) != item.key })
		own.People = slices.DeleteFunc(slices.Clone(set.People), func(p PersonShare) bool { return c.deal(p.Index) != item.key })
		if own.Indices == nil {
			own.Indices = []int{}
		}
		for _, index := range own.Indices {
			share := m.shares[shareName{set.ID, index}]
			if len(share) == 0 {
				return nil, fmt.Errorf("%w: share %d of set %s is missing", ErrFacts, index, set.ID)
			}
			fields[shareField(set.ID, index)] = share
		}
		for _, person := range own.People {
			if message := m.messages[shareName{set.ID, person.Index}]; message != nil {
				fields[messageField(set.ID, person.Index)] = message
			}
		}
		facts.Sets = append(facts.Sets, own)
	}
	encoded, err := facts.encode()
	if err != nil {
		return nil, err
	}
	fields[fieldFacts] = encoded
	return fields, nil
}

// shareField and messageField name the fields of shares.
func shareField(set string, index int) string   { return set + "." + strconv.Itoa(index) }
func messageField(set string, index int) string { return shareField(set, index) + ".pgp" }

// readItem reads the fields of one item into material of that item alone. The shares are copied out of the fields.
func readItem(cluster string, kind Kind, item materialItem, fields custody.Fields) (*material, error) {
	facts, err := parseFacts(fields[fieldFacts])
	if err != nil {
		return nil, err
	}
	if facts.Cluster != cluster || facts.Kind != kind {
		return nil, fmt.Errorf("%w: it is of cluster %q and kind %q", ErrFacts, facts.Cluster, facts.Kind)
	}
	item.sets = map[string]SetState{}
	m := &material{Facts: *facts, shares: map[shareName][]byte{}, messages: map[shareName][]byte{}}
	known := map[string]bool{fieldFacts: true}
	for _, set := range facts.Sets {
		item.sets[set.ID] = set.State
		for _, index := range set.Indices {
			field := shareField(set.ID, index)
			if len(fields[field]) == 0 {
				m.wipe()
				return nil, fmt.Errorf("%w: share %d of set %s is missing", ErrFacts, index, set.ID)
			}
			known[field] = true
			m.shares[shareName{set.ID, index}] = slices.Clone(fields[field])
		}
		for _, person := range set.People {
			field := messageField(set.ID, person.Index)
			known[field] = true
			if message := fields[field]; message != nil {
				m.messages[shareName{set.ID, person.Index}] = slices.Clone(message)
			}
		}
	}
	for field := range fields {
		if !known[field] {
			m.wipe()
			return nil, fmt.Errorf("%w: the field %q belongs to no set", ErrFacts, field)
		}
	}
	m.items = []materialItem{item}
	return m, nil
}

// merge puts the opened items of a spread together. The sets of the result are those of any item, each active where one item
// says so, because an item says so only after Vault was told. One that not every item holds does not count: either it is new
// and Vault was not told of it yet, or it is old and another one was promoted.
func merge(parts []*material) (*material, error) {
	m := &material{Facts: parts[0].Facts, shares: map[shareName][]byte{}, messages: map[shareName][]byte{}}
	m.Sets = nil
	first := parts[0].items[0].name
	for _, part := range parts {
		name := part.items[0].name
		switch {
		case part.Origin != m.Origin:
			return nil, fmt.Errorf("%w: the items %q and %q were begun by different initialisations", ErrFacts, first, name)
		case part.SealType != m.SealType || part.RecoverySeal != m.RecoverySeal || part.StorageType != m.StorageType:
			return nil, fmt.Errorf("%w: the items %q and %q are of different clusters", ErrFacts, first, name)
		case part.Spread != m.Spread:
			return nil, fmt.Errorf("%w: the items %q and %q were dealt differently: %q and %q", ErrFacts, first, name, m.Spread, part.Spread)
		case m.ClusterID == "":
			m.ClusterID, m.ClusterName = part.ClusterID, part.ClusterName
		case part.ClusterID != "" && part.ClusterID != m.ClusterID:
			return nil, fmt.Errorf("%w: the items %q and %q name the clusters %s and %s", ErrFacts, first, name, m.ClusterID, part.ClusterID)
		}
		m.items = append(m.items, part.items...)
		for _, set := range part.Sets {
			if err := m.mergeSet(set); err != nil {
				return nil, err
			}
		}
		maps.Copy(m.shares, part.shares)
		maps.Copy(m.messages, part.messages)
	}
	if m.active() == nil {
		return nil, fmt.Errorf("%w: no active set of shares is in all of the items", ErrFacts)
	}
	return m, nil
}

// mergeSet adds an item's part of a set.
func (m *material) mergeSet(part Set) error {
	set := m.set(part.ID)
	if set == nil {
		part.Indices, part.People = slices.Clone(part.Indices), slices.Clone(part.People)
		m.Sets = append(m.Sets, part)
		return nil
	}
	if set.Shares != part.Shares || set.Threshold != part.Threshold {
		return fmt.Errorf("%w: set %s has %d shares and a threshold of %d in one item, %d and %d in another", ErrFacts, part.ID,
			set.Shares, set.Threshold, part.Shares, part.Threshold)
	}
	if part.State == SetActive {
		set.State, set.VerificationNonce = SetActive, ""
	}
	set.VerificationNonce = cmp.Or(set.VerificationNonce, part.VerificationNonce)
	set.Indices = slices.Compact(slices.Sorted(slices.Values(append(set.Indices, part.Indices...))))
	set.People = append(set.People, part.People...)
	slices.SortFunc(set.People, func(a, b PersonShare) int { return cmp.Compare(a.Index, b.Index) })
	return nil
}

// load opens as many items as are needed to reach the threshold, at the cost of one HSM operation each, and those of a spread
// at once. The caller wipes the material. It is [ErrNoMaterial] where the cluster has none.
func (k *Custodian) load(ctx context.Context, c *Cluster, kind Kind) (*material, error) {
	return k.open(ctx, c, kind, c.needed())
}

// loadAll opens all items, which is what a change of the shares wants.
func (k *Custodian) loadAll(ctx context.Context, c *Cluster, kind Kind) (*material, error) {
	return k.open(ctx, c, kind, len(c.keys()))
}

func (k *Custodian) open(ctx context.Context, c *Cluster, kind Kind, needed int) (*material, error) {
	keys := c.keys()
	parts, errs := make([]*material, len(keys)), make([]error, len(keys))
	var group sync.WaitGroup
	for i := range needed {
		group.Go(func() { parts[i], errs[i] = k.openItem(ctx, c, kind, keys[i]) })
	}
	group.Wait()
	opened := needed - len(slices.DeleteFunc(slices.Clone(errs), func(err error) bool { return err == nil }))
	for i := needed; i < len(keys) && opened < needed; i++ { // in place of those that are away
		if parts[i], errs[i] = k.openItem(ctx, c, kind, keys[i]); errs[i] == nil {
			opened++
		}
	}
	parts = slices.DeleteFunc(parts, func(part *material) bool { return part == nil })
	m, err := assemble(c, kind, parts, needed, join(errs...))
	if err != nil {
		for _, part := range parts {
			part.wipe()
		}
		return nil, err
	}
	m.whole = len(parts) == len(keys)
	return m, nil
}

// assemble is the material of what was opened.
func assemble(c *Cluster, kind Kind, parts []*material, needed int, failed error) (*material, error) {
	what := fmt.Sprintf("the %s keys of cluster %q", kind, c.Name)
	if len(parts) < needed {
		if len(parts) == 0 && onlyNotFound(failed) {
			return nil, fmt.Errorf("opening %s: %w: store %q has no item %q; initialise or import the cluster: %w", what, ErrNoMaterial, c.Store,
				c.item(kind, c.keys()[0]), failed)
		}
		return nil, fmt.Errorf("opening %s: %d of the %d items that are needed could be opened: %w", what, len(parts), needed, failed)
	}
	m, err := merge(parts)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", what, err)
	}
	configured := ""
	if c.Spread != nil {
		configured = c.Spread.String()
	}
	if m.Spread != configured {
		return nil, fmt.Errorf("opening %s: %w: they are spread as %q and the configuration says %q; write it as it was, or export and import them anew",
			what, ErrInvalid, m.Spread, configured)
	}
	return m, nil
}

// onlyNotFound tells whether all that failed is missing.
func onlyNotFound(err error) bool {
	if some, ok := errors.AsType[failures](err); ok {
		return !slices.ContainsFunc(some, func(err error) bool { return !errors.Is(err, custody.ErrNotFound) })
	}
	return errors.Is(err, custody.ErrNotFound)
}

// openItem opens one item.
func (k *Custodian) openItem(ctx context.Context, c *Cluster, kind Kind, key string) (*material, error) {
	item := materialItem{name: c.item(kind, key), key: key}
	fields, metadata, err := k.keeper.Open(ctx, c.Name, item.name, custody.ReadOptions{Store: c.Store, By: k.host})
	if err != nil {
		return nil, err
	}
	defer fields.Wipe()
	item.generation = metadata.Generation
	m, err := readItem(c.Name, kind, item, fields)
	if err != nil {
		return nil, fmt.Errorf("opening material %q of cluster %q: %w", item.name, c.Name, err)
	}
	return m, nil
}

// save writes the opened items as the material is now, one after the other, each by compare-and-swap. No HSM is touched. What
// failed may be saved again with the same request id: items that were written then are not written twice. After an error some
// items may be written and others not, which the rules of merge allow for.
func (k *Custodian) save(ctx context.Context, c *Cluster, m *material, by, request string) error {
	for i := range m.items {
		if err := k.saveItem(ctx, c, m, &m.items[i], by, request); err != nil {
			return err
		}
	}
	return nil
}

func (k *Custodian) saveItem(ctx context.Context, c *Cluster, m *material, item *materialItem, by, request string) error {
	fields, err := m.fields(c, *item)
	if err != nil {
		return fmt.Errorf("storing %q of cluster %q: %w", item.name, c.Name, err)
	}
	return k.put(ctx, c, item, fields, by, request)
}

// put writes one item, announced to the audit log.
func (k *Custodian) put(ctx context.Context, c *Cluster, item *materialItem, fields custody.Fields, by, request string) (err error) {
	end, err := k.act(ctx, "store", c, "", by, map[string]string{
		"item": item.name, "key": item.key, "store": c.Store, "replaces": strconv.FormatUint(item.generation, 10),
	})
	if err != nil {
		return err
	}
	defer func() { end(err) }()
	written, err := k.keeper.Put(ctx, c.Name, item.name, fields, custody.PutOptions{
		Key: item.key, Store: c.Store, CAS: &item.generation, By: by, RequestID: request,
	})
	if err != nil {
		return err
	}
	item.generation = written.Generation
	return nil
}
