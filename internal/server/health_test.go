package server

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/token"
)

func TestHealthTellsHowTheKeysFare(t *testing.T) {
	w := newWorld(t)
	w.adopt2("leased")
	w.lease("leased", time.Hour)
	text := w.token(token.Spec{Keys: []string{"prod", "leased"}})
	r := w.start(nil).waitReady()
	client := r.client()
	w.units[0].Delay(10 * time.Millisecond)
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	for range 20 {
		r.decrypt(client, text, "prod", sealed)
	}
	var health Health
	byName := map[string]KeyHealth{}
	eventually(t, "the operation is measured", func() bool {
		health = Health{}
		must(t, json.Unmarshal([]byte(r.ask(client, http.MethodGet, "/v1/sys/health", "", "").raw), &health))
		for _, k := range health.Nitroseal.Keys {
			byName[k.Name] = k
		}
		return byName["prod"].OperationSeconds > 0.009 && byName["leased"].LeaseUntil != nil
	})
	if !health.Initialized || health.Sealed || health.Standby || health.Version != "1.2.3" || time.Since(time.Unix(health.ServerTimeUTC, 0)) > time.Minute {
		t.Errorf("health: %+v", health)
	}
	strict, leased := byName["prod"], byName["leased"]
	if strict.Mode != ModeStrict || strict.Version != 1 || strict.Recipients != 1 || strict.RecipientsUp != 1 || !strict.Seals || !strict.Opens || strict.LeaseUntil != nil {
		t.Errorf("the strict key: %+v", strict)
	}
	if leased.Mode != ModeLeased || leased.LeaseLocked == nil || time.Until(*leased.LeaseUntil) < 50*time.Minute {
		t.Errorf("the leased key: %+v", leased)
	}
	if got, want := strict.Capacity, capacity(time.Duration(strict.OperationSeconds*float64(time.Second)), 2); got < want-1 || got > want+1 {
		t.Errorf("the capacity is %d, the formula says %d", got, want)
	}
	head := r.ask(client, http.MethodHead, "/v1/sys/health", "", "")
	if head.code != http.StatusOK || head.raw != "" {
		t.Errorf("HEAD: %d %q", head.code, head.raw)
	}
	if about := r.page("/v1/sys/health"); json.Unmarshal([]byte(about), &Health{}) != nil || len(about) < 100 {
		t.Errorf("at the listener about the server: %s", about)
	}
}

// disk is an audit sink that may be full.
type disk struct {
	full    atomic.Bool
	reopens atomic.Int64
}

func (*disk) Name() string { return "disk" }

func (d *disk) Reopen() error { d.reopens.Add(1); return nil }

func (*disk) Close() error { return nil }

// Write implements [audit.Sink].
func (d *disk) Write([]audit.Line) error {
	if d.full.Load() {
		return errors.New("no space left on device")
	}
	return nil
}

// Room is what the log asks without an act.
func (d *disk) Room() error { return d.Write(nil) }

// TestAFullAuditDiskEndsOpeningsAndHealthSaysSo: a balancer sends Vaults that unseal elsewhere, and those that start may stay.
func TestAFullAuditDiskEndsOpeningsAndHealthSaysSo(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	d := &disk{}
	r := w.start(func(site *Site) {
		log, err := audit.Open(audit.Options{Sinks: []audit.Sink{d}, Host: "seal-1", Program: "nitroseal"})
		must(t, err)
		site.Audit = log
		before := site.Close
		site.Close = func() error { return errors.Join(before(), log.Close()) }
	}).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	d.full.Store(true)
	if got := r.decrypt(client, text, "prod", sealed); got.code != http.StatusServiceUnavailable {
		t.Errorf("an opening: %d %s", got.code, got.raw)
	}
	if got := r.encrypt(client, text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("a sealing: %d %s", got.code, got.raw)
	}
	eventually(t, "health tells that nothing is opened", func() bool {
		return r.ask(client, http.MethodGet, "/v1/sys/health", "", "").code == http.StatusServiceUnavailable
	})
	if got := r.ask(client, http.MethodGet, "/v1/sys/health?sealedcode=200", "", ""); got.code != http.StatusOK {
		t.Errorf("for a Vault that starts: %d %s", got.code, got.raw)
	}
	if about := r.page("/readyz"); !strings.Contains(about, `"ready": true`) || !strings.Contains(about, "no space left") {
		t.Errorf("readyz says %s", about)
	}
	d.full.Store(false)
	if got := r.decrypt(client, text, "prod", sealed); got.code != http.StatusOK {
		t.Errorf("with room again: %d %s", got.code, got.raw)
	}
	eventually(t, "health tells that openings work again", func() bool {
		return r.ask(client, http.MethodGet, "/v1/sys/health", "", "").code == http.StatusOK
	})
	r.set(func(site *Site) { site.Mount = "sys" }) // which is refused
	before := d.reopens.Load()
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", func() bool { return r.logged.count("the new configuration is refused") == 1 })
	r.decrypt(client, text, "prod", sealed)
	if d.reopens.Load() == before {
		t.Error("a log file that was rotated is not opened anew")
	}
}

// TestHealthSendsNoLengthWithAnAnswerThatHasNoBody: what is between might wait for it, and take the next answer for it.
func TestHealthSendsNoLengthWithAnAnswerThatHasNoBody(t *testing.T) {
	s := &server{}
	for _, path := range []string{"?uninitcode=204", "?uninitcode=304"} {
		recorder := httptest.NewRecorder()
		s.health(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/sys/health"+path, nil))
		if length := recorder.Header().Get("Content-Length"); length != "" || recorder.Body.Len() != 0 {
			t.Errorf("%s: %d with a length of %s and %d bytes", path, recorder.Code, length, recorder.Body.Len())
		}
	}
}
