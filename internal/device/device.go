// Package device opens HSMs from configuration and keeps them open.
//
// A plugin process serves several mounts, and a mount has several devices. The [Registry] belongs to the process; a
// [Handle] is one mount's device. Nothing is opened until somebody needs it, so that configuration can be written
// while the HSM lies in a drawer, and a device that could not be opened is tried again at the next need: a returned
// HSM is used again without a restart of anything.
//
// What several mounts share (the module host, the log-in, the queue in front of a card, the PIN bar) is shared one
// room below, in the provider. Here each mount has its own handle, so that closing one never disturbs another.
//
// A PIN comes from the configuration or from a file under the secrets directory. A file is read anew when it changed:
// a rotated PIN needs no write to Vault.
package device

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// ErrClosed is returned by a handle after its Close.
var ErrClosed = errors.New("the device was closed")

// Opener opens a device of one type. It copies the PIN if it keeps it. Owner names the mount, so that the provider can
// be fair between mounts and keep one mount's wrong PIN from barring another.
type Opener func(ctx context.Context, owner string, config Config, pin []byte) (hsm.Device, error)

// Options configure a [Registry].
type Options struct {
	// Openers are the known types of device: TypePKCS11 and so on.
	Openers map[string]Opener
	Secrets SecretFiles
	Logger  *slog.Logger
}

// Registry opens devices for all mounts of a process.
type Registry struct {
	openers map[string]Opener
	secrets SecretFiles
	logger  *slog.Logger
}

// New returns a registry. It does no I/O.
func New(options Options) *Registry {
	logger := options.Logger
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &Registry{openers: options.Openers, secrets: options.Secrets, logger: logger}
}

// Check says what is wrong with a configuration, its secret file included, without touching the HSM. What the user can
// mend wraps [ErrConfig].
func (r *Registry) Check(config Config) error {
	if err := config.Validate(); err != nil {
		return err
	}
	if _, known := r.openers[config.Type]; !known {
		return complain(`this build of the plugin has no support for devices of type %q`, config.Type)
	}
	if config.PINFile != "" {
		return r.secrets.Check(config.PINFile)
	}
	return nil
}

// Open returns a handle. The HSM is not touched before the handle's Device is called.
func (r *Registry) Open(owner, name string, config Config) (*Handle, error) {
	if err := config.Validate(); err != nil {
		return nil, fmt.Errorf("device %q: %w", name, err)
	}
	opener, known := r.openers[config.Type]
	if !known {
		return nil, fmt.Errorf("device %q: %w", name, complain(`this build of the plugin has no support for devices of type %q`, config.Type))
	}
	return &Handle{
		owner: owner, name: name, config: config, open: opener, secrets: r.secrets,
		logger:  r.logger.With("device", name),
		opening: make(chan struct{}, 1),
	}, nil
}

// Handle is one mount's device. Its methods are safe for concurrent use.
type Handle struct {
	owner, name string
	config      Config
	open        Opener
	secrets     SecretFiles
	logger      *slog.Logger

	// opening is held while the device is opened or closed: one opens, the others wait for it or for their ctx.
	opening chan struct{}

	mu      sync.Mutex // guards what follows
	device  hsm.Device
	pinFile fileState // of the file that the open device's PIN came from
	closed  bool
	probed  probe
}

// Name is the device's name in its mount.
func (h *Handle) Name() string { return h.name }

// Device returns the open device, opening it first where that is necessary. The device belongs to the handle: the
// caller does not close it, and asks again for the next operation.
func (h *Handle) Device(ctx context.Context) (hsm.Device, error) {
	if device, err := h.current(); device != nil || err != nil {
		return device, err
	}
	select {
	case h.opening <- struct{}{}:
		defer func() { <-h.opening }()
	case <-ctx.Done():
		return nil, fmt.Errorf("opening device %q: %w", h.name, ctx.Err())
	}
	if device, err := h.current(); device != nil || err != nil { // somebody else opened it while we waited
		return device, err
	}
	if err := h.drop(); err != nil {
		h.logger.Warn("closing the device to open it with a changed PIN file", "error", err)
	}
	state := h.statPINFile()
	pin, err := h.pin()
	if err != nil {
		return nil, fmt.Errorf("device %q: %w", h.name, err)
	}
	defer clear(pin)
	device, err := h.open(ctx, h.owner, h.config, pin)
	if err != nil {
		return nil, fmt.Errorf("opening device %q: %w", h.name, err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, errors.Join(fmt.Errorf("device %q: %w", h.name, ErrClosed), device.Close())
	}
	h.device, h.pinFile = device, state
	return device, nil
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

// current returns the open device, or nil where it has to be opened.
func (h *Handle) current() (hsm.Device, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, fmt.Errorf("device %q: %w", h.name, ErrClosed)
	case h.device == nil:
		return nil, nil //nolint:nilnil // "not open" is an ordinary answer between these few lines
	case h.config.PINFile != "" && h.statPINFile() != h.pinFile:
		return nil, nil //nolint:nilnil // as above: the PIN file changed, so the device is opened anew
	default:
		return h.device, nil
	}
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

// pin returns the PIN; the caller wipes it.
func (h *Handle) pin() ([]byte, error) {
	if h.config.PINFile == "" {
		return []byte(h.config.PIN), nil
	}
	return h.secrets.Read(h.config.PINFile)
}

// fileState tells whether a file was changed or replaced.
type fileState struct {
	modified time.Time
	size     int64
	target   string // what the links lead to: Kubernetes swaps a link to replace a secret
}

func (h *Handle) statPINFile() fileState {
	if h.config.PINFile == "" {
		return fileState{}
	}
	path := h.config.PINFile
	if !filepath.IsAbs(path) {
		path = filepath.Join(h.secrets.Dir, path)
	}
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fileState{}
	}
	var info fs.FileInfo
	if info, err = os.Stat(target); err != nil {
		return fileState{}
	}
	return fileState{modified: info.ModTime(), size: info.Size(), target: target}
}
