package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// An import takes these steps. Nothing is stored before Vault has said that it takes the shares.
//
//	step                                            a crash after it leaves            which the next run
//	1 Vault: the shares are proved                  nothing, or a proof                ends
//	2 a rehearsal on store, HSM and local disk      an item of no value                deletes
//	3 all items, sealed, in one note on the disk    the whole import, on this host     stores
//	4 store: each item                              some of the items, and the note    stores the others
//	5 store: items of an earlier spread deleted     all items, and the note            deletes the others
//	6 the note is removed                           the whole import
//
// The next run is an import with or without shares: what is noted is finished before anything else is looked at.

// ImportRequest is what is taken into custody. The shares stay the caller's, who wipes them.
type ImportRequest struct {
	By string
	// Shares or RecoveryShares are given, as the cluster has them: at least as many as its threshold, at most all. None of them
	// only finishes an import that was cut off.
	Shares, RecoveryShares [][]byte
	// RootToken is kept where the cluster is configured to keep it, and only then.
	RootToken []byte
	// Replace takes the place of the keys that are in custody, which there must be.
	Replace bool
	// Unproved stores shares although no node of the cluster answers that could prove them.
	Unproved bool
}

// ImportResult is what [Custodian.Import] has done.
type ImportResult struct {
	Cluster           string
	Kind              Kind
	Given             int // shares in custody
	Shares, Threshold int // of the cluster
	Items             []string
	// Proved is true where Vault said that it takes the shares: Node, which was unsealed by them where Unsealed is set.
	Proved, Unsealed bool
	Node             string
	RootToken        bool // it is kept
	// Finished is true where an import was found that had been cut off, and was finished; the request was not looked at.
	Finished bool
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// ErrUnproved is wrapped where no node answered that could say whether the shares are its cluster's.
var ErrUnproved = errors.New("the shares could not be proved")

// Import takes the keys of a running cluster into custody, after Vault has said that it takes them: by a rekey that is
// cancelled, or by unsealing a node that is sealed.
func (k *Custodian) Import(ctx context.Context, c *Cluster, request ImportRequest) (result ImportResult, err error) {
	if err := c.Check(); err != nil {
		return ImportResult{}, err
	}
	unlock, err := k.lock(ctx, c)
	if err != nil {
		return ImportResult{}, err
	}
	defer unlock()
	end, err := k.act(ctx, "import", c, "", request.By, nil)
	if err != nil {
		return ImportResult{}, err
	}
	defer func() { end(err) }()
	i := &importing{k: k, c: c, request: request, result: ImportResult{Cluster: c.Name}}
	defer func() { i.m.wipe() }()
	left, err := k.readImport(ctx, c)
	if err != nil {
		return ImportResult{}, err
	}
	if left != nil {
		if err := k.finishImport(ctx, c, left); err != nil {
			return ImportResult{}, err
		}
		i.result.Finished, i.result.Kind, i.result.Items = true, left.Kind, left.names()
		i.result.Given, i.result.Shares, i.result.Threshold = left.Given, left.Shares, left.Threshold
		return i.result, nil
	}
	if err := i.check(); err != nil {
		return ImportResult{}, err
	}
	if err := i.place(ctx); err != nil {
		return ImportResult{}, err
	}
	if err := i.prove(ctx); err != nil {
		return ImportResult{}, err
	}
	return i.store(ctx)
}

// importing is one call of Import.
type importing struct {
	k       *Custodian
	c       *Cluster
	request ImportRequest
	result  ImportResult
	shares  [][]byte // of the kind that was given; the caller's
	m       *material
	// there are the items that the import takes the place of: generations by name.
	there map[string]uint64
}

// check looks at the request alone.
func (i *importing) check() error {
	switch {
	case len(i.request.Shares) > 0 && len(i.request.RecoveryShares) > 0:
		return fmt.Errorf("cluster %q: %w: unseal keys and recovery keys; a cluster has one of them", i.c.Name, ErrInvalid)
	case len(i.request.RecoveryShares) > 0:
		i.result.Kind, i.shares = KindRecovery, i.request.RecoveryShares
	case len(i.request.Shares) > 0:
		i.result.Kind, i.shares = KindUnseal, i.request.Shares
	default:
		return fmt.Errorf("cluster %q: %w: there are no shares, and no import of it was cut off; give the shares", i.c.Name, ErrInvalid)
	}
	if len(i.shares) > MaxShares {
		return fmt.Errorf("cluster %q: %w: %d shares; an item has room for %d", i.c.Name, ErrInvalid, len(i.shares), MaxShares)
	}
	if err := checkShares(string(i.result.Kind)+" key", i.shares); err != nil {
		return fmt.Errorf("cluster %q: %w: %w", i.c.Name, ErrInvalid, err)
	}
	i.result.Given = len(i.shares)
	return nil
}

// place looks what is in custody already.
func (i *importing) place(ctx context.Context) error {
	if held, err := i.k.heldItems(ctx, i.c); err != nil {
		return err
	} else if len(held) > 0 {
		return fmt.Errorf("importing cluster %q: %w, and come first: `nitroseal unseal %s` stores them", i.c.Name, ErrHeld, i.c.Name)
	}
	i.there = map[string]uint64{}
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		names, err := i.k.kindItems(ctx, i.c, kind)
		if err != nil {
			return err
		}
		for _, key := range i.c.keys() {
			if name := i.c.item(kind, key); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
		for _, name := range names {
			if err := i.find(ctx, name); err != nil {
				return err
			}
		}
	}
	switch {
	case len(i.there) > 0 && !i.request.Replace:
		return fmt.Errorf("importing cluster %q: %w; `nitroseal verify %s` says whether they are right, and --replace puts these in their place", i.c.Name,
			ErrExists, i.c.Name)
	case len(i.there) == 0 && i.request.Replace:
		return fmt.Errorf("importing cluster %q: %w, so there is nothing to replace; leave --replace out", i.c.Name, ErrNoMaterial)
	}
	return i.find(ctx, itemRoot)
}

// find notes an item that is there. What a delete has left is not.
func (i *importing) find(ctx context.Context, name string) error {
	metadata, err := i.k.keeper.Get(ctx, i.c.Name, name, custody.ReadOptions{Store: i.c.Store, By: i.k.host})
	switch {
	case errors.Is(err, custody.ErrNotFound):
		return nil
	case err != nil:
		return err
	}
	i.there[name] = max(metadata.Generation, metadata.Expected)
	return nil
}

// prove finds a node and asks it whether it takes the shares: the active one, or else one that is sealed.
func (i *importing) prove(ctx context.Context) error {
	origin := newID()
	n, st, err := i.k.activeNode(ctx, i.c, nil)
	if err == nil {
		if err := i.compose(n, st, origin); err != nil {
			return err
		}
		return i.proveActive(ctx, n)
	}
	unavailable := err
	for _, address := range i.c.Nodes {
		n, err := i.k.node(i.c, address)
		if err != nil {
			return err
		}
		st, err := n.Status(ctx)
		if err != nil || !st.Initialized || !st.Sealed || st.T == 0 || st.Type != sealShamir || st.RecoverySeal {
			continue
		}
		if err := i.compose(n, st, origin); err != nil {
			return err
		}
		return i.proveSealed(ctx, n, st)
	}
	if !i.request.Unproved || errors.Is(unavailable, node.ErrIdentity) || errors.Is(unavailable, node.ErrRedirect) {
		return fmt.Errorf("importing cluster %q: %w, and nothing was stored: %w; import it when a node answers, or with --unproved to store them as they are",
			i.c.Name, ErrUnproved, unavailable)
	}
	return i.composeUnseen(origin)
}

// compose makes the material of the shares, as the node says that there have to be.
func (i *importing) compose(n *node.Node, st node.Status, origin string) error {
	if err := fitsKind(i.c, n, i.result.Kind, st); err != nil {
		return err
	}
	switch given := len(i.shares); {
	case given > st.N:
		return fmt.Errorf("importing cluster %q: %w: %d shares, and node %s has %d; which of them are its?", i.c.Name, ErrMismatch, given, n.Address(), st.N)
	case given < st.T:
		return fmt.Errorf("importing cluster %q: %w: %d shares, and node %s wants %d of its %d; give as many", i.c.Name, ErrInvalid, given, n.Address(), st.T, st.N)
	case given < st.N:
		i.warn("%d of the %d shares are in custody. The others open the cluster as well, for whoever has %d of them.", given, st.N, st.T)
	}
	return i.fill(n.Address(), st, origin)
}

// composeUnseen makes the material where no node says anything: the configuration has to.
func (i *importing) composeUnseen(origin string) error {
	shares, threshold := i.c.sizes(i.result.Kind)
	if len(i.shares) > shares || len(i.shares) < threshold {
		return fmt.Errorf("importing cluster %q: %w: %d shares, and the configuration says %d with a threshold of %d; correct it", i.c.Name, ErrInvalid,
			len(i.shares), shares, threshold)
	}
	i.warn("No node could prove these shares: nobody knows whether they are the cluster's. `nitroseal verify --prove %s` tells when one runs.", i.c.Name)
	// Storage and id are learned later. The type of an auto-seal is not known, so its recovery keys wait for a node.
	if i.result.Kind == KindRecovery {
		return fmt.Errorf("importing cluster %q: %w: recovery keys are imported when a node answers that has them", i.c.Name, ErrUnproved)
	}
	return i.fill("", node.Status{Type: sealShamir, N: shares, T: threshold}, origin)
}

func (i *importing) warn(format string, arguments ...any) {
	i.result.Warnings = append(i.result.Warnings, fmt.Sprintf(format, arguments...))
}

func (i *importing) fill(address string, st node.Status, origin string) error {
	i.result.Node, i.result.Shares, i.result.Threshold = address, st.N, st.T
	if st.N > MaxShares {
		return fmt.Errorf("importing cluster %q: %w: it has %d shares, and an item has room for %d; rekey it to fewer", i.c.Name, ErrInvalid, st.N, MaxShares)
	}
	if i.c.Spread != nil {
		if err := i.c.checkDeal("the shares as they are", len(i.shares), st.T); err != nil {
			return fmt.Errorf("importing cluster %q: %w", i.c.Name, err)
		}
	}
	i.m = i.k.newMaterial(i.c, i.result.Kind, origin, st, i.request.By)
	own := map[int][]byte{}
	for index, share := range i.shares {
		own[index] = slices.Clone(share)
	}
	i.m.add(Set{ID: newID(), Shares: st.N, Threshold: st.T, State: SetActive, Made: i.k.today(), MadeBy: i.request.By}, own, nil)
	return nil
}

func (i *importing) proveActive(ctx context.Context, n *node.Node) error {
	if err := i.k.endLeftRekey(ctx, i.c, n, i.result.Kind, ""); err != nil {
		return err
	}
	if err := i.k.proveAt(ctx, i.c, n, i.result.Kind, i.shares[:i.result.Threshold], i.request.By); err != nil {
		return fmt.Errorf("nothing was stored: %w", err)
	}
	i.result.Proved = true
	if len(i.request.RootToken) > 0 && i.c.rootToken() == RootKeep {
		if err := n.LookupSelf(ctx, i.request.RootToken); err != nil {
			return fmt.Errorf("importing cluster %q: the root token; nothing was stored: %w", i.c.Name, err)
		}
	}
	return nil
}

func (i *importing) proveSealed(ctx context.Context, n *node.Node, st node.Status) error {
	o := opened(i.m)
	var out Outcome
	if err := i.k.unseal(ctx, i.c, n, st, o, &out); err != nil {
		return fmt.Errorf("nothing was stored: %w", err)
	}
	if out.Action != ActionUnsealed {
		return fmt.Errorf("importing cluster %q: %w, and nothing was stored: node %s took them and is not unsealed yet; look again: %s: %w", i.c.Name,
			ErrUnproved, n.Address(), out.Note, ErrBusy)
	}
	i.m.ClusterID, i.m.ClusterName = o.id, o.name
	i.result.Proved, i.result.Unsealed = true, true
	// A proof that an earlier run was cut off in went with the seal of its node.
	left, err := i.k.notedAttempt(ctx, i.c, string(i.result.Kind))
	if err != nil {
		return err
	}
	if left != nil && left.What == whatProof && left.Node == n.Address() {
		i.k.forgetAttempt(ctx, i.c, string(i.result.Kind))
	}
	return nil
}

// store brings the items to the local disk, all at once, and from there to the store.
func (i *importing) store(ctx context.Context) (ImportResult, error) {
	if err := i.k.ready(ctx, i.c); err != nil {
		return ImportResult{}, err
	}
	if err := i.k.rehearse(ctx, i.c, i.result.Kind); err != nil {
		return ImportResult{}, err
	}
	noted, err := i.note(ctx)
	if err != nil {
		return ImportResult{}, fmt.Errorf("importing cluster %q: nothing was stored: %w", i.c.Name, err)
	}
	// From here on the next run finishes it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), importTime)
	defer cancel()
	defer i.k.critical(fmt.Sprintf("the import of cluster %q", i.c.Name))()
	if err := i.k.finishImport(ctx, i.c, noted); err != nil {
		return ImportResult{}, err
	}
	i.result.Items = noted.names()
	return i.result, nil
}

// importTime bounds the part of an import that goes on when its caller has gone.
const importTime = 2 * time.Minute

// importNote is a whole import on the local disk, each item sealed with its own wrapping key.
type importNote struct {
	Format    int            `json:"format"`
	Origin    string         `json:"origin"`
	Kind      Kind           `json:"kind"`
	By        string         `json:"by,omitempty"`
	At        time.Time      `json:"at"`
	Given     int            `json:"given"`
	Shares    int            `json:"shares"`
	Threshold int            `json:"threshold"`
	Items     []importedItem `json:"items"`
	// Drop are items that these take the place of.
	Drop []string `json:"drop,omitempty"`
}

type importedItem struct {
	Item string `json:"item"`
	Key  string `json:"key"`
	// Replaces is the generation that the store has, 0 for none.
	Replaces uint64 `json:"replaces,omitempty"`
	// Envelope is made for nothing but this note.
	Envelope json.RawMessage `json:"envelope"`
}

const importFormat = 1

func (n *importNote) names() []string {
	var names []string
	for _, item := range n.Items {
		names = append(names, item.Item)
	}
	return names
}

func importPath(c *Cluster) string { return "imports/" + c.Name }

// ImportLeft tells whether an import of a cluster was cut off on this host. The next [Custodian.Import] finishes it, and needs
// no shares.
func (k *Custodian) ImportLeft(ctx context.Context, c *Cluster) (bool, error) {
	note, err := k.readImport(ctx, c)
	return note != nil, err
}

// readImport reads the import that was cut off, nil for none.
func (k *Custodian) readImport(ctx context.Context, c *Cluster) (*importNote, error) {
	entry, err := k.local.Get(ctx, importPath(c))
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil //nolint:nilnil // none is the ordinary case
	}
	if err != nil {
		return nil, fmt.Errorf("looking for an import of cluster %q that was cut off: %w", c.Name, err)
	}
	note := new(importNote)
	decoder := json.NewDecoder(bytes.NewReader(entry.Value))
	decoder.DisallowUnknownFields()
	err = decoder.Decode(note)
	if err == nil {
		if _, err = decoder.Token(); errors.Is(err, io.EOF) {
			err = nil
		}
	}
	if err != nil || note.Format != importFormat || !validID(note.Origin) || len(note.Items) == 0 {
		return nil, fmt.Errorf("looking for an import of cluster %q that was cut off: %w: the note %q on the local disk; remove it, and import the cluster again",
			c.Name, ErrFacts, importPath(c))
	}
	return note, nil
}

