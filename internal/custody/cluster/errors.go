package cluster

import (
	"errors"
	"fmt"
	"strings"
)

// The errors of this package. They are wrapped in a sentence that names the cluster and the node and says what to do next: ask
// with errors.Is. Errors of the node, the store, the keyring and the HSM come through beside them.
var (
	// ErrInvalid: the configuration of the cluster, or the request, is wrong. Nothing was done.
	ErrInvalid = errors.New("invalid request")
	// ErrNotInitialized: the cluster is not initialised yet.
	ErrNotInitialized = errors.New("the cluster is not initialised")
	// ErrNoMaterial: the cluster is initialised, and its keys are not in custody here.
	ErrNoMaterial = errors.New("the keys of the cluster are not in custody")
	// ErrExists: keys of the cluster are in custody already, where there must be none.
	ErrExists = errors.New("keys of the cluster are in custody already")
	// ErrEmpty: the cluster was initialised by an attempt whose answer nobody has, so its keys are lost. It holds no data yet.
	ErrEmpty = errors.New("the cluster is initialised and nobody holds its keys")
	// ErrHeld: the keys are sealed on the local disk, because the store did not take them. The next run stores them.
	ErrHeld = errors.New("the keys are held on the local disk")
	// ErrIntentElsewhere: another host is initialising the cluster. Look again.
	ErrIntentElsewhere = errors.New("another host is initialising the cluster")
	// ErrBusy: somebody else is at work on the node. Look again.
	ErrBusy = errors.New("somebody else is at work")
	// ErrMismatch: the node is another one than the material is for, or its seal has changed. It got nothing.
	ErrMismatch = errors.New("the node does not match what is recorded of its cluster")
	// ErrForeignCluster: a node that took the shares turned out to be of another cluster. An alarm: rekey.
	ErrForeignCluster = errors.New("the shares were given to another cluster")
	// ErrWrongShares: the node says that the shares in custody do not unseal it.
	ErrWrongShares = errors.New("the shares in custody do not unseal the node")
	// ErrFacts: what an envelope of ours holds contradicts itself, or another envelope of the cluster.
	ErrFacts = errors.New("malformed material")
)

// failures are several errors in one line: errors.Join takes one line for each, which reads badly in an answer.
type failures []error

func (f failures) Error() string {
	texts := make([]string, len(f))
	for i, err := range f {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (f failures) Unwrap() []error { return f }

// join is nil for none and the error itself for one.
func join(errs ...error) error {
	var some failures
	for _, err := range errs {
		if err != nil {
			some = append(some, err)
		}
	}
	switch len(some) {
	case 0:
		return nil
	case 1:
		return some[0]
	default:
		return some
	}
}

// invalid is ErrInvalid with a sentence.
func invalid(format string, arguments ...any) error {
	return fmt.Errorf("%w: %w", ErrInvalid, fmt.Errorf(format, arguments...))
}
