package nethsm

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
)

// Manager opens NetHSMs for all mounts of a process. Devices with the same URLs, trust and credentials share one [Client]:
// its connections, what it knows about the nodes, and its patience, since a NetHSM answers one wrong password a second.
// Others share nothing, so that nobody gets answers that somebody else's password or certificate paid for.
type Manager struct {
	logger *slog.Logger
	key    [sha256.Size]byte // of the digests that tell configurations apart without keeping their passwords

	mu      sync.Mutex // guards what follows
	shared  map[digest]*shared
	devices map[*Device]struct{}
	closed  bool
}

// digest tells configurations apart.
type digest [sha256.Size]byte

// DeviceConfig says which NetHSM a device is and who uses it.
type DeviceConfig struct {
	Options

	// Operator decrypts. It has the role Operator.
	Operator Credentials
	// Administrator makes and deletes keys, and keeps objects. It has the role Administrator, in the namespace of the
	// Operator. nil where none of that is wanted: sealing and opening do without.
	Administrator *Credentials
	// UnlockPassphrase, where given, unlocks a node by itself that is found locked: after a restart, for example. It is tried
	// once for each time that the node is found so.
	UnlockPassphrase []byte
	// Objects makes the device an [hsm.ObjectStore]. It needs the Administrator.
	Objects bool
	// Tags are put on keys that the device makes: only operators that have one of them can use those keys.
	Tags []string
	// Owner names the mount in the log.
	Owner string
}

// NewManager returns a manager. It does no I/O. A nil logger discards.
func NewManager(logger *slog.Logger) *Manager {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	m := &Manager{logger: logger, shared: map[digest]*shared{}, devices: map[*Device]struct{}{}}
	_, _ = rand.Read(m.key[:]) // never fails: crypto/rand
	return m
}

// Open returns a device. It does no I/O, so that a NetHSM can be configured before it is there. Every complaint is
// [ErrConfig]. The passwords are copied.
func (m *Manager) Open(config DeviceConfig) (*Device, error) {
	if config.Logger == nil {
		config.Logger = m.logger
	}
	if err := config.check(); err != nil {
		return nil, err
	}
	id, err := m.digest(config)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, fmt.Errorf("opening a NetHSM: %w", ErrClosed)
	}
	s := m.shared[id]
	if s == nil {
		if s, err = newShared(config); err != nil {
			return nil, err
		}
		m.shared[id] = s
	}
	s.users++
	d := newDevice(m, id, s, config)
	m.devices[d] = struct{}{}
	return d, nil
}

// release gives back what a closed device had. With the last device of its kind the client is closed.
func (m *Manager) release(d *Device) error {
	m.mu.Lock()
	delete(m.devices, d)
	s := d.shared
	s.users--
	last := s.users == 0
	if last {
		delete(m.shared, d.id)
	}
	m.mu.Unlock()
	if !last {
		return nil
	}
	return s.close()
}

// Close closes the devices that are still open, and the manager for good.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	open := slices.Collect(maps.Keys(m.devices))
	m.mu.Unlock()
	var failed []error
	for _, device := range open {
		failed = append(failed, device.Close())
	}
	return errors.Join(failed...)
}

// digest is the same for configurations that may share a client. The order of the URLs counts: it is the order in which
// nodes are shown, and in which they are asked for what changes keys.
func (m *Manager) digest(config DeviceConfig) (digest, error) {
	mac := hmac.New(sha256.New, m.key[:])
	for _, text := range config.URLs {
		base, err := parseURL(text)
		if err != nil {
			return digest{}, err
		}
		part(mac, "url", []byte(base))
	}
	part(mac, "ca", config.TLS.CA)
	for _, pin := range config.TLS.Pins {
		part(mac, "pin", []byte(strings.ToLower(strings.ReplaceAll(pin, ":", ""))))
	}
	part(mac, "tls", []byte(config.TLS.ServerName), fmt.Append(nil, config.TLS.Insecure))
	part(mac, "client", fmt.Append(nil, config.Timeout, config.Connections), []byte(config.UserAgent))
	part(mac, "operator", []byte(config.Operator.Username), config.Operator.Password)
	if config.Administrator != nil {
		part(mac, "administrator", []byte(config.Administrator.Username), config.Administrator.Password)
	}
	part(mac, "unlock", config.UnlockPassphrase)
	return digest(mac.Sum(nil)), nil
}

// part adds a named list of values, so that no two different lists look alike.
func part(mac hash.Hash, name string, values ...[]byte) {
	for _, value := range append([][]byte{[]byte(name)}, values...) {
		mac.Write(binary.BigEndian.AppendUint64(nil, uint64(len(value))))
		mac.Write(value)
	}
}

// check complains about what the client does not check itself.
func (c DeviceConfig) check() error {
	if err := c.Operator.check("operator"); err != nil {
		return err
	}
	if c.Administrator != nil {
		if err := c.Administrator.check("administrator"); err != nil {
			return err
		}
		if ours, theirs := c.Operator.namespace(), c.Administrator.namespace(); ours != theirs {
			return fmt.Errorf("%w: the operator is of %s and the administrator of %s; they would not see each other's keys, "+
				"so take an administrator of the operator's namespace", ErrConfig, describeNamespace(ours), describeNamespace(theirs))
		}
	}
	if c.Objects && c.Administrator == nil {
		return fmt.Errorf("%w: keeping objects on a NetHSM needs an administrator, because each object is the certificate of a key", ErrConfig)
	}
	if n := len(c.UnlockPassphrase); n != 0 && (n < minPassphrase || n > maxPassphrase) {
		return fmt.Errorf("%w: an unlock passphrase has %d to %d bytes", ErrConfig, minPassphrase, maxPassphrase)
	}
	if err := checkTags("checking the tags of new keys", c.Tags); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	return nil
}

// check complains about credentials that no NetHSM can know.
func (c Credentials) check(role string) error {
	if err := checkUser("checking the user name of the "+role, c.Username); err != nil {
		return fmt.Errorf("%w: %w", ErrConfig, err)
	}
	if len(c.Password) == 0 {
		return fmt.Errorf("%w: the password of the %s %q is missing", ErrConfig, role, c.Username)
	}
	return nil
}

// namespace is that of the user, empty for the root namespace.
func (c Credentials) namespace() string {
	namespace, _, found := strings.Cut(c.Username, "~")
	if !found {
		return ""
	}
	return namespace
}

func describeNamespace(name string) string {
	if name == "" {
		return "the root namespace"
	}
	return fmt.Sprintf("the namespace %q", name)
}
