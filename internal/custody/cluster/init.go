package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Initialising goes through these steps. Between any two of them the process may die, and the node, the store or the disk may
// fail at any; the last column says what the next run, of this host or another one, makes of it.
//
//	   step                                      what there is when it was cut off here, and what the next run does
//	 1 local lock                                nothing; the lock dies with its holder
//	 2 store what an earlier run held            the held items stay, and are stored then
//	 3 look: material, then the node             nothing
//	 4 rehearsal on disk, HSMs and store         a rehearsal item, which the next one of this host removes
//	 5 intent into the store, create-only        an intent without a copy: Vault was not asked; taken over at once by this host,
//	                                             by others when it is old
//	 6 look again                                the same
//	 7 audit log: intent of "init"               the same
//	 8 copy of the intent to the local disk      node not initialised: taken over, as one that may have asked Vault;
//	                                             node initialised: ErrEmpty, which is the truth from step 9 on
//	 9 sys/init                                  the one window: keys exist, and only in this process. ErrEmpty
//	10 hold: sealed, fsynced on the local disk   the held items; step 2 of the next run, or of Tend
//	11 the same items into the store, CAS 0      held and stored: recognised by the request id or by the origin in the facts
//	12 held items removed                        intent and copy: removed by the next Init of this host
//	13 intent removed, then its copy             a copy without an intent, which nobody asks for
//	14 unseal, join, unseal the others           Tend does what is left
//	15 cluster id learned, into the items        the next unsealing does it
//	16 root token revoked, its item deleted      Tend revokes it again, which is no error, and deletes it
//
// From 7 to 12 the process must not end on request ([Config.Critical]), and from the answer of 9 to the end of 10 or 11 nothing
// but its death ends it: keep tries for ever.

// InitOptions say who initialises.
type InitOptions struct {
	By string // display name, for records and the audit log
}

