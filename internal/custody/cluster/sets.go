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
	"strings"
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

// material is what the items of one kind hold, opened. Where there are several, it is what those of them hold that were
// opened. Whoever got it wipes it.
type material struct {
	// Facts have the sets of all opened items, each with the indices and the people of all of them.
	Facts

	c      *Cluster       // by which new sets are dealt
	items  []materialItem // those that were opened, and those that are to be made
	shares map[shareName][]byte
	// messages are the shares of people, which only they can open.
	messages map[shareName][]byte
	// partial tells that there are items which were tried and did not open.
	partial bool
}

// materialItem is an item that was opened, or is to be made.
type materialItem struct {
	name, key  string
	generation uint64 // 0 for none yet
	// sets are what it holds of which set. None: it is to be made, or made anew.
	sets map[string]part
	// foreign is one that the configuration does not name: it was dealt by another one.
	foreign bool
	// lost is why an item that is there could not be opened. A rekey makes it anew.
	lost error
}

// part is what an item holds of a set. While sets are written, items differ in its state.
type part struct {
	state   SetState
	indices []int
	people  []PersonShare
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
		c:        c,
		shares:   map[shareName][]byte{},
		messages: map[shareName][]byte{},
	}
	if c.Spread != nil {
		m.Spread = c.Spread.String()
	}
	for _, key := range c.keys() {
		m.items = append(m.items, materialItem{name: c.item(kind, key), key: key, sets: map[string]part{}})
	}
	return m
}

// today is the time for records, to the second.
func (k *Custodian) today() time.Time { return k.now().UTC().Truncate(time.Second) }

// add takes a set of shares into the material: the HSM's own by their indices, and the messages of people. The shares are
// the material's from then on, and wiped with it. They are dealt to the items as the configuration says.
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
		item := &m.items[i]
		if item.foreign {
			continue
		}
		own := part{state: set.State}
		for _, index := range set.Indices {
			if m.c.deal(index) == item.key {
				own.indices = append(own.indices, index)
			}
		}
		for _, person := range set.People {
			if m.c.deal(person.Index) == item.key {
				own.people = append(own.people, person)
			}
		}
		item.sets[set.ID] = own
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

// everywhere tells whether all items hold a set that were opened or are to be made, and that the configuration names. A rekey
// tells Vault that a set was kept only when they do.
func (m *material) everywhere(id string) bool {
	return !slices.ContainsFunc(m.items, func(item materialItem) bool { _, held := item.sets[id]; return !held && !item.foreign })
}

// held tells whether all items hold a set that were opened.
func (m *material) held(id string) bool {
	return !slices.ContainsFunc(m.items, func(item materialItem) bool { _, held := item.sets[id]; return !held && len(item.sets) > 0 })
}

// inHand tells whether the opened items have of a set what a node wants, or all that there is of it but people's shares.
func (m *material) inHand(set *Set) bool {
	if set == nil {
		return false
	}
	if len(m.take(set, set.Threshold)) >= set.Threshold {
		return true
	}
	return slices.ContainsFunc(m.items, func(item materialItem) bool {
		_, held := item.sets[set.ID]
		return held && !strings.Contains(item.name, ".") // it is not a part
	})
}

// superseded tells whether a set that is still said to be active was the one before: where another one is active that an item
// calls pending beside it.
func (m *material) superseded(id string) bool {
	return slices.ContainsFunc(m.items, func(item materialItem) bool {
		if item.sets[id].state != SetActive {
			return false
		}
		for other, its := range item.sets {
			if its.state == SetPending && m.set(other).State == SetActive {
				return true
			}
		}
		return false
	})
}

// newest tells whether a set is active and took the place of all others, so that Vault need not be asked.
func (m *material) newest(id string) bool {
	return !slices.ContainsFunc(m.Sets, func(set Set) bool { return set.State != SetActive || set.ID != id && !m.superseded(set.ID) })
}

// inState are the sets in that state, in the order in which they are tried: first those of which all is in hand, the newest
// first.
func (m *material) inState(state SetState) []*Set {
	var sets []*Set
	for i := range m.Sets {
		if m.Sets[i].State == state {
			sets = append(sets, &m.Sets[i])
		}
	}
	rank := func(set *Set) int {
		switch {
		case !m.inHand(set):
			return 2
		case m.superseded(set.ID):
			return 1
		default:
			return 0
		}
	}
	slices.SortStableFunc(sets, func(a, b *Set) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), b.Made.Compare(a.Made)) })
	return sets
}

// active is the set that Vault takes; nil where neither all of it that is needed is in hand, nor each opened item has a part.
func (m *material) active() *Set {
	for _, set := range m.inState(SetActive) {
		if m.inHand(set) && !m.superseded(set.ID) || m.held(set.ID) {
			return set
		}
	}
	return nil
}

// pending is the set of which Vault may have been told that it was kept, and takes then; nil for none.
func (m *material) pending() *Set {
	for _, set := range m.inState(SetPending) {
		if m.everywhere(set.ID) {
			return set
		}
	}
	return nil
}

