package main

import (
	"fmt"
	"path/filepath"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// custodyDir is the folder of the state directory that holds what is begun, and keys, sealed, that no store has taken yet.
const custodyDir = "custody"

// custodian opens what does the work on clusters, the same one each time.
func (a *app) custodian() (*cluster.Custodian, error) {
	if a.custody != nil {
		return a.custody, nil
	}
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	keeper, err := a.keeper()
	if err != nil {
		return nil, err
	}
	keys, err := a.keyring()
	if err != nil {
		return nil, err
	}
	local, err := file.Open(filepath.Join(c.StateDir, custodyDir))
	if err != nil {
		return nil, fmt.Errorf("opening the folder of what custody has begun: %w", err)
	}
	a.onClose(local.Close)
	log, err := a.audit()
	if err != nil {
		return nil, err
	}
	a.custody = cluster.New(cluster.Config{
		Keeper: keeper, Keys: keys, Stores: appStores{a}, Local: local, Audit: log,
		Logger: a.logger(), UserAgent: "nitroseal/" + version, Critical: a.enterCritical,
	})
	a.onClose(a.custody.Close)
	return a.custody, nil
}

// enterCritical begins a window in which the process must not end: no signal ends it, and the daemon's own end waits as well.
func (a *app) enterCritical(what string) (leave func()) {
	leave = a.critical.enter(what)
	if a.hooks == nil {
		return leave
	}
	calm := a.hooks.Critical(what)
	return func() {
		calm()
		leave()
	}
}
