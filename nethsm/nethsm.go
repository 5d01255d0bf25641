// Package nethsm is a client of the Nitrokey NetHSM, a networked HSM with a REST API: the appliance, or its software in a
// container.
//
// A [Client] knows the nodes of one NetHSM, one URL for each. [Client.As] is a view of it with a user's credentials,
// [Client.At] a view of one node; views cost nothing and share connections. Every endpoint is one method with one request
// behind it: a ctx first, a deadline of its own, typed values in and out.
//
//	client, err := nethsm.New(nethsm.Options{URLs: []string{"https://hsm1", "https://hsm2"}, TLS: nethsm.TLS{CA: ca}})
//	operator := client.As(nethsm.Credentials{Username: "operator", Password: password})
//	plaintext, err := operator.Decrypt(ctx, "seal", nethsm.ModeOAEPSHA256, ciphertext, nil)
//
// What all nodes share (keys, users, namespaces) is asked of any node that serves, and a node that does not is passed over.
// What a node has for itself (its state, its TLS certificate, its clock, being unlocked or rebooted) wants a view of that
// node: [ErrManyNodes] says where one is missing. A request that changes something is not sent again unless it surely did not happen;
// where nobody knows, its error is hsm.ErrMayHaveHappened.
//
// An answer that says no is an [*Error]; ask it with errors.Is for what it means: the errors of package hsm, and here
// [ErrRequest], [ErrState] and [ErrContainer]. What the client can see to be wrong is refused before anything is sent.
// Passwords are [Secret] values, which print as nothing, and the bodies that held them are wiped.
//
// # How a call finds its node
//
// A call (call.go) is tried on one node after the other, each at most once but for the waits below, within one deadline of which
// every node gets its share. The pool (pool.go) chooses the least busy of those that serve. A node (node.go) serves or rests: no
// answer, a 5xx or a 412 of its state lets it rest, and then it is probed (probe.go) with growing pauses until it is ready; found
// Locked it is unlocked (unlocker.go) where somebody has said how. While all rest, one request a second tries each, and the others
// wait for that a moment. A 429 is waited out once. A 401 (patience.go) takes the node away from that one login: one verifier tries
// the password with growing pauses, and calls it wrong only after more than a minute. What creates goes over a connection of its
// own (transport.go), and once it is sent its error is the end. Where no node serves, each one's own cause is told (unserved.go).
// The order of the locks stands with the pool.
package nethsm

import (
	"log/slog"
	"time"
)

// Options configure a [Client].
type Options struct {
	// URLs are the nodes of one NetHSM: https://host[:port], with or without /api/v1. Plain http is for a loopback address
	// only.
	URLs []string
	// TLS says how a node proves what it is.
	TLS TLS
	// Timeout is the deadline of one ordinary call, all its tries together; 0 means 10 s. Calls that take long by nature,
	// making a key, a backup, unlocking, have longer ones.
	Timeout time.Duration
	// Connections is how many connections are kept open to each node; 0 means 32.
	Connections int
	// UserAgent is what the NetHSM's log shows of this client; empty: "nitroseal".
	UserAgent string
	// Logger hears of nodes that fail and return. Nil discards.
	Logger *slog.Logger
}

// TLS says how a node proves what it is. The zero value trusts the system's roots and the host name of the URL.
type TLS struct {
	// CA holds the certificates to trust instead of the system's roots, in PEM.
	CA []byte
	// Pins are SHA-256 fingerprints of leaf certificates in hexadecimal, colons allowed; a node must show one of them. With a
	// CA both must hold. Without one a pin stands in for the authority, the name and the time, as the certificate that a
	// NetHSM makes for itself needs it. Two pins let a certificate be replaced.
	Pins []string
	// ServerName is the name that the certificate must have; empty: the host of the URL.
	ServerName string
	// Insecure trusts whoever answers, and sends passwords there; every new connection warns in the log. It is refused
	// together with a CA.
	Insecure bool
}

// Credentials are a user of the NetHSM.
type Credentials struct {
	// Username is "namespace~user" for a user of a namespace.
	Username string
	Password Secret
}
