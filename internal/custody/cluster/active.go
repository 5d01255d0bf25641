package cluster

import (
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// errNoActive: no node of the cluster serves changes now.
var errNoActive = errors.New("the cluster has no active node")

// activeNode finds the node that serves changes of keys, and looks whether it is what is recorded. m is nil where nothing is
// recorded, or it does not matter.
func (k *Custodian) activeNode(ctx context.Context, c *Cluster, m *material) (*node.Node, node.Status, error) {
	var errs []error
	sealed := 0
	for _, address := range c.Nodes {
		n, err := k.node(c, address)
		if err != nil {
			return nil, node.Status{}, err
		}
		st, err := n.Status(ctx)
		if err == nil && st.Sealed {
			sealed++
			continue
		}
		var role node.Role
		if err == nil {
			role, err = n.Role(ctx)
		}
		switch {
		case err != nil:
			errs = append(errs, err)
			continue
		case role != node.RoleActive:
			continue
		}
		if m != nil {
			if _, sentence := m.fits(st); sentence != "" {
				return nil, st, fmt.Errorf("cluster %q: %w: node %s: %s; nothing was sent to it", c.Name, ErrMismatch, address, sentence)
			}
		}
		return n, st, nil
	}
	if len(errs) > 0 {
		return nil, node.Status{}, fmt.Errorf("cluster %q: %w: %w", c.Name, errNoActive, join(errs...))
	}
	if sealed == len(c.Nodes) {
		return nil, node.Status{}, fmt.Errorf("cluster %q: %w", c.Name, allSealedError{})
	}
	return nil, node.Status{}, fmt.Errorf("cluster %q: %w: it is choosing one, or the active one is not in the configuration; look again, or list all nodes: %w",
		c.Name, errNoActive, node.ErrUnavailable)
}

// allSealedError is errNoActive, and what a sealed node's own error is.
type allSealedError struct{}

func (allSealedError) Error() string { return "all its nodes are sealed; unseal it first" }

// Is implements errors.Is.
func (allSealedError) Is(target error) bool {
	return target == errNoActive || target == node.ErrSealed || target == node.ErrUnavailable
}