// note seals all items and writes them to the local disk, in one step.
func (i *importing) note(ctx context.Context) (*importNote, error) {
	note := &importNote{
		Format: importFormat, Origin: i.m.Origin, Kind: i.result.Kind, By: i.request.By, At: i.k.today(),
		Given: i.result.Given, Shares: i.result.Shares, Threshold: i.result.Threshold,
	}
	for _, item := range i.m.items {
		fields, err := i.m.fields(item)
		if err != nil {
			return nil, err
		}
		if err := i.seal(ctx, note, item.name, item.key, fields); err != nil {
			return nil, err
		}
	}
	if err := i.noteRoot(ctx, note); err != nil {
		return nil, err
	}
	for name := range i.there {
		if name != itemRoot && !slices.Contains(note.names(), name) {
			note.Drop = append(note.Drop, name)
		}
	}
	slices.Sort(note.Drop)
	raw, err := json.Marshal(note)
	if err != nil {
		return nil, err
	}
	return note, i.k.putLocal(ctx, importPath(i.c), raw)
}

// noteRoot adds the root token, where it is to be kept.
func (i *importing) noteRoot(ctx context.Context, note *importNote) error {
	switch {
	case len(i.request.RootToken) == 0:
		return nil
	case i.c.rootToken() != RootKeep:
		i.warn("The root token was not taken: the configuration does not say root_token = \"keep\". Revoke it when it is not needed any more.")
		return nil
	}
	root := i.k.newRoot(i.c, i.m.Origin, RootKeep, i.request.RootToken, nil, i.request.By)
	fields, err := root.fields()
	if err != nil {
		return err
	}
	i.result.RootToken = true
	return i.seal(ctx, note, itemRoot, i.c.keys()[0], fields)
}

