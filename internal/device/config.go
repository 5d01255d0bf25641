package device

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The kinds of device.
const (
	TypePKCS11 = "pkcs11"
	TypeNetHSM = "nethsm"
)

// Types lists the kinds of device.
func Types() []string { return []string{TypePKCS11, TypeNetHSM} }

// ErrConfig is wrapped by every complaint about a configuration: the user can mend it, trying again does not help.
var ErrConfig = errors.New("invalid device configuration")

// Config says which HSM a device is and how to log in to it. It is stored as JSON where the caller keeps its secrets.
// Each field belongs to one type; the names of the fields are those of the JSON, here and in every complaint.
type Config struct {
	Type string `json:"type"`

	// PKCS#11: see config_pkcs11.go for what goes together.

	// Module is the path of the vendor's PKCS#11 module. Exactly one of Serial, TokenLabel and Slot chooses the token
	// in it; after a token went and came back it is found again by its serial, whatever slot it returns in.
	Module     string `json:"module,omitempty"`
	Serial     string `json:"serial,omitempty"`
	TokenLabel string `json:"token_label,omitempty"`
	Slot       *uint  `json:"slot,omitempty"`
	// PIN is the user PIN itself, PINFile a file under the secrets directory that holds it; one of the two.
	PIN     string `json:"pin,omitempty"`
	PINFile string `json:"pin_file,omitempty"`
	// Parallel is how many operations the token takes at a time: 1 for a card, the default; 8 suits SoftHSM.
	Parallel int `json:"parallel,omitempty"`
	// DecryptTimeout and GenerateTimeout are how long one operation may stay inside the module before the module host
	// is killed. Zero means the provider's default: 20 seconds and 5 minutes.
	DecryptTimeout  time.Duration `json:"decrypt_timeout,omitempty"`
	GenerateTimeout time.Duration `json:"generate_timeout,omitempty"`

	// NetHSM: see config_nethsm.go.

	// URLs are the nodes of one cluster, https://host[:port]; any of them may serve a request.
	URLs []string `json:"urls,omitempty"`
	// Username and its password are an Operator's, "namespace~user" for one in a namespace. AdminUsername is an
	// Administrator of the same namespace; only what makes or deletes something on the NetHSM needs one.
	Username          string `json:"username,omitempty"`
	Password          string `json:"password,omitempty"`
	PasswordFile      string `json:"password_file,omitempty"`
	AdminUsername     string `json:"admin_username,omitempty"`
	AdminPassword     string `json:"admin_password,omitempty"`
	AdminPasswordFile string `json:"admin_password_file,omitempty"`
	// UnlockPassphrase unlocks a node that is found locked. Without one, a person does.
	UnlockPassphrase     string `json:"unlock_passphrase,omitempty"`
	UnlockPassphraseFile string `json:"unlock_passphrase_file,omitempty"`
	// CACert is PEM of the authorities that sign the nodes' certificates; empty means those of the system. TLSPins are
	// SHA-256 of certificates that the nodes may show, in hexadecimal. TLSServerName is the name in the certificates
	// where it is not the host of the URL. Insecure accepts any certificate.
	CACert        string   `json:"ca_cert,omitempty"`
	TLSPins       []string `json:"tls_pins,omitempty"`
	TLSServerName string   `json:"tls_server_name,omitempty"`
	Insecure      bool     `json:"tls_insecure,omitempty"`
	// RequestTimeout is how long one call may take; zero means the provider's default, 10 seconds.
	RequestTimeout time.Duration `json:"request_timeout,omitempty"`
	// ObjectStore lets stores of type "object" lie in the certificate slots of keys. It needs the Administrator.
	ObjectStore bool `json:"object_store,omitempty"`
	// KeyTags restrict the keys that are made: only users with one of these tags may use them.
	KeyTags []string `json:"key_tags,omitempty"`
}

// Validate says what is wrong with the configuration, and how to mend it; nil where nothing is. It touches neither
// files nor HSM. The error wraps [ErrConfig].
func (c Config) Validate() error {
	switch c.Type {
	case "":
		return complain(`"type" is missing; set type=%s`, strings.Join(Types(), " or type="))
	case TypePKCS11, TypeNetHSM:
	default:
		return complain(`type %q is not known; use type=%s`, c.Type, strings.Join(Types(), " or type="))
	}
	for _, field := range c.fields() {
		if field.set && field.kind != c.Type {
			return complain(`%q belongs to devices of type %q, and this one is of type %q; leave it out`, field.name, field.kind, c.Type)
		}
	}
	for _, secret := range c.SecretFields() {
		if *secret.Value != "" && *secret.File != "" {
			return complain(`both %q and %q are given; keep one`, secret.Name, secret.FileName())
		}
	}
	if c.Type == TypeNetHSM {
		return c.validateNetHSM()
	}
	return c.validatePKCS11()
}

// DestinationChanged names the fields in which the new configuration would send a secret somewhere else than the old
// one did, or in another way. Who may write the configuration may not thereby learn a secret that is in it: such a write
// must carry every one of them again. Less trust counts as well: who is left may be the wrong one.
func (c Config) DestinationChanged(old Config) []string {
	var changed []string
	if c.Type != old.Type {
		changed = append(changed, "type")
	}
	before := old.fields()
	for i, field := range c.fields() {
		if field.destination != before[i].destination {
			changed = append(changed, field.name)
		}
	}
	return changed
}

// Redacted is what a read of the configuration may show: everything but the secrets, of which it says only whether they
// are there.
func (c Config) Redacted() map[string]any {
	shown := map[string]any{"type": c.Type}
	for _, field := range c.fields() {
		if field.kind == c.Type && field.shown != nil {
			shown[field.name] = field.shown
		}
	}
	for _, secret := range c.SecretFields() {
		if secret.kind == c.Type {
			shown[secret.Name+"_set"] = *secret.Value != ""
		}
	}
	return shown
}

// field is one field of a configuration besides its type.
type field struct {
	name string
	kind string // the type of device that it belongs to
	set  bool
	// shown is what a read shows of it, nil for nothing.
	shown any
	// destination identifies the value of a field that decides where a secret goes; it is empty for every other field.
	destination string
}

// fields lists all fields but the type, each time in the same order.
func (c Config) fields() []field {
	fields := append(c.fieldsPKCS11(), c.fieldsNetHSM()...)
	for _, secret := range c.SecretFields() {
		fields = append(fields,
			field{name: secret.Name, kind: secret.kind, set: *secret.Value != ""},
			field{name: secret.FileName(), kind: secret.kind, set: *secret.File != "", shown: *secret.File},
		)
	}
	return fields
}

// between complains about a time limit out of its bounds; zero, the default, is always allowed.
func between(name string, value, from, to time.Duration) error {
	if value != 0 && (value < from || value > to) {
		return complain(`%s %v is out of range; use %v to %v`, name, value, from, to)
	}
	return nil
}

// setOf identifies a list whose order does not matter.
func setOf(values []string) string {
	sorted := slices.Sorted(slices.Values(values))
	return fmt.Sprintf("%q", slices.Compact(sorted))
}

// present is a list that is shown as empty, not as null.
func present(list []string) []string { return append([]string{}, list...) }

func seconds(d time.Duration) int64 { return int64(d / time.Second) }

func complain(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrConfig}, args...)...)
}
