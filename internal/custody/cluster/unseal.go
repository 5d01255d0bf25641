package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// sealShamir is the type of a seal that wants shares. Any other one unseals by itself.
const sealShamir = "shamir"

// opening opens the unseal keys of a cluster when the first node needs them, once for all nodes of a call. Whoever made it
// wipes it.
type opening struct {
	load func(ctx context.Context) (*material, error)
	// loadFormer opens the keys from before the last rekey; nil where there can be none.
	loadFormer func(ctx context.Context) (*material, error)

	mu       sync.Mutex
	done     bool
	material *material
	err      error
	former   formerKeys
	id, name string // of the cluster, as its nodes have shown them
}

// opening returns one that opens nothing yet.
func (k *Custodian) opening(c *Cluster) *opening {
	return &opening{
		load: func(ctx context.Context) (*material, error) {
			m, err := k.gather(ctx, c, KindUnseal, false)
			if err == nil && m.dealtOtherwise() {
				k.logger.Warn("the shares of a cluster are dealt to other wrapping keys than the configuration names; rekey to deal them as the configuration says",
					"cluster", c.Name, "dealt_to", m.where())
			}
			return m, err
		},
		loadFormer: func(ctx context.Context) (*material, error) { return k.loadFormer(ctx, c, KindUnseal) },
	}
}

// opened is an opening of what is open already.
func opened(m *material) *opening {
	return &opening{done: true, material: m, id: m.ClusterID, name: m.ClusterName}
}

// get opens the material at the first call.
func (o *opening) get(ctx context.Context) (*material, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.done {
		o.done = true
		if o.material, o.err = o.load(ctx); o.err == nil {
			o.id, o.name = o.material.ClusterID, o.material.ClusterName
		}
	}
	return o.material, o.err
}

// formerKeys are the keys from before the last rekey.
type formerKeys struct {
	done     bool
	material *material
	err      error
}

// getFormer opens the keys from before the last rekey at the first call; nil for none.
func (o *opening) getFormer(ctx context.Context) (*material, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.former.done && o.loadFormer != nil {
		o.former.done = true
		o.former.material, o.former.err = o.loadFormer(ctx)
	}
	return o.former.material, o.former.err
}

// saw compares the cluster id of a node that was unsealed with the recorded one, or learns it where none is recorded.
func (o *opening) saw(id, name string) (recorded string, same bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if id == "" { // it does not tell
		return o.id, true
	}
	if o.id == "" {
		o.id, o.name = id, name
	}
	return o.id, o.id == id
}

// wipe ends it.
func (o *opening) wipe() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.material.wipe()
	o.former.material.wipe()
	o.former = formerKeys{done: true, err: errWiped}
	o.material, o.done, o.err = nil, true, errWiped
}

var errWiped = errors.New("the keys were wiped")

// learn writes the cluster id that a node has shown into the items that are open. It is no loss where that fails: the next one
// does it.
func (k *Custodian) learn(ctx context.Context, c *Cluster, o *opening) {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := o.material
	if m == nil {
		return
	}
	k.remember(func(memory *memory) { memory.ids[c.Name] = o.id })
	if m.ClusterID == o.id {
		return
	}
	m.ClusterID, m.ClusterName = o.id, o.name
	if err := k.save(ctx, c, m, k.host, ""); err != nil {
		k.logger.Warn("noting the id of a cluster beside its keys failed; the next unsealing does it", "cluster", c.Name, "error", err)
	}
}

// unseal gives a sealed node the shares that it wants. Before the material is opened, and before a share leaves, the node is
// looked at: what it says of its seal has to be as recorded.
func (k *Custodian) unseal(ctx context.Context, c *Cluster, n *node.Node, st node.Status, o *opening, out *Outcome) error {
	address := n.Address()
	where := fmt.Sprintf("node %s of cluster %q", address, c.Name)
	if st.Migration {
		return fmt.Errorf("%s: %w: a migration of its seal is under way, and shares would be spent on that; end it by hand", where, ErrMismatch)
	}
	if st.Removed {
		return fmt.Errorf("%s: %w: it was removed from its raft cluster; wipe its storage and let it join anew", where, ErrMismatch)
	}
	if waiting, note := k.waiting(c, address, st); waiting {
		out.Action, out.Note = ActionWaiting, note
		out.People = max(st.T-st.Progress, 0)
		if st.Progress == 0 {
			out.People = 0
		}
		return nil
	}
	if err := k.refused(ctx, c, address, st); err != nil {
		return err
	}
	alarm, err := k.alarm(ctx, c, address, true)
	if err != nil {
		return err
	}
	if alarm != nil {
		return alarm.err()
	}
	// Before the keys are opened, not only before they are sent: where nobody can write it down, they stay sealed.
	end, err := k.act(ctx, "unseal", c, address, k.host, map[string]string{"threshold": fmt.Sprint(st.T)})
	if err != nil {
		return err
	}
	err = k.openAndGive(ctx, c, n, st, o, out)
	end(err)
	return err
}

