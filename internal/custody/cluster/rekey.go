package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// A rekey gives a cluster new keys, and goes through these steps. Vault keeps the old keys until it has seen that the new
// ones were kept, so at no point are they the only ones or in one place only. A stands for the old set of shares, B for the
// new one; the store holds "A", "A, B pending" or "B", each one write of one item; see former.go for what becomes of A.
//
//	step                                           a crash after it leaves                    which the next run
//	1 the attempt is noted on the local disk       a note, A                                  forgets
//	2 Vault: rekey begun, with verification        a rekey that shows the noted key, A        cancels, and begins again
//	3 Vault: shares of A given, all but the last   the same                                   cancels, and begins again
//	4 Vault: the last share of A given             the same; B is made and nobody has it      cancels, and begins again
//	5 store: A, B pending                          B waits for its verification               verifies, step 6
//	6 Vault: shares of B given, all but the last   the same, some were given                  restarts the verification, step 6
//	7 Vault: the last share of B given             Vault takes B; the store has A, B pending  proves that B opens it, step 8
//	8 store: A as the former set                   the same, and A in items of its own        proves that B opens it, step 8
//	9 store: B                                     B, and A as the former set                 has nothing to do
//	10 the note is removed                         the same                                   has nothing to do
//
// The items of a spread are written one after the other in steps 5, 8 and 9. B counts in step 5 once all have it, and in step 9 as
// soon as one has it alone. Where Vault has lost the rekey of step 5 or 6, because it was restarted, sealed or changed its
// leader, B is proved not to open it and dropped. A rekey that is neither noted here nor in the store is somebody else's:
// [ErrBusy], and nothing is touched.
//
// An item of the configuration that did not open, as its HSM is lost, or that is not there, as the configuration was changed, gets
// B alone in step 5, after the others. Those have enough of A for the threshold: whoever unseals opens items until one set is in
// hand, those of the configuration first, then what another one dealt. So B waits beside A in items that are both's, A alone in
// items that the configuration does not name any more, and these are deleted after step 9. Until then the table holds for each
// of them; where B is dropped, an item that had B alone is left as it is, and made anew by the next rekey.
//
// Between 4 and 5 the answer is in memory only. That is enough, since A stays valid until 7, so losing it costs a new attempt.

// RekeyOptions say what a rekey makes.
type RekeyOptions struct {
	By string
	// Kind says which keys, "" for those that the cluster has.
	Kind Kind
	// Shares and Threshold are those of the new keys, 0 for the numbers of the old ones.
	Shares, Threshold int
	// Cancel ends a rekey that is under way, whoever began it, undoes what an own one left, and makes no new keys.
	Cancel bool
}

