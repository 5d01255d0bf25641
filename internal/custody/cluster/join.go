package cluster

import (
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// storageRaft is the storage whose nodes have to be joined. With any other one a node is initialised by what it shares with
// the others.
const storageRaft = "raft"

// join makes an uninitialised node a member of its raft cluster, and returns its status afterwards. It is ErrNotInitialized
// where there is no cluster to join. No share is sent for it.
func (k *Custodian) join(ctx context.Context, c *Cluster, n *node.Node, st node.Status) (now node.Status, joined bool, err error) {
	kinds, err := k.kinds(ctx, c)
	if err != nil {
		return st, false, err
	}
	leader, sealed := k.leader(ctx, c, n.Address())
	switch {
	case len(kinds) == 0:
		return st, false, fmt.Errorf("node %s of cluster %q: %w; run: %s", n.Address(), c.Name, ErrNotInitialized, k.do("init", c.Name))
	case st.StorageType != storageRaft:
		return st, false, fmt.Errorf("node %s of cluster %q: %w here, although its keys are in custody: with storage %q it becomes so by what it shares with "+
			"the others; look at its storage", n.Address(), c.Name, ErrNotInitialized, st.StorageType)
	case leader == "" && sealed:
		return st, false, fmt.Errorf("node %s of cluster %q: %w: it joins its cluster when another node is unsealed", n.Address(), c.Name, ErrBusy)
	case leader == "":
		return st, false, fmt.Errorf("node %s of cluster %q: %w here, although its keys are in custody, and there is no other node that it could join; "+
			"find out what became of its storage", n.Address(), c.Name, ErrNotInitialized)
	}
	k.logger.Info("a node joins its cluster", "cluster", c.Name, "node", n.Address(), "leader", leader)
	joined, err = k.joinLeader(ctx, c, n, leader)
	// Vault's own retry_join may have been faster, and then it refuses us: what counts is how the node is afterwards.
	now, lookErr := n.Status(ctx)
	switch {
	case lookErr == nil && now.Initialized:
		return now, joined, nil
	case err == nil && lookErr == nil:
		return now, false, nil // it is about to
	case err == nil:
		return st, joined, lookErr
	default:
		return st, false, err
	}
}

func (k *Custodian) joinLeader(ctx context.Context, c *Cluster, n *node.Node, leader string) (joined bool, err error) {
	end, err := k.act(ctx, "join", c, n.Address(), k.host, map[string]string{"leader": leader})
	if err != nil {
		return false, err
	}
	defer func() { end(err) }()
	request := node.JoinRequest{LeaderAddress: leader, LeaderServerName: c.TLS.ServerName, LeaderCA: c.RaftLeaderCA}
	if request.LeaderCA == nil {
		request.LeaderCA = c.TLS.CA
	}
	return n.Join(ctx, request)
}

// leader is the address of the node to join among the others of the configuration: the active one, or a standby, which passes
// the request on, or the first one where that does not answer us and may answer the node. sealed is true where there is none
// because others are sealed.
func (k *Custodian) leader(ctx context.Context, c *Cluster, except string) (address string, sealed bool) {
	var standby string
	for _, other := range c.Nodes {
		if other == except {
			continue
		}
		n, err := k.node(c, other)
		if err != nil {
			continue
		}
		role, err := n.Role(ctx)
		if errors.Is(err, node.ErrSealed) || err == nil && role == node.RoleNone {
			// One that is not initialised answers as a sealed one does.
			if st, lookErr := n.Status(ctx); lookErr == nil && !st.Initialized {
				continue
			}
		}
		switch {
		case err == nil && role == node.RoleActive:
			return other, false
		case err == nil && standby == "" && role == node.RoleStandby:
			standby = other
		case errors.Is(err, node.ErrSealed), err == nil && role == node.RoleNone:
			sealed = true
		case err != nil && other == c.Nodes[0] && errors.Is(err, node.ErrUnavailable) && !errors.Is(err, node.ErrUninitialized):
			address = other
		}
	}
	if standby != "" {
		return standby, false
	}
	if sealed {
		return "", true
	}
	return address, false
}