// openAndGive opens the keys, compares the node with what is recorded beside them, and gives it its shares.
func (k *Custodian) openAndGive(ctx context.Context, c *Cluster, n *node.Node, st node.Status, o *opening, out *Outcome) error {
	address := n.Address()
	where := fmt.Sprintf("node %s of cluster %q", address, c.Name)
	m, err := o.get(ctx)
	if err != nil {
		return err
	}
	sets, difference := m.fits(st)
	if difference != "" {
		tried, err := k.giveFormer(ctx, c, n, m, st, difference, o, out)
		if tried && !errors.Is(err, node.ErrWrongShares) {
			return err
		}
		partial := m.partial || !tried && err != nil
		err = join(fmt.Errorf("%s: %w: %s; it got no share; correct its address, or where that is right and its keys were changed elsewhere, import them", where,
			ErrMismatch, difference), err)
		k.refuse(ctx, c, address, st, partial, err)
		return err
	}
	sets = slices.DeleteFunc(sets, func(set *Set) bool { return !m.inHand(set) })
	if len(sets) == 0 {
		return fmt.Errorf("%s: %w: a rekey was cut off, and the items that open have not enough of the keys that it may take; bring another HSM of the cluster back",
			where, ErrFacts)
	}
	short := len(m.take(sets[0], sets[0].Threshold)) < sets[0].Threshold
	if st.Progress > 0 && !short {
		if st, err = k.alone(ctx, c, n, st); err != nil {
			return err
		}
		if out.Node.Seal = st; !st.Sealed {
			return nil // by others
		}
	}
	for i, set := range sets {
		err = k.give(ctx, c, n, m, set, o, out)
		if !errors.Is(err, node.ErrWrongShares) {
			return err
		}
		k.logger.Error("a node does not take the shares in custody", "cluster", c.Name, "node", address, "set", set.ID, "state", set.State,
			"others_left", len(sets)-i-1)
	}
	tried, formerErr := k.giveFormer(ctx, c, n, m, st, "it does not take the active ones", o, out)
	if tried && !errors.Is(formerErr, node.ErrWrongShares) {
		return formerErr
	}
	if formerErr != nil {
		err = join(err, formerErr)
	}
	err = fmt.Errorf("%s: %w: %w; rekeyed elsewhere? then import its keys; it is not tried again before something changes", where, ErrWrongShares, err)
	k.refuse(ctx, c, address, st, m.partial || !tried && formerErr != nil, err)
	return err
}

// giveFormer gives a node of raft storage the shares from before the last rekey, where there are such that it may take.
func (k *Custodian) giveFormer(
	ctx context.Context, c *Cluster, n *node.Node, m *material, st node.Status, why string, o *opening, out *Outcome,
) (tried bool, err error) {
	if st.StorageType != storageRaft {
		return false, nil
	}
	former, err := o.getFormer(ctx)
	if err != nil || former == nil || former.Origin != m.Origin {
		return false, err
	}
	sets, difference := former.fits(st)
	if difference != "" {
		return false, nil
	}
	k.logger.Warn("a node is given the shares from before the last rekey: it missed that while it was sealed or away, or was restored from an older snapshot",
		"cluster", c.Name, "node", n.Address(), "because", why)
	return true, k.give(ctx, c, n, former, sets[0], o, out)
}

// where names the items that hold the active set.
func (m *material) where() string {
	var names []string
	for _, item := range m.items {
		if _, held := item.sets[m.active().ID]; held {
			names = append(names, item.name)
		}
	}
	return strings.Join(names, ", ")
}

// waiting tells whether a node has our shares already and goes on without us, for a while.
func (k *Custodian) waiting(c *Cluster, address string, st node.Status) (yes bool, note string) {
	name := nodeName{c.Name, address}
	k.remember(func(m *memory) {
		was, known := m.given[name]
		switch {
		case !known:
		case was.nonce != "" && was.nonce == st.Nonce && st.Progress > 0:
			yes, note = true, peopleNote(st)
		case was.nonce == "" && st.Progress == 0 && k.now().Before(was.until):
			yes, note = true, "It has its shares and joins its cluster."
		default:
			delete(m.given, name)
		}
	})
	return yes, note
}

func peopleNote(st node.Status) string {
	return fmt.Sprintf("It has the shares in custody and %d of %d in all; people give the others: vault operator unseal.", st.Progress, st.T)
}

