package server

import (
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// TestAReloadBeforeKeysCanSealDoesNotSayReady: systemd would start a Vault, and it would end.
func TestAReloadBeforeKeysCanSealDoesNotSayReady(t *testing.T) {
	w := newWorld(t)
	w.token(token.Spec{})
	w.units[0].away(hsm.ErrUnavailable)
	r := w.start(nil)
	r.reload <- syscall.SIGHUP
	eventually(t, "the configuration is read", func() bool { return r.logged.count("the new configuration is in use") == 1 })
	r.reload <- syscall.SIGHUP // taken when the loop has turned
	if told := r.told.String(); strings.Contains(told, "READY=1") {
		t.Errorf("systemd was told\n%s", told)
	}
	w.units[0].away(nil)
	r.waitReady()
	eventually(t, "systemd is told", func() bool { return r.told.count("READY=1") >= 1 })
	r.reload <- syscall.SIGHUP
	eventually(t, "systemd is told of a reload", func() bool { return r.told.count("RELOADING=1") == 1 && r.told.count("READY=1") == 2 })
}

// TestAReloadThatKnowsNoTokensIsRefusedAndSaysWhy: the HSM is not to blame.
func TestAReloadThatKnowsNoTokensIsRefusedAndSaysWhy(t *testing.T) {
	w := newWorld(t)
	w.timing.settle = 200 * time.Millisecond
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	r.mu.Lock()
	r.change = func(site *Site) {
		site.Tokens = token.NewRegistry(token.RegistryOptions{Store: &absentStore{Store: w.tokens}})
	}
	r.mu.Unlock()
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", func() bool { return r.logged.count("the store of its tokens does not tell them") == 1 })
	if got := r.encrypt(r.client(), text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("the configuration in use: %d %s", got.code, got.raw)
	}
}

// TestLeasesAreWipedWhenTheServerStops, whatever closing a site does.
func TestLeasesAreWipedWhenTheServerStops(t *testing.T) {
	w := newWorld(t)
	w.lease("prod", time.Hour)
	w.token(token.Spec{})
	left := -1
	r := w.start(func(site *Site) {
		before := site.Close
		site.Close = func() error {
			left = len(site.Keys.Leases())
			return before()
		}
	}).waitReady()
	eventually(t, "a lease is open", func() bool { return r.metric(`nitroseal_serve_lease_locked{key="prod",version="1"}`) != "" })
	r.end()
	if left != 0 {
		t.Errorf("%d leases were open when the site was closed", left)
	}
}

// TestARefusedReloadLeavesWhatIsMeasured of the HSMs in use, and a good one takes its number of connections.
func TestARefusedReloadLeavesWhatIsMeasured(t *testing.T) {
	w := newWorld(t)
	w.timing.settle = 2 * time.Second
	w.token(token.Spec{})
	r := w.start(nil).waitReady()
	reload := func(change func(*Site)) {
		r.mu.Lock()
		r.change = change
		r.mu.Unlock()
		r.reload <- syscall.SIGHUP
	}
	reload(func(site *Site) {
		site.Devices = nil
		site.Tokens = token.NewRegistry(token.RegistryOptions{Store: &absentStore{Store: w.tokens}})
	})
	eventually(t, "it is refused", func() bool { return r.logged.count("the new configuration is refused") == 1 })
	operations := &r.server.hooks.operations
	operations.ended("one", time.Now(), time.Second)
	if operations.of("one") == 0 {
		t.Error("an HSM that is in use is not measured any more")
	}
	reload(func(site *Site) { site.Listen.MaxConnections = 7 })
	eventually(t, "it is in use", func() bool { return r.logged.count("the new configuration is in use") == 1 })
	if most := r.server.most.Load(); most != 7 {
		t.Errorf("%d connections are served at a time", most)
	}
}
