// Package sealtest plays Vaults whose seal is `seal "transit"`, in numbers that no test could start real ones of, and the
// network between them and their seal servers.
//
// A [Seal] makes the calls of a real one, in the order that was observed of Vault 1.21, over real TLS: the token renewed and
// a byte sealed at the start, which ends the process where it fails; the root key opened at the unsealing, again every five
// seconds until it works; two bytes sealed to learn the key's version, and what was sealed under another one sealed anew;
// then a health check, sealed and opened. It repeats a call as Vault's client does: twice, after 429, 5xx and a lost
// connection, when Retry-After says so or a second later, and gives up after a minute in all. Whatever it opens must be what
// it sealed.
//
// A [Tally] counts what seals were answered, [Storm] starts them all at once as after a power cut, and a [Balancer] spreads
// connections over servers without looking into them.
package sealtest

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrWrong is an answer that no seal can live with: another plaintext than the one that was sealed, or no ciphertext. It is
// never asked for again.
var ErrWrong = errors.New("the seal server gave a wrong answer")

// StatusError is an answer with a status of 400 or more.
type StatusError struct {
	// Op is the call, see [Call].
	Op     Op
	Status int
	// Errors are the sentences of Vault's {"errors": […]}.
	Errors []string
	// RetryAfter is how long the server asks to wait; 0 where it does not.
	RetryAfter time.Duration
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("%s was answered with %d: %s", e.Op, e.Status, strings.Join(e.Errors, "; "))
}

// Op is a call of a seal.
type Op string

// The calls.
const (
	Renew   Op = "renew-self"
	Encrypt Op = "encrypt"
	Decrypt Op = "decrypt"
)

// Call is one request and its answer.
type Call struct {
	Op Op
	// Status is the answer's; 0 where there was none.
	Status int
	// RetryAfter tells whether the answer said when to come again.
	RetryAfter bool
	// Reason is what the server said where it refused.
	Reason string
	// Took is the time until the answer was read, or given up.
	Took time.Duration
	// Err is why there was no answer.
	Err error
}
