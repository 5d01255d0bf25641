package main

import (
	"slices"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/daemon"
)

func TestTheDaemonKnowsEveryStoreOfItsClustersAndAsksNoHSM(t *testing.T) {
	a := newApp(nil, nil, nil)
	a.configuration = &config.Config{Stores: []config.Store{
		{Name: "stick", Type: config.StoreObject, Device: "one"},
		{Name: "files", Type: config.StoreFile, Dir: t.TempDir()},
		{Name: "unused", Type: config.StoreFile, Dir: t.TempDir()},
	}}
	stores, err := a.watchedStores(t.Context(), a.configuration, []*cluster.Cluster{{Name: "a", Store: "stick"}, {Name: "b", Store: "files"}})
	if err != nil {
		t.Fatal(err)
	}
	opened := slices.IndexFunc(stores, func(s daemon.Store) bool { return s.Store != nil })
	if len(stores) != 2 || stores[0].Name != "stick" || stores[0].Probe || opened != 1 || stores[1].Name != "files" || !stores[1].Probe {
		t.Errorf("watched are %+v", stores)
	}
}