// RekeyResult is what [Custodian.Rekey] has done.
type RekeyResult struct {
	Cluster           string
	Kind              Kind
	Node              string // that it was done at
	Shares, Threshold int    // of the keys as they are now
	Items             []string
	// People are those who took a share, each with the message that only they can open.
	People []PersonMessage
	// Made is how many new shares this call made and Vault verified; 0 for none.
	Made int
	// Finished is true where an earlier rekey was found that had not ended, and was finished; no other one was made then.
	Finished bool
	// Dropped is true where an earlier rekey was found that had not ended, and was undone.
	Dropped bool
	// Redealt is true where the configuration names other wrapping keys than the shares were dealt to, and they were dealt
	// anew.
	Redealt bool
	// Cancelled is true where a rekey that was under way in Vault was ended.
	Cancelled bool
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// Rekey gives a cluster new keys, verifies that they are kept before Vault takes them, and drops the old ones. An earlier
// rekey that did not end is finished or undone first; where that leaves new keys as they are wanted, none other are made. The
// new shares are dealt as the configuration says today: to its wrapping key or spread, and to its people.
func (k *Custodian) Rekey(ctx context.Context, c *Cluster, options RekeyOptions) (result RekeyResult, err error) {
	if err := c.Check(); err != nil {
		return RekeyResult{}, err
	}
	unlock, err := k.lock(ctx, c)
	if err != nil {
		return RekeyResult{}, err
	}
	defer unlock()
	r := &rekey{k: k, c: c, options: options, result: RekeyResult{Cluster: c.Name}}
	defer func() { r.m.wipe() }()
	if err := r.open(ctx); err != nil {
		return RekeyResult{}, err
	}
	end, err := k.act(ctx, "rekey", c, r.n.Address(), options.By, r.detail())
	if err != nil {
		return RekeyResult{}, err
	}
	defer func() { end(err) }()
	r.result.Kind, r.result.Node = r.kind, r.n.Address()
	if options.Cancel {
		return r.cancel(ctx)
	}
	if err := r.settle(ctx); err != nil {
		return RekeyResult{}, err
	}
	if r.result.Finished && r.asWanted() {
		return r.done()
	}
	if err := r.renew(ctx); err != nil {
		return RekeyResult{}, err
	}
	return r.done()
}

// rekey is one call of Rekey.
type rekey struct {
	k       *Custodian
	c       *Cluster
	options RekeyOptions
	kind    Kind
	m       *material
	n       *node.Node
	result  RekeyResult
	failed  error // why Vault did not take the new keys; nil where it did, or none were made
}

func (r *rekey) detail() map[string]string {
	detail := map[string]string{"kind": string(r.kind)}
	if r.options.Shares > 0 {
		detail["shares"] = strconv.Itoa(r.options.Shares)
	}
	if r.options.Threshold > 0 {
		detail["threshold"] = strconv.Itoa(r.options.Threshold)
	}
	if r.options.Cancel {
		detail["cancel"] = "true"
	}
	return detail
}

// open opens the shares and finds the node.
func (r *rekey) open(ctx context.Context) (err error) {
	if r.kind, err = r.k.kindOf(ctx, r.c, r.options.Kind); err != nil {
		return err
	}
	if r.m, err = r.k.loadMost(ctx, r.c, r.kind); err != nil {
		return err
	}
	r.n, _, err = r.k.activeNode(ctx, r.c, r.m)
	return err
}

// kindOf says which keys of a cluster are meant: those named, or those that are in custody.
func (k *Custodian) kindOf(ctx context.Context, c *Cluster, named Kind) (Kind, error) {
	switch named {
	case KindUnseal, KindRecovery:
		return named, nil
	case "":
	default:
		return "", fmt.Errorf("cluster %q: %w: the kind of keys %q; it is %q or %q", c.Name, ErrInvalid, named, KindUnseal, KindRecovery)
	}
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		names, err := k.kindItems(ctx, c, kind)
		if err != nil {
			return "", err
		}
		for _, key := range c.keys() { // of which there may be no record on this host
			if name := c.item(kind, key); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		for _, name := range names {
			_, err := k.keeper.Get(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: k.host})
			if err == nil {
				return kind, nil
			}
			if !errors.Is(err, custody.ErrNotFound) {
				return "", err
			}
		}
	}
	return "", fmt.Errorf("cluster %q: %w: store %q has none; initialise or import the cluster", c.Name, ErrNoMaterial, c.Store)
}

// settle finishes or undoes what an earlier rekey left. Afterwards there is one set, the active one, and no rekey of ours is
// under way.
func (r *rekey) settle(ctx context.Context) error {
	if pending := r.m.pending(); pending != nil {
		st, err := r.n.RekeyStatus(ctx, r.kind.nodeKind())
		if err != nil {
			return r.k.refusedAttempt(r.c, r.n, whatRekey, err)
		}
		if st.Started && st.VerificationNonce != "" && st.Nonce == pending.VerificationNonce {
			return r.critical(ctx, func(ctx context.Context) error { return r.finish(ctx, *pending) })
		}
	}
	if err := r.endLeft(ctx); err != nil {
		return err
	}
	return r.decide(ctx)
}

