package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"os"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// ErrConfig is wrapped by every complaint about options and sites: somebody can mend it, trying again does not help.
var ErrConfig = errors.New("invalid configuration of the seal server")

// Keys are the wrapping keys of a site. *keyring.Keyring is one.
type Keys interface {
	transit.Keys
	// OpenLeased opens an envelope whose KEK is in memory. It returns false where an HSM or the store would have to be asked.
	OpenLeased(name string, raw []byte, want envelope.Context) (opened keyring.Opened, ok bool, err error)
	// List returns the names of all keys, Get describes one. Neither touches an HSM.
	List(ctx context.Context) ([]string, error)
	Get(ctx context.Context, name string) (*keyring.Key, error)
	Ready(ctx context.Context, name string, purpose keyring.Purpose) error
	// Warm opens what a key needs before it can seal and open with one operation: authentication keys, and the KEK of a key with
	// a lease.
	Warm(ctx context.Context, name string) error
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
	// Refresh reads the list of tokens anew. The server calls it at the start and every few seconds, one call at a time. Where it
	// fails the list in memory stays in use.
	Refresh(ctx context.Context) error
}

// Device is an HSM of a site.
type Device struct {
	// Device is what opens it; *device.Handle does.
	Device interface {
		Name() string
		Device(ctx context.Context) (hsm.Device, error)
	}
	// Parallel is how many operations it takes at a time, 0 for 1.
	Parallel int
}

// ClientCertificates says whether clients must show a certificate.
type ClientCertificates string

// The rules about client certificates.
const (
	ClientCertificatesOptional ClientCertificates = "optional" // who shows one shows a good one; a token may want one
	ClientCertificatesRequired ClientCertificates = "required"
)

// Listen is where seals ask.
type Listen struct {
	// Address is host and port.
	Address string
	// CertFile and KeyFile hold the server's certificate chain and key, in PEM. They are read anew when they change.
	CertFile, KeyFile string
	// ClientCAFile holds the CAs of client certificates; "" where none are asked for.
	ClientCAFile       string
	ClientCertificates ClientCertificates // "" for optional
	// Plain serves without TLS. Only an address of this machine itself (loopback) may be plain.
	Plain bool
	// MaxConnections are served at one time, 0 for 4096.
	MaxConnections int
}

// Monitor is where the server answers /healthz, /readyz and /metrics.
type Monitor struct {
	// Address is host and port, "" for nowhere. One that other machines reach needs Certificate, or Plain.
	Address     string
	Certificate *tls.Certificate
	Plain       bool
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
	Monitor Monitor
	Mount   string // "" for transit.DefaultMount
	MaxBody int    // in bytes, 0 for transit.DefaultMaxBody
	// Rate is how many requests a second each token is good for, Burst how many at once, where it has no rate of its own.
	// Rate 0 is no limit.
	Rate  float64
	Burst int
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
}

// Hooks are what the parts of a site report to. It is a device.Observer.
type Hooks struct{}

// DeviceOperation implements device.Observer.
func (h *Hooks) DeviceOperation(device, operation string, took time.Duration, err error) {}

// Run serves until ctx ends, and returns nil after a clean stop. It fails where the first site cannot be built, or its address not
// be had.
func Run(ctx context.Context, options Options) error { return errors.ErrUnsupported }
