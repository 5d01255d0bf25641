package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"os"
	"slices"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/daemon"
)

// site is what the daemon watches: the named clusters of the configuration, all where none is named, with the devices and stores
// that the app opens. It stays open until the app is closed.
func (a *app) site(ctx context.Context, wanted []string) (*daemon.Site, error) {
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	clusters, err := a.clusters(wanted)
	if err != nil {
		return nil, err
	}
	custodian, err := a.custodian()
	if err != nil {
		return nil, err
	}
	log, err := a.audit()
	if err != nil {
		return nil, err
	}
	site := &daemon.Site{
		Custodian: daemon.Custody(custodian, clusters), Clusters: daemon.Watched(clusters), Audit: log,
		Listen:   daemon.Listen{Address: c.Run.Listen, Plain: c.Run.PlainHTTP},
		Interval: c.Run.Interval,
	}
	if site.Listen.Certificate, err = runCertificate(c); err != nil {
		return nil, err
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
		site.Devices = append(site.Devices, handle)
	}
	if site.Stores, err = a.watchedStores(ctx, c, clusters); err != nil {
		return nil, err
	}
	return site, nil
}

// watchedStores are the stores of clusters. Those on an HSM are not asked whether they answer, and opened when they are needed:
// the HSM may be away, and is watched itself.
func (a *app) watchedStores(ctx context.Context, c *config.Config, clusters []*cluster.Cluster) ([]daemon.Store, error) {
	var watched []daemon.Store
	for i := range c.Stores {
		name := c.Stores[i].Name
		used := slices.ContainsFunc(clusters, func(c *cluster.Cluster) bool { return c.Store == name })
		if !used {
			continue
		}
		if c.Stores[i].Type == config.StoreObject {
			watched = append(watched, daemon.Store{Name: name})
			continue
		}
		opened, err := a.store(ctx, name)
		if err != nil {
			return nil, err
		}
		watched = append(watched, daemon.Store{Name: name, Store: opened, Probe: true})
	}
	return watched, nil
}

// runCertificate is what the daemon answers with; nil for plain HTTP.
func runCertificate(c *config.Config) (*tls.Certificate, error) {
	if !c.Run.Secure() {
		return nil, nil //nolint:nilnil // documented
	}
	chain, err := os.ReadFile(c.Run.TLSCertFile)
	if err != nil {
		return nil, fmt.Errorf("%w: run: reading tls_cert_file %s: %w", config.ErrInvalid, c.Run.TLSCertFile, pathless(err))
	}
	key, err := c.SecretFiles().ReadPEM(c.Run.TLSKeyFile)
	if err != nil {
		return nil, fmt.Errorf("run: tls_key_file: %w", err)
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%w: run: tls_cert_file and tls_key_file: %w", config.ErrInvalid, err)
	}
	return &pair, nil
}
