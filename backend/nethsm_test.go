package backend

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/device"
)

const (
	netURL         = "https://nethsm.example:8443"
	netPassword    = "planted-password"
	netAdmin       = "planted-admin-password"
	netPassphrase  = "planted-unlock-passphrase"
	netCertificate = 1 << 31 // seconds: 2038
)

// testNetHSM is a NetHSM in memory. It notes with which secrets it was opened.
type testNetHSM struct {
	*hsmtest.Memory

	mu     sync.Mutex
	opened []device.Secrets
	nodes  []hsm.Node
	// weak is true where the user has not the role Operator.
	weak bool
	// tried are the passphrases that it was to be unlocked with.
	tried []string
}

// addNetHSM puts a NetHSM into the rack.
func (m *mount) addNetHSM(url string) *testNetHSM {
	m.t.Helper()
	m.rack.mu.Lock()
	defer m.rack.mu.Unlock()
	if m.rack.netHSMs == nil {
		m.rack.netHSMs = map[string]*testNetHSM{}
	}
	netHSM := &testNetHSM{Memory: hsmtest.NewMemory()}
	m.rack.netHSMs[url] = netHSM
	return netHSM
}

// openNetHSM is a device.Opener. It does no I/O, as the provider's does not.
func (r *rack) openNetHSM(ctx context.Context, _ string, config device.Config, secrets device.Secrets) (hsm.Device, error) {
	if r.opening != nil {
		r.opening(ctx)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	found := r.netHSMs[config.URLs[0]]
	if found == nil {
		found = &testNetHSM{Memory: hsmtest.NewMemory()}
		found.SetError(fmt.Errorf("no node answers: %w", hsm.ErrUnavailable))
	}
	found.mu.Lock()
	defer found.mu.Unlock()
	found.opened = append(found.opened, device.Secrets{
		Password: bytes.Clone(secrets.Password), AdminPassword: bytes.Clone(secrets.AdminPassword),
		UnlockPassphrase: bytes.Clone(secrets.UnlockPassphrase),
	})
	handle := found.Attach()
	return &netHSMDevice{handle, handle, handle, found, config}, nil
}

// netHSMDevice is an open testNetHSM. It has not what only tokens have.
type netHSMDevice struct {
	hsm.Device
	hsm.Randomer
	hsm.ObjectStore

	hsm    *testNetHSM
	config device.Config
}

func (d *netHSMDevice) Nodes(context.Context) []hsm.Node {
	d.hsm.mu.Lock()
	defer d.hsm.mu.Unlock()
	return slices.Clone(d.hsm.nodes)
}

func (d *netHSMDevice) Unlock(_ context.Context, passphrase []byte) error {
	d.hsm.mu.Lock()
	d.hsm.tried = append(d.hsm.tried, string(passphrase))
	d.hsm.mu.Unlock()
	if len(passphrase) < 10 {
		return fmt.Errorf("a passphrase has 10 to 200 bytes: %w", device.ErrRequest)
	}
	if string(passphrase) != netPassphrase {
		return &hsm.PINError{TriesLeft: -1, Wrong: true, Detail: "the unlock passphrase is wrong (403)"}
	}
	d.hsm.SetError(nil)
	return nil
}

func (d *netHSMDevice) Lock(context.Context) error {
	if d.config.AdminUsername == "" {
		return fmt.Errorf("locking: %w", hsm.ErrForbidden)
	}
	d.hsm.SetError(hsm.ErrLocked)
	return nil
}

func (d *netHSMDevice) Random(ctx context.Context, n int) ([]byte, error) {
	if d.hsm.weak {
		return nil, fmt.Errorf("random (403): %w", hsm.ErrForbidden)
	}
	return d.Randomer.Random(ctx, n)
}

// netHSMFieldsWith is a whole configuration with changes; nil leaves a field out.
func netHSMFieldsWith(changes fields) fields {
	whole := fields{
		"type": "nethsm", "urls": netURL, "username": "operator", "password": netPassword, "admin_username": "admin",
		"admin_password": netAdmin, "unlock_passphrase": netPassphrase,
	}
	for field, value := range changes {
		if value == nil {
			delete(whole, field)
		} else {
			whole[field] = value
		}
	}
	return whole
}

// both are the fields of two maps.
func both(one, two fields) fields {
	all := maps.Clone(one)
	maps.Copy(all, two)
	return all
}

func TestNetHSMIsReadWithoutItsSecrets(t *testing.T) {
	m := newMount(t)
	m.secretFile("unlock", netPassphrase)
	m.write("devices/net", netHSMFieldsWith(fields{
		"urls": netURL + ",https://b.example", "unlock_passphrase": nil, "unlock_passphrase_file": "unlock", "request_timeout": "5s",
		"key_tags": "seal", "object_store": true, "tls_server_name": "nethsm",
	})).want(t, http.StatusNoContent)
	got := m.read("devices/net").want(t, http.StatusOK)
	for field, want := range map[string]string{
		"type": "nethsm", "urls": "[" + netURL + " https://b.example]", "username": "operator", "password_set": "true", "password_file": "",
		"admin_username": "admin", "admin_password_set": "true", "unlock_passphrase_set": "false", "unlock_passphrase_file": "unlock",
		"ca_cert": "", "tls_pins": "[]", "tls_server_name": "nethsm", "tls_insecure": "false", "request_timeout": "5", "key_tags": "[seal]",
		"object_store": "true",
	} {
		if got.text(field) != want {
			t.Errorf("%s = %s, want %s", field, got.text(field), want)
		}
	}
	for _, field := range []string{"password", "admin_password", "unlock_passphrase", "pin_set", "pin_change_pending", "module"} {
		if _, shown := got.data[field]; shown {
			t.Errorf("%s is shown", field)
		}
	}
	m.write("devices/net", fields{"key_tags": "", "request_timeout": 0, "unlock_passphrase": netPassphrase}).ok(t)
	got = m.read("devices/net")
	if got.text("key_tags") != "[]" || got.text("unlock_passphrase_set") != "true" || got.text("unlock_passphrase_file") != "" ||
		got.text("password_set") != "true" || got.text("object_store") != "true" {
		t.Errorf("after a partial write: %v", got.data)
	}
}

func TestNetHSMWritesThatAreRefused(t *testing.T) {
	for name, test := range map[string]struct {
		changes fields
		says    string
	}{
		"without nodes":               {fields{"urls": nil}, `"urls" is missing`},
		"with http":                   {fields{"urls": "http://nethsm.example"}, "in the clear"},
		"without a user":              {fields{"username": nil}, `"username" is missing`},
		"without a password":          {fields{"password": nil}, "no password"},
		"with an empty password":      {fields{"password": ""}, "no password"},
		"with half an Administrator":  {fields{"admin_password": nil}, "without its password"},
		"with password and file":      {fields{"password_file": "p"}, "keep one"},
		"with a file that is missing": {fields{"admin_password": nil, "admin_password_file": "p"}, "cannot be read"},
		"with a file outside":         {fields{"unlock_passphrase": nil, "unlock_passphrase_file": "/etc/passwd"}, "secrets directory"},
		"with a field of a token":     {fields{"pin": rightPIN}, `"pin" belongs to devices of type "pkcs11"`},
		"insecure with pins":          {fields{"tls_insecure": true, "tls_pins": strings.Repeat("ab", 32)}, "check nothing"},
		"with an endless timeout":     {fields{"request_timeout": "10m"}, "out of range"},
		"with a passphrase of blanks": {fields{"unlock_passphrase": "  "}, "nothing but blanks"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			got := m.write("devices/net", netHSMFieldsWith(test.changes)).want(t, http.StatusBadRequest).says(t, test.says)
			if strings.Contains(got.message, "planted") || strings.Contains(got.message, rightPIN) {
				t.Errorf("the message shows a secret: %s", got.message)
			}
			m.read("devices/net").want(t, http.StatusNotFound)
		})
	}
}

