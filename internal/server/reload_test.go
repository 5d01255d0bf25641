package server

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/token"
	"vault-plugin-secrets-nitrokey/internal/transit"
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
	r.set(func(site *Site) {
		site.Tokens = token.NewRegistry(token.RegistryOptions{Store: &absentStore{Store: w.tokens}})
	})
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", func() bool { return r.logged.count("the store of its tokens does not tell them") == 1 })
	if got := r.encrypt(r.client(), text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("the configuration in use: %d %s", got.code, got.raw)
	}
}

// TestAReloadWhileTheHSMIsAwayLeavesWhatIsInUse: that can seal without it, a new one could not.
func TestAReloadWhileTheHSMIsAwayLeavesWhatIsInUse(t *testing.T) {
	w := newWorld(t)
	w.timing.settle = 500 * time.Millisecond
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	encrypt := func(mount string) int {
		return r.ask(client, http.MethodPut, "/v1/"+mount+"/encrypt/prod", text, `{"plaintext":"YQ=="}`).code
	}
	w.units[0].away(hsm.ErrUnavailable)
	r.set(func(site *Site) { site.Mount = "later" })
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", func() bool { return r.logged.count("the new configuration is refused; the one in use stays") == 1 })
	if code := encrypt("transit"); code != http.StatusOK || r.metric("nitroseal_serve_config_last_reload_successful") != "0" {
		t.Errorf("the service in use: %d", code)
	}
	w.units[0].away(nil)
	r.reloadUntil("it is taken", func() bool { return encrypt("later") == http.StatusOK })
}

// TestAReloadTakesNothingFromAKeyThatWorks, where another one waits for its HSM since the start.
func TestAReloadTakesNothingFromAKeyThatWorks(t *testing.T) {
	w := newWorld(t)
	w.timing.settle = 200 * time.Millisecond
	w.adoptElsewhere("other", newUnit("two", 1))
	w.units[1].away(hsm.ErrUnavailable)
	text := w.token(token.Spec{Keys: []string{"prod", "other"}})
	r := w.start(nil)
	client := r.client()
	eventually(t, "one of them seals", func() bool { return r.encrypt(client, text, "prod", "a").code == http.StatusOK })
	w.units[0].away(hsm.ErrUnavailable)
	r.reload <- syscall.SIGHUP
	r.reload <- syscall.SIGHUP // taken when the first one has ended
	if got := r.encrypt(client, text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("after a reload: %d %s", got.code, got.raw)
	}
	w.units[0].away(nil)
	r.reloadUntil("it is taken with what waits as before", func() bool { return r.logged.count("the new configuration is in use") > 0 })
	if got := r.encrypt(client, text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("after another reload: %d %s", got.code, got.raw)
	}
}

// TestSealingWipesAlsoWhatEndsItsRequests since a reload, and a stop turns away who waits there.
func TestSealingWipesAlsoWhatEndsItsRequests(t *testing.T) {
	w := newWorld(t)
	w.units[0].places = make(chan struct{}, 4)
	before, err := w.keys.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("a secret"), nil)
	must(t, err)
	w.lease("prod", time.Hour)
	text := w.token(token.Spec{})
	r := w.start(func(site *Site) { site.Devices[0].Parallel = 1 }).waitReady()
	old := r.server.service.Load()
	client := r.client()
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	var running sync.WaitGroup
	open := func(ctx context.Context, code *int) {
		running.Go(func() {
			got, _ := r.tryUntil(ctx, client, http.MethodPut, "/v1/transit/decrypt/prod", text,
				`{"ciphertext":"`+transit.Format(before.Version, before.Envelope)+`"}`)
			*code = got.code // 0 for who went away
		})
	}
	w.units[0].hang(true)
	var one, two, waiting int
	open(ctx, &one)
	open(ctx, &two)
	eventually(t, "two are at the HSM", func() bool { return w.units[0].hang(true) == 2 })
	open(t.Context(), &waiting)
	eventually(t, "one waits", func() bool { _, n := r.queue(); return n == 1 })
	w.units[0].hang(false)
	r.reload <- syscall.SIGHUP
	eventually(t, "a new one is in use", func() bool { return r.server.service.Load() != old })
	if len(old.site.Keys.Leases()) == 0 {
		t.Fatal("there is no lease to be wiped")
	}
	r.seal <- syscall.SIGUSR1
	eventually(t, "it is sealed", func() bool { return r.logged.count("sealed: all leases were ended") == 1 })
	if left := old.site.Keys.Leases(); len(left) != 0 {
		t.Errorf("left are %v", left)
	}
	ended := make(chan struct{})
	go func() { r.end(); close(ended) }()
	eventually(t, "who waits is turned away", func() bool { _, urgent, patient := old.desk.load(); return urgent+patient == 0 })
	leave()
	running.Wait()
	<-ended
	if waiting != http.StatusServiceUnavailable {
		t.Errorf("who waited is answered with %d", waiting)
	}
}

// TestAReloadWaitsForAsManyKeysAsThereAre: a card needs half a minute for fifty.
func TestAReloadWaitsForAsManyKeysAsThereAre(t *testing.T) {
	w := newWorld(t)
	w.timing.settle = time.Second
	w.units[0].places = make(chan struct{}, 1)
	names := []string{"prod", "a", "b", "c", "d", "e"}
	for _, name := range names[1:] {
		w.adopt(name)
	}
	w.token(token.Spec{Keys: names})
	r := w.start(nil).waitReady()
	w.units[0].Delay(300 * time.Millisecond) // and six of them
	r.reloadUntil("it is taken", func() bool { return r.logged.count("the new configuration is in use") > 0 })
}

// reloadUntil reloads again and again: on a busy machine a new configuration may not be ready in the time that a test gives it.
func (r *running) reloadUntil(what string, yes func() bool) {
	r.t.Helper()
	eventually(r.t, what, func() bool {
		if yes() {
			return true
		}
		r.reload <- syscall.SIGHUP
		return false
	})
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
	w.timing.settle = 500 * time.Millisecond
	w.token(token.Spec{})
	r := w.start(nil).waitReady()
	r.set(func(site *Site) {
		site.Devices = nil
		site.Tokens = token.NewRegistry(token.RegistryOptions{Store: &absentStore{Store: w.tokens}})
	})
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", func() bool { return r.logged.count("the new configuration is refused") == 1 })
	operations := &r.server.hooks.operations
	operations.ended("one", time.Now(), time.Second)
	if operations.of("one") == 0 {
		t.Error("an HSM that is in use is not measured any more")
	}
	r.set(func(site *Site) { site.Listen.MaxConnections = 7 })
	r.reloadUntil("it is in use", func() bool { return r.logged.count("the new configuration is in use") > 0 })
	if most := r.server.most.Load(); most != 7 {
		t.Errorf("%d connections are served at a time", most)
	}
}
