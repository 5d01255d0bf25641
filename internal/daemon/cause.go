package daemon

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// nodesError is about nodes of one cluster that are not unsealed for one and the same cause: it says that once.
type nodesError struct {
	cluster   string
	addresses []string
	errs      []error
}

// gather adds a node that failed to those that failed for the same cause.
func gather(all []nodesError, n NodeReport) []nodesError {
	at := slices.IndexFunc(all, func(f nodesError) bool { return f.cluster == n.Cluster && f.sameCause(n) })
	if at < 0 {
		return append(all, nodesError{n.Cluster, []string{n.Address}, []error{n.Err}})
	}
	all[at].addresses, all[at].errs = append(all[at].addresses, n.Address), append(all[at].errs, n.Err)
	return all
}

// sameCause tells whether a node failed for the cause of the others. A PIN that a token refused is the cause of all who were not let
// try after it, whatever they say.
func (f nodesError) sameCause(n NodeReport) bool {
	if alarmOf(f.errs[0]) == AlarmPIN && alarmOf(n.Err) == AlarmPIN {
		return true
	}
	return causeAt(f.addresses[0], f.errs[0]) == causeAt(n.Address, n.Err)
}

// causeAt is what an error says besides the node that it is about.
func causeAt(address string, err error) string {
	return strings.TrimPrefix(err.Error(), fmt.Sprintf("node %s: ", address))
}

// Error implements error.
func (f nodesError) Error() string {
	tells := 0 // the one whose PIN was sent knows more than those that were spared
	for i, err := range f.errs {
		if pin := (*hsm.PINError)(nil); errors.As(err, &pin) && !pin.Barred {
			tells = i
			break
		}
	}
	cause := causeAt(f.addresses[tells], f.errs[tells])
	if last := len(f.addresses) - 1; last > 0 {
		return fmt.Sprintf("nodes %s and %s of cluster %q: %s", strings.Join(f.addresses[:last], ", "), f.addresses[last], f.cluster, cause)
	}
	if strings.Contains(cause, f.addresses[0]) { // it says so itself
		return cause
	}
	return fmt.Sprintf("node %s of cluster %q: %s", f.addresses[0], f.cluster, cause)
}

// Unwrap lets errors.Is and errors.As look into the errors of all the nodes.
func (f nodesError) Unwrap() []error { return f.errs }