func TestDeviceKeepsItsType(t *testing.T) {
	m := newMount(t)
	m.addDevice("card")
	m.write("devices/card", netHSMFieldsWith(nil)).want(t, http.StatusBadRequest).says(t, `is of type "pkcs11" and stays so`)
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	m.write("devices/net", fields{"type": "pkcs11"}).want(t, http.StatusBadRequest).says(t, `is of type "nethsm" and stays so`)
	m.write("devices/net", fields{"type": "nethsm", "object_store": true}).ok(t)
}

// A write that changes where secrets go carries every one of them, those in files by name, or changes nothing.
func TestNetHSMWhoseSecretsWouldGoElsewhereWantsThemAgain(t *testing.T) {
	for field, value := range map[string]any{
		"urls": netURL + ",https://evil.example", "username": "other", "admin_username": "other", "tls_pins": strings.Repeat("ab", 32),
		"tls_server_name": "evil.example", "tls_insecure": true,
	} {
		t.Run(field, func(t *testing.T) {
			m := newMount(t)
			netHSM := m.addNetHSM(netURL)
			m.secretFile("unlock", netPassphrase)
			m.write("devices/net", netHSMFieldsWith(fields{"unlock_passphrase": nil, "unlock_passphrase_file": "unlock"})).ok(t)
			before, opened := m.stored()["devices/net"], len(netHSM.opened)
			for _, given := range []fields{
				{},
				{"password": netPassword},
				{"password": netPassword, "admin_password": netAdmin},
				{"password": netPassword, "unlock_passphrase_file": "unlock"},
				{"admin_password": netAdmin, "unlock_passphrase": netPassphrase},
			} {
				given[field] = value
				m.write("devices/net", given).want(t, http.StatusBadRequest).says(t, field, "in the same write", "nothing was changed")
			}
			if m.stored()["devices/net"] != before || len(netHSM.opened) != opened {
				t.Error("a refused write changed the record or opened the device")
			}
			m.write("devices/net", fields{
				field: value, "password": netPassword, "admin_password": netAdmin, "unlock_passphrase_file": "unlock",
			}).ok(t)
		})
	}
	t.Run("what there is not need not be given", func(t *testing.T) {
		m := newMount(t)
		m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
		m.write("devices/net", fields{
			"admin_username": "", "admin_password": "", "unlock_passphrase": "", "password": netPassword,
		}).ok(t)
		m.write("devices/net", fields{"urls": "https://b.example", "password": netPassword}).ok(t)
		m.write("devices/net", fields{"urls": netURL}).want(t, http.StatusBadRequest).
			says(t, "password would go somewhere else", "give password or password_file in the same write")
	})
}

