// Package device opens HSMs from configuration and keeps them open.
//
// A plugin process serves several mounts, and a mount has several devices. The [Registry] belongs to the process; a
// [Handle] is one mount's device. Nothing is opened until somebody needs it, so that configuration can be written
// while the HSM lies in a drawer, and a device that could not be opened is tried again at the next need: a returned
// HSM is used again without a restart of anything.
//
// What several mounts share (the module host, the log-in, the queue in front of a card, the PIN bar; the connections to a
// NetHSM and the patience with its nodes) is shared one room below, in the provider. Here each mount has its own handle, so
// that closing one never disturbs another.
//
// A PIN, password or passphrase comes from the configuration or from a file under the secrets directory. A file is read
// anew when it changed: a rotated PIN needs no write to Vault. While it cannot be read, an open device stays in use.
package device

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm"
)

// ErrClosed is returned by a handle after its Close.
var ErrClosed = errors.New("the device was closed")

// Opener opens a device of one type. It copies the secrets that it keeps. Owner names the mount, so that the provider
// can be fair between mounts and keep one mount's wrong PIN from barring another.
type Opener func(ctx context.Context, owner string, config Config, secrets Secrets) (hsm.Device, error)

// Options configure a [Registry].
type Options struct {
	// Openers are the known types of device: [TypePKCS11] and so on.
	Openers map[string]Opener
	Secrets SecretFiles
	// NetHSMs are the URLs of the nodes that devices of [TypeNetHSM] may name; none means that they may name any.
	NetHSMs []string
	// Strangers is true where others write configurations than who chose Secrets, as those of a mount. They could name a file
	// of it, and a server of their own that it is sent to: so none goes to a NetHSM that is not among NetHSMs.
	Strangers bool
	Logger    *slog.Logger
	Observer  Observer // is told of every operation; nil for none
}

// Registry opens devices for all mounts of a process.
type Registry struct {
	openers   map[string]Opener
	secrets   SecretFiles
	netHSMs   []string
	strangers bool
	logger    *slog.Logger
	observer  Observer
}

// New returns a registry. It does no I/O.
func New(options Options) *Registry {
	logger := options.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &Registry{
		openers: options.Openers, secrets: options.Secrets, netHSMs: options.NetHSMs, strangers: options.Strangers, logger: logger,
		observer: options.Observer,
	}
}

// Check says what is wrong with a configuration, its secret files included, without touching the HSM. What the user can
// mend wraps [ErrConfig].
func (r *Registry) Check(config Config) error {
	if _, err := r.opener(config); err != nil {
		return err
	}
	secrets, err := r.secrets.readAll(config)
	secrets.Wipe()
	return err
}

// opener returns the opener of a valid configuration.
func (r *Registry) opener(config Config) (Opener, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if err := config.checkAllowed(r.netHSMs, r.strangers); err != nil {
		return nil, err
	}
	opener, known := r.openers[config.Type]
	if !known {
		return nil, complain(`devices of type %q cannot be opened here: this program was built or started without them`, config.Type)
	}
	return opener, nil
}

// Open returns a handle. The HSM is not touched before the handle's Device is called.
func (r *Registry) Open(owner, name string, config Config) (*Handle, error) {
	opener, err := r.opener(config)
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", name, err)
	}
	h := &Handle{
		owner: owner, name: name, config: config, open: opener, secrets: r.secrets,
		logger: r.logger.With("device", name), observer: r.observer,
		opening: make(chan struct{}, 1),
	}
	_, _ = rand.Read(h.digestKey[:]) // never fails: crypto/rand
	return h, nil
}

// Handle is one mount's device. Its methods are safe for concurrent use.
type Handle struct {
	owner, name string
	config      Config
	open        Opener
	secrets     SecretFiles
	logger      *slog.Logger
	observer    Observer // nil for none

	// opening is held while the device is opened or closed: one opens, the others wait for it or for their ctx.
	opening chan struct{}

	digestKey [sha256.Size]byte

	mu     sync.Mutex // guards what follows
	device hsm.Device
	files  fileStates        // of the secrets, as they were when last looked at
	unread bool              // one could not be read then, so that it is tried again also where it looks the same
	digest [sha256.Size]byte // of the secrets that the device was opened with
	closed bool
	probed probe
}

