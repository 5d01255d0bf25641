package server

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

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
