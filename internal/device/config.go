package device

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// The kinds of device.
const (
	TypePKCS11 = "pkcs11"
)

// Bounds of what a configuration may ask for. The limits are bounded because a token is shared: one mount's hanging
// operation keeps its place in the queue for as long as that mount allows.
const (
	maxParallel      = 64
	minDecryptLimit  = 2 * time.Second
	maxDecryptLimit  = 2 * time.Minute
	minGenerateLimit = 10 * time.Second
	maxGenerateLimit = 15 * time.Minute // an RSA-4096 key takes a card minutes
)

// ErrConfig is wrapped by every complaint about a configuration: the user can mend it, trying again does not help.
var ErrConfig = errors.New("invalid device configuration")

// Config says which HSM a device is and how to log in to it. It is stored as JSON where the caller keeps its secrets.
type Config struct {
	Type string `json:"type"`

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
}

// Validate says what is wrong with the configuration, and how to mend it; nil where nothing is. It touches neither
// files nor HSM. The error wraps [ErrConfig].
func (c Config) Validate() error {
	switch {
	case c.Type == "":
		return complain(`"type" is missing; set type=%s`, TypePKCS11)
	case c.Type != TypePKCS11:
		return complain(`type %q is not known; use type=%s`, c.Type, TypePKCS11)
	case c.Module == "":
		return complain(`"module" is missing; name the vendor's PKCS#11 module, /usr/lib/x86_64-linux-gnu/opensc-pkcs11.so for example`)
	case !strings.HasPrefix(c.Module, "/"):
		return complain(`module %q is not an absolute path`, c.Module)
	}
	chosen := 0
	for _, given := range []bool{c.Serial != "", c.TokenLabel != "", c.Slot != nil} {
		if given {
			chosen++
		}
	}
	switch {
	case chosen == 0:
		return complain(`no token is chosen; give one of "serial", "token_label" and "slot" (pkcs11-tool --list-slots shows them)`)
	case chosen > 1:
		return complain(`more than one of "serial", "token_label" and "slot" is given; keep one`)
	case c.PIN == "" && c.PINFile == "":
		return complain(`no PIN is given; set "pin", or "pin_file" to a file under the plugin's -secrets-dir`)
	case c.PIN != "" && c.PINFile != "":
		return complain(`both "pin" and "pin_file" are given; keep one`)
	case c.Parallel < 0 || c.Parallel > maxParallel:
		return complain(`parallel %d is out of range; use 1 for a card, 8 for SoftHSM, at most %d`, c.Parallel, maxParallel)
	}
	for _, limit := range []struct {
		name            string
		value, from, to time.Duration
	}{
		{"decrypt_timeout", c.DecryptTimeout, minDecryptLimit, maxDecryptLimit},
		{"generate_timeout", c.GenerateTimeout, minGenerateLimit, maxGenerateLimit},
	} {
		if limit.value != 0 && (limit.value < limit.from || limit.value > limit.to) {
			return complain(`%s %v is out of range; use %v to %v`, limit.name, limit.value, limit.from, limit.to)
		}
	}
	return nil
}

// DestinationChanged names the fields in which the new configuration would send the secret somewhere else than the
// old one did. Who may write the configuration may not thereby learn the PIN: such a write must carry it again.
func (c Config) DestinationChanged(old Config) []string {
	var changed []string
	note := func(field string, differs bool) {
		if differs {
			changed = append(changed, field)
		}
	}
	note("type", c.Type != old.Type)
	note("module", c.Module != old.Module)
	note("serial", c.Serial != old.Serial)
	note("token_label", c.TokenLabel != old.TokenLabel)
	note("slot", !equalSlot(c.Slot, old.Slot))
	return changed
}

// Redacted is what a read of the configuration may show: everything but the secret, of which it says only whether it
// is there.
func (c Config) Redacted() map[string]any {
	shown := map[string]any{
		"type":             c.Type,
		"module":           c.Module,
		"serial":           c.Serial,
		"token_label":      c.TokenLabel,
		"pin_set":          c.PIN != "",
		"pin_file":         c.PINFile,
		"parallel":         max(c.Parallel, 1),
		"decrypt_timeout":  int64(c.DecryptTimeout / time.Second),
		"generate_timeout": int64(c.GenerateTimeout / time.Second),
	}
	if c.Slot != nil {
		shown["slot"] = *c.Slot
	}
	return shown
}

// Types lists the kinds of device.
func Types() []string { return []string{TypePKCS11} }

func equalSlot(a, b *uint) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

func complain(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrConfig}, args...)...)
}
