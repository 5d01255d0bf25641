package cluster

import (
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// NodeStatus is how a node is. No secret was touched to find out.
type NodeStatus struct {
	Address string
	// Err is why the node could not be asked; nil where it answered. Seal, Role and Leader are set then.
	Err  error
	Seal node.Status
	// Role is that of an unsealed node, "" where it is sealed or did not tell.
	Role   node.Role
	Leader string // address of the active node, where a standby told it
	// Alarm is set where the node took shares that were not its own.
	Alarm *Alarm
	Took  time.Duration // to ask it
}

// Alarm says that a node of another cluster took the shares of this one.
type Alarm struct {
	Format  int       `json:"format"`
	Cluster string    `json:"cluster"`
	Node    string    `json:"node"`
	At      time.Time `json:"at"`
	// Recorded is the cluster id that was expected, Seen the one that the node showed once it was unsealed.
	Recorded string `json:"recorded"`
	Seen     string `json:"seen"`
}

// Status is how a cluster is, and how well its keys are kept. No HSM was touched to find out.
type Status struct {
	Cluster  string
	At       time.Time
	Nodes    []NodeStatus // in the order of the configuration
	Material []MaterialStatus
	// Spread is how the shares are dealt to wrapping keys, as [Spread.String] says it; "" where each envelope has all.
	Spread string
	// Held are the items on the local disk that the store has not taken yet.
	Held []string
	// Intent is an initialisation that is under way, or was cut off; nil for none.
	Intent *Intent
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// MaterialStatus is how an item of the cluster is kept.
type MaterialStatus struct {
	Item string // "unseal", "recovery", "root", "unseal.<key>", …
	Kind Kind   // "" for "root"
	// Err is why nothing more is known of it; custody.ErrNotFound for an item that should be there and is not.
	Err error
	custody.Metadata
}