// endLeft ends a rekey of ours that is under way: one that is noted here, or that the pending set was made by.
func (r *rekey) endLeft(ctx context.Context) error {
	nonce := ""
	for _, set := range r.m.inState(SetPending) {
		nonce = set.VerificationNonce
	}
	return r.k.endLeftRekey(ctx, r.c, r.n, r.kind, nonce)
}

// decide drops all sets but one, where a rekey left more and is not under way any more. Vault is asked which one it takes,
// unless only one of them can be it.
func (r *rekey) decide(ctx context.Context) error {
	if only := r.m.Sets[0]; len(r.m.Sets) == 1 && only.State == SetActive {
		if !slices.ContainsFunc(r.m.items, func(item materialItem) bool { return item.sets[only.ID].state == SetPending }) {
			return r.dropForeign(ctx)
		}
		r.result.Finished = true // all but the last items say it, of which none has what was there before
		return r.promote(ctx, only.ID)
	}
	var likely []*Set // the newest first
	for _, set := range append(r.m.inState(SetPending), r.m.inState(SetActive)...) {
		if r.m.inHand(set) && !r.m.superseded(set.ID) {
			likely = append(likely, set)
		}
	}
	// That the others are not in hand is no reason: Vault may take one whose HSM is away.
	if len(likely) == 1 && r.m.newest(likely[0].ID) { // items of a spread were being written
		r.result.Finished = true
		return r.promote(ctx, likely[0].ID)
	}
	var refusal error
	for _, set := range likely {
		err := r.prove(ctx, *set)
		if err == nil {
			finished := set == likely[0]
			if len(likely) == 1 {
				finished = slices.ContainsFunc(r.m.Sets, func(other Set) bool { return other.ID != set.ID && other.State == SetActive })
			}
			if r.result.Finished, r.result.Dropped = finished, !finished; !finished {
				r.k.logger.Info("dropping the new shares of a rekey that was cut off: Vault does not take them", "cluster", r.c.Name, "taken", set.ID)
			}
			return r.promote(ctx, set.ID)
		}
		if !errors.Is(err, ErrWrongShares) {
			return err
		}
		refusal = err
	}
	if len(likely) < len(r.m.Sets) {
		return fmt.Errorf("cluster %q: a rekey was cut off, and node %s does not take those of the shares that could be opened; all are kept: bring the "+
			"other HSMs of the cluster back, and run it again: %w", r.c.Name, r.n.Address(), cmp.Or(refusal, ErrWrongShares))
	}
	return fmt.Errorf("cluster %q: a rekey was cut off, and node %s takes neither the shares from before it nor the new ones; both are kept: "+
		"restore a snapshot of the cluster that fits one of them, or import its shares: %w", r.c.Name, r.n.Address(), refusal)
}

// prove asks Vault whether it takes a set.
func (r *rekey) prove(ctx context.Context, set Set) error {
	shares, err := r.enough(set)
	if err != nil {
		return err
	}
	return r.k.proveAt(ctx, r.c, r.n, r.kind, shares, r.options.By)
}

// enough returns as many shares of a set as its threshold asks for.
func (r *rekey) enough(set Set) ([][]byte, error) {
	shares := r.m.take(&set, set.Threshold)
	if len(shares) < set.Threshold {
		return nil, fmt.Errorf("cluster %q: %w: the HSM holds %d of its shares and %d are needed; people hold the others, so `vault operator rekey` "+
			"has to be done with them, and the new shares imported", r.c.Name, ErrInvalid, len(shares), set.Threshold)
	}
	return shares, nil
}