// promote makes a set the active one in all items that have a part of it, and drops the others. An item without a part of it
// is left as it is in the store, and is to be made anew.
func (m *material) promote(id string) {
	for i := range m.items {
		sets := m.items[i].sets
		own, held := sets[id]
		clear(sets)
		if held {
			own.state = SetActive
			sets[id] = own
		}
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
func (m *material) fields(item materialItem) (custody.Fields, error) {
	facts := m.Facts
	facts.Sets = nil
	fields := custody.Fields{}
	for _, set := range m.Sets {
		part, held := item.sets[set.ID]
		if !held {
			continue
		}
		own := set
		own.State, own.Indices, own.People = part.state, part.indices, part.people
		if own.State != SetPending {
			own.VerificationNonce = ""
		}
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
	item.sets = map[string]part{}
	m := &material{Facts: *facts, shares: map[shareName][]byte{}, messages: map[shareName][]byte{}}
	known := map[string]bool{fieldFacts: true}
	for _, set := range facts.Sets {
		item.sets[set.ID] = part{set.State, set.Indices, set.People}
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

// merge puts opened items together. The sets of the result are those of any item, each active where one item says so, because
// an item says so only after Vault was told.
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
	if !slices.ContainsFunc(m.Sets, func(set Set) bool { return m.held(set.ID) || m.inHand(&set) }) {
		return nil, fmt.Errorf("%w: no set of shares is in all of the items", ErrFacts)
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
	for _, person := range part.People {
		if !slices.Contains(set.People, person) {
			set.People = append(set.People, person)
		}
	}
	slices.SortFunc(set.People, func(a, b PersonShare) int { return cmp.Compare(a.Index, b.Index) })
	return nil
}

// load opens as many items as are needed to reach the threshold, at the cost of one HSM operation each, and those of a spread
// at once. The caller wipes the material. It is [ErrNoMaterial] where the cluster has none.
func (k *Custodian) load(ctx context.Context, c *Cluster, kind Kind) (*material, error) {
	return k.withActive(k.gather(ctx, c, kind, false))
}

// loadMost opens all items that open, which is what a change of the shares wants, and fails where those are fewer than are
// needed. Items that the configuration names and that did not open are in the material without any set.
func (k *Custodian) loadMost(ctx context.Context, c *Cluster, kind Kind) (*material, error) {
	return k.withActive(k.gather(ctx, c, kind, true))
}

// withActive refuses material in whose items nobody can tell what Vault takes.
func (k *Custodian) withActive(m *material, err error) (*material, error) {
	if err == nil && m.active() == nil {
		err = fmt.Errorf("the %s keys of cluster %q: %w: a rekey was cut off, and the items that open have not enough of the keys from before it; bring "+
			"another of its HSMs back", m.Kind, m.Cluster, ErrFacts)
		m.wipe()
		return nil, err
	}
	return m, err
}

// gathering is one call of gather.
type gathering struct {
	k     *Custodian
	c     *Cluster
	kind  Kind
	parts []*material
	blank []materialItem // that the configuration names, and that did not open
	errs  []error
}

// gather opens items: those that the configuration names first, then those that were dealt by another one, as the store has
// them. It ends when the active set is in hand, or with all set when all were tried.
func (k *Custodian) gather(ctx context.Context, c *Cluster, kind Kind, all bool) (*material, error) {
	g := &gathering{k: k, c: c, kind: kind}
	var named []materialItem
	for _, key := range c.keys() {
		named = append(named, materialItem{name: c.item(kind, key), key: key, sets: map[string]part{}})
	}
	at := c.needed()
	if all {
		at = len(named)
	}
	g.open(ctx, named[:at]...)
	for _, item := range named[at:] { // in place of those that are away
		if g.enough() {
			return g.material()
		}
		g.open(ctx, item)
	}
	if !all && g.enough() {
		return g.material()
	}
	foreign, err := k.foreignItems(ctx, c, kind)
	if err != nil {
		g.errs = append(g.errs, err)
	}
	for _, item := range foreign {
		if !all && g.enough() {
			break
		}
		g.open(ctx, item)
	}
	return g.material()
}

// open opens items at once.
func (g *gathering) open(ctx context.Context, items ...materialItem) {
	parts, errs := make([]*material, len(items)), make([]error, len(items))
	var group sync.WaitGroup
	for i, item := range items {
		group.Go(func() { parts[i], errs[i] = g.k.openItem(ctx, g.c, g.kind, item) })
	}
	group.Wait()
	for i, item := range items {
		if parts[i] != nil {
			g.parts = append(g.parts, parts[i])
			continue
		}
		g.errs = append(g.errs, errs[i])
		if item.foreign {
			continue
		}
		if !errors.Is(errs[i], custody.ErrNotFound) {
			item.lost = errs[i]
		}
		g.blank = append(g.blank, item)
	}
}

// enough tells whether the active set is in hand.
func (g *gathering) enough() bool {
	if len(g.parts) == 0 {
		return false
	}
	m, err := merge(g.parts)
	return err == nil && m.active() != nil && m.inHand(m.active())
}

// material is what was opened, with which the gathering ends.
func (g *gathering) material() (m *material, err error) {
	defer func() {
		if err != nil {
			for _, part := range g.parts {
				part.wipe()
			}
		}
	}()
	failed := join(g.errs...)
	m, err = assemble(g.c, g.kind, g.parts, failed)
	if err != nil {
		return nil, err
	}
	m.partial = failed != nil && !onlyNotFound(failed)
	m.items = append(m.items, g.blank...)
	return m, nil
}

// assemble is the material of what was opened.
func assemble(c *Cluster, kind Kind, parts []*material, failed error) (*material, error) {
	what := fmt.Sprintf("the %s keys of cluster %q", kind, c.Name)
	if len(parts) == 0 && onlyNotFound(failed) {
		return nil, fmt.Errorf("opening %s: %w: store %q has no item %q; initialise or import the cluster: %w", what, ErrNoMaterial, c.Store,
			c.item(kind, c.keys()[0]), failed)
	}
	few := func() error {
		return fmt.Errorf("opening %s: %d of the %d items that are needed could be opened: %w", what, len(parts), c.needed(), failed)
	}
	if len(parts) == 0 {
		return nil, few()
	}
	m, err := merge(parts)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", what, join(err, failed))
	}
	m.c = c
	if failed != nil && !slices.ContainsFunc(indices(m.Sets), func(i int) bool { return m.inHand(&m.Sets[i]) }) {
		return nil, few()
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
func (k *Custodian) openItem(ctx context.Context, c *Cluster, kind Kind, item materialItem) (*material, error) {
	fields, metadata, err := k.keeper.Open(ctx, c.Name, item.name, custody.ReadOptions{Store: c.Store, By: k.host})
	if err != nil {
		return nil, err
	}
	defer fields.Wipe()
	item.generation = metadata.Generation
	if item.foreign {
		item.key = metadata.Key
	}
	m, err := readItem(c.Name, kind, item, fields)
	if err != nil {
		return nil, fmt.Errorf("opening material %q of cluster %q: %w", item.name, c.Name, err)
	}
	return m, nil
}

// itemNames names the items of a cluster that this host or its store knows of, in order.
func (k *Custodian) itemNames(ctx context.Context, c *Cluster) ([]string, error) {
	refs, _, err := k.keeper.List(ctx, c.Name)
	if err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for _, ref := range refs {
		names[ref.Name] = true
	}
	// Without any record of the cluster, the keeper does not know which store to look into.
	s, err := k.store(ctx, c)
	if err != nil {
		return nil, err
	}
	prefix := "material/" + c.Name + "/"
	stored, err := s.List(ctx, prefix)
	if err != nil {
		return nil, fmt.Errorf("listing store %q: %w", c.Store, err)
	}
	for _, name := range stored {
		names[strings.TrimPrefix(name, prefix)] = true
	}
	return slices.Sorted(maps.Keys(names)), nil
}

// foreignItems are the items of a kind that are there and that the configuration does not name.
func (k *Custodian) foreignItems(ctx context.Context, c *Cluster, kind Kind) ([]materialItem, error) {
	names, err := k.itemNames(ctx, c)
	if err != nil {
		return nil, err
	}
	var items []materialItem
	for _, name := range names {
		ours := slices.ContainsFunc(c.keys(), func(key string) bool { return c.item(kind, key) == name })
		if head, _, _ := strings.Cut(name, "."); head == string(kind) && !ours {
			items = append(items, materialItem{name: name, foreign: true, sets: map[string]part{}})
		}
	}
	return items, nil
}

// dealtOtherwise tells whether the shares are not dealt to the wrapping keys that the configuration names.
func (m *material) dealtOtherwise() bool {
	active := m.active()
	if active == nil {
		return false
	}
	spread := ""
	if m.c.Spread != nil {
		spread = m.c.Spread.String()
	}
	return m.Spread != spread || slices.ContainsFunc(m.items, func(item materialItem) bool {
		_, held := item.sets[active.ID]
		return held && item.foreign
	})
}

// save writes the items as the material is now, one after the other, each by compare-and-swap. No HSM is touched. What
// failed may be saved again with the same request id: items that were written then are not written twice. After an error some
// items may be written and others not, which the rules of merge allow for.
func (k *Custodian) save(ctx context.Context, c *Cluster, m *material, by, request string) error {
	for i := range m.items {
		if len(m.items[i].sets) == 0 || m.items[i].foreign {
			continue
		}
		if err := k.saveItem(ctx, c, m, &m.items[i], by, request); err != nil {
			return err
		}
	}
	return nil
}

func (k *Custodian) saveItem(ctx context.Context, c *Cluster, m *material, item *materialItem, by, request string) error {
	fields, err := m.fields(*item)
	if err != nil {
		return fmt.Errorf("storing %q of cluster %q: %w", item.name, c.Name, err)
	}
	if item.lost == nil {
		return k.put(ctx, c, item, fields, by, request)
	}
	if err := k.putOver(ctx, c, item, fields, by, request); err != nil {
		return err
	}
	item.lost = nil // it is like the others from now on
	return nil
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
