// Package server is "nitroseal serve": the wire of `seal "transit"` over TLS, for Vaults and OpenBaos that unseal themselves by an
// HSM without another Vault between.
//
// A [Site] is what was made of the configuration: keys, tokens, devices, where to listen. Encrypting needs an HSM once after the
// start, for the keys that authenticate what is sealed, and then none. Decrypting is one operation in an HSM, which does few at a
// time: a gate lets in twice as many openings as the HSMs do at once, so that none idles, and puts the others in order. An unseal
// goes before the health check of a Vault that runs (what this server sealed in the last minute), nobody waits for ever, and whoever
// would wait longer than a client does is told so at once, with 503 and when to come again. A key with a lease opens in memory
// while that lasts, and passes no gate.
//
// What was read once stays in memory: records of keys, tokens, authentication keys. So an HSM or a store that goes away takes nothing
// from encrypting, and its return is found by itself. The server calls itself ready when its keys can seal, because a Vault that
// starts earlier than that would end. Several servers share nothing but HSMs, the store of tokens and the keys' records.
//
// SIGHUP reads the configuration anew, SIGUSR1 wipes all leases, and a clean stop lets end what runs.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/token"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// ErrConfig is wrapped by every complaint about options and sites: somebody can mend it, trying again does not help.
var ErrConfig = errors.New("invalid configuration of the seal server")

// Keys are the wrapping keys of a site. *keyring.Keyring is one; it caches records.
type Keys interface {
	transit.Keys
	// OpenLeased opens an envelope whose KEK is in memory. It returns false where an HSM or the store would have to be asked.
	OpenLeased(name string, raw []byte, want envelope.Context) (opened keyring.Opened, ok bool, err error)
	// Get describes a key, and Ready tells whether it may seal. Neither touches an HSM.
	Get(ctx context.Context, name string) (*keyring.Key, error)
	Ready(ctx context.Context, name string, purpose keyring.Purpose) error
	// Warm opens the authentication keys that a key needs to seal, and to open with one operation. OpenLease opens its KEK, where it
	// has a lease.
	Warm(ctx context.Context, name string) error
	OpenLease(ctx context.Context, name string) error
	// Invalidate forgets what is cached of a key's record, of all with "".
	Invalidate(name string)
	Leases() []keyring.Lease
	// EndLeases wipes the KEKs in memory.
	EndLeases()
}

// Tokens are the tokens of a site. *token.Registry is one.
type Tokens interface {
	transit.Tokens
	// Keys returns the wrapping keys that some token is for, sorted.
	Keys() []string
	// IDs returns the ids of all tokens, sorted.
	IDs() []string
	// Refresh reads the list of tokens now, and Run every few seconds until ctx ends. Where that fails the list in memory stays in
	// use, and it is they who say so.
	Refresh(ctx context.Context) error
	Run(ctx context.Context)
	// Status says how fresh the list is.
	Status() token.Status
}

// Device is an HSM of a site.
type Device struct {
	HSM monitor.Device // what opens it; *device.Handle does
	// Parallel is how many operations it takes at a time, 0 for 1.
	Parallel int
}

// Listen is where seals ask.
type Listen struct {
	// Address is host and port.
	Address string
	// Certificate reads the server's certificate chain and key, in PEM; the server wipes the key. It is called every few seconds, so
	// that a renewed one comes into use. Nil for a plain listener.
	Certificate func() (chain, key []byte, err error)
	// ClientCA reads the CAs of client certificates, in PEM, in the same way; nil where none are asked for. Who shows one shows a
	// good one.
	ClientCA func() ([]byte, error)
	// Required refuses who shows no certificate, to ask how the server fares as well.
	Required bool
	// Plain serves without TLS. Only an address of this machine itself (loopback) may be plain.
	Plain bool
	// MaxConnections are served at one time, 0 for 4096.
	MaxConnections int
}

// Site is what was made of one configuration.
type Site struct {
	Keys    Keys
	Names   []string // of the keys that are served; nil for those that some token is for
	Tokens  Tokens
	Devices []Device
	// Records is the folder of the file store with the keys' records: where a file in it changes, they are read anew. "" where
	// nobody else writes them.
	Records string
	Audit   *audit.Log // nil for none
	Listen  Listen
	Monitor monitor.Listen // of /healthz, /readyz and /metrics, and of /v1/sys/health as well
	Mount   string         // "" for transit.DefaultMount
	MaxBody int            // in bytes, 0 for transit.DefaultMaxBody
	// Limit is how often each token may ask that has no limit of its own; a Rate of 0 is no limit.
	Limit token.Limit
	// Close gives back all of it. It is called once, after everything that used the site has ended. Nil for nothing.
	Close func() error
}

// Options are what [Run] needs.
type Options struct {
	// Build makes a site, at the start and at each reload. Where it fails at a reload, the site in use stays. It touches no HSM.
	// The hooks are a device.Observer for the registry that it opens devices with.
	Build   func(ctx context.Context, hooks *Hooks) (*Site, error)
	Logger  *slog.Logger // nil for none
	Version string
	// Reload delivers one value for each reload, Seal one for each sealing; nil for SIGHUP and SIGUSR1.
	Reload, Seal <-chan os.Signal
	// Listening, where set, is called with each address that is listened on: what is "seal" or "monitor".
	Listening func(what, address string)
	// Ready, where set, is called once: the served keys can seal.
	Ready func()

	notify  *monitor.Notifier // set by tests
	running func(*server)     // set by tests
	timing  *timing           // set by tests
}

// check says what is wrong with a site.
func (s *Site) check() error {
	var problem error
	switch {
	case s.Keys == nil, s.Tokens == nil:
		problem = errors.New("it needs keys and tokens")
	default:
		problem = errors.Join(s.Listen.check(), s.Monitor.Check())
	}
	if problem != nil {
		return fmt.Errorf("%w: %w", ErrConfig, problem)
	}
	return nil
}

// served are the names of the wrapping keys.
func (s *Site) served() []string {
	if s.Names != nil {
		return s.Names
	}
	return s.Tokens.Keys()
}

func (s *Site) close() error {
	if s.Close == nil {
		return nil
	}
	return s.Close()
}
