package cluster

// memory is what a custodian remembers of its nodes, so that it does not do over what failed. It is lost with the process.
type memory struct{}
