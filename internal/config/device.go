package config

import (
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// device reads a block `device "NAME" { … }`.
func (b *block) device(allowed PKCS11) Device {
	d := Device{Name: b.label}
	switch d.Type = b.kind(device.TypePKCS11, device.TypeNetHSM); d.Type {
	case device.TypePKCS11:
		b.pkcs11Device(&d, allowed)
	case device.TypeNetHSM:
		b.nethsmDevice(&d)
	default:
		return d
	}
	b.validate(d)
	return d
}

// pkcs11DeviceAttributes are those of a device of type "pkcs11".
type pkcs11DeviceAttributes struct {
	Module          string `hcl:"module,optional"`
	Serial          string `hcl:"serial,optional"`
	TokenLabel      string `hcl:"token_label,optional"`
	Slot            *uint  `hcl:"slot,optional"`
	PINFile         string `hcl:"pin_file,optional"`
	PINEnv          string `hcl:"pin_env,optional"`
	Parallel        int    `hcl:"parallel,optional"`
	DecryptTimeout  string `hcl:"decrypt_timeout,optional"`
	GenerateTimeout string `hcl:"generate_timeout,optional"`
}

func (b *block) pkcs11Device(d *Device, allowed PKCS11) {
	var given pkcs11DeviceAttributes
	b.decode(&given)
	b.secret("pin", given.PINFile, given.PINEnv)
	if b.good && given.PINFile == "" && given.PINEnv == "" {
		b.wrong("pin_file", "no PIN is given; set pin_file to the path of a file that holds it, or pin_env to the name of an environment "+
			"variable that does")
	}
	if given.Module == "" && len(allowed.Modules) == 1 {
		given.Module = allowed.Modules[0]
	}
	d.Module, d.Serial, d.TokenLabel, d.Slot = given.Module, given.Serial, given.TokenLabel, given.Slot
	d.PINFile, d.PINEnv = b.secretFile("pin_file", given.PINFile), given.PINEnv
	d.Parallel = given.Parallel
	d.DecryptTimeout = b.duration("decrypt_timeout", given.DecryptTimeout)
	d.GenerateTimeout = b.duration("generate_timeout", given.GenerateTimeout)
}

// nethsmDeviceAttributes are those of a device of type "nethsm".
type nethsmDeviceAttributes struct {
	URLs                 []string `hcl:"urls"`
	Username             string   `hcl:"username"`
	PasswordFile         string   `hcl:"password_file,optional"`
	PasswordEnv          string   `hcl:"password_env,optional"`
	AdminUsername        string   `hcl:"admin_username,optional"`
	AdminPasswordFile    string   `hcl:"admin_password_file,optional"`
	AdminPasswordEnv     string   `hcl:"admin_password_env,optional"`
	UnlockPassphraseFile string   `hcl:"unlock_passphrase_file,optional"`
	UnlockPassphraseEnv  string   `hcl:"unlock_passphrase_env,optional"`
	CACertFile           string   `hcl:"ca_cert_file,optional"`
	TLSPins              []string `hcl:"tls_pins,optional"`
	TLSServerName        string   `hcl:"tls_server_name,optional"`
	TLSInsecure          bool     `hcl:"tls_insecure,optional"`
	RequestTimeout       string   `hcl:"request_timeout,optional"`
	ObjectStore          bool     `hcl:"object_store,optional"`
	KeyTags              []string `hcl:"key_tags,optional"`
}

func (b *block) nethsmDevice(d *Device) {
	var given nethsmDeviceAttributes
	b.decode(&given)
	b.secret("password", given.PasswordFile, given.PasswordEnv)
	b.secret("admin_password", given.AdminPasswordFile, given.AdminPasswordEnv)
	b.secret("unlock_passphrase", given.UnlockPassphraseFile, given.UnlockPassphraseEnv)
	if b.good && given.PasswordFile == "" && given.PasswordEnv == "" {
		b.wrong("username", "no password is given; set password_file to the path of a file that holds it, or password_env to the name of an "+
			"environment variable that does")
	}
	adminPassword := given.AdminPasswordFile != "" || given.AdminPasswordEnv != ""
	if b.good && adminPassword != (given.AdminUsername != "") {
		b.wrong("admin_username", "admin_username and its password belong together; give both (admin_password_file or admin_password_env) or neither")
	}
	d.URLs, d.Username, d.AdminUsername = given.URLs, given.Username, given.AdminUsername
	d.PasswordFile, d.PasswordEnv = b.secretFile("password_file", given.PasswordFile), given.PasswordEnv
	d.AdminPasswordFile, d.AdminPasswordEnv = b.secretFile("admin_password_file", given.AdminPasswordFile), given.AdminPasswordEnv
	d.UnlockPassphraseFile, d.UnlockPassphraseEnv = b.secretFile("unlock_passphrase_file", given.UnlockPassphraseFile), given.UnlockPassphraseEnv
	d.CACert = string(b.pem("ca_cert_file", given.CACertFile))
	d.TLSPins, d.TLSServerName, d.Insecure = given.TLSPins, given.TLSServerName, given.TLSInsecure
	d.RequestTimeout = b.duration("request_timeout", given.RequestTimeout)
	d.ObjectStore, d.KeyTags = given.ObjectStore, given.KeyTags
}

// validate lets package device judge what is right in itself. Secrets that will come from the environment are there for
// it, since whether they are set is not a matter of the file.
func (b *block) validate(d Device) {
	if !b.good {
		return
	}
	complete, err := d.WithEnvironment(func(string) (string, bool) { return "set", true })
	if err == nil {
		err = complete.Validate()
	}
	if err != nil {
		b.refuse(b.at, "%s: %s", b.what, strings.TrimPrefix(err.Error(), device.ErrConfig.Error()+": "))
	}
}

// WithEnvironment returns the device's configuration with the secrets that come from the environment, as lookup (which is
// [os.LookupEnv]) finds them. A variable that is not set, or that holds what
// cannot be meant, by the rule of secret files, is an error that wraps [device.ErrConfig].
func (d Device) WithEnvironment(lookup func(string) (string, bool)) (device.Config, error) {
	complete := d.Config
	for _, from := range []struct {
		env  string
		into *string
	}{
		{d.PINEnv, &complete.PIN},
		{d.PasswordEnv, &complete.Password},
		{d.AdminPasswordEnv, &complete.AdminPassword},
		{d.UnlockPassphraseEnv, &complete.UnlockPassphrase},
	} {
		if from.env == "" {
			continue
		}
		value, set := lookup(from.env)
		if !set || value == "" {
			return device.Config{}, fmt.Errorf("%w: device %q: the environment variable %s is not set; it holds a secret of the device, and "+
				"nothing was sent to the HSM", device.ErrConfig, d.Name, from.env)
		}
		secret, trouble := device.CutSecret([]byte(value))
		if trouble != "" {
			return device.Config{}, fmt.Errorf("%w: device %q: the secret in the environment variable %s %s; nothing was sent to the HSM",
				device.ErrConfig, d.Name, from.env, trouble)
		}
		*from.into = string(secret)
	}
	return complete, nil
}
