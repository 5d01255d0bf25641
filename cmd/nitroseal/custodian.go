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
		Logger: a.logger(), UserAgent: "nitroseal/" + version, Critical: a.critical.enter,
	})
	a.onClose(a.custody.Close)
	return a.custody, nil
}
