package nethsm

import (
	"errors"
	"fmt"
)

// ErrConfig says that the options cannot work.
var ErrConfig = errors.New("the configuration of the NetHSM is not usable")

// State is the state of a node.
type State string

// Error is an answer of a NetHSM that says no.
type Error struct {
	Op      string
	Node    string // host:port
	Status  int
	Message string // may be empty
	State   State  // asked after a 412; empty: unknown
}

func (e *Error) Error() string { return fmt.Sprintf("%s at %s: HTTP %d %s", e.Op, e.Node, e.Status, e.Message) }