func TestNetHSMThatTakesAnyCertificateIsWarnedOf(t *testing.T) {
	m := newMount(t)
	var log bytes.Buffer
	m.logger = NewLogger(hclog.New(&hclog.LoggerOptions{Output: &log}))
	got := m.write("devices/net", netHSMFieldsWith(fields{"tls_insecure": true})).want(t, http.StatusOK)
	if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "tls_insecure") || !strings.Contains(log.String(), "any certificate") {
		t.Errorf("warnings %v, log %q", got.warnings, log.String())
	}
}

func TestNetHSMsNodesAreShown(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	netHSM.AddRSA(t, "seal", "seal", 2048)
	netHSM.nodes = []hsm.Node{
		{
			URL: netURL, State: hsm.StateOperational, Serial: "0000000001", Firmware: "5.0", RoundTrip: 3 * time.Millisecond,
			CertificateEnds: time.Unix(netCertificate, 0),
		},
		{URL: "https://b.example", State: hsm.StateAbsent, Resting: true, Err: fmt.Errorf("connection refused: %w", hsm.ErrUnavailable)},
	}
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	status := m.read("devices/net/status").want(t, http.StatusOK)
	if status.text("usable") != "true" || !strings.Contains(status.text("notes"), "trouble with the node https://b.example: connection refused") {
		t.Errorf("status = %v", status.data)
	}
	nodes, _ := status.data["nodes"].([]any)
	if len(nodes) != 2 {
		t.Fatalf("nodes = %v", status.data["nodes"])
	}
	for i, want := range []fields{
		{
			"url": netURL, "state": "operational", "serial": "0000000001", "firmware": "5.0", "round_trip_ms": 3.0,
			"certificate_ends": "2038-01-19T03:14:08Z", "resting": false, "error": "",
		},
		{"url": "https://b.example", "state": "absent", "resting": true, "error": "connection refused: the HSM is unavailable"},
	} {
		for field, value := range want {
			if got := nodes[i].(map[string]any)[field]; fmt.Sprint(got) != fmt.Sprint(value) {
				t.Errorf("node %d: %s = %v, want %v", i, field, got, value)
			}
		}
	}
	health := m.read("health").want(t, http.StatusOK)
	if net := health.data["devices"].(map[string]any)["net"].(map[string]any); net["usable"] != true || len(net["nodes"].([]any)) != 2 {
		t.Errorf("health = %v", net)
	}
}

