package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/file"
	"vault-plugin-secrets-nitrokey/internal/store/object"
)

// storeSet holds the stores that are open, each opened once however many goroutines ask for it.
type storeSet struct {
	mu   sync.Mutex
	open map[string]*openStore
}

// openStore is a store, or one that is to be opened: turn holds one token, and whoever took it may open it. A store on an HSM
// that does not answer keeps only those waiting who need it, and each no longer than its ctx.
type openStore struct {
	turn  chan struct{}
	store store.Store // nil until it was opened
}

func (s *storeSet) of(name string) *openStore {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = map[string]*openStore{}
	}
	if s.open[name] == nil {
		s.open[name] = &openStore{turn: make(chan struct{}, 1)}
	}
	return s.open[name]
}

// store returns a store of the configuration, and opens it where it is not yet.
func (a *app) store(ctx context.Context, name string) (store.Store, error) {
	entry := a.stores.of(name)
	select {
	case entry.turn <- struct{}{}:
		defer func() { <-entry.turn }()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for store %q to be opened: %w", name, ctx.Err())
	}
	if entry.store != nil {
		return entry.store, nil
	}
	opened, err := a.openStore(ctx, name)
	if err != nil {
		return nil, err
	}
	if a.hooks != nil {
		opened = a.hooks.Store(name, opened)
	}
	entry.store = opened
	return opened, nil
}

// appStores is the app as [custody.Stores].
type appStores struct{ app *app }

// Store implements [custody.Stores].
func (s appStores) Store(ctx context.Context, name string) (store.Store, error) {
	opened, err := s.app.store(ctx, name)
	if err != nil {
		return nil, err
	}
	return opened, nil
}

// openStore opens a store. Nothing is connected before it is used, but for one on an HSM, whose serial number names its lock.
func (a *app) openStore(ctx context.Context, name string) (store.Store, error) {
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	configured, ok := c.Store(name)
	if !ok {
		return nil, fmt.Errorf("store %q: %w %s", name, errNotFound, c.Path)
	}
	switch configured.Type {
	case config.StoreEtcd:
		return a.etcdStore(c, configured)
	case config.StoreObject:
		return a.objectStore(ctx, c, configured)
	case config.StoreFile:
		return a.fileStore(configured)
	default:
		return nil, fmt.Errorf("%w: store %q is of type %q, which this version does not know", config.ErrInvalid, name, configured.Type)
	}
}

func (a *app) etcdStore(c *config.Config, configured config.Store) (store.Store, error) {
	settings := etcd.Config{
		Endpoints: configured.Endpoints, Prefix: configured.Prefix, Username: configured.Username,
		CACert: configured.CACert, ClientCert: configured.ClientCert, ServerName: configured.ServerName,
		RequestTimeout: configured.RequestTimeout, Insecure: configured.Insecure,
	}
	secrets := c.SecretFiles()
	if configured.ClientKeyFile != "" {
		key, err := secrets.ReadPEM(configured.ClientKeyFile)
		if err != nil {
			return nil, fmt.Errorf("store %q: %w", configured.Name, err)
		}
		defer clear(key)
		settings.ClientKey = key
	}
	switch {
	case configured.PasswordEnv != "":
		if settings.Password = os.Getenv(configured.PasswordEnv); settings.Password == "" {
			return nil, fmt.Errorf("%w: store %q: the environment variable %s is not set", config.ErrInvalid, configured.Name, configured.PasswordEnv)
		}
	case configured.PasswordFile != "":
		password, err := secrets.Read(configured.PasswordFile)
		if err != nil {
			return nil, fmt.Errorf("store %q: %w", configured.Name, err)
		}
		defer clear(password)
		settings.Password = string(password)
	}
	opened, err := etcd.Open(settings)
	if err != nil {
		return nil, fmt.Errorf("%w: store %q: %w", config.ErrInvalid, configured.Name, err)
	}
	a.onClose(opened.Close)
	return opened, nil
}

// objectStore opens a store on an HSM. A token's lock is named by its serial number, a NetHSM's by its nodes.
func (a *app) objectStore(ctx context.Context, c *config.Config, configured config.Store) (store.Store, error) {
	on, err := a.deviceConfig(configured.Device)
	if err != nil {
		return nil, err
	}
	place := on.Place()
	if on.Type == device.TypePKCS11 {
		opened, err := a.device(ctx, configured.Device)
		if err != nil {
			return nil, fmt.Errorf("store %q: %w", configured.Name, err)
		}
		info, err := opened.Info(ctx)
		if err != nil {
			return nil, fmt.Errorf("store %q: %w", configured.Name, err)
		}
		place = info.Serial
	}
	return object.New(func(ctx context.Context) (hsm.ObjectStore, error) {
		opened, err := a.device(ctx, configured.Device)
		if err != nil {
			return nil, err
		}
		objects, ok := opened.(hsm.ObjectStore)
		if !ok {
			return nil, fmt.Errorf("device %q keeps no objects: %w", configured.Device, hsm.ErrUnsupported)
		}
		return objects, nil
	}, object.Config{Application: configured.Application, StateDir: c.StateDir, Serial: place})
}

func (a *app) fileStore(configured config.Store) (store.Store, error) {
	if _, err := os.Stat(configured.Dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: store %q: the folder %s is not there; make it, with mode 0700, or mend dir", config.ErrInvalid, configured.Name, configured.Dir)
	}
	opened, err := file.Open(configured.Dir)
	if err != nil {
		return nil, fmt.Errorf("store %q: %w", configured.Name, err)
	}
	return opened, nil
}
