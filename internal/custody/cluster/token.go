package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// The item of the root token has one of these fields beside its facts: the token itself, or a message of Vault's in which a
// person finds it.
const (
	fieldToken        = "token"
	fieldTokenMessage = "token.pgp"
)

// rootFacts are what is known of a root token. They lie in its envelope.
//
// With [RootDiscard] the token is sealed for the seconds between initialising and its revocation, so that a crash cannot leave
// a living token that nobody knows of. It is sealed with the first wrapping key, also where a [Spread] wants several HSMs to
// take part: for these seconds one HSM opens it.
type rootFacts struct {
	Format  int       `json:"format"`
	Cluster string    `json:"cluster"`
	Origin  string    `json:"origin"` // of the initialisation or import that brought it
	Purpose RootToken `json:"purpose"`
	// Fingerprint is that of the OpenPGP key that a message is for.
	Fingerprint string    `json:"fingerprint,omitempty"`
	Made        time.Time `json:"made"`
	MadeBy      string    `json:"made_by,omitempty"`
	Host        string    `json:"host,omitempty"`
}

// rootItem is the item of a root token, opened.
type rootItem struct {
	rootFacts

	token      []byte // nil for a message
	message    []byte // nil for a token
	generation uint64
}

func (r *rootItem) wipe() {
	if r != nil {
		clear(r.token)
	}
}

// parseRoot reads the fields of the item. The token is copied.
func parseRoot(cluster string, fields custody.Fields) (*rootItem, error) {
	decoder := json.NewDecoder(bytes.NewReader(fields[fieldFacts]))
	decoder.DisallowUnknownFields()
	var r rootItem
	if err := decoder.Decode(&r.rootFacts); err != nil {
		return nil, fmt.Errorf("%w: the facts of the root token: %w", ErrFacts, err)
	}
	_, err := decoder.Token()
	switch {
	case !errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%w: something follows the facts of the root token", ErrFacts)
	case r.Format != factsFormat:
		return nil, fmt.Errorf("%w: format %d of the facts of the root token, this program knows %d", ErrFacts, r.Format, factsFormat)
	case r.Cluster != cluster || !validID(r.Origin):
		return nil, fmt.Errorf("%w: the root token is of cluster %q", ErrFacts, r.Cluster)
	case r.Purpose == RootPGP && len(fields[fieldTokenMessage]) > 0 && len(fields) == 2:
		r.message = bytes.Clone(fields[fieldTokenMessage])
	case (r.Purpose == RootKeep || r.Purpose == RootDiscard) && len(fields[fieldToken]) > 0 && len(fields) == 2:
		r.token = bytes.Clone(fields[fieldToken])
	default:
		return nil, fmt.Errorf("%w: the purpose %q of the root token, with the fields %q", ErrFacts, r.Purpose, fields.Names())
	}
	return &r, nil
}

// fields are what parseRoot reads. The token is the item's.
func (r *rootItem) fields() (custody.Fields, error) {
	facts, err := json.Marshal(r.rootFacts)
	if err != nil {
		return nil, fmt.Errorf("encoding the facts of the root token of cluster %q: %w", r.Cluster, err)
	}
	if r.Purpose == RootPGP {
		return custody.Fields{fieldFacts: facts, fieldTokenMessage: r.message}, nil
	}
	return custody.Fields{fieldFacts: facts, fieldToken: r.token}, nil
}

// newRoot is the item of a token that was just made or given.
func (k *Custodian) newRoot(c *Cluster, origin string, purpose RootToken, token, message []byte, by string) *rootItem {
	return &rootItem{
		rootFacts: rootFacts{
			Format: factsFormat, Cluster: c.Name, Origin: origin, Purpose: purpose, Made: k.today(), MadeBy: by, Host: k.host,
		},
		token: token, message: message,
	}
}

// originOf reads which initialisation or import brought an item, of whatever kind.
func originOf(fields custody.Fields) (string, error) {
	var facts struct {
		Origin string `json:"origin"`
	}
	if err := json.Unmarshal(fields[fieldFacts], &facts); err != nil || !validID(facts.Origin) {
		return "", fmt.Errorf("%w: it has no origin", ErrFacts)
	}
	return facts.Origin, nil
}

// openRoot opens the root token, at the cost of one HSM operation. The caller wipes it. It is custody.ErrNotFound where there
// is none.
func (k *Custodian) openRoot(ctx context.Context, c *Cluster) (*rootItem, error) {
	fields, metadata, err := k.keeper.Open(ctx, c.Name, itemRoot, custody.ReadOptions{Store: c.Store, By: k.host})
	if err != nil {
		return nil, err
	}
	defer fields.Wipe()
	r, err := parseRoot(c.Name, fields)
	if err != nil {
		return nil, fmt.Errorf("opening the root token of cluster %q: %w", c.Name, err)
	}
	r.generation = metadata.Generation
	return r, nil
}

