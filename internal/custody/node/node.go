// Package node speaks to one node of a Vault or OpenBao cluster, for the few calls that custody needs, and takes the care
// that a client of unseal keys should take.
//
// A node is known by TLS before anything is sent to it: by a CA of its cluster, never the system's, by pinned keys, or by
// both. Nothing comes from the environment: no proxy, no address, no token, no trust. No redirect is followed: it is an
// error that names its target. Whatever changes something at the node is sent once, over a connection of its own, so that no
// kept connection that has died meanwhile can make it fail or be sent twice; where its answer is lost, the error is
// [ErrMayHaveHappened]. (A question may be sent twice: net/http does so where the kept connection turns out to be dead.)
//
// Shares, tokens and what Vault answers with them are []byte. A request with a secret is written by hand into one buffer,
// an answer is read into one bounded buffer and scanned there, and both are wiped when the call is over; what is returned
// belongs to the caller, who wipes it. That covers the memory that this package controls. Package net/http and crypto/tls
// copy what they send and receive through buffers of their own, which nobody wipes, and a token in a header has to be a
// string. So a share may survive for a while in freed memory of this process, as it does in Vault's own.
//
// Errors name the call, the node and what to do next. They hold Vault's messages, made printable and short; never
// the body of an answer, and no message that repeats what was sent.
package node

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"time"
)

// Limits of a node's answers and calls.
const (
	// MaxAnswer is the largest answer in bytes; a longer one is [ErrMalformed].
	MaxAnswer = 1 << 20

	// DefaultTimeout is the deadline of an ordinary call.
	DefaultTimeout = 10 * time.Second
	// DefaultInitTimeout is the deadline of an initialisation.
	DefaultInitTimeout = 5 * time.Minute
)

// Config says where a node is, and how it proves that it is this node.
type Config struct {
	// Address is https://host:port, or http://host:port on loopback with [TLS.PlainHTTP]. It should be the node's own, not
	// a balancer's: whoever ends the TLS sees the shares.
	Address string
	TLS     TLS
	// Timeout is the deadline of every call but Init; 0: [DefaultTimeout].
	Timeout time.Duration
	// InitTimeout is the deadline of Init; 0: [DefaultInitTimeout].
	InitTimeout time.Duration
	// UserAgent is sent with each call; "": "nitroseal".
	UserAgent string
	// Transport wraps the transport, nil for none. Tests count and break calls there.
	Transport func(http.RoundTripper) http.RoundTripper
}

// Node is a client of one node. It is safe for concurrent use, and keeps one idle connection for reading.
type Node struct {
	address     string
	timeout     time.Duration
	initTimeout time.Duration
	userAgent   []string
	lines       *lines
	transport   http.RoundTripper // lines, perhaps wrapped
	dated       bool              // the time of its certificate is looked at
	closed      atomic.Bool
}

// New checks the configuration and returns a client. It does no I/O. Every complaint is [ErrConfig].
func New(config Config) (*Node, error) {
	address, plain, err := parseAddress(config.Address, config.TLS.PlainHTTP)
	if err != nil {
		return nil, err
	}
	var identity *trust
	if !plain {
		if identity, err = newTrust(config.TLS); err != nil {
			return nil, fmt.Errorf("%w (node %s)", err, address)
		}
	}
	if config.Timeout < 0 || config.InitTimeout < 0 {
		return nil, fmt.Errorf("%w: a timeout of node %s is negative", ErrConfig, address)
	}
	n := &Node{
		address:     address,
		timeout:     config.Timeout,
		initTimeout: config.InitTimeout,
		userAgent:   []string{config.UserAgent},
		lines:       newLines(identity),
		dated:       identity != nil && identity.roots != nil,
	}
	if n.timeout == 0 {
		n.timeout = DefaultTimeout
	}
	if n.initTimeout == 0 {
		n.initTimeout = DefaultInitTimeout
	}
	if config.UserAgent == "" {
		n.userAgent = []string{"nitroseal"}
	}
	n.transport = n.lines
	if config.Transport != nil {
		n.transport = config.Transport(n.lines)
	}
	return n, nil
}

// Address is the node's address, https://host:port.
func (n *Node) Address() string { return n.address }

// Close ends the kept connection. Calls in flight go on to their end; calls begun later fail.
func (n *Node) Close() {
	n.closed.Store(true)
	n.lines.closeIdle()
}