func TestStatusOfANetHSMSaysWhatIsWrong(t *testing.T) {
	for name, test := range map[string]struct {
		prepare func(*testNetHSM)
		says    []string
	}{
		"every node is locked": {func(n *testNetHSM) {
			n.SetError(hsm.ErrLocked)
			n.nodes = []hsm.Node{{State: hsm.StateLocked}, {State: hsm.StateLocked}}
		}, []string{"all 2 nodes are locked", "unlock passphrase"}},
		"the only node is": {func(n *testNetHSM) {
			n.SetError(hsm.ErrLocked)
			n.nodes = []hsm.Node{{State: hsm.StateLocked}}
		}, []string{"the node is locked"}},
		"the last node that answers has failed": {func(n *testNetHSM) {
			n.SetError(hsm.ErrUnavailable)
			n.nodes = []hsm.Node{{State: hsm.StateAbsent}, {State: hsm.StateFailed}, {State: hsm.StateAbsent}}
		}, []string{"1 node is in the state Failed", "2 nodes are out of reach"}},
		"it is new": {func(n *testNetHSM) {
			n.SetError(hsm.ErrUnavailable)
			n.nodes = []hsm.Node{{State: hsm.StateUnprovisioned}}
		}, []string{"not provisioned"}},
		"the password is wrong": {func(n *testNetHSM) {
			n.SetError(&hsm.PINError{TriesLeft: -1, Wrong: true, Detail: "the password of operator is wrong"})
			n.nodes = []hsm.Node{{State: hsm.StateOperational}}
		}, []string{"the password of operator is wrong"}},
		"the user has another role": {func(n *testNetHSM) {
			n.weak = true
			n.nodes = []hsm.Node{{State: hsm.StateOperational}}
		}, []string{"may list keys and not use them", "role Operator"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			test.prepare(m.addNetHSM(netURL))
			m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
			got := m.read("devices/net/status").want(t, http.StatusOK)
			for _, part := range test.says {
				if !strings.Contains(got.text("error"), part) {
					t.Errorf("error %q does not say %q", got.text("error"), part)
				}
			}
			if got.text("usable") != "false" || got.text("state") == "" {
				t.Errorf("usable = %s, state = %q", got.text("usable"), got.text("state"))
			}
			m.read("health").want(t, http.StatusServiceUnavailable)
		})
	}
}

func TestNetHSMIsUnlockedWithThePassphraseGivenOrConfigured(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	m.write("devices/net", netHSMFieldsWith(fields{"unlock_passphrase": nil})).ok(t)
	m.write("devices/net/lock", nil).want(t, http.StatusNoContent)
	m.list("devices/net/keys").want(t, http.StatusServiceUnavailable)
	m.write("devices/net/unlock", nil).want(t, http.StatusBadRequest).says(t, "passphrase is missing", "unlock_passphrase")
	m.write("devices/net/unlock", fields{"passphrase": "another one"}).want(t, http.StatusBadRequest).says(t, "passphrase is wrong")
	m.write("devices/net/unlock", fields{"passphrase": netPassphrase}).want(t, http.StatusNoContent)
	netHSM.AddRSA(t, "k", "k", 2048)
	m.list("devices/net/keys").ok(t)

	m.write("devices/net", fields{"unlock_passphrase": netPassphrase}).ok(t)
	warned := m.write("devices/net/lock", nil).want(t, http.StatusOK).warnings
	if len(warned) != 1 || !strings.Contains(warned[0], "unlocks it with the next use") {
		t.Errorf("warnings = %v", warned)
	}
	m.write("devices/net/unlock", nil).want(t, http.StatusNoContent)
	m.list("devices/net/keys").ok(t)

	m.write("devices/net", fields{"admin_username": "", "admin_password": "", "password": netPassword, "unlock_passphrase": netPassphrase}).ok(t)
	m.write("devices/net/lock", nil).want(t, http.StatusBadRequest).says(t, "only an Administrator of the root namespace may", "admin_username")
}

