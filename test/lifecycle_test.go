package test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// limit is how long a test waits for what should take a second or two: machines of continuous integration are slow.
const limit = vaulttest.Patience

// newSite is the usual start: device "hsm", wrapping key "prod", and what "prod" wrapped.
func newSite(t *testing.T, options vaulttest.SiteOptions) (site *vaulttest.Site, wrapped string) {
	t.Helper()
	site = vaulttest.StartSite(t, options)
	site.AddDevice(t, "hsm")
	site.AddKey(t, "prod", "hsm", "rsa-2048")
	wrapped = site.Wrap(t, "prod", secret)
	site.MustUnwrap(t, "prod", wrapped, secret)
	return site, wrapped
}

const secret = "the first of five shares"

// eventuallyUnwraps waits until Vault serves again.
func eventuallyUnwraps(t *testing.T, site *vaulttest.Site, wrapped string) {
	t.Helper()
	vaulttest.Eventually(t, limit, "unwrap to work again", func() error {
		return site.Unwraps(t, "prod", wrapped, secret)
	})
}

func TestWrappedValuesOutliveEveryKindOfRestart(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})

	t.Run("Vault restarted", func(t *testing.T) {
		site.Restart(t)
		eventuallyUnwraps(t, site, wrapped)
	})
	t.Run("Vault sealed and unsealed", func(t *testing.T) {
		before := site.Processes()
		site.Seal(t)
		vaulttest.WaitGone(t, limit, before...)
		site.Unseal(t)
		eventuallyUnwraps(t, site, wrapped)
	})
	t.Run("plugin reloaded", func(t *testing.T) {
		before := site.Processes()
		reload(t, site)
		eventuallyUnwraps(t, site, wrapped)
		vaulttest.WaitGone(t, limit, before...)
	})
	t.Run("plugin killed", func(t *testing.T) {
		before := site.Processes()
		for _, plugin := range site.Plugins() {
			plugin.Kill(t)
		}
		eventuallyUnwraps(t, site, wrapped)
		vaulttest.WaitGone(t, limit, before...)
	})
	t.Run("module host killed", func(t *testing.T) {
		hosts := site.Hosts()
		if len(hosts) != 1 {
			t.Fatalf("%d module hosts serve one module", len(hosts))
		}
		hosts[0].Kill(t)
		eventuallyUnwraps(t, site, wrapped) // the operation that finds it dead may fail, the next is served
	})
}

// A Vault that is killed cannot end its plugin. One that stayed would keep its module host logged in to the token, beside
// those of the next Vault.
func TestAKilledVaultLeavesNoProcessBehind(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	before := site.Processes()
	if len(before) < 2 {
		t.Fatalf("a plugin and a module host should run, not %v", before)
	}
	site.Kill(t)
	vaulttest.WaitGone(t, limit, before...)
	site.Resume(t)
	eventuallyUnwraps(t, site, wrapped)
}

func TestAnUpgradeKeepsWhatTheOldVersionWrapped(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	const newer = "v0.0.2-test"
	site.Register(t, vaulttest.Build{Version: newer}.Binary(t), site.Args, site.Env)
	wanted := newer
	if err := site.Client(t).Sys().TuneMountAllowNil("nitrokey", api.TuneMountConfigInput{PluginVersion: &wanted}); err != nil {
		t.Fatal(err)
	}
	before := site.Processes()
	reload(t, site)
	eventuallyUnwraps(t, site, wrapped)
	vaulttest.WaitGone(t, limit, before...)

	mounts, err := site.Client(t).Sys().ListMounts()
	if err != nil {
		t.Fatal(err)
	}
	if running := mounts["nitrokey/"].RunningVersion; running != newer {
		t.Errorf("the mount runs %q, not %q", running, newer)
	}
}

func TestAReplacedPluginFileDoesNotDisturbTheRunningPlugin(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	newer := vaulttest.Build{Version: "v0.0.2-test"}.Binary(t)
	content, err := os.ReadFile(newer.Path)
	if err != nil {
		t.Fatal(err)
	}
	// As a package manager does: a new file under the old name.
	installed := filepath.Join(site.PluginDir, vaulttest.Name+"-"+vaulttest.DefaultVersion)
	if err := os.WriteFile(installed+".new", content, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(installed+".new", installed); err != nil {
		t.Fatal(err)
	}
	for _, host := range site.Hosts() { // a new one comes from the plugin that runs, not from the file
		host.Kill(t)
	}
	eventuallyUnwraps(t, site, wrapped)
}

// reload makes Vault start the plugin anew.
func reload(t *testing.T, site *vaulttest.Site) {
	t.Helper()
	_, err := site.Client(t).Sys().ReloadPluginWithContext(context.Background(), &api.ReloadPluginInput{
		Mounts: []string{"nitrokey/"},
	})
	if err != nil {
		t.Fatal(fmt.Errorf("reloading the plugin: %w", err))
	}
}
