package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// owner names the command to the providers, which are fair between owners.
const owner = "nitroseal"

// advice is what an operator types where a token refused a PIN.
var advice = pkcs11.Advice{
	Give:    "put the right one where the configuration has it, and log in once at your word (nitroseal device pin try NAME)",
	Unbar:   "lift the bar (nitroseal device pin unbar NAME)",
	LastTry: "put the right one where the configuration has it, and log in once with \"nitroseal device pin try NAME --last-try\"",
	Force:   "--last-try",
}

// deviceSet opens the devices of the configuration, each when it is first needed.
type deviceSet struct {
	app      *app
	registry *device.Registry

	mu      sync.Mutex
	handles map[string]*device.Handle
}

var _ keyring.Devices = (*deviceSet)(nil)

// devices returns the set, the same one each time.
func (a *app) devices() (*deviceSet, error) {
	if a.set != nil {
		return a.set, nil
	}
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	tokens := pkcs11.New(pkcs11.Options{
		Modules: c.PKCS11.Modules, StateDir: c.StateDir, Env: c.PKCS11.Env,
		HostPath: c.PKCS11.ModuleHost, HostSHA256: c.PKCS11.ModuleHostSHA256, Logger: a.logger(),
		Advice: advice,
	})
	a.onClose(tokens.Close)
	netHSMs := nethsm.NewManager(a.logger())
	a.onClose(netHSMs.Close)
	options := device.Options{
		Openers: map[string]device.Opener{device.TypePKCS11: device.PKCS11(tokens), device.TypeNetHSM: device.NetHSM(netHSMs)},
		Secrets: c.SecretFiles(),
		Logger:  a.logger(), Observer: a.observer,
	}
	a.set = &deviceSet{app: a, handles: map[string]*device.Handle{}, registry: device.New(options)}
	return a.set, nil
}

// handle returns the handle of a device; the HSM is not touched yet.
func (s *deviceSet) handle(name string) (*device.Handle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if opened := s.handles[name]; opened != nil {
		return opened, nil
	}
	configured, err := s.app.deviceConfig(name)
	if err != nil {
		return nil, err
	}
	complete, err := configured.WithEnvironment(os.LookupEnv)
	if err != nil {
		return nil, err
	}
	if configured.Type == device.TypePKCS11 { // nobody logs in without the PIN ledger
		if err := s.app.checkStateDir(); err != nil {
			return nil, err
		}
	}
	opened, err := s.registry.Open(owner, name, complete)
	if err != nil {
		return nil, err
	}
	s.handles[name] = opened
	s.app.onClose(opened.Close)
	return opened, nil
}

// Device implements [keyring.Devices].
func (s *deviceSet) Device(ctx context.Context, name string) (hsm.Device, error) {
	opened, err := s.handle(name)
	if errors.Is(err, errNotFound) {
		return nil, fmt.Errorf("%w: %w", keyring.ErrNoDevice, err)
	}
	if err != nil {
		return nil, err
	}
	return opened.Device(ctx)
}

// device opens a device by its name.
func (a *app) device(ctx context.Context, name string) (hsm.Device, error) {
	set, err := a.devices()
	if err != nil {
		return nil, err
	}
	return set.Device(ctx, name)
}

// checkSecrets reads the secrets of all devices, of etcd and of Vault, and forgets them. What etcd's client finds wrong with
// its part of the configuration comes out as well, and what custody finds wrong with clusters; nothing is connected.
func (a *app) checkSecrets(c *config.Config) error {
	set, err := a.devices()
	if err != nil {
		return err
	}
	var complaints []config.Complaint
	complain := func(err error) {
		switch {
		case err == nil:
		case errors.Is(err, device.ErrNoCredentials): // a person looks at what a service will have
			a.say("nitroseal: warning: not looked at: %v", err)
		default:
			text := strings.TrimPrefix(err.Error(), config.ErrInvalid.Error()+": ") // the whole begins with it
			complaints = append(complaints, config.Complaint{File: c.Path, Text: text})
		}
	}
	for _, configured := range c.Devices {
		complete, err := configured.WithEnvironment(os.LookupEnv)
		if err != nil {
			complain(err)
		} else if err := set.registry.Check(complete); err != nil {
			complain(fmt.Errorf("device %q: %w", configured.Name, err))
		}
	}
	for _, configured := range c.Stores {
		if configured.Type == config.StoreEtcd {
			_, err := a.etcdStore(c, configured)
			complain(err)
		}
	}
	for i := range c.Clusters {
		_, err := newCluster(c.Clusters[i])
		complain(err)
	}
	_, err = runCertificate(c)
	complain(err)
	for _, err := range sealListenerProblems(c) {
		complain(err)
	}
	token, err := vaultToken(c)
	clear(token)
	complain(err)
	if complaints == nil {
		return nil
	}
	return &config.Error{Complaints: complaints}
}

func deviceNames(c *config.Config) []string {
	all := make([]string, len(c.Devices))
	for i := range c.Devices {
		all[i] = c.Devices[i].Name
	}
	slices.Sort(all)
	return all
}