// The device is written anew while it is being unlocked: what was configured for one NetHSM must not reach the other.
func TestAConfiguredPassphraseStaysWithItsNetHSM(t *testing.T) {
	const evilURL = "https://evil.example"
	m := newMount(t)
	m.addNetHSM(netURL)
	evil := m.addNetHSM(evilURL)
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	var writing sync.WaitGroup
	var begun atomic.Bool
	m.rack.opening = func(context.Context) {
		if !begun.CompareAndSwap(false, true) {
			return
		}
		before, _ := m.devices.find("net")
		writing.Go(func() {
			m.write("devices/net", netHSMFieldsWith(fields{"urls": evilURL, "unlock_passphrase": "the passphrase of evil"})).ok(t)
		})
		await(t, "the device to be written", func() bool { now, _ := m.devices.find("net"); return now != before })
	}
	m.write("devices/net/unlock", nil)
	writing.Wait()
	if !begun.Load() || slices.Contains(evil.tried, netPassphrase) {
		t.Errorf("the other NetHSM was sent %q", evil.tried)
	}
}

// A node that does not answer is left as it is. Who locks a NetHSM because something is wrong must not believe it locked.
func TestNodesThatWereNotReachedAreNamed(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	m.write("devices/net", netHSMFieldsWith(fields{"unlock_passphrase": nil})).ok(t)
	absent := hsm.Node{URL: "https://b.example", State: hsm.StateAbsent, Err: fmt.Errorf("no answer: %w", hsm.ErrUnavailable)}
	warned := func(got reply, parts ...string) {
		t.Helper()
		got.want(t, http.StatusOK)
		for _, part := range append(parts, "https://b.example", "no answer") {
			if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], part) {
				t.Errorf("warnings %q do not say %q", got.warnings, part)
			}
		}
	}
	netHSM.nodes = []hsm.Node{{URL: netURL, State: hsm.StateLocked}, absent}
	warned(m.write("devices/net/lock", nil), "may not be locked", "devices/net/lock again")
	netHSM.nodes = []hsm.Node{{URL: netURL, State: hsm.StateOperational}, absent}
	warned(m.write("devices/net/unlock", fields{"passphrase": netPassphrase}), "may not be unlocked", "devices/net/unlock again")
}

func TestNetHSMHasNoPIN(t *testing.T) {
	m := newMount(t)
	m.addNetHSM(netURL)
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	m.write("devices/net/pin", fields{"new_pin": "735591"}).want(t, http.StatusBadRequest).says(t, "is a NetHSM", "no PIN")
	m.write("devices/net/pin", fields{"new_pin": "735591", "on_token": false}).want(t, http.StatusBadRequest).says(t, "is a NetHSM")
	m.write("devices/net/unbar", nil).want(t, http.StatusBadRequest).says(t, "is a NetHSM")
	if strings.Contains(m.stored()["devices/net"], "735591") {
		t.Error("the PIN was stored")
	}
}

// What answers in a NetHSM's place may call every request wrong, a proxy for example: that is no mistake of who unwraps.
func TestARequestThatTheNetHSMRefusesIsOnlyWhereItIsMadeAMistake(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	netHSM.AddRSA(t, "k", "k", 2048)
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	m.write("keys/prod", fields{"device": "net", "key_id": "k"}).ok(t)
	wrapped := m.write("wrap/prod", fields{"plaintext": "YQ=="}).ok(t).data["ciphertext"]
	netHSM.SetError(fmt.Errorf("decrypting (400): %w", device.ErrRequest))
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).want(t, http.StatusServiceUnavailable)
	m.list("devices/net/keys").want(t, http.StatusServiceUnavailable)
	m.write("keys/other", fields{"device": "net", "key_id": "k"}).want(t, http.StatusBadRequest)
	m.write("devices/net/unlock", fields{"passphrase": "short"}).want(t, http.StatusBadRequest).says(t, "10 to 200")
}

func TestRandomBytesComeFromANetHSM(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	m.write("random", fields{"bytes": 16, "format": "hex"}).ok(t)
	netHSM.weak = true
	m.write("random", nil).want(t, http.StatusServiceUnavailable).says(t, "does not allow this user")
}