// How long it takes until a root token that is to be revoked is looked for again: after none was found, and after a failure.
const (
	rootAgain = time.Hour
	rootRetry = time.Minute
)

// revokeDue revokes the root token that initialising made, as soon as the node is active. It looks for one once an hour only,
// and is quiet where there is none.
func (k *Custodian) revokeDue(ctx context.Context, c *Cluster, n *node.Node, st node.Status) (revoked bool, err error) {
	if c.rootToken() != RootDiscard || !k.rootDue(c) {
		return false, nil
	}
	metadata, err := k.keeper.Get(ctx, c.Name, itemRoot, custody.ReadOptions{Store: c.Store})
	gone := errors.Is(err, custody.ErrNotFound)
	if err == nil && metadata.State == custody.StateVanished { // another host revoked it
		gone, err = true, k.keeper.Delete(ctx, c.Name, itemRoot, custody.DeleteOptions{Store: c.Store, By: k.host})
	}
	if gone {
		k.rootAt(c, k.now().Add(rootAgain))
		return false, nil
	}
	if err != nil {
		k.rootAt(c, k.now().Add(rootRetry))
		return false, err
	}
	var kept uint64
	k.remember(func(m *memory) { kept = m.kept[c.Name] })
	if metadata.Generation == kept { // it was opened before, and is not to be revoked
		k.rootAt(c, k.now().Add(rootAgain))
		return false, nil
	}
	role, err := n.Role(ctx)
	if err != nil || role != node.RoleActive {
		return false, err
	}
	revoked, err = k.revokeRoot(ctx, c, n, st)
	if err != nil {
		k.rootAt(c, k.now().Add(rootRetry))
		k.logger.Error("the first root token could not be revoked and still lives; it is tried again", "cluster", c.Name, "node", n.Address(), "error", err)
		return false, fmt.Errorf("revoking the first root token of cluster %q: %w", c.Name, err)
	}
	k.rootAt(c, k.now().Add(rootAgain))
	return revoked, nil
}

func (k *Custodian) rootDue(c *Cluster) (due bool) {
	k.remember(func(m *memory) { due = !k.now().Before(m.roots[c.Name]) })
	return due
}

func (k *Custodian) rootAt(c *Cluster, at time.Time) {
	k.remember(func(m *memory) { m.roots[c.Name] = at })
}

// revokeRoot revokes the token that is kept for that, then deletes it. A token that the node does not know any more is revoked.
func (k *Custodian) revokeRoot(ctx context.Context, c *Cluster, n *node.Node, st node.Status) (revoked bool, err error) {
	if err := k.knownID(c, n.Address(), st.ClusterID); err != nil {
		return false, err
	}
	root, err := k.openRoot(ctx, c)
	if errors.Is(err, custody.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer root.wipe()
	if root.Purpose != RootDiscard { // it was to be kept when it came
		k.remember(func(m *memory) { m.kept[c.Name] = root.generation })
		return false, nil
	}
	end, err := k.act(ctx, "revoke-root", c, n.Address(), k.host, nil)
	if err != nil {
		return false, err
	}
	defer func() { end(err) }()
	err = n.RevokeSelf(ctx, root.token)
	if errors.Is(err, node.ErrMayHaveHappened) {
		if now := n.LookupSelf(ctx, root.token); errors.Is(now, node.ErrDenied) {
			err = nil
		}
	}
	if err != nil && !errors.Is(err, node.ErrDenied) {
		return false, err
	}
	err = k.keeper.Delete(ctx, c.Name, itemRoot, custody.DeleteOptions{Store: c.Store, CAS: &root.generation, By: k.host})
	if errors.Is(err, custody.ErrNotFound) || errors.Is(err, store.ErrNotFound) {
		err = nil
	}
	return err == nil, err
}

// knownID returns ErrMismatch where a node shows another cluster id than the material that was opened last.
func (k *Custodian) knownID(c *Cluster, address, seen string) error {
	var recorded string
	k.remember(func(m *memory) { recorded = m.ids[c.Name] })
	if recorded == "" || seen == "" || recorded == seen {
		return nil
	}
	return fmt.Errorf("node %s of cluster %q: %w: its cluster id is %s, recorded is %s; correct its address", address, c.Name, ErrMismatch, seen, recorded)
}
