package cluster

import "time"

// Action is what [Custodian.Tend] found or did.
type Action string

// The actions.
const (
	ActionNone     Action = "none"      // the node is unsealed, nothing was to do
	ActionUnsealed Action = "unsealed"  // it was sealed and is not any more
	ActionWaiting  Action = "waiting"   // somebody else has to go on: another host, people, Vault itself; Note says who
	ActionAutoSeal Action = "auto-seal" // the cluster unseals itself
)

// Outcome is what [Custodian.Tend] has done for a node.
type Outcome struct {
	Node   NodeStatus // as it was found, or left
	Action Action
	Joined bool     // it was joined to its cluster
	Stored []string // items that were held on the local disk and are in the store now
	// RootRevoked is true where the root token that initialising made was revoked.
	RootRevoked bool
	// People is how many people must still give their share.
	People int
	// Note is a sentence on what happens next, "" for nothing.
	Note string
	Took time.Duration
}

// NodeOutcome is what [Custodian.TendAll] has done for one node.
type NodeOutcome struct {
	Address string
	Outcome Outcome
	Err     error
}