// promote makes a set the only one, after the one that it takes the place of was kept as the former one. No HSM is touched.
func (r *rekey) promote(ctx context.Context, id string) error {
	failed := func(err error) error {
		return fmt.Errorf("cluster %q: the keys that Vault takes are kept, and store %q did not take that they are the only ones; run it again: %w",
			r.c.Name, r.c.Store, err)
	}
	if active := r.m.active(); active != nil && active.ID != id {
		if err := r.k.keepFormer(ctx, r.c, r.m, r.options.By); err != nil {
			return failed(err)
		}
	}
	r.m.promote(id)
	if err := r.k.save(ctx, r.c, r.m, r.options.By, newID()); err != nil {
		return failed(err)
	}
	if err := r.dropForeign(ctx); err != nil {
		return err
	}
	r.k.forgetAttempt(ctx, r.c, string(r.kind))
	return nil
}

// finish has Vault verify a pending set, and makes it the only one. Where Vault does not take it any more it is dropped; that
// is no error, and told in the result.
func (r *rekey) finish(ctx context.Context, set Set) error {
	verifying := r.verify(ctx, set)
	if verifying == nil {
		r.result.Finished = true
		return r.promote(ctx, set.ID)
	}
	// The answer was lost, or Vault has lost the rekey. It is asked which keys it takes.
	if err := r.endLeft(ctx); err != nil {
		return join(verifying, err)
	}
	if err := r.decide(ctx); err != nil {
		return join(verifying, err)
	}
	r.k.logger.Warn("the verification of new keys went wrong, and Vault was asked which ones it takes", "cluster", r.c.Name,
		"taken", r.result.Finished, "error", verifying)
	if r.result.Dropped {
		r.failed = verifying
	}
	return nil
}

// verify gives the shares of a pending set to the verification that waits for them.
func (r *rekey) verify(ctx context.Context, set Set) error {
	shares, err := r.enough(set)
	if err != nil {
		return err
	}
	st, err := r.n.VerifyStatus(ctx, r.kind.nodeKind())
	if err == nil && st.Progress > 0 { // given by a run that was cut off; the same share twice is refused
		st, err = r.n.VerifyCancel(ctx, r.kind.nodeKind())
	}
	if err != nil {
		return err
	}
	for _, share := range shares {
		answer, err := r.n.VerifyUpdate(ctx, r.kind.nodeKind(), share, st.Nonce)
		if err != nil || answer.Complete {
			return err
		}
	}
	return fmt.Errorf("verifying the new keys at node %s: %w: it took %d shares and wants more", r.n.Address(), ErrMismatch, len(shares))
}

// renew makes new keys.
func (r *rekey) renew(ctx context.Context) error {
	r.failed = nil // that is said of an earlier one
	active := *r.m.active()
	old, err := r.enough(active)
	if err != nil {
		return err
	}
	shares, threshold := cmp.Or(r.options.Shares, active.Shares), cmp.Or(r.options.Threshold, active.Threshold)
	people, err := r.newHolders(shares, threshold)
	if err != nil {
		return err
	}
	if err := r.k.ready(ctx, r.c); err != nil {
		return err
	}
	r.result.Redealt = r.m.dealtOtherwise()
	if err := r.heal(ctx); err != nil {
		return err
	}
	if err := r.present(ctx); err != nil {
		return err
	}
	under, err := r.k.beginRekey(ctx, r.c, r.n, r.kind, whatRekey, r.options.By, shares, threshold, people.keys)
	if err != nil {
		return err
	}
	// Whoever asks the process to end waits from here on: what is half done would be undone by the next run only.
	return r.critical(ctx, func(ctx context.Context) error {
		// Noted is the nonce of the rekey itself: that of its verification changes whenever a verification goes wrong.
		set, err := r.take(ctx, under, old, Set{
			ID: newID(), Shares: shares, Threshold: threshold, State: SetPending, Made: r.k.today(), MadeBy: r.options.By,
			People: people.shares, VerificationNonce: under.nonce,
		})
		if err != nil {
			under.end(ctx)
			return err
		}
		if err := r.finish(ctx, set); err != nil {
			return err
		}
		if r.failed != nil {
			return fmt.Errorf("cluster %q: Vault did not take the new keys, and those from before are as they were; run it again: %w", r.c.Name, r.failed)
		}
		r.result.Made, r.result.Finished = shares, false // and so is the latter
		return nil
	})
}

