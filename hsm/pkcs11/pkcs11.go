// Package pkcs11 is the provider for PKCS#11 tokens: a client, in pure Go, of the module host, the process of its own
// in which the vendor's module lives (package modhost).
//
// A [Manager] belongs to the process and keeps one host for each module, shared by all devices on it. A [Device] is one
// mount's view of one token. The host is born when first needed and ends with its last device.
//
// What makes a token dependable here is small. Callers return at their deadline whatever the card does; work waits in
// one fair, bounded queue for each token; a host is killed only when nothing has come back from it for as long as its
// slowest operation may take. The one recovery is a new host: log in again, find the key again, compare its public half
// with the recorded one. An operation that is harmless to repeat is then run once more, unless it is the one that the
// host died of. A host that fails again and again is started anew with growing pauses of at most a second.
//
// A wrong PIN costs one of very few tries, so every log-in goes through the ledger (ledger.go), which lets one PIN be
// wrong once for the whole machine. The log-in belongs to the host and so to all its devices; each must hold the same
// PIN to use it.
package pkcs11

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// ErrClosed is returned by a device or manager after its Close.
var ErrClosed = fmt.Errorf("%w: the device was closed", hsm.ErrUnavailable)

// ErrConfig is wrapped by every error of [Manager.Open] that whoever configures the device, or starts the program, can
// mend: a module that is not allowed, not there or open to others, a token that is not chosen. Trying again does not help.
var ErrConfig = errors.New("invalid configuration")

// configError is an [ErrConfig] that says what to mend, and nothing else.
type configError struct{ err error }

func (e *configError) Error() string   { return e.err.Error() }
func (e *configError) Unwrap() []error { return []error{ErrConfig, e.err} }

// The limits that a zero in [Config] means.
const (
	defaultDecryptLimit  = 20 * time.Second
	defaultGenerateLimit = 5 * time.Minute
)

// queueBound is how many operations may wait for one token; another gets ErrUnavailable at once.
const queueBound = 256

// Options come from the program's own arguments, never from a mount: whoever may write a mount's configuration must not
// be able to choose what is loaded or with which environment.
type Options struct {
	// Modules are the paths of the modules that devices may use.
	Modules []string
	// StateDir holds the PIN ledger. All processes of the machine that use the same tokens share it.
	StateDir string
	// Env names the environment variables that module hosts get, with the values of this process.
	Env []string
	// HostPath is the program to run as module host, and HostSHA256 its SHA-256 in hexadecimal; both empty where this
	// program is built with cgo and can be the host itself.
	HostPath, HostSHA256 string
	// Advice is what errors about PINs tell people to do.
	Advice Advice
	// Logger gets what an operator should know. Nil discards it.
	Logger *slog.Logger
}

// Config says which token a device is, and how to use it.
type Config struct {
	// Module is the path of the vendor's module.
	Module string
	// Exactly one of Serial, TokenLabel and Slot chooses the token. A token once found is recorded by its serial and
	// after a loss found again by that, whatever slot it returns in.
	Serial, TokenLabel string
	Slot               *uint
	// PIN is the user PIN. Open copies it.
	PIN []byte
	// Owner names the mount. Owners take turns where they wait for one token.
	Owner string
	// Parallel is how many operations the token takes at a time: 1 for a card, which 0 means; 8 suits SoftHSM. Devices
	// that share a token share the number of the first one.
	Parallel int
	// GenerateLimit and DecryptLimit are how long an operation may stay inside the module before the host is killed:
	// a key generation, and any other. Zero means 5 minutes and 20 seconds. How long a token takes is a matter of the token,
	// not of who asks, and a host is shared: of the open devices on one token the longest limit holds for all, so that a
	// short one of one mount kills nobody's host early.
	DecryptLimit, GenerateLimit time.Duration
}

