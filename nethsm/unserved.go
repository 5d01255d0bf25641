package nethsm

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// reworded is an earlier error of a node, told as that of another call.
func reworded(err error, op string) error {
	if refused, is := errors.AsType[*Error](err); is {
		again := *refused
		again.Op = op
		return &again
	}
	if lost, is := errors.AsType[*failure](err); is {
		again := *lost
		again.op, again.lost = op, false
		return &again
	}
	return err
}

// unserved says that no node served a call. It is what all its causes are, and unavailable where one of them is: that one
// node is Locked does not mean that only a person can help.
type unserved struct {
	op     string
	causes []error // one for each node
	ended  error   // of the caller's ctx
}

func (e *unserved) Error() string {
	var parts []string
	nodes := make(map[string][]string)
	for _, cause := range e.causes {
		node, text := "", cause.Error()
		if told, is := cause.(placed); is {
			node, text = told.told()
		}
		if !slices.Contains(parts, text) {
			parts = append(parts, text)
		}
		if node != "" {
			nodes[text] = append(nodes[text], node)
		}
	}
	for i, text := range parts {
		if same := nodes[text]; len(same) > 1 {
			parts[i] = fmt.Sprintf("at %s and %s: %s", strings.Join(same[:len(same)-1], ", "), same[len(same)-1], text)
		} else if len(same) == 1 {
			parts[i] = fmt.Sprintf("at %s: %s", same[0], text)
		}
	}
	if e.ended != nil {
		parts = append(parts, e.ended.Error())
	}
	return fmt.Sprintf("%s: no node of the NetHSM serves: %s", e.op, strings.Join(parts, "; "))
}

// placed is an error that can tell apart where something happened and what.
type placed interface {
	told() (node, text string)
}

func (e *unserved) Is(target error) bool {
	if e.ended != nil && errors.Is(e.ended, target) {
		return true
	}
	is := 0
	for _, cause := range e.causes {
		if errors.Is(cause, target) {
			is++
		}
	}
	return is == len(e.causes) || is > 0 && target == hsm.ErrUnavailable
}

// As finds the causes' types. A password that is wrong on one node is so on all.
func (e *unserved) As(target any) bool {
	for _, cause := range e.causes {
		if errors.As(cause, target) {
			return true
		}
	}
	return false
}

// unlockError is the cause of a Locked node that could not be unlocked by itself.
type unlockError struct{ cause, unlock error }

func (e *unlockError) Error() string {
	return fmt.Sprintf("%v; unlocking it by itself did not work: %v", e.cause, e.unlock)
}

func (e *unlockError) told() (node, text string) {
	cause, is := e.cause.(placed)
	if !is {
		return "", e.Error()
	}
	node, text = cause.told()
	return node, fmt.Sprintf("%s; unlocking it by itself did not work: %v", text, e.unlock)
}

func (e *unlockError) Unwrap() error { return e.cause }
