package config

import (
	"slices"
	"time"
)

// maxStoreTimeout is the longest time that one operation of a store may take.
const maxStoreTimeout = time.Minute

// objectStoreAttributes are those of a store of type "object".
type objectStoreAttributes struct {
	Device      string `hcl:"device"`
	Application string `hcl:"application,optional"`
}

// fileStoreAttributes are those of a store of type "file".
type fileStoreAttributes struct {
	Dir string `hcl:"dir"`
}

// store reads a block `store "NAME" { … }`.
func (b *block) store() Store {
	s := Store{Name: b.label}
	switch s.Type = b.kind(StoreEtcd, StoreObject, StoreFile); s.Type {
	case StoreEtcd:
		b.etcd(&s)
	case StoreObject:
		var given objectStoreAttributes
		b.decode(&given)
		s.Device, s.Application = given.Device, given.Application
	case StoreFile:
		var given fileStoreAttributes
		b.decode(&given)
		if b.good && given.Dir == "" {
			b.wrong("dir", "dir is empty; name the folder in which the envelopes lie")
		}
		s.Dir = b.resolve(given.Dir)
	}
	return s
}

// etcdStoreAttributes are those of a store of type "etcd".
type etcdStoreAttributes struct {
	Endpoints      []string `hcl:"endpoints"`
	Prefix         string   `hcl:"prefix"`
	Username       string   `hcl:"username,optional"`
	PasswordFile   string   `hcl:"password_file,optional"`
	PasswordEnv    string   `hcl:"password_env,optional"`
	CACertFile     string   `hcl:"ca_cert_file,optional"`
	ClientCertFile string   `hcl:"client_cert_file,optional"`
	ClientKeyFile  string   `hcl:"client_key_file,optional"`
	ServerName     string   `hcl:"server_name,optional"`
	RequestTimeout string   `hcl:"request_timeout,optional"`
	Insecure       bool     `hcl:"insecure,optional"`
}

func (b *block) etcd(s *Store) {
	var given etcdStoreAttributes
	b.decode(&given)
	b.secret("password", given.PasswordFile, given.PasswordEnv)
	password := given.PasswordFile != "" || given.PasswordEnv != ""
	switch {
	case !b.good:
	case len(given.Endpoints) == 0 || slices.Contains(given.Endpoints, ""):
		b.wrong("endpoints", `endpoints lists the URLs of etcd's members, "https://host:2379"`)
	case password != (given.Username != ""):
		b.wrong("username", "username and its password belong together; give both (password_file or password_env) or neither")
	case (given.ClientCertFile == "") != (given.ClientKeyFile == ""):
		b.wrong("client_cert_file", "client_cert_file and client_key_file belong together; give both or neither")
	}
	s.Endpoints, s.Prefix, s.ServerName, s.Insecure = given.Endpoints, given.Prefix, given.ServerName, given.Insecure
	s.Username, s.PasswordFile, s.PasswordEnv = given.Username, b.secretFile("password_file", given.PasswordFile), given.PasswordEnv
	s.CACert = b.pem("ca_cert_file", given.CACertFile)
	s.ClientCert = b.pem("client_cert_file", given.ClientCertFile)
	s.ClientKeyFile = b.secretFile("client_key_file", given.ClientKeyFile)
	if s.RequestTimeout = b.duration("request_timeout", given.RequestTimeout); s.RequestTimeout > maxStoreTimeout {
		b.wrong("request_timeout", "request_timeout is longer than %v", maxStoreTimeout)
	}
}
