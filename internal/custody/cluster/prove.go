package cluster

import (
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// Prove tells whether shares are those of a running cluster, and changes nothing: nil where they are, and [ErrWrongShares]
// where Vault says that they are not. Vault says it when a rekey with verification is begun under them, which makes new keys
// that nobody has verified; it is cancelled at once. As many shares as the threshold asks for are given, to the active node.
//
// The shares of a cluster that is sealed cannot be proved so: unsealing it proves them.
func (k *Custodian) Prove(ctx context.Context, c *Cluster, kind Kind, shares [][]byte, by string) (err error) {
	unlock, err := k.lock(ctx, c)
	if err != nil {
		return err
	}
	defer unlock()
	n, st, err := k.activeNode(ctx, c, nil)
	if err != nil {
		return err
	}
	if err := fitsKind(c, n, kind, st); err != nil {
		return err
	}
	if len(shares) < st.T {
		return fmt.Errorf("cluster %q: %w: %d shares, and node %s wants %d of %d; give as many", c.Name, ErrInvalid, len(shares), n.Address(), st.T, st.N)
	}
	if err := k.endLeftRekey(ctx, c, n, kind, ""); err != nil {
		return err
	}
	end, err := k.act(ctx, "prove", c, n.Address(), by, map[string]string{"kind": string(kind)})
	if err != nil {
		return err
	}
	defer func() { end(err) }()
	return k.proveAt(ctx, c, n, kind, shares[:st.T], by)
}

// fitsKind refuses recovery keys for a cluster that has none, and unseal keys for one that unseals itself.
func fitsKind(c *Cluster, n *node.Node, kind Kind, st node.Status) error {
	switch {
	case kind == KindUnseal && st.RecoverySeal:
		return fmt.Errorf("cluster %q: %w: node %s unseals itself (%s) and has recovery keys, no unseal keys", c.Name, ErrMismatch, n.Address(), st.Type)
	case kind == KindRecovery && !st.RecoverySeal:
		return fmt.Errorf("cluster %q: %w: node %s does not unseal itself, so it has unseal keys and no recovery keys", c.Name, ErrMismatch, n.Address())
	}
	return nil
}

// proveAt proves shares, exactly as many as the threshold asks for, at the active node. No rekey is under way there.
func (k *Custodian) proveAt(ctx context.Context, c *Cluster, n *node.Node, kind Kind, shares [][]byte, by string) error {
	r, err := k.beginRekey(ctx, c, n, kind, whatProof, by, 1, 1, nil)
	if err != nil {
		return err
	}
	defer r.end(ctx)
	answer, err := r.give(ctx, shares)
	answer.Wipe() // a new key that was never verified
	switch {
	case errors.Is(err, node.ErrWrongShares):
		return fmt.Errorf("cluster %q: %w: %w", c.Name, ErrWrongShares, err)
	case err != nil:
		return fmt.Errorf("cluster %q: proving its shares: %w", c.Name, err)
	}
	return nil
}

// proveMaterial asks Vault about the shares in custody: the active set, or else the pending one of a rekey that was cut off,
// which unsealing tries as well.
func (k *Custodian) proveMaterial(ctx context.Context, c *Cluster, m *material, by string) error {
	active := m.active()
	err := k.Prove(ctx, c, m.Kind, m.take(active, active.Threshold), by)
	pending := m.pending()
	if pending == nil || !errors.Is(err, ErrWrongShares) {
		return err
	}
	shares := m.take(pending, pending.Threshold)
	if len(shares) < pending.Threshold {
		return err
	}
	return k.Prove(ctx, c, m.Kind, shares, by)
}