// alone waits for others who have begun to unseal a node. Where they do not go on, what they have given is reset.
func (k *Custodian) alone(ctx context.Context, c *Cluster, n *node.Node, st node.Status) (node.Status, error) {
	k.pause(ctx, k.pauses.look)
	now, err := n.Status(ctx)
	switch {
	case err != nil || !now.Sealed:
		return now, err
	case now.Progress == 0:
		return now, nil
	case now.Progress != st.Progress || now.Nonce != st.Nonce:
		return now, fmt.Errorf("node %s of cluster %q: %w: others are unsealing it; look again", n.Address(), c.Name, ErrBusy)
	}
	k.logger.Warn("an unsealing that stalled is reset", "cluster", c.Name, "node", n.Address(), "progress", now.Progress)
	st, err = n.ResetUnseal(ctx)
	if err != nil { // refused where others have just unsealed it
		if now, lookErr := n.Status(ctx); lookErr == nil && !now.Sealed {
			return now, nil
		}
	}
	return st, err
}

// give sends the shares of a set, as many as the threshold asks for.
func (k *Custodian) give(ctx context.Context, c *Cluster, n *node.Node, m *material, set *Set, o *opening, out *Outcome) error {
	shares := m.take(set, set.Threshold)
	st, err := k.send(ctx, c, n, shares, set)
	if err != nil {
		return err
	}
	out.Node.Seal = st
	name := nodeName{c.Name, n.Address()}
	switch {
	case !st.Sealed:
		return k.unsealed(ctx, c, n, st, o, out)
	case len(shares) < set.Threshold:
		k.remember(func(m *memory) { m.given[name] = given{nonce: st.Nonce} })
		out.Action, out.People, out.Note = ActionWaiting, max(st.T-st.Progress, 0), peopleNote(st)
		return nil
	}
	// A raft node that has just joined has all it needs, and goes on by itself.
	k.remember(func(m *memory) { m.given[name] = given{until: k.now().Add(joinTime)} })
	st = k.settled(ctx, n, st, k.pauses.settle)
	out.Node.Seal = st
	if !st.Sealed {
		return k.unsealed(ctx, c, n, st, o, out)
	}
	out.Action, out.Note = ActionWaiting, "It has its shares and joins its cluster."
	return nil
}

// joinTime is how long a node that has its shares is left alone.
const joinTime = time.Minute

// send sends shares one by one, and watches in each answer that it was ours that counted.
func (k *Custodian) send(ctx context.Context, c *Cluster, n *node.Node, shares [][]byte, set *Set) (st node.Status, err error) {
	whole := len(shares) >= set.Threshold
	var nonce string
	for i, share := range shares {
		st, err = n.Unseal(ctx, share)
		// It may be unsealed now; and while others unseal it, it fails in ways of its own.
		if errors.Is(err, node.ErrMayHaveHappened) || errors.Is(err, node.ErrUnavailable) || errors.Is(err, node.ErrRefused) {
			now, lookErr := n.Status(ctx)
			if lookErr == nil && !now.Sealed {
				return now, nil
			}
		}
		if err != nil || !st.Sealed {
			return st, err
		}
		last := i == len(shares)-1
		ours := st.Progress == i+1 && (i == 0 || st.Nonce == nonce) || whole && last && st.Progress == 0
		if whole && !ours {
			return k.disturbed(ctx, c, n, st)
		}
		nonce = st.Nonce
	}
	return st, nil
}

// disturbed is the end of an attempt to which somebody else gave shares as well, as another host does that finds the node
// sealed at the same moment.
func (k *Custodian) disturbed(ctx context.Context, c *Cluster, n *node.Node, st node.Status) (node.Status, error) {
	now := k.settled(ctx, n, st, k.pauses.look)
	if now.Sealed {
		return now, fmt.Errorf("node %s of cluster %q: %w: others gave it shares at the same time; look again", n.Address(), c.Name, ErrBusy)
	}
	return now, nil
}

// settled looks at a node until it is unsealed, for so long at most.
func (k *Custodian) settled(ctx context.Context, n *node.Node, st node.Status, limit time.Duration) node.Status {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for pause := k.pauses.poll; ; pause = min(2*pause, k.pauses.pollLast) {
		k.pause(ctx, pause)
		if ctx.Err() != nil {
			return st
		}
		now, err := n.Status(ctx)
		if err != nil {
			continue // it is busy
		}
		if st = now; !st.Sealed {
			return st
		}
	}
}

// unsealed compares the cluster id of a node that our shares unsealed.
func (k *Custodian) unsealed(ctx context.Context, c *Cluster, n *node.Node, st node.Status, o *opening, out *Outcome) error {
	if st.ClusterID == "" { // it had none to tell in that moment
		if now, err := n.Status(ctx); err == nil {
			st = now
			out.Node.Seal = now
		}
	}
	k.remember(func(m *memory) { delete(m.given, nodeName{c.Name, n.Address()}) })
	out.Action = ActionUnsealed
	recorded, same := o.saw(st.ClusterID, st.ClusterName)
	if !same {
		alarm := k.raise(ctx, c, n.Address(), recorded, st.ClusterID)
		out.Node.Alarm = alarm
		return alarm.err()
	}
	k.logger.Info("a node was unsealed", "cluster", c.Name, "node", n.Address())
	return nil
}
