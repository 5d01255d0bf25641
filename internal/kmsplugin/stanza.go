package kmsplugin

import (
	"encoding/hex"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// stanza is what a seal's settings say. Its fields were found to be right in themselves; no file was read yet.
type stanza struct {
	// key is the name of the wrapping key, and record the file that holds its key record, whose SHA-256 the operator
	// confirmed.
	key, record, recordSHA256 string
	// These are an operator's word about a key that opens on one HSM only.
	acceptSingleHSM, backupConfirmed bool

	// config is a nitroseal.hcl whose devices are used. Where it is empty, the stanza describes one device itself.
	config string
	// name is the device's, as the key record has it; empty for the only one there.
	name   string
	device device.Config
	// caCert is the file of the device's CACert.
	caCert string
}

// setting is one setting of a stanza.
type setting struct {
	name string
	read func(*stanza, string) error
	// ofDevice marks what describes the device, and so does not go together with `config`.
	ofDevice bool
}

// settings are all that a stanza may have, in the order in which they are documented.
var settings = []setting{
	{"key", text(func(s *stanza) *string { return &s.key }), false},
	{"key_record_file", path(func(s *stanza) *string { return &s.record }), false},
	{"key_record_sha256", func(s *stanza, value string) error {
		if sum, err := hex.DecodeString(value); err != nil || len(sum) != 32 {
			return fmt.Errorf("is not a SHA-256 in hexadecimal; \"nitroseal key backup\" prints the right one")
		}
		s.recordSHA256 = value
		return nil
	}, false},
	{"accept_single_hsm", truth(func(s *stanza) *bool { return &s.acceptSingleHSM }), false},
	{"backup_confirmed", truth(func(s *stanza) *bool { return &s.backupConfirmed }), false},
	{"config", path(func(s *stanza) *string { return &s.config }), false},

	{"device", text(func(s *stanza) *string { return &s.name }), true},
	{"type", text(func(s *stanza) *string { return &s.device.Type }), true},
	// PKCS#11
	{"module", path(func(s *stanza) *string { return &s.device.Module }), true},
	{"serial", text(func(s *stanza) *string { return &s.device.Serial }), true},
	{"token_label", text(func(s *stanza) *string { return &s.device.TokenLabel }), true},
	{"slot", func(s *stanza, value string) error {
		number, err := strconv.ParseUint(value, 0, 32)
		if err != nil {
			return fmt.Errorf("is not the number of a slot; write 1, or 0x1")
		}
		slot := uint(number)
		s.device.Slot = &slot
		return nil
	}, true},
	{"pin_file", text(func(s *stanza) *string { return &s.device.PINFile }), true},
	{"parallel", func(s *stanza, value string) error {
		number, err := strconv.Atoi(value)
		if err != nil || number < 1 {
			return fmt.Errorf("is not a number of operations; write 1 for a card, 8 for SoftHSM")
		}
		s.device.Parallel = number
		return nil
	}, true},
	{"decrypt_timeout", duration(func(s *stanza) *time.Duration { return &s.device.DecryptTimeout }), true},
	// NetHSM
	{"urls", list(func(s *stanza) *[]string { return &s.device.URLs }), true},
	{"username", text(func(s *stanza) *string { return &s.device.Username }), true},
	{"password_file", text(func(s *stanza) *string { return &s.device.PasswordFile }), true},
	{"unlock_passphrase_file", text(func(s *stanza) *string { return &s.device.UnlockPassphraseFile }), true},
	{"ca_cert_file", path(func(s *stanza) *string { return &s.caCert }), true},
	{"tls_pins", list(func(s *stanza) *[]string { return &s.device.TLSPins }), true},
	{"tls_server_name", text(func(s *stanza) *string { return &s.device.TLSServerName }), true},
	{"tls_insecure", truth(func(s *stanza) *bool { return &s.device.Insecure }), true},
	{"request_timeout", duration(func(s *stanza) *time.Duration { return &s.device.RequestTimeout }), true},
}

// secret are settings that would hold a secret, each with the one that names a file instead.
var secret = map[string]string{
	"pin": "pin_file", "password": "password_file", "unlock_passphrase": "unlock_passphrase_file", "passphrase": "unlock_passphrase_file",
}

// maxSetting is the longest value of a setting in bytes. The longest that has a meaning is a list of URLs.
const maxSetting = 16 << 10

// parseStanza reads the settings of a stanza strictly: a mistyped name must not mean a default. An error lists all that is
// wrong; it never quotes the value of a setting that is not known, which may be a secret.
func parseStanza(given map[string]string) (stanza, error) {
	var s stanza
	var wrong complaints
	for _, name := range slices.Sorted(maps.Keys(given)) {
		value := given[name]
		i := slices.IndexFunc(settings, func(known setting) bool { return known.name == name })
		file, isSecret := secret[name]
		switch {
		case isSecret:
			wrong.add("%q would hold a secret in OpenBao's configuration; put it into a file and name that in %q", name, file)
		case i < 0:
			wrong.add("%q is no setting of this seal; it has %s", shorten(name), strings.Join(names(), ", "))
		case len(value) > maxSetting:
			wrong.add("%q is longer than %d bytes", name, maxSetting)
		case strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }):
			wrong.add("%q holds a control character", name)
		case strings.TrimSpace(value) == "":
			wrong.add("%q is empty; leave it out", name)
		default:
			if err := settings[i].read(&s, value); err != nil {
				wrong.add("%q %w", name, err)
			}
		}
	}
	if err := wrong.err(); err != nil {
		return stanza{}, err
	}
	if err := s.check(given); err != nil {
		return stanza{}, err
	}
	return s, nil
}