// holders are people who take new shares.
type holders struct {
	keys   []string // as Vault wants them
	shares []PersonShare
}

// newHolders checks who is to have the new shares.
func (r *rekey) newHolders(shares, threshold int) (holders, error) {
	wanted := *r.c
	if wanted.Shares, wanted.Threshold = shares, threshold; r.kind == KindRecovery {
		wanted.Shares, wanted.Threshold = r.c.Shares, r.c.Threshold
		wanted.RecoveryShares, wanted.RecoveryThreshold = shares, threshold
	}
	if err := wanted.Check(); err != nil {
		return holders{}, err
	}
	own := shares - len(r.c.People)
	if own < threshold {
		return holders{}, fmt.Errorf("cluster %q: %w: of %d new shares people take %d, and the HSM needs the threshold of %d to verify them; make more "+
			"shares, or fewer people's", r.c.Name, ErrInvalid, shares, len(r.c.People), threshold)
	}
	var h holders
	for i, person := range r.c.People {
		key, err := ReadPGPKey(person.PGPKey)
		if err != nil {
			return holders{}, fmt.Errorf("cluster %q: the key of person %q: %w", r.c.Name, person.Name, err)
		}
		given, err := key.forVault(r.k.now())
		if err != nil {
			return holders{}, fmt.Errorf("cluster %q: the key of person %q: %w", r.c.Name, person.Name, err)
		}
		h.keys = append(h.keys, given)
		h.shares = append(h.shares, PersonShare{Index: own + i, Name: person.Name, Fingerprint: key.Fingerprint})
	}
	return h, nil
}

// present looks for nodes that would miss the rekey. A node of raft storage that does wants the keys from before it, which are
// kept until the next one: so it is warned of them now, and refused where others may still want those that this one would drop.
func (r *rekey) present(ctx context.Context) error {
	var absent []string
	raft := false
	for _, n := range r.k.lookAll(ctx, r.c) {
		raft = raft || n.Err == nil && n.Seal.StorageType == storageRaft
		if n.Err != nil || n.Seal.Sealed || !n.Seal.Initialized {
			absent = append(absent, n.Address)
		}
	}
	if !raft || len(absent) == 0 || r.kind != KindUnseal {
		return nil
	}
	former, err := r.k.formerItems(ctx, r.c, r.kind)
	if err != nil {
		return err
	}
	if len(former) > 0 {
		return fmt.Errorf("cluster %q: %w: sealed or away: %s; a raft node that missed the last rekey wants the keys from before that, and another rekey drops them; "+
			"unseal it first, or take it off the cluster and off nodes; nothing was changed", r.c.Name, ErrBusy, strings.Join(absent, ", "))
	}
	r.warn("Sealed or away: %s. A raft node that misses a rekey wants the keys from before it, which are kept until the next one: unseal it before that.",
		strings.Join(absent, ", "))
	return nil
}