// Manager keeps the module hosts of a process. Its methods are safe for concurrent use.
type Manager struct {
	options Options
	logger  *slog.Logger
	ledger  *ledger
	// pinKey makes PINs comparable in constant time, whatever their lengths, without keeping them.
	pinKey [32]byte
	// spawn starts a host process; tests put a host of their own behind it.
	spawn func() (*process, error)
	// closePatience is the constant of that name; tests have less.
	closePatience time.Duration

	mu      sync.Mutex
	closed  bool
	modules map[string]*module // by resolved path
}

// New returns a manager. It does no I/O.
func New(options Options) *Manager {
	logger := options.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	options.Advice = options.Advice.complete()
	m := &Manager{
		options: options, logger: logger, ledger: openLedger(options.StateDir), closePatience: closePatience,
		modules: make(map[string]*module),
	}
	m.ledger.advice = options.Advice
	_, _ = rand.Read(m.pinKey[:]) // never fails (crypto/rand)
	m.spawn = birth{hostPath: options.HostPath, hostSHA256: options.HostSHA256, env: options.Env}.start
	return m
}

// Open returns a device. It checks the configuration and the module's path; the host is started, and the token looked
// for, by the first operation, so that a device can be opened while its token lies in a drawer. Its errors are [ErrConfig]
// and [ErrClosed].
func (m *Manager) Open(_ context.Context, config Config) (*Device, error) {
	if err := config.validate(); err != nil {
		return nil, &configError{err}
	}
	if err := checkEnvironment(m.options.Env); err != nil {
		return nil, &configError{err}
	}
	path, err := resolveModule(config.Module, m.options.Modules)
	if err != nil {
		return nil, &configError{err}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, ErrClosed
	}
	mod := m.modules[path]
	if mod == nil {
		mod = newModule(m, path)
		m.modules[path] = mod
	}
	d := newDevice(m, mod, config)
	mod.devices[d] = struct{}{}
	return d, nil
}

// listingLimit is how long listing a module's slots may take: as long as its slowest token.
func (m *Manager) listingLimit(mod *module) (limit time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for d := range mod.devices {
		limit = max(limit, d.config.DecryptLimit)
	}
	return limit
}

// release gives back one device's share of its module and ends the module's host with the last one.
func (m *Manager) release(mod *module, d *Device) {
	m.mu.Lock()
	delete(mod.devices, d)
	last := len(mod.devices) == 0 && m.modules[mod.path] == mod
	if last {
		delete(m.modules, mod.path)
	}
	m.mu.Unlock()
	if last {
		mod.close()
	}
}

// Close ends all hosts and waits a few seconds for them. Devices still open fail from now on.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	modules := m.modules
	m.modules = make(map[string]*module)
	m.mu.Unlock()
	for _, mod := range modules {
		mod.close()
	}
	return nil
}

func (c Config) validate() error {
	chosen := 0
	for _, given := range []bool{c.Serial != "", c.TokenLabel != "", c.Slot != nil} {
		if given {
			chosen++
		}
	}
	switch {
	case chosen != 1:
		return errors.New("choosing a token: give exactly one of serial, token label and slot")
	case c.Parallel < 0:
		return fmt.Errorf("a token cannot take %d operations at a time; 1 is right for a card", c.Parallel)
	case c.DecryptLimit < 0 || c.GenerateLimit < 0:
		return errors.New("a time limit cannot be negative")
	}
	return nil
}

// withDefaults fills in what is zero.
func (c Config) withDefaults() Config {
	c.Parallel = max(c.Parallel, 1)
	if c.DecryptLimit == 0 {
		c.DecryptLimit = defaultDecryptLimit
	}
	if c.GenerateLimit == 0 {
		c.GenerateLimit = defaultGenerateLimit
	}
	return c
}

// unavailable is an [hsm.ErrUnavailable] that says why.
func unavailable(format string, args ...any) error {
	return fmt.Errorf("%w: %w", hsm.ErrUnavailable, fmt.Errorf(format, args...))
}
