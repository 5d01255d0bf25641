package kmsplugin

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// devices are the HSMs of one wrapper, by the names that the key record has for them.
type devices struct {
	options Options
	logger  *slog.Logger

	mu      sync.Mutex // guards handles
	handles map[string]*device.Handle
}

var _ keyring.Devices = (*devices)(nil)

func newDevices(options Options) *devices {
	return &devices{options: options, logger: options.Logger, handles: map[string]*device.Handle{}}
}

// Device implements [keyring.Devices].
func (d *devices) Device(ctx context.Context, name string) (hsm.Device, error) {
	d.mu.Lock()
	handle := d.handles[name]
	d.mu.Unlock()
	if handle == nil {
		return nil, fmt.Errorf("device %q: %w: the seal stanza describes %s", name, keyring.ErrNoDevice, quoted(d.names()))
	}
	return handle.Device(ctx)
}

// names lists the devices.
func (d *devices) names() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.handles))
}

// close gives the devices back.
func (d *devices) close() error {
	d.mu.Lock()
	handles := d.handles
	d.handles = nil
	d.mu.Unlock()
	var errs []error
	for _, handle := range handles {
		errs = append(errs, handle.Close())
	}
	return errors.Join(errs...)
}

// configure opens handles of the devices that a stanza describes, by itself or in a file, for a key record that names these.
// No HSM is touched.
func (d *devices) configure(wanted stanza, recorded []string, noEnvironment bool) error {
	configs, err := d.described(wanted, recorded, noEnvironment)
	if err != nil {
		return err
	}
	// The providers are fair between owners, and one owner's wrong PIN bars no other.
	owner := "seal " + wanted.key + " " + rand.Text()[:8]
	d.mu.Lock()
	defer d.mu.Unlock()
	for name, described := range configs {
		if err := d.check(described); err != nil {
			return fmt.Errorf("device %q: %w", name, err)
		}
		if err := d.options.Devices.Check(described); err != nil {
			return fmt.Errorf("device %q: %w", name, err)
		}
		if d.handles[name], err = d.options.Devices.Open(owner, name, described); err != nil {
			return err
		}
	}
	return nil
}

// described returns the configurations of the devices that the record names and the stanza describes.
func (d *devices) described(wanted stanza, recorded []string, noEnvironment bool) (map[string]device.Config, error) {
	if wanted.config != "" {
		return d.fromFile(wanted.config, recorded, noEnvironment)
	}
	switch {
	case wanted.name == "" && len(recorded) == 1:
		wanted.name = recorded[0]
	case wanted.name == "":
		return nil, fmt.Errorf("%w: the key record names the devices %s; say in \"device\" which one the stanza describes, or describe "+
			"several in a nitroseal.hcl and name that in \"config\"", errStanza, quoted(recorded))
	case !slices.Contains(recorded, wanted.name):
		return nil, fmt.Errorf("%w: the key record names no device %q; it has %s", errStanza, wanted.name, quoted(recorded))
	}
	described := wanted.device
	if wanted.caCert != "" {
		pem, err := readFile("ca_cert_file", wanted.caCert, maxCertificates)
		if err != nil {
			return nil, err
		}
		described.CACert = string(pem)
	}
	if described.Type == device.TypePKCS11 && described.Module == "" && len(d.options.Modules) == 1 {
		described.Module = d.options.Modules[0]
	}
	return map[string]device.Config{wanted.name: described}, nil
}

// fromFile returns the devices of a nitroseal.hcl that the record names.
func (d *devices) fromFile(path string, recorded []string, noEnvironment bool) (map[string]device.Config, error) {
	read, err := config.Load(path)
	if err != nil {
		return nil, fmt.Errorf("%w: \"config\": %w", errStanza, err)
	}
	found := map[string]device.Config{}
	for _, name := range recorded {
		described, ok := read.Device(name)
		if !ok {
			d.logger.Warn("the key record names a device that the configuration does not describe; it opens nothing here",
				"device", name, "config", path)
			continue
		}
		lookup := os.LookupEnv
		if noEnvironment {
			lookup = func(string) (string, bool) { return "", false }
		}
		if found[name], err = described.WithEnvironment(lookup); err != nil {
			return nil, fmt.Errorf("%w: \"config\": %w", errStanza, err)
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: %s describes none of the devices that the key record names: %s", errStanza, path, quoted(recorded))
	}
	return found, nil
}

// check finds what the plugin's own arguments do not allow, and says it in the words of OpenBao's configuration.
func (d *devices) check(described device.Config) error {
	for _, field := range described.SecretFields() {
		if *field.File != "" && d.options.SecretsDir == "" && !strings.HasPrefix(*field.File, device.CredentialPrefix) {
			return fmt.Errorf(`%w: the file of %q may not be read: add "-secrets-dir=DIR" to the args of the plugin stanza, with the `+
				`folder that it lies in`, errStanza, field.FileName())
		}
	}
	if described.Type != device.TypePKCS11 {
		return nil
	}
	if described.Module != "" && !slices.Contains(d.options.Modules, described.Module) {
		return fmt.Errorf(`%w: the module %s may not be loaded: add "-pkcs11-module=%s" to the args of the plugin stanza`, errStanza,
			described.Module, described.Module)
	}
	if d.options.StateDir == "" {
		return fmt.Errorf(`%w: no PIN is sent without a place that remembers a wrong one: add "-state-dir=DIR" to the args of the `+
			`plugin stanza, with the folder that all our programs on this machine share`, errStanza)
	}
	return nil
}

// quoted names some devices in a sentence.
func quoted(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	quotes := make([]string, len(names))
	for i, name := range names {
		quotes[i] = fmt.Sprintf("%q", name)
	}
	return strings.Join(quotes, ", ")
}

// The sizes of the largest files, in bytes.
const (
	maxRecord       = 128 << 10
	maxCertificates = 1 << 20
)

// readFile reads a file that a setting names. It holds no secret, but it says whom to trust: others than its owner must
// not write it.
func readFile(setting, path string, limit int64) ([]byte, error) {
	complain := func(format string, args ...any) error {
		return fmt.Errorf("%w: the file %s of %q "+format, append([]any{errStanza, path, setting}, args...)...)
	}
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not make OpenBao wait
	if err != nil {
		return nil, complain("cannot be read (%w)", pathless(err))
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, complain("cannot be read (%w)", pathless(err))
	case !info.Mode().IsRegular():
		return nil, complain("is not a regular file")
	case info.Mode().Perm()&0o022 != 0:
		return nil, complain("may be written by others than its owner (mode %04o); run chmod go-w on it", info.Mode().Perm())
	}
	content, err := io.ReadAll(io.LimitReader(file, limit+1))
	switch {
	case err != nil:
		return nil, complain("cannot be read (%w)", pathless(err))
	case int64(len(content)) > limit:
		return nil, complain("is larger than %d bytes; is it the right one?", limit)
	}
	return content, nil
}

// pathless drops the path that os errors carry: the sentence around it names the file.
func pathless(err error) error {
	if inside := (*os.PathError)(nil); errors.As(err, &inside) {
		return inside.Err
	}
	return err
}
