// Package config reads nitroseal.hcl, the operator's configuration: which HSMs there are and how to log in to them,
// where envelopes lie, which Vault to ask, and which clusters' unseal material is kept.
//
// The file is HCL, and read strictly. Whatever is not known is refused with file, line, column and the closest name
// that is; all complaints come at once, so that a file is mended in one go. Nothing is evaluated: there are no variables
// and no functions.
//
// The file holds no secret. A PIN, a password and a passphrase each come from a file or from an environment variable
// that the configuration names (pin_file, pin_env); an attribute that would hold the secret itself is refused. [Load]
// reads no secret either: who opens a device does, through package device, by its one rule for secret files. A file may be
// a credential that systemd hands over, "credential:NAME"; whether it is there is known to who reads it.
//
// Paths are relative to the folder of the file. It names the PKCS#11 modules that are loaded into a process of ours, so
// it must not be writable by others than its owner.
package config

import (
	"time"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// DefaultPath is where the configuration lies unless the operator says otherwise.
const DefaultPath = "/etc/nitroseal/nitroseal.hcl"

// The kinds of store.
const (
	StoreEtcd   = "etcd"
	StoreObject = "object"
	StoreFile   = "file"
)

// Config is a configuration that was found to be right in itself. All paths in it are absolute.
type Config struct {
	// Path is the file that it was read from.
	Path string
	// StateDir holds what the command keeps: wrapping keys, and the PIN ledger that all programs of ours on a machine
	// share.
	StateDir string
	// SecretsDir is the folder under which secret files must lie; "/" where the configuration names none.
	SecretsDir string
	PKCS11     PKCS11
	Devices    []Device  // in the order of the file, names unique
	Stores     []Store   // in the order of the file, names unique
	Vault      *Vault    // nil where there is no such block
	Clusters   []Cluster // in the order of the file, names unique
	Run        Run
	Serve      *Serve  // nil where there is no such block
	Audits     []Audit // in the order of the file; none where it names none
}

// PKCS11 says what may be loaded into a module host.
type PKCS11 struct {
	// Modules are the vendor modules that devices may use.
	Modules []string
	// Env names environment variables that modules get.
	Env []string
	// ModuleHost is the program that loads the modules where this one was built without cgo, ModuleHostSHA256 its
	// SHA-256 in hexadecimal; both or neither.
	ModuleHost, ModuleHostSHA256 string
}

// Device is one HSM.
type Device struct {
	Name string
	// Config lacks secrets that come from the environment, see [Device.WithEnvironment].
	device.Config
	// These name environment variables that hold the secret; empty where a file does, or nothing.
	PINEnv, PasswordEnv, AdminPasswordEnv, UnlockPassphraseEnv string
}

// Store is a place where envelopes lie. Which fields are set depends on the type.
type Store struct {
	Name, Type string

	// StoreEtcd. The certificates are PEM, read from the files that the configuration names.
	Endpoints                 []string
	Prefix                    string
	Username                  string
	PasswordFile, PasswordEnv string
	CACert, ClientCert        []byte
	ClientKeyFile             string
	ServerName                string
	RequestTimeout            time.Duration
	Insecure                  bool
	// StoreObject.
	Device, Application string
	// StoreFile.
	Dir string
}

// Vault is the Vault or OpenBao that runs the plugin.
type Vault struct {
	Address             string
	CACert              []byte // PEM; empty: the system's
	TLSServerName       string
	TokenFile, TokenEnv string // at most one is set
	Mount               string // default "nitrokey"
	PluginName          string // default "vault-plugin-secrets-nitrokey"
	PluginFile          string // on this machine; may be empty
}

// Device returns the device of that name; ok is false where there is none.
func (c *Config) Device(name string) (found Device, ok bool) {
	for _, d := range c.Devices {
		if d.Name == name {
			return d, true
		}
	}
	return Device{}, false
}

// Store returns the store of that name; ok is false where there is none.
func (c *Config) Store(name string) (found Store, ok bool) {
	for _, s := range c.Stores {
		if s.Name == name {
			return s, true
		}
	}
	return Store{}, false
}

// SecretFiles is where the secrets that the file names may lie.
func (c *Config) SecretFiles() device.SecretFiles {
	return device.SecretFiles{Dir: c.SecretsDir, Credentials: true}
}

// Cluster returns the cluster of that name; ok is false where there is none.
func (c *Config) Cluster(name string) (found Cluster, ok bool) {
	for _, cluster := range c.Clusters {
		if cluster.Name == name {
			return cluster, true
		}
	}
	return Cluster{}, false
}