func TestKeyIsMadeOnANetHSMByAnAdministratorOnly(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	m.write("devices/net", netHSMFieldsWith(fields{"admin_username": nil, "admin_password": nil})).ok(t)
	generate := fields{"device": "net", "generate": true, "algorithm": "rsa-2048"}
	m.write("keys/prod", generate).want(t, http.StatusBadRequest).says(t, "has no Administrator", "admin_username")
	m.read("keys/prod").want(t, http.StatusNotFound)
	m.write("devices/net", fields{"admin_username": "admin", "admin_password": netAdmin, "password": netPassword, "unlock_passphrase": netPassphrase}).ok(t)
	m.write("keys/prod", fields{"device": "net", "generate": true, "algorithm": "ecdh-p256"}).want(t, http.StatusBadRequest).
		says(t, "key agreement", "rsa-2048")
	m.write("keys/prod", generate).ok(t)
	m.awaitState("prod", "ready")
	m.write("keys/prod/rotate", fields{"generate": true, "algorithm": "ecdh-p256"}).want(t, http.StatusBadRequest).says(t, "key agreement")
	if n := netHSM.Generations(); n != 1 {
		t.Errorf("%d keys were made", n)
	}
	wrapped := m.write("wrap/prod", fields{"plaintext": "YQ=="}).ok(t).data["ciphertext"]
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).ok(t)
}

// On a NetHSM the list of mechanisms is a decision, and another use of the same RSA key an oracle for ours.
func TestKeyOfANetHSMWithAnotherMechanismIsAdoptedByWordOnly(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	netHSM.AddRSA(t, "both", "both", 2048)
	netHSM.SetTraits("both", hsm.Traits{Sensitive: true, AlsoUsableFor: []string{"RSA_Signature_PKCS1"}, ForeignUsesRefused: true})
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	adopt := fields{"device": "net", "key_id": "both"}
	m.write("keys/prod", adopt).want(t, http.StatusBadRequest).says(t, "RSA_Signature_PKCS1", "accept_weak_key")
	adopt["accept_weak_key"] = true
	m.write("keys/prod", adopt).ok(t)
	wrapped := m.write("wrap/prod", fields{"plaintext": "YQ=="}).ok(t).data["ciphertext"]
	m.write("unwrap/prod", fields{"ciphertext": wrapped}).ok(t)
}

func TestUserOfANetHSMThatMayUseNoKeyAdoptsNone(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	netHSM.AddEC(t, "k", "k", ecdh.P256())
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	netHSM.SetError(fmt.Errorf("looking up keys (403): %w", hsm.ErrForbidden))
	m.write("keys/prod", fields{"device": "net", "key_id": "k"}).want(t, http.StatusBadRequest).says(t, "403")
}

// The plugin was registered anew, and the registration names another NetHSM: the requests are right, and so was the record.
func TestNetHSMThatIsNotAllowedAnyMoreIsNobodysMistake(t *testing.T) {
	m := newMount(t)
	m.addNetHSM(netURL).AddRSA(t, "k", "k", 2048)
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	m.write("keys/prod", fields{"device": "net", "key_id": "k"}).ok(t)
	wrapped := m.write("wrap/prod", fields{"plaintext": "YQ=="}).ok(t).data["ciphertext"]

	other := mountOf(t, m.storage, device.Options{
		Openers: map[string]device.Opener{device.TypeNetHSM: m.rack.openNetHSM}, NetHSMs: []string{"https://other.example"},
	}, m.state)
	other.write("unwrap/prod", fields{"ciphertext": wrapped}).want(t, http.StatusServiceUnavailable).says(t, "-nethsm-url=https://nethsm.example:8443")
	other.list("devices/net/keys").want(t, http.StatusServiceUnavailable).says(t, "-nethsm-url")
	other.write("devices/net/lock", nil).want(t, http.StatusServiceUnavailable).says(t, "-nethsm-url")
	other.read("devices/net").want(t, http.StatusOK)
	for path, shown := range map[string]map[string]any{
		"status": other.read("devices/net/status").want(t, http.StatusOK).data,
		"health": other.read("health").want(t, http.StatusServiceUnavailable).data["devices"].(map[string]any)["net"].(map[string]any),
	} {
		if shown["usable"] != false || !strings.Contains(fmt.Sprint(shown["error"]), "-nethsm-url") {
			t.Errorf("%s = %v", path, shown)
		}
	}
	other.write("devices/net", fields{"request_timeout": "5s"}).want(t, http.StatusBadRequest).says(t, "-nethsm-url")
	other.delete("devices/net", fields{"force": true}).want(t, http.StatusNoContent)
}

