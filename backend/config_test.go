package backend

import (
	"context"
	"net/http"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/device"
)

func TestConfigHasDefaultsAndKeepsWhatAWriteLeavesOut(t *testing.T) {
	m := newMount(t)
	if got := m.read("config").ok(t); got.text("request_timeout") != "45" || got.text("default_key") != "" {
		t.Errorf("defaults = %v", got.data)
	}
	m.write("config", fields{"default_key": "prod", "default_store": "etcd"}).want(t, http.StatusNoContent)
	m.write("config", fields{"request_timeout": "20s"}).ok(t)
	got := m.remount().read("config").ok(t)
	if got.text("request_timeout") != "20" || got.text("default_key") != "prod" || got.text("default_store") != "etcd" {
		t.Errorf("config = %v", got.data)
	}
}

func TestConfigWritesThatAreRefused(t *testing.T) {
	for name, data := range map[string]fields{
		"no time at all":                  {"request_timeout": 0},
		"more time than Vault gives":      {"request_timeout": 81},
		"a time that is none":             {"request_timeout": "soon"},
		"a key that cannot be named so":   {"default_key": "a/b"},
		"a store that cannot be named so": {"default_store": "-x"},
		"an unknown field":                {"timeout": 3},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			m.write("config", data).want(t, http.StatusBadRequest)
			if got := m.read("config").text("request_timeout"); got != "45" {
				t.Errorf("request_timeout = %s afterwards", got)
			}
		})
	}
}

func TestConfigOfAnotherNodeTakesEffect(t *testing.T) {
	m := newMount(t)
	m.read("config").ok(t)
	other := mountOn(t, m.storage, m.rack, m.secrets, m.state)
	other.write("config", fields{"request_timeout": 7}).ok(t)
	m.InvalidateKey(context.Background(), "config")
	if got := m.read("config").text("request_timeout"); got != "7" {
		t.Errorf("request_timeout = %s, want 7", got)
	}
}

func TestHangingHSMIsAnsweredWith503WithinTheRequestTimeout(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0"}).ok(t).text("ciphertext")
	m.write("config", fields{"request_timeout": 1}).ok(t)
	token.Delay(time.Hour)
	begin := time.Now()
	got := m.write("unwrap/prod", fields{"ciphertext": wrapped}).want(t, http.StatusServiceUnavailable).says(t, "request_timeout")
	if took := time.Since(begin); took > defaultRequestTimeout/2 { // the configured second, and what a busy machine adds
		t.Errorf("the answer took %v", took)
	}
	if retry := got.headers["Retry-After"]; len(retry) != 1 || retry[0] != "2" {
		t.Errorf("Retry-After = %v", retry)
	}
	token.Delay(0)
	m.write("config", fields{"request_timeout": 45}).ok(t)
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).ok(t)
}

func TestUnmountingEndsRequestsInFlight(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	wrapped := m.write("wrap/prod", fields{"plaintext": "c2VjcmV0"}).ok(t).text("ciphertext")
	begun := make(chan struct{})
	m.rack.opening = func(ctx context.Context) { // an HSM that never answers
		close(begun)
		<-ctx.Done()
	}
	m = m.remount()
	answers := make(chan reply, 1)
	go func() { answers <- m.write("unwrap/prod", fields{"ciphertext": wrapped}) }()
	<-begun
	m.Cleanup(context.Background())
	select {
	case got := <-answers:
		got.want(t, http.StatusServiceUnavailable)
	case <-time.After(20 * time.Second):
		t.Fatal("the request goes on after the mount was cleaned up")
	}
}

func TestFactoryTouchesNeitherStorageNorHSM(t *testing.T) {
	storage := &faultyStorage{Storage: nil} // any use of it panics
	registry := device.New(device.Options{})
	config := newMount(t).configFor(storage)
	made, err := New(Options{Devices: registry})(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	made.Cleanup(context.Background())
	if _, err := New(Options{Devices: registry})(context.Background(), nil); err == nil {
		t.Error("a nil configuration is accepted")
	}
	if _, err := New(Options{})(context.Background(), config); err == nil {
		t.Error("a factory without devices is accepted")
	}
}