func (i *importing) seal(ctx context.Context, note *importNote, item, key string, fields custody.Fields) error {
	payload, err := fields.Encode()
	if err != nil {
		return err
	}
	defer clear(payload)
	sealed, err := i.k.keyring.Seal(ctx, key, importContext(i.c, item), payload)
	if err != nil {
		return fmt.Errorf("sealing %q: %w", item, err)
	}
	note.Items = append(note.Items, importedItem{Item: item, Key: key, Replaces: i.there[item], Envelope: sealed.Envelope})
	return nil
}

// importContext is what an envelope of the note is made for. It opens as nothing else.
func importContext(c *Cluster, item string) envelope.Context {
	return envelope.Context{Use: envelope.UseMaterial, Cluster: c.Name, Name: "import." + item, Generation: 1}
}

// finishImport stores what is noted, at the cost of one HSM operation for each item, and removes the note.
func (k *Custodian) finishImport(ctx context.Context, c *Cluster, note *importNote) error {
	failed := func(item string, err error) error {
		return fmt.Errorf("importing cluster %q: %w, sealed, until store %q has taken %q; `nitroseal import %s` goes on: %w", c.Name, ErrHeld, c.Store, item,
			c.Name, err)
	}
	for _, item := range note.Items {
		if err := k.finishImported(ctx, c, note, item); err != nil {
			return failed(item.Item, err)
		}
	}
	for _, name := range note.Drop {
		if err := k.dropItem(ctx, c, name); err != nil {
			return failed(name, err)
		}
	}
	if err := k.deleteLocal(ctx, importPath(c)); err != nil {
		return fmt.Errorf("importing cluster %q: everything is stored, and the note on the local disk could not be removed; run it again: %w", c.Name, err)
	}
	return nil
}

func (k *Custodian) finishImported(ctx context.Context, c *Cluster, note *importNote, item importedItem) error {
	opened, err := k.keyring.Open(ctx, item.Key, item.Envelope, importContext(c, item.Item))
	if err != nil {
		return err
	}
	defer clear(opened.Payload)
	fields, err := custody.DecodeFields(opened.Payload)
	if err != nil {
		return err
	}
	defer fields.Wipe()
	// By the request id the item is recognised that an earlier run stored.
	err = k.put(ctx, c, &materialItem{name: item.Item, key: item.Key, generation: item.Replaces}, fields, note.By, "import."+note.Origin)
	if errors.Is(err, custody.ErrConflict) {
		err = join2(err, k.sameOrigin(ctx, c, item.Item, note.Origin))
	}
	return err
}
