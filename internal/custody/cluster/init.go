package cluster

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