func TestObjectStoreOnANetHSM(t *testing.T) {
	m := newMount(t)
	m.addNetHSM(netURL).AddRSA(t, "k", "k", 2048)
	m.write("devices/net", netHSMFieldsWith(nil)).ok(t)
	m.write("stores/objects", fields{"type": "object", "device": "net"}).want(t, http.StatusBadRequest).says(t, "object_store=true")
	m.write("devices/net", fields{"object_store": true}).ok(t)
	m.write("stores/objects", fields{"type": "object", "device": "net", "check": true}).ok(t)
	m.write("keys/prod", fields{"device": "net", "key_id": "k"}).ok(t)
	m.write("material/eu/shares", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "objects"}).ok(t)
	m.write("material/eu/shares/open", nil).ok(t)

	// The same NetHSM, written in another way, and another mount: what belongs to one is not the other's.
	other := mountOn(t, &faultyStorage{Storage: new(logical.InmemStorage)}, m.rack, m.secrets, m.state)
	m.rack.netHSMs["https://NETHSM.example:8443/api/v1"] = m.rack.netHSMs[netURL]
	other.write("devices/net", netHSMFieldsWith(fields{"urls": "https://NETHSM.example:8443/api/v1", "object_store": true})).ok(t)
	other.write("stores/objects", fields{"type": "object", "device": "net", "check": true}).want(t, http.StatusBadRequest).
		says(t, "belongs to another mount")
	other.write("stores/objects", fields{"type": "object", "device": "net", "application": "other", "check": true}).ok(t)

	// The same cluster, named by some of its nodes only.
	const second, third = "https://b.example", "https://c.example"
	m.rack.netHSMs[second], m.rack.netHSMs[third] = m.rack.netHSMs[netURL], m.rack.netHSMs[netURL]
	secrets := fields{"password": netPassword, "admin_password": netAdmin, "unlock_passphrase": netPassphrase}
	m.write("devices/net", both(fields{"urls": netURL + "," + second}, secrets)).ok(t)
	m.write("material/eu/shares", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "objects"}).ok(t)
	other.write("devices/net", both(fields{"urls": third + "," + second}, secrets)).ok(t)
	store := fields{"type": "object", "device": "net", "application": "nitroseal"}
	other.write("stores/objects", both(store, fields{"check": true})).want(t, http.StatusBadRequest).says(t, "belongs to another mount", "take_over")
	m.write("devices/net", both(fields{"urls": third + "," + netURL}, secrets)).ok(t)
	m.write("material/eu/shares", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "objects"}).ok(t)
	other.write("stores/objects", both(store, fields{"take_over": true})).ok(t)
	m.write("material/eu/shares", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "objects"}).want(t, http.StatusBadRequest).
		says(t, "belongs to another mount")
}

func TestSecretsOfANetHSMReachTheOpenerFromFiles(t *testing.T) {
	m := newMount(t)
	netHSM := m.addNetHSM(netURL)
	netHSM.AddRSA(t, "k", "k", 2048)
	for _, file := range []string{"a", "b", "c"} {
		m.secretFile(file, file+"-secret\n")
	}
	m.write("devices/net", netHSMFieldsWith(fields{
		"password": nil, "password_file": "a", "admin_password": nil, "admin_password_file": "b", "unlock_passphrase": nil,
		"unlock_passphrase_file": "c",
	})).ok(t)
	m.list("devices/net/keys").ok(t)
	for _, file := range []string{"b", "c"} {
		m.secretFile(file, file+"-another-secret\n")
		m.list("devices/net/keys").ok(t)
		newest := netHSM.opened[len(netHSM.opened)-1]
		if all := string(newest.Password) + string(newest.AdminPassword) + string(newest.UnlockPassphrase); !strings.Contains(all, file+"-another-secret") {
			t.Errorf("after file %s changed, the device was opened with %s", file, all)
		}
	}
	if stored := m.stored()["devices/net"]; strings.Contains(stored, "-secret") {
		t.Errorf("the record holds what the files hold: %s", stored)
	}
}
