// Package nethsm is a client of the Nitrokey NetHSM's REST API.
package nethsm

import (
	"log/slog"
	"time"
)

// Options configure a [Client].
type Options struct {
	URLs        []string // https://host[:port] with or without /api/v1; http only for a loopback address
	TLS         TLS
	Timeout     time.Duration // of one ordinary call; 0: 10 s
	Connections int           // kept for each node; 0: 32
	UserAgent   string
	Logger      *slog.Logger
}

// TLS says how a node proves what it is.
type TLS struct {
	CA         []byte   // PEM; empty: the system's roots
	Pins       []string // SHA-256 of the leaf certificate, hex, colons allowed
	ServerName string
	Insecure   bool
}

// Credentials are a user of the NetHSM, "namespace~user" for one of a namespace.
type Credentials struct {
	Username string
	Password []byte
}
