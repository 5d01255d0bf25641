package device

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Secrets are what a device is opened with; those that its type does not have, or its configuration does not give, are
// empty.
type Secrets struct {
	PIN              []byte // of a PKCS#11 token
	Password         []byte // of a NetHSM's Operator
	AdminPassword    []byte // of its Administrator
	UnlockPassphrase []byte
}

// String tells nothing, so that no log or error shows a secret by accident.
func (Secrets) String() string { return "secrets" }

// Wipe overwrites the secrets.
func (s Secrets) Wipe() {
	for _, secret := range s.all() {
		clear(*secret)
	}
}

// kinds is how many secrets there are.
const kinds = 4

// all lists the secrets in the order of [Config.SecretFields].
func (s *Secrets) all() [kinds]*[]byte {
	return [kinds]*[]byte{&s.PIN, &s.Password, &s.AdminPassword, &s.UnlockPassphrase}
}

// SecretField is one secret of a configuration: the value itself, or a file under the secrets directory that holds it.
type SecretField struct {
	Name  string  // the name of the field: "pin"
	Value *string // never both
	File  *string

	kind string // the type of device that it belongs to
}

// FileName is the name of the field that names the file.
func (f SecretField) FileName() string { return f.Name + "_file" }

// SecretFields lists the secrets that a configuration may hold, for reading and changing them.
func (c *Config) SecretFields() [kinds]SecretField {
	return [kinds]SecretField{
		{"pin", &c.PIN, &c.PINFile, TypePKCS11},
		{"password", &c.Password, &c.PasswordFile, TypeNetHSM},
		{"admin_password", &c.AdminPassword, &c.AdminPasswordFile, TypeNetHSM},
		{"unlock_passphrase", &c.UnlockPassphrase, &c.UnlockPassphraseFile, TypeNetHSM},
	}
}

// readAll returns the secrets of a configuration, all or none. The caller wipes them.
func (s SecretFiles) readAll(config Config) (Secrets, error) {
	var read Secrets
	for i, secret := range read.all() {
		var err error
		if *secret, err = s.read(config.SecretFields()[i]); err != nil {
			read.Wipe()
			return Secrets{}, err
		}
	}
	return read, nil
}

// read returns one secret, nil where it is not configured. The caller wipes it.
func (s SecretFiles) read(field SecretField) ([]byte, error) {
	switch {
	case *field.File != "":
		return s.Read(*field.File)
	case *field.Value != "":
		return []byte(*field.Value), nil
	default:
		return nil, nil
	}
}

// digest tells secrets apart without keeping them.
func (s Secrets) digest(key []byte) [sha256.Size]byte {
	mac := hmac.New(sha256.New, key)
	for _, secret := range s.all() {
		mac.Write(binary.BigEndian.AppendUint64(nil, uint64(len(*secret))))
		mac.Write(*secret)
	}
	return [sha256.Size]byte(mac.Sum(nil))
}

// fileState tells whether a file was changed or replaced; the zero value is a file that is not there.
type fileState struct {
	modified time.Time
	size     int64
	info     fs.FileInfo // of what the links lead to: Kubernetes swaps a link to replace a secret
}

// fileStates are those of a configuration's secrets.
type fileStates [kinds]fileState

// same tells whether no file was changed or replaced between two looks.
func (s *fileStates) same(other *fileStates) bool {
	for i := range s {
		a, b := &s[i], &other[i]
		if a.size != b.size || !a.modified.Equal(b.modified) || (a.info == nil) != (b.info == nil) || a.info != nil && !os.SameFile(a.info, b.info) {
			return false
		}
	}
	return true
}

// states looks at the files of a configuration without reading them. Every operation does, so it is one system call for each.
func (s SecretFiles) states(config Config) (states fileStates) {
	for i, secret := range config.SecretFields() {
		if *secret.File != "" {
			states[i] = s.state(*secret.File)
		}
	}
	return states
}

func (s SecretFiles) state(path string) fileState {
	s, path, err := s.place(path)
	if err != nil {
		return fileState{}
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(s.Dir, path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return fileState{}
	}
	return fileState{modified: info.ModTime(), size: info.Size(), info: info}
}
