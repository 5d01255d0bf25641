package device

import (
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// withNodes completes the status of a device of several nodes by what its nodes say: a state where nothing else told one,
// a sentence about why none can serve, a note for each that is in trouble while others serve.
func withNodes(status Status, config Config) Status {
	if status.Info.State == "" {
		status.Info.State = stateOf(status.Nodes)
	}
	if status.Err != nil {
		if sentence := whyNone(status.Nodes, config.UnlockPassphrase+config.UnlockPassphraseFile != ""); sentence != "" {
			status.Err = &nodesError{sentence, status.Err}
		}
		return status
	}
	for _, node := range status.Nodes {
		if node.Err != nil {
			status.Info.Notes = append(status.Info.Notes, fmt.Sprintf("trouble with the node %s: %v", node.URL, node.Err))
		}
	}
	return status
}

// nodesError says in one sentence what the error of a call repeats for every node.
type nodesError struct {
	sentence string
	err      error
}

func (e *nodesError) Error() string { return e.sentence }
func (e *nodesError) Unwrap() error { return e.err }

// states are the states of a node, the most useful one first.
var states = []hsm.State{hsm.StateOperational, hsm.StateLocked, hsm.StateUnprovisioned, hsm.StateFailed, hsm.StateAbsent}

// stateOf returns the state of the best node.
func stateOf(nodes []hsm.Node) hsm.State {
	for _, state := range states {
		for _, node := range nodes {
			if node.State == state {
				return state
			}
		}
	}
	return ""
}

// whyNone says why no node can serve, and what to do; it is empty where a node could. Locked nodes that should be unlocked by
// themselves are in trouble.
func whyNone(nodes []hsm.Node, unlocksItself bool) string {
	counts, errs := map[hsm.State]int{}, map[hsm.State][]string{}
	for _, node := range nodes {
		if node.State == hsm.StateOperational {
			return ""
		}
		counts[node.State]++
		if node.Err != nil {
			errs[node.State] = append(errs[node.State], node.Err.Error())
		}
	}
	var parts []string
	for _, state := range states {
		n := counts[state]
		if n == 0 {
			continue
		}
		part := count(n, len(nodes)) + " " + advice[state]
		switch {
		case state == hsm.StateLocked && !unlocksItself:
			part += ", or configure unlock_passphrase, and it is unlocked whenever it is found locked"
		case state == hsm.StateLocked && errs[state] != nil:
			part += "; the configured unlock_passphrase has not done it: " + errs[state][0] // the others say the same
		case state == hsm.StateAbsent && errs[state] != nil:
			part += ": " + strings.Join(errs[state], "; ")
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, "; ")
}

// advice says what a state of nodes means, and what to do.
var advice = map[hsm.State]string{
	hsm.StateLocked:        "locked: unlock the NetHSM with its unlock passphrase",
	hsm.StateUnprovisioned: "not provisioned: set the NetHSM up first",
	hsm.StateFailed:        "in the state Failed: the database (etcd) may be away, and then it recovers by itself; else see the log",
	hsm.StateAbsent:        "out of reach",
}

func count(n, of int) string {
	switch {
	case of == 1:
		return "the node is"
	case n == of:
		return fmt.Sprintf("all %d nodes are", n)
	case n == 1:
		return "1 node is"
	default:
		return fmt.Sprintf("%d nodes are", n)
	}
}
