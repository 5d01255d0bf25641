package node

import (
	"context"
	"errors"
	"net/http"
	"time"
)

// Status is what a node tells anybody about its seal.
type Status struct {
	Type                string // of the seal: "shamir", or the name of an auto-seal
	Initialized, Sealed bool
	N, T                int // shares and threshold; of recovery keys with an auto-seal. 0 while the node has none
	Progress            int // shares given since the last reset
	Nonce               string
	Version             string
	Migration           bool // a seal migration is under way: shares would be spent on that
	RecoverySeal        bool // the seal is an auto-seal, and the shares are recovery keys
	StorageType         string
	ClusterName         string // of an unsealed node only
	ClusterID           string // of an unsealed node only
	Removed             bool   // removed from its raft cluster; it serves no more

	// CertificateEnds is when the certificate ends by which the node proved itself, and with it the trust in it. Zero where
	// nobody looks at that: with plain http, and where pins replace the chain.
	CertificateEnds time.Time
}

// Status reads sys/seal-status. It is answered in every state.
func (n *Node) Status(ctx context.Context) (Status, error) {
	return n.sealStatus(ctx, &call{op: "reading the seal status of", method: http.MethodGet, path: "sys/seal-status"})
}

// sealStatus sends a call that is answered with a seal status.
func (n *Node) sealStatus(ctx context.Context, c *call) (Status, error) {
	var status Status
	c.field, c.check = status.read()
	c.ends = &status.CertificateEnds
	if err := n.do(ctx, c); err != nil {
		return Status{}, err
	}
	return status, nil
}

// read returns what reads a status from an answer. What it must hold is looked at: a page of something else, answered with
// 200, must not pass for an unsealed Vault.
func (status *Status) read() (field func(string, *scanner) error, check func() error) {
	var initialized, sealed bool
	field = func(name string, s *scanner) error {
		switch name {
		case "type":
			return s.into(&status.Type)
		case "initialized":
			initialized = true
			return s.boolean(&status.Initialized)
		case "sealed":
			sealed = true
			return s.boolean(&status.Sealed)
		case "n":
			return s.count(&status.N)
		case "t":
			return s.count(&status.T)
		case "progress":
			return s.count(&status.Progress)
		case "nonce":
			return s.into(&status.Nonce)
		case "version":
			return s.into(&status.Version)
		case "migration":
			return s.boolean(&status.Migration)
		case "recovery_seal":
			return s.boolean(&status.RecoverySeal)
		case "storage_type":
			return s.into(&status.StorageType)
		case "cluster_name":
			return s.into(&status.ClusterName)
		case "cluster_id":
			return s.into(&status.ClusterID)
		case "removed_from_cluster":
			return s.boolean(&status.Removed)
		default:
			return s.skip()
		}
	}
	check = func() error {
		if !initialized || !sealed || status.Type == "" {
			return errors.New("it is no seal status")
		}
		return nil
	}
	return field, check
}

// Role is what a node does in its cluster.
type Role string

// The roles.
const (
	RoleActive  Role = "active"  // serves requests
	RoleStandby Role = "standby" // knows the active node and passes requests on to it
	RoleNone    Role = "none"    // unsealed, but the cluster has no active node, or this one does not know it yet
)

// Leader is what a node says about the active node.
type Leader struct {
	Role    Role   // of the node that was asked
	Address string // of the active node, as that one announces itself; "" without HA or active node
}

// Role tells what the node does. A sealed node is ErrSealed.
func (n *Node) Role(ctx context.Context) (Role, error) {
	leader, err := n.Leader(ctx)
	return leader.Role, err
}

// Leader reads sys/leader. A sealed node is ErrSealed. A storage without HA has no leader and answers even while sealed, so
// its node is asked for its seal status as well.
func (n *Node) Leader(ctx context.Context) (Leader, error) {
	var leader Leader
	var ha, self, known bool
	err := n.do(ctx, &call{
		op: "asking for the active node of the cluster at", method: http.MethodGet, path: "sys/leader",
		field: func(name string, s *scanner) error {
			switch name {
			case "ha_enabled":
				known = true
				return s.boolean(&ha)
			case "is_self":
				return s.boolean(&self)
			case "leader_address":
				return s.into(&leader.Address)
			default:
				return s.skip()
			}
		},
		check: func() error {
			if !known {
				return errors.New("it does not tell about HA")
			}
			return nil
		},
	})
	if err != nil {
		return Leader{}, err
	}
	leader.Role = RoleNone
	switch {
	case self:
		leader.Role = RoleActive
	case leader.Address != "":
		leader.Role = RoleStandby
	case !ha:
		status, err := n.Status(ctx)
		if err != nil {
			return Leader{}, err
		}
		if status.Sealed {
			return Leader{}, &Error{
				Op: "asking for the active node of the cluster at", Node: n.address, is: []error{ErrSealed, ErrUnavailable}, what: "it is sealed", advice: "unseal it",
			}
		}
		leader.Role = RoleActive
	}
	return leader, nil
}