// take has Vault make new keys, and stores them as the pending set beside the active one.
func (r *rekey) take(ctx context.Context, under *rekeying, old [][]byte, set Set) (Set, error) {
	answer, err := under.give(ctx, old)
	if err != nil {
		if errors.Is(err, node.ErrWrongShares) {
			return Set{}, fmt.Errorf("cluster %q: %w: Vault does not take them, and nothing was changed: rekeyed elsewhere, or was a store or a snapshot "+
				"restored? then import the keys that it takes, with --replace: %w", r.c.Name, ErrWrongShares, err)
		}
		return Set{}, fmt.Errorf("cluster %q: making new keys: %w", r.c.Name, err)
	}
	defer answer.Wipe()
	if len(answer.Shares) != set.Shares || !answer.VerificationRequired {
		return Set{}, fmt.Errorf("cluster %q: node %s made %d shares where %d were asked for: %w", r.c.Name, r.n.Address(), len(answer.Shares), set.Shares,
			node.ErrMalformed)
	}
	shares, messages := map[int][]byte{}, map[int][]byte{}
	for i, message := range answer.Shares {
		if i >= set.Shares-len(set.People) {
			messages[i] = slices.Clone(message)
			continue
		}
		if shares[i], err = under.own.openShare(message); err != nil {
			wipeAll(slices.Collect(maps.Values(shares)))
			return Set{}, fmt.Errorf("cluster %q: new share %d: %w", r.c.Name, i+1, err)
		}
	}
	r.m.Spread = ""
	if r.c.Spread != nil {
		r.m.Spread = r.c.Spread.String()
	}
	r.m.add(set, shares, messages)
	if err := r.k.save(ctx, r.c, r.m, r.options.By, newID()); err != nil {
		return Set{}, fmt.Errorf("cluster %q: the new keys could not be stored, so Vault was not told to take them, and those from before are as they were: %w",
			r.c.Name, err)
	}
	return *r.m.set(set.ID), nil
}

// rekeyTimeout is how long the part of a rekey may take that goes on when its caller has gone.
const rekeyTimeout = 2 * time.Minute

// critical does what should not be cut off.
func (r *rekey) critical(ctx context.Context, do func(context.Context) error) error {
	defer r.k.critical(fmt.Sprintf("the rekey of cluster %q", r.c.Name))()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rekeyTimeout)
	defer cancel()
	return do(ctx)
}

// cancel ends whatever rekey is under way, and undoes or finishes what an own one left.
func (r *rekey) cancel(ctx context.Context) (RekeyResult, error) {
	st, err := r.n.RekeyStatus(ctx, r.kind.nodeKind())
	if err != nil {
		return RekeyResult{}, r.k.refusedAttempt(r.c, r.n, whatRekey, err)
	}
	if st.Started {
		if err := r.n.RekeyCancel(ctx, r.kind.nodeKind(), st.Nonce); err != nil {
			return RekeyResult{}, fmt.Errorf("cluster %q: cancelling the rekey: %w", r.c.Name, err)
		}
		r.result.Cancelled = true
	}
	r.k.forgetAttempt(ctx, r.c, string(r.kind))
	if err := r.decide(ctx); err != nil {
		return RekeyResult{}, err
	}
	return r.done()
}

// asWanted tells whether the active set, which an earlier rekey made, is what this one is to make.
func (r *rekey) asWanted() bool {
	active := r.m.active()
	if r.m.dealtOtherwise() || !r.m.everywhere(active.ID) {
		return false // dealt to other wrapping keys, or there is an item to be made anew
	}
	if cmp.Or(r.options.Shares, active.Shares) != active.Shares || cmp.Or(r.options.Threshold, active.Threshold) != active.Threshold {
		return false
	}
	return slices.EqualFunc(active.People, r.c.People, func(has PersonShare, wanted Person) bool {
		key, err := ReadPGPKey(wanted.PGPKey)
		return err == nil && key.Fingerprint == has.Fingerprint
	})
}

// done describes the keys as they are now.
func (r *rekey) done() (RekeyResult, error) {
	active := r.m.active()
	r.result.Shares, r.result.Threshold = active.Shares, active.Threshold
	for _, item := range r.m.items {
		if len(item.sets) == 0 {
			continue
		}
		r.result.Items = append(r.result.Items, item.name)
	}
	var err error
	r.result.People, err = r.m.people(active)
	return r.result, err
}

// people are those who have shares of a set, each with the message that only they can open.
func (m *material) people(set *Set) ([]PersonMessage, error) {
	var people []PersonMessage
	for _, person := range set.People {
		message := m.messages[shareName{set.ID, person.Index}]
		if message == nil {
			continue
		}
		text, err := armorMessage(message)
		if err != nil {
			return nil, err
		}
		people = append(people, PersonMessage{PersonShare: person, Message: text})
	}
	return people, nil
}
