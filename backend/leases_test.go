package backend

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestALeaseIsSetAndShown(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	if got := m.read("keys/prod").ok(t); got.text("lease") != "0" || len(got.data["leases"].([]any)) != 0 || kek(t, got, 0) != "" {
		t.Errorf("a new key = %v", got.data)
	}
	for _, wrong := range []any{"5s", "25h", "1500ms", "soon", -600} {
		m.write("keys/prod", fields{"lease": wrong}).want(t, http.StatusBadRequest)
	}
	if got := m.write("keys/prod", fields{"lease": "10m"}).ok(t); got.text("lease") != "600" || kek(t, got, 0) == "" {
		t.Errorf("with a lease it is %v", got.data)
	}
	if got := m.write("keys/prod", fields{"deletion_allowed": true}).ok(t); got.text("lease") != "600" {
		t.Errorf("a write of something else made the lease %v", got.data["lease"])
	}
	if got := m.write("keys/prod", fields{"lease": 0}).ok(t); got.text("lease") != "0" {
		t.Errorf("without it is %v", got.data)
	}
}

// kek is the id of a version's key encryption key, as a key is shown.
func kek(t *testing.T, shown reply, version int) string {
	t.Helper()
	return shown.data["versions"].([]any)[version].(map[string]any)["kek"].(string)
}

// leased is a mount whose key "prod" has an open lease, and something that is sealed to it.
func leased(t *testing.T) (m *mount, token *testToken, sealed string) {
	t.Helper()
	m = newMount(t)
	m.rack.locks = true
	token = m.addKey("prod")
	m.readyForEncrypt("prod")
	m.write("keys/prod", fields{"lease": "10m"}).ok(t)
	m.seals(t)
	// The first sealing asks for the lease, and does not wait for it.
	await(t, "the lease to be open", func() bool { return len(m.read("keys/prod").ok(t).data["leases"].([]any)) == 1 })
	return m, token, m.seals(t)
}

// seals encrypts with "prod".
func (m *mount) seals(t *testing.T) string {
	t.Helper()
	return m.write("encrypt/prod", fields{"plaintext": "YQ=="}).ok(t).text("ciphertext")
}

func TestALeaseServesManyWithoutTheHSM(t *testing.T) {
	m, token, _ := leased(t)
	before := token.Operations()
	var last string
	for range 20 {
		last = m.seals(t)
		m.write("decrypt/prod", fields{"ciphertext": last}).ok(t)
	}
	token.SetError(hsm.ErrUnavailable)
	if opened := m.write("decrypt/prod", fields{"ciphertext": last}).ok(t); opened.text("plaintext") != "YQ==" {
		t.Errorf("decrypt = %v", opened.data)
	}
	if cost := token.Operations() - before; cost != 0 {
		t.Errorf("it cost %d operations", cost)
	}
	shown := m.read("keys/prod").ok(t)
	lease := shown.data["leases"].([]any)[0].(map[string]any)
	until, err := time.Parse(time.RFC3339, fmt.Sprint(lease["until"]))
	if err != nil || time.Until(until) < 9*time.Minute || lease["kek"] != kek(t, shown, 0) || fmt.Sprint(lease["version"]) != "1" {
		t.Errorf("the lease is shown as %v, %v", lease, err)
	}
	health := m.read("health").want(t, http.StatusServiceUnavailable)
	if leases, _ := health.data["leases"].(map[string]any); len(leases) != 1 || len(leases["prod"].([]any)) != 1 {
		t.Errorf("health shows %v", health.data["leases"])
	}
}

func TestLeasesEndWithTheUseOfTheHSM(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, m *mount) *mount{
		"the mount is cleaned up": func(_ *testing.T, m *mount) *mount {
			m.Cleanup(context.Background())
			if left := m.keys.Leases(); len(left) != 0 {
				m.t.Errorf("left are %v", left)
			}
			return m.remount()
		},
		"the device is locked": func(t *testing.T, m *mount) *mount {
			t.Helper()
			m.write("devices/prod-hsm/lock", nil).ok(t)
			return m
		},
		"the device is deleted": func(t *testing.T, m *mount) *mount {
			t.Helper()
			m.delete("devices/prod-hsm", fields{"force": true}).want(t, http.StatusNoContent)
			return m
		},
		"strict mode is wanted again": func(t *testing.T, m *mount) *mount {
			t.Helper()
			m.write("keys/prod", fields{"lease": "0"}).ok(t)
			return m
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, token, sealed := leased(t)
			m = end(t, m)
			if left := m.keys.Leases(); len(left) != 0 {
				t.Errorf("left are %v", left)
			}
			token.SetError(hsm.ErrUnavailable)
			m.write("decrypt/prod", fields{"ciphertext": sealed}).want(t, http.StatusServiceUnavailable)
			token.SetError(nil)
			m.write("devices/prod-hsm", fields{"module": testModule, "serial": "SN-prod-hsm", "pin": rightPIN}).ok(t)
			if opened := m.write("decrypt/prod", fields{"ciphertext": sealed}).ok(t); opened.text("plaintext") != "YQ==" {
				t.Errorf("decrypt = %v", opened.data)
			}
		})
	}
}

// A job that must not be cut off may go on for minutes after the mount was ended.
func TestNoLeaseIsHeldWhileAMountThatEndsWaitsForItsJobs(t *testing.T) {
	m, _, _ := leased(t)
	goOn := make(chan struct{})
	m.jobs.start(m.closing, "a job", func(context.Context) { <-goOn })
	cleaned := make(chan struct{})
	go func() {
		defer close(cleaned)
		m.Cleanup(context.Background())
	}()
	defer func() {
		close(goOn)
		<-cleaned
		m.remount()
	}()
	await(t, "the leases to end for good", func() bool {
		m.keys.EndLeases()
		return m.closing.Err() != nil && m.keys.OpenLease(t.Context(), "prod") == nil && len(m.keys.Leases()) == 0
	})
}
