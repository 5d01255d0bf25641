package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/memory"
	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/server"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// sealSite is what the seal server serves: wrapping keys, tokens and devices of the configuration. It stays open until the app is
// closed.
func (a *app) sealSite(ctx context.Context) (*server.Site, error) {
	settings, err := a.serve()
	if err != nil {
		return nil, err
	}
	if settings.MLock {
		if err := memory.LockAll(); err != nil {
			return nil, fmt.Errorf("%w: serve: mlock = true: the memory cannot be locked: %w; allow it (LimitMEMLOCK=infinity in the unit, ulimit -l unlimited), "+
				"or leave mlock out: keys are locked all the same where the system lets a user lock a page", config.ErrInvalid, err)
		}
	}
	c := a.configuration
	keys, err := a.keyring() // which looks at the state directory
	if err != nil {
		return nil, err
	}
	tokens, err := a.tokens(ctx)
	if err != nil {
		return nil, err
	}
	log, err := a.audit()
	if err != nil {
		return nil, err
	}
	site := &server.Site{
		Keys: keys, Names: settings.Keys, Tokens: tokens, Records: filepath.Join(c.StateDir, keyringDir), Audit: log,
		Listen:  sealListener(c),
		Monitor: monitor.Listen{Address: settings.MetricsListen},
		Mount:   settings.Mount, MaxBody: int(settings.MaxBody), Limit: token.Limit{Rate: settings.Rate, Burst: settings.Burst},
	}
	if err := errors.Join(sealListenerProblems(c)...); err != nil {
		return nil, err
	}
	if info, err := os.Stat(settings.TLSKeyFile); err == nil && info.Mode().Perm()&0o004 != 0 {
		a.logger().Warn("every user of this machine can read the server's key; run chmod o-r on it", "tls_key_file", settings.TLSKeyFile)
	}
	set, err := a.devices()
	if err != nil {
		return nil, err
	}
	for i := range c.Devices {
		handle, err := set.handle(c.Devices[i].Name)
		if err != nil {
			return nil, err
		}
		site.Devices = append(site.Devices, server.Device{HSM: handle, Parallel: c.Devices[i].Parallel})
	}
	return site, nil
}

// sealListener is where seals ask. What it is made of is read anew each time, for certificates are renewed while it listens.
func sealListener(c *config.Config) server.Listen {
	settings := c.Serve
	listen := server.Listen{Address: settings.Listen, Plain: settings.PlainHTTP, MaxConnections: settings.MaxConnections}
	if settings.Secure() {
		listen.Certificate = func() (chain, key []byte, err error) { return sealCertificate(c) }
	}
	if settings.ClientCAFile != "" {
		listen.ClientCA = func() ([]byte, error) { return clientCA(c) }
		listen.Required = settings.ClientCertificates == config.CertificatesRequired
	}
	return listen
}

// sealCertificate reads the server's certificate and its key, which the caller wipes.
func sealCertificate(c *config.Config) (chain, key []byte, err error) {
	if chain, err = os.ReadFile(c.Serve.TLSCertFile); err != nil {
		return nil, nil, fmt.Errorf("%w: serve: reading tls_cert_file %s: %w", config.ErrInvalid, c.Serve.TLSCertFile, pathless(err))
	}
	if key, err = c.SecretFiles().ReadPEM(c.Serve.TLSKeyFile); err != nil {
		return nil, nil, fmt.Errorf("serve: tls_key_file: %w", err)
	}
	return chain, key, nil
}

func clientCA(c *config.Config) ([]byte, error) {
	authority, err := os.ReadFile(c.Serve.ClientCAFile)
	if err != nil {
		return nil, fmt.Errorf("%w: serve: reading client_ca_file %s: %w", config.ErrInvalid, c.Serve.ClientCAFile, pathless(err))
	}
	return authority, nil
}

// sealListenerProblems says what is wrong with the files of the listener.
func sealListenerProblems(c *config.Config) (problems []error) {
	if c.Serve == nil {
		return nil
	}
	if c.Serve.Secure() {
		chain, key, err := sealCertificate(c)
		if err == nil {
			if _, err = tls.X509KeyPair(chain, key); err != nil {
				err = fmt.Errorf("%w: serve: tls_cert_file and tls_key_file: %w", config.ErrInvalid, err)
			}
		}
		clear(key)
		problems = append(problems, err)
	}
	if c.Serve.ClientCAFile != "" {
		authority, err := clientCA(c)
		if err == nil && !x509.NewCertPool().AppendCertsFromPEM(authority) {
			err = fmt.Errorf("%w: serve: client_ca_file %s holds no certificate in PEM", config.ErrInvalid, c.Serve.ClientCAFile)
		}
		problems = append(problems, err)
	}
	return problems
}