// Name is the device's name in its mount.
func (h *Handle) Name() string { return h.name }

// Device returns the open device, opening it first where that is necessary. The device belongs to the handle: the
// caller does not close it, and asks again for the next operation.
func (h *Handle) Device(ctx context.Context) (hsm.Device, error) {
	if device, current, err := h.current(); current || err != nil {
		return device, err
	}
	select {
	case h.opening <- struct{}{}:
		defer func() { <-h.opening }()
	case <-ctx.Done():
		return nil, fmt.Errorf("opening device %q: %w", h.name, ctx.Err())
	}
	open, current, err := h.current()
	if current || err != nil { // somebody else opened it while we waited
		return open, err
	}
	files := h.secrets.states(h.config)
	secrets, err := h.secrets.readAll(h.config)
	defer secrets.Wipe()
	digest := secrets.digest(h.digestKey[:])
	switch {
	case err != nil && open != nil:
		// A secrets volume that flaps, a file that is just being rewritten: the secrets that are in use still work.
		if h.putOff(files) {
			h.logger.Warn("a secret file changed and cannot be read; going on with the secret in use", "error", err)
		}
		return open, nil
	case err != nil:
		return nil, fmt.Errorf("device %q: %w", h.name, err)
	case open != nil && digest == h.digestInUse():
		h.keep(open, files, digest)
		return open, nil
	}
	if err := h.drop(); err != nil {
		h.logger.Warn("closing the device to open it with a changed secret", "error", err)
	}
	device, err := h.open(ctx, h.owner, h.config, secrets)
	if err != nil {
		return nil, fmt.Errorf("opening device %q: %w", h.name, err)
	}
	device = observe(h.name, device, h.observer)
	if !h.keep(device, files, digest) {
		return nil, errors.Join(fmt.Errorf("device %q: %w", h.name, ErrClosed), device.Close())
	}
	return device, nil
}

// UnlockPassphrase returns the passphrase that the configuration gives for unlocking the device, nil for none. The caller
// wipes it.
func (h *Handle) UnlockPassphrase() ([]byte, error) {
	passphrase, err := h.secrets.read(SecretField{Value: &h.config.UnlockPassphrase, File: &h.config.UnlockPassphraseFile})
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", h.name, err)
	}
	return passphrase, nil
}

// keep makes a device the open one, unless the handle was closed meanwhile.
func (h *Handle) keep(device hsm.Device, files fileStates, digest [sha256.Size]byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return false
	}
	h.device, h.files, h.digest, h.unread = device, files, digest, false
	return true
}

// putOff leaves the open device as it is, because one of its secret files cannot be read: the next use tries again. It
// tells whether that is news.
func (h *Handle) putOff(files fileStates) (news bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	news = !h.unread || !files.same(&h.files)
	h.files, h.unread = files, true
	return news
}

func (h *Handle) digestInUse() [sha256.Size]byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.digest
}

// Close gives the device back.
func (h *Handle) Close() error {
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.opening <- struct{}{}
	defer func() { <-h.opening }()
	return h.drop()
}

// current returns the open device, nil for none, and whether it may be used as it is: not where one of its secret files
// has changed since.
func (h *Handle) current() (device hsm.Device, current bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, false, fmt.Errorf("device %q: %w", h.name, ErrClosed)
	}
	files := h.secrets.states(h.config)
	return h.device, h.device != nil && !h.unread && files.same(&h.files), nil
}

// drop closes the open device, if any. The caller holds opening.
func (h *Handle) drop() error {
	h.mu.Lock()
	device := h.device
	h.device = nil
	h.mu.Unlock()
	if device == nil {
		return nil
	}
	return device.Close()
}