// check finds what is missing and what does not go together.
func (s *stanza) check(given map[string]string) error {
	var wrong complaints
	for _, name := range []string{"key", "key_record_file", "key_record_sha256"} {
		if given[name] == "" {
			wrong.add("%q is missing; \"nitroseal key backup KEY --out FILE\" writes the key record and prints its SHA-256", name)
		}
	}
	if s.config != "" {
		for _, known := range settings {
			if _, both := given[known.name]; both && known.ofDevice {
				wrong.add("%q describes a device, and %q names a file that describes them; keep one of the two", known.name, "config")
			}
		}
	} else if s.device.Type == "" {
		wrong.add("%q is missing; write \"pkcs11\" or \"nethsm\" and describe the device, or name a nitroseal.hcl in %q", "type", "config")
	}
	if s.caCert != "" && s.device.Type != device.TypeNetHSM && s.config == "" { // device.Config judges the rest
		wrong.add("%q belongs to devices of type %q; leave it out", "ca_cert_file", device.TypeNetHSM)
	}
	return wrong.err()
}

// complaints are all that is wrong with a stanza.
type complaints []error

func (c *complaints) add(format string, args ...any) { *c = append(*c, fmt.Errorf(format, args...)) }

// err is the complaints as one error, nil for none.
func (c complaints) err() error {
	if len(c) == 0 {
		return nil
	}
	texts := make([]string, len(c))
	for i, one := range c {
		texts[i] = one.Error()
	}
	return fmt.Errorf("%w: %s", errStanza, strings.Join(texts, "; "))
}

func names() []string {
	all := make([]string, len(settings))
	for i, known := range settings {
		all[i] = known.name
	}
	return all
}

// shorten keeps a long name out of a log.
func shorten(name string) string {
	const enough = 60
	if len(name) <= enough {
		return name
	}
	return name[:enough] + "…"
}

func text(field func(*stanza) *string) func(*stanza, string) error {
	return func(s *stanza, value string) error {
		*field(s) = strings.TrimSpace(value)
		return nil
	}
}

// path is a file, or a file of a credential by its prefix: OpenBao's working directory may be any.
func path(field func(*stanza) *string) func(*stanza, string) error {
	return func(s *stanza, value string) error {
		if value = strings.TrimSpace(value); !filepath.IsAbs(value) {
			return fmt.Errorf("is not an absolute path")
		}
		*field(s) = filepath.Clean(value)
		return nil
	}
}

// truth is true or false. OpenBao makes 1 and 0 of those that stand without quotation marks.
func truth(field func(*stanza) *bool) func(*stanza, string) error {
	return func(s *stanza, value string) error {
		switch strings.TrimSpace(value) {
		case "true", "1":
			*field(s) = true
		case "false", "0":
			*field(s) = false
		default:
			return fmt.Errorf("is neither \"true\" nor \"false\"")
		}
		return nil
	}
}

func duration(field func(*stanza) *time.Duration) func(*stanza, string) error {
	return func(s *stanza, value string) error {
		length, err := time.ParseDuration(strings.TrimSpace(value))
		if err != nil || length <= 0 {
			return fmt.Errorf("is not a duration; write 30s, for example")
		}
		*field(s) = length
		return nil
	}
}

func list(field func(*stanza) *[]string) func(*stanza, string) error {
	return func(s *stanza, value string) error {
		var all []string
		for one := range strings.SplitSeq(value, ",") {
			one = strings.TrimSpace(one)
			if one == "" {
				return fmt.Errorf("has an empty place between two commas")
			}
			all = append(all, one)
		}
		*field(s) = all
		return nil
	}
}