// InitResult is what [Custodian.Init] has done.
type InitResult struct {
	Cluster string
	// Initialized is true where this call initialised the cluster, false where it had been before.
	Initialized bool
	Kind        Kind // of the keys in custody
	Shares      int
	Threshold   int
	Items       []string // that the keys lie in
	// People are those who took a share, each with the message that only they can open.
	People []PersonMessage
	// RootPGP is the root token as Vault encrypted it for [RootPGP], armored; nil otherwise.
	RootPGP []byte
	// RootRevoked is true where the root token has been revoked.
	RootRevoked bool
	Nodes       []NodeOutcome
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// PersonMessage is a person's share.
type PersonMessage struct {
	PersonShare

	Message []byte // armored OpenPGP
}

// Init initialises a cluster where it is not, and joins and unseals its nodes. It may be called on all hosts at once, and again
// after any failure or crash: one host initialises, the others wait until its keys are in the store. What ctx ends is only the
// waiting: once Vault was asked, Init returns when the keys are safe.
//
// The error is nil when the keys are in the store and the first node is unsealed, or waits for people; how the other nodes are
// is in the result, which is of use beside an error as well.
func (k *Custodian) Init(ctx context.Context, c *Cluster, options InitOptions) (InitResult, error) {
	result := InitResult{Cluster: c.Name}
	if err := c.Check(); err != nil {
		return result, err
	}
	unlock, err := k.lock(ctx, c)
	if err != nil {
		return result, err
	}
	defer unlock()
	var reason error // of waiting
	var since time.Time
	for {
		done, err := k.initOnce(ctx, c, options, &result)
		switch {
		case done && err != nil && ctx.Err() != nil:
			return result, join(reason, err)
		case done:
			return result, err
		case reason != nil && errors.Is(err, ErrBusy) && k.now().Sub(since) > intentLife:
			return result, fmt.Errorf("%w, for longer than that takes; look at the log of the node", err)
		}
		if reason == nil {
			since = k.now()
			k.logger.Info("waiting for another host that initialises the cluster", "cluster", c.Name, "reason", err)
		}
		reason = err
		k.pause(ctx, k.pauses.wait)
		if ctx.Err() != nil {
			return result, join(err, context.Cause(ctx))
		}
	}
}

// initOnce does what is due. done is false where it has to be looked at again: the error says why.
func (k *Custodian) initOnce(ctx context.Context, c *Cluster, options InitOptions, result *InitResult) (done bool, err error) {
	if _, err := k.finishHeld(ctx, c); err != nil {
		return true, err
	}
	// Keys are stored only after the node was initialised. So whoever sees none, and then a node without keys, has seen no
	// cluster; and none of them may be there when the node, looked at later, has no keys.
	kinds, err := k.kinds(ctx, c)
	if err != nil {
		return true, err
	}
	n, err := k.node(c, c.Nodes[0])
	if err != nil {
		return true, err
	}
	st, err := n.Status(ctx)
	switch {
	case err != nil:
		return true, err
	case st.Initialized && st.T == 0:
		return false, fmt.Errorf("node %s of cluster %q: %w: it is being initialised", n.Address(), c.Name, ErrBusy)
	case st.Initialized && len(kinds) == 0:
		err := k.diagnose(ctx, c)
		return !errors.Is(err, ErrIntentElsewhere) && !errors.Is(err, ErrBusy), err
	case st.Initialized && !k.complete(ctx, c, kinds[0]):
		if err := k.storing(ctx, c); err != nil {
			return false, err
		}
		return true, k.settle(ctx, c, kinds[0], st, k.opening(c), result)
	case st.Initialized:
		return true, k.settle(ctx, c, kinds[0], st, k.opening(c), result)
	case len(kinds) > 0 && k.joinable(ctx, c, st):
		return true, k.settle(ctx, c, kinds[0], st, k.opening(c), result)
	case len(kinds) > 0:
		return true, fmt.Errorf("initialising cluster %q: %w, and its first node %s has none: where its storage was wiped on purpose, delete the material "+
			"first; where the node is a new one that should join, list another one first; else look at its address", c.Name, ErrExists, n.Address())
	}
	kind := KindUnseal
	if st.Type != sealShamir || st.RecoverySeal {
		kind = KindRecovery
	}
	if err := c.checkShares(kind); err != nil {
		return true, fmt.Errorf("cluster %q: %w", c.Name, err)
	}
	return k.begin(ctx, c, n, kind, options, result)
}

// joinable tells whether the first node, which has lost its storage, can join the others again.
func (k *Custodian) joinable(ctx context.Context, c *Cluster, st node.Status) bool {
	if st.StorageType != storageRaft {
		return false
	}
	leader, sealed := k.leader(ctx, c, c.Nodes[0])
	return leader != "" || sealed
}

// complete tells whether all items of a kind are there. Of a spread, a host that has initialised stores one after the other.
func (k *Custodian) complete(ctx context.Context, c *Cluster, kind Kind) bool {
	return !slices.ContainsFunc(k.items(ctx, c, kind), func(item MaterialStatus) bool { return errors.Is(item.Err, custody.ErrNotFound) })
}

// storing is ErrIntentElsewhere while another host may still be storing what it made.
func (k *Custodian) storing(ctx context.Context, c *Cluster) error {
	s, err := k.store(ctx, c)
	if err != nil {
		return err
	}
	hostID, err := k.hostID(ctx)
	if err != nil {
		return err
	}
	found, err := readIntent(ctx, s, c.Name)
	if err == nil && found.Intent != nil && found.HostID != hostID && found.alive(k.now()) {
		return found.elsewhere()
	}
	return err
}

// begin makes sure that keys could be kept, takes the right to make them, and makes them.
func (k *Custodian) begin(ctx context.Context, c *Cluster, n *node.Node, kind Kind, options InitOptions, result *InitResult) (done bool, err error) {
	s, err := k.store(ctx, c)
	if err != nil {
		return true, err
	}
	if found, err := readIntent(ctx, s, c.Name); err != nil {
		return true, err
	} else if found.Intent != nil {
		hostID, err := k.hostID(ctx)
		if err != nil {
			return true, err
		}
		if found.HostID != hostID && found.alive(k.now()) {
			return false, found.elsewhere()
		}
	}
	if err := k.ready(ctx, c); err != nil {
		return true, err
	}
	request, own, err := k.initRequest(c, kind)
	if err != nil {
		return true, err
	}
	if err := k.rehearse(ctx, c, kind); err != nil {
		return true, err
	}
	claimed, err := k.claim(ctx, c, s, options.By)
	if err != nil {
		return !errors.Is(err, ErrIntentElsewhere), err
	}
	// Another host may have done all of it between our look and our claim.
	kinds, err := k.kinds(ctx, c)
	var st node.Status
	if err == nil {
		st, err = n.Status(ctx)
	}
	switch {
	case err != nil:
		return true, join(err, k.withdraw(ctx, s, claimed))
	case st.Initialized || len(kinds) > 0:
		busy := fmt.Errorf("initialising cluster %q: %w: another host was faster", c.Name, ErrBusy)
		return false, join(busy, k.withdraw(ctx, s, claimed))
	}
	made := &creation{kind: kind, request: request, own: own, by: options.By}
	defer made.wipe()
	if err := k.create(ctx, c, n, st, s, claimed, made, result); err != nil {
		return !errors.Is(err, ErrBusy), err
	}
	result.Initialized = true
	return true, k.settle(ctx, c, kind, st, opened(made.material), result)
}

// creation is what Vault is asked for, and what it answered.
type creation struct {
	kind    Kind
	request node.InitRequest
	own     *ownKey // for the HSM's shares where people take some; nil otherwise
	by      string

	material *material // nil until there is an answer
	root     *rootItem
}

func (made *creation) wipe() {
	made.material.wipe()
	made.root.wipe()
}

// initRequest is what Vault is asked for.
func (k *Custodian) initRequest(c *Cluster, kind Kind) (request node.InitRequest, own *ownKey, err error) {
	shares, threshold := c.sizes(kind)
	var keys []string
	if len(c.People) > 0 {
		if own, err = newOwnKey(k.now()); err != nil {
			return request, nil, err
		}
		for range shares - len(c.People) {
			keys = append(keys, own.forVault())
		}
		for _, person := range c.People {
			key, err := k.personKey(person.PGPKey)
			if err != nil {
				return request, nil, fmt.Errorf("cluster %q: %w: the key of person %q: %w", c.Name, ErrInvalid, person.Name, err)
			}
			keys = append(keys, key)
		}
	}
	if kind == KindRecovery {
		request.RecoveryShares, request.RecoveryThreshold, request.RecoveryPGPKeys = shares, threshold, keys
	} else {
		request.Shares, request.Threshold, request.PGPKeys = shares, threshold, keys
	}
	if c.rootToken() == RootPGP {
		if request.RootPGPKey, err = k.personKey(c.RootPGPKey); err != nil {
			return request, nil, fmt.Errorf("cluster %q: %w: the OpenPGP key for the root token: %w", c.Name, ErrInvalid, err)
		}
	}
	return request, own, nil
}

// personKey is a person's key as Vault wants it.
func (k *Custodian) personKey(raw []byte) (string, error) {
	key, err := ReadPGPKey(raw)
	if err != nil {
		return "", err
	}
	return key.forVault(k.now())
}

// create asks Vault for the keys and brings them to safety. ErrBusy says that somebody else was faster.
func (k *Custodian) create(
	ctx context.Context, c *Cluster, n *node.Node, st node.Status, s store.Store, claimed foundIntent, made *creation, result *InitResult,
) error {
	leave := k.critical("initialising cluster " + c.Name)
	defer leave()
	shares, threshold := c.sizes(made.kind)
	end, err := k.act(ctx, "init", c, n.Address(), made.by, map[string]string{
		"intent": claimed.ID, "kind": string(made.kind), "shares": fmt.Sprint(shares), "threshold": fmt.Sprint(threshold), "people": fmt.Sprint(len(c.People)),
	})
	if err != nil {
		return join(err, k.withdraw(ctx, s, claimed))
	}
	answer, err := k.ask(ctx, c, n, s, claimed, made.request)
	end(err)
	if answer == nil {
		return err
	}
	defer answer.Wipe()
	odd := join(err, k.take(c, st, claimed.ID, made, answer, result)) // the keys could be read all the same
	items, err := made.newborns(c)
	if err != nil {
		return join(odd, err)
	}
	if err := k.keep(ctx, c, items, made.by, claimed.ID); err != nil {
		return join(odd, err)
	}
	for i := range made.material.items {
		made.material.items[i].generation = items[i].generation
	}
	// All is stored. What cannot be cleared away now is recognised by the next run.
	if err := k.dropHeld(ctx, c, claimed.ID); err != nil {
		result.Warnings = append(result.Warnings, err.Error())
	}
	if err := k.settleIntent(ctx, c); err != nil {
		result.Warnings = append(result.Warnings, err.Error())
	}
	k.rootAt(c, time.Time{})
	if odd != nil {
		return fmt.Errorf("initialising cluster %q: its keys are stored as far as the answer could be read: %w", c.Name, odd)
	}
	return nil
}

// ask asks Vault, once. What it surely did not do takes the intent back.
func (k *Custodian) ask(
	ctx context.Context, c *Cluster, n *node.Node, s store.Store, claimed foundIntent, request node.InitRequest,
) (*node.InitAnswer, error) {
	copied, err := readIntent(ctx, k.local, c.Name)
	if err == nil {
		_, err = writeIntent(ctx, k.local, claimed.Intent, copied.revision)
	}
	if err != nil {
		return nil, join(err, k.withdraw(ctx, s, claimed))
	}
	k.logger.Info("initialising a cluster", "cluster", c.Name, "node", n.Address(), "intent", claimed.ID)
	answer, err := n.Init(ctx, request)
	switch {
	case err == nil, answer != nil:
		return answer, err
	case errors.Is(err, node.ErrMayHaveHappened):
		now, lookErr := afterwards(ctx, n.Status)
		if lookErr == nil && now.Initialized && now.T > 0 {
			return nil, join(k.empty(c, claimed.Intent), err)
		}
		return nil, fmt.Errorf("initialising cluster %q: %w; run it again to find out", c.Name, err)
	case errors.Is(err, node.ErrAlreadyInitialized):
		return nil, join(fmt.Errorf("initialising cluster %q: %w: somebody else was faster: %w", c.Name, ErrBusy, err), k.withdraw(ctx, s, claimed))
	default:
		return nil, join(fmt.Errorf("initialising cluster %q: %w", c.Name, err), k.withdraw(ctx, s, claimed))
	}
}

// take makes material of what Vault answered. It gives up no share: what cannot be read is told beside it.
func (k *Custodian) take(c *Cluster, st node.Status, origin string, made *creation, answer *node.InitAnswer, result *InitResult) error {
	total, threshold := c.sizes(made.kind)
	raw := answer.Shares
	if made.kind == KindRecovery {
		raw = answer.RecoveryShares
	}
	m := k.newMaterial(c, made.kind, origin, st, made.by)
	made.material = m
	set := Set{ID: origin, Shares: total, Threshold: threshold, State: SetActive, Made: m.Made, MadeBy: made.by}
	shares, messages := map[int][]byte{}, map[int][]byte{}
	var failed []error
	for i, answered := range raw[:min(len(raw), total)] {
		switch first := total - len(c.People); {
		case made.own == nil:
			shares[i] = slices.Clone(answered)
		case i < first:
			share, err := made.own.openShare(answered)
			if err != nil {
				failed = append(failed, err)
				continue
			}
			shares[i] = share
		default:
			person, err := personShare(c.People[i-first], i)
			failed = append(failed, err)
			messages[i] = slices.Clone(answered)
			set.People = append(set.People, person)
			armored, err := armorMessage(answered)
			failed = append(failed, err)
			result.People = append(result.People, PersonMessage{person, armored})
		}
	}
	m.add(set, shares, messages)
	result.Kind, result.Shares, result.Threshold = made.kind, total, threshold
	if len(answer.RootToken) == 0 {
		return join(append(failed, fmt.Errorf("the answer was cut off before the root token, which lives and which nobody knows: when the cluster is "+
			"unsealed, make another one (%s) and revoke the first by its accessor", k.do("root", c.Name)))...)
	}
	switch purpose := c.rootToken(); purpose {
	case RootPGP:
		key, err := ReadPGPKey(c.RootPGPKey)
		failed = append(failed, err)
		made.root = k.newRoot(c, origin, purpose, nil, slices.Clone(answer.RootToken), made.by)
		if err == nil {
			made.root.Fingerprint = key.Fingerprint
		}
		result.RootPGP, err = armorMessage(answer.RootToken)
		failed = append(failed, err)
	default:
		made.root = k.newRoot(c, origin, purpose, slices.Clone(answer.RootToken), nil, made.by)
	}
	return join(failed...)
}

// personShare says that a person has a share.
func personShare(person Person, index int) (PersonShare, error) {
	share := PersonShare{Index: index, Name: person.Name}
	key, err := ReadPGPKey(person.PGPKey)
	if err == nil {
		share.Fingerprint = key.Fingerprint
	}
	return share, err
}

// newborns are the items that have to be stored: those of the material, in their order, then that of the root token.
func (made *creation) newborns(c *Cluster) ([]*newborn, error) {
	var items []*newborn
	for _, item := range made.material.items {
		fields, err := made.material.fields(item)
		if err != nil {
			return nil, err
		}
		items = append(items, &newborn{materialItem: item, fields: fields})
	}
	if made.root != nil {
		fields, err := made.root.fields()
		if err != nil {
			return nil, err
		}
		items = append(items, &newborn{materialItem: materialItem{name: itemRoot, key: c.keys()[0]}, fields: fields})
	}
	return items, nil
}

// busyLooks is how often the first node is looked at again while others are at it.
const busyLooks = 10

// settle brings the nodes of an initialised cluster up, the first one first, and clears away what initialising left.
func (k *Custodian) settle(ctx context.Context, c *Cluster, kind Kind, st node.Status, o *opening, result *InitResult) error {
	defer o.wipe()
	result.Kind = kind
	if !result.Initialized {
		result.Shares, result.Threshold = st.N, st.T
		for _, tidy := range []func(context.Context, *Cluster) error{k.settleIntent, k.clearRehearsal} {
			if err := tidy(ctx, c); err != nil {
				result.Warnings = append(result.Warnings, err.Error())
			}
		}
	}
	for _, item := range k.items(ctx, c, kind) {
		result.Items = append(result.Items, item.Item)
	}
	// The others join the first one, so it has to serve first.
	first, err := k.tend(ctx, c, c.Nodes[0], o)
	for range busyLooks {
		if !errors.Is(err, ErrBusy) {
			break
		}
		k.pause(ctx, k.pauses.look) // another host unseals it, too
		first, err = k.tend(ctx, c, c.Nodes[0], o)
	}
	if err == nil && !first.Node.Seal.Sealed {
		o.saw(first.Node.Seal.ClusterID, first.Node.Seal.ClusterName)
	}
	k.learn(ctx, c, o)
	result.RootRevoked = first.RootRevoked
	if err == nil && !first.Node.Seal.Sealed {
		if n, err := k.node(c, c.Nodes[0]); err == nil {
			if err := k.awaitActive(ctx, n); err != nil {
				result.Warnings = append(result.Warnings, "The first node does not serve yet; nodes that have to join it do so later.")
			}
		}
	}
	result.Nodes = k.tendAll(ctx, c, o)
	for i := range result.Nodes {
		result.RootRevoked = result.RootRevoked || result.Nodes[i].Outcome.RootRevoked
	}
	if looked := &result.Nodes[0]; err == nil && looked.Err == nil { // what was done in the two looks is one outcome
		if looked.Outcome.Action == ActionNone {
			looked.Outcome.Action = first.Action
		}
		looked.Outcome.Joined = looked.Outcome.Joined || first.Joined
		looked.Outcome.Took += first.Took
	}
	if c.rootToken() == RootDiscard && result.Initialized && !result.RootRevoked {
		result.Warnings = append(result.Warnings, "The root token that initialising made is not revoked yet; that is done when a node is active and looked at.")
	}
	return result.Nodes[0].Err
}

// diagnose says what became of the keys of a cluster that is initialised while the store has none. The local lock is held, so
// no other process of this host is at work.
func (k *Custodian) diagnose(ctx context.Context, c *Cluster) error {
	names, err := k.heldNow(ctx, c)
	if err != nil {
		return err
	}
	if len(names) > 0 {
		return fmt.Errorf("cluster %q: %w, sealed, until store %q takes them", c.Name, ErrHeld, c.Store)
	}
	if kinds, err := k.kinds(ctx, c); err != nil || len(kinds) > 0 {
		return join(err, fmt.Errorf("cluster %q: %w: its keys were stored this moment; look again", c.Name, ErrBusy))
	}
	s, err := k.store(ctx, c)
	if err != nil {
		return err
	}
	found, err := readIntent(ctx, s, c.Name)
	if err != nil {
		return err
	}
	none := fmt.Errorf("cluster %q: %w: it was initialised by somebody else; import its keys: %s", c.Name, ErrNoMaterial, k.do("import", c.Name))
	if found.Intent == nil {
		return none
	}
	hostID, err := k.hostID(ctx)
	if err != nil {
		return err
	}
	asked, err := k.asked(ctx, found.Intent, hostID)
	if err != nil {
		return err
	}
	switch others := *found.Intent; {
	case !asked && len(found.Before) == 0:
		return join(none, k.withdraw(ctx, s, found))
	case found.HostID != hostID && found.alive(k.now()):
		return found.elsewhere()
	case !asked && others.alive(k.now()): // those that it took over from may still be at work
		return found.elsewhere()
	default:
		return k.empty(c, found.Intent)
	}
}

// empty is the diagnosis of promise 3: nobody holds the keys. Nothing is ever wiped by us.
func (k *Custodian) empty(c *Cluster, intent *Intent) error {
	return fmt.Errorf("cluster %q: %w: an initialisation by %s got no further than Vault's own part, so it holds no data yet, and no store and no disk here has "+
		"its keys. Where one of these hosts is still running it, or holds the keys on its disk (held/%s/ in its custody folder), let it go on there: it "+
		"stores them. Else wipe the storage of all nodes of the cluster by hand, start them, and run: %s", c.Name, ErrEmpty, intent.hosts(), c.Name,
		k.do("init", c.Name))
}
