package backend

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

func TestBrokenStorageIsNobodysMistakeAndLosesNothing(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.write("stores/files", fields{"type": "file", "dir": "x"}).ok(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	before := m.stored()

	m.storage.fail(errStorage, errStorage)
	for _, path := range []string{"devices/prod-hsm", "stores/files", "material/c/i"} {
		if got := m.read(path).says(t, "on fire"); got.status < http.StatusInternalServerError {
			t.Errorf("read %s: status %d with a broken storage", path, got.status)
		}
	}
	for path, data := range map[string]fields{
		"config":                     {"default_key": "prod"},
		"keys/prod":                  {"deletion_allowed": true},
		"keys/prod/rotate":           {"generate": true},
		"material/c/i":               {"fields": fields{"x": "Yg=="}, "key": "prod", "store": "files"},
		"devices/prod-hsm/pin":       {"new_pin": "111111"},
		"material/c/i/open":          nil,
		"devices/prod-hsm/recipient": nil,
	} {
		if got := m.write(path, data); got.status < http.StatusBadRequest {
			t.Errorf("write %s: status %d with a broken storage", path, got.status)
		}
	}
	m.storage.fail(nil, nil)
	for key, value := range before {
		if now := m.stored()[key]; now != value {
			t.Errorf("%s changed from %s to %s", key, value, now)
		}
	}
	m.write("material/c/i/open", nil).ok(t)
}

func TestManyRequestsAtOnce(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.write("stores/own", fields{"type": "vault"}).ok(t)
	m.write("stores/objects", fields{"type": "object", "device": "prod-hsm"}).ok(t)
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for j := range 5 {
				value := fmt.Sprintf("%08d", i*10+j)
				wrapped := m.write("wrap/prod", fields{"plaintext": value}).ok(t)
				opened := m.write("unwrap/prod", fields{"ciphertext": wrapped.data["ciphertext"]})
				switch {
				case opened.status == http.StatusServiceUnavailable: // its device was closed meanwhile, see below
				case opened.status != http.StatusOK || opened.text("plaintext") != value:
					t.Errorf("unwrap = %d %s %v, want %s", opened.status, opened.message, opened.data, value)
				}
				m.write(fmt.Sprintf("material/c/i%d", i), fields{"fields": fields{"x": value}, "key": "prod", "store": "own"}).ok(t)
				m.read("health")
				m.write("devices/prod-hsm", fields{"parallel": 1 + j}).ok(t) // closes the device, and opens it anew
				m.read("keys/prod").ok(t)
			}
		})
	}
	group.Wait()
	if token.wrong != 0 {
		t.Errorf("%d wrong PINs were sent", token.wrong)
	}
}

// Of two requests that make the same key at one time, one makes it and the other finds it.
func TestOneOfManyMakesTheKey(t *testing.T) {
	m := newMount(t)
	token := m.addDevice("card")
	var group sync.WaitGroup
	for range 6 {
		group.Go(func() {
			m.write("keys/prod", fields{"device": "card", "generate": true, "algorithm": "ecdh-p256"}).ok(t)
		})
	}
	group.Wait()
	m.awaitState("prod", "ready")
	m.jobs.wait()
	if made := token.Generations(); made != 1 {
		t.Errorf("%d HSM keys were made", made)
	}
	if entries, _ := framework.ListWAL(context.Background(), m.storage); len(entries) != 0 {
		t.Errorf("%d journal entries are left", len(entries))
	}
}

func TestInvalidationForgetsWhatWasCached(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.write("stores/files", fields{"type": "file", "dir": "one", "check": true}).ok(t)
	m.write("material/c/i", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	for _, key := range []string{"keys/prod", "stores/files"} {
		if err := m.storage.Delete(context.Background(), key); err != nil {
			t.Fatal(err)
		}
		m.InvalidateKey(context.Background(), key)
	}
	m.read("keys/prod").want(t, http.StatusNotFound)
	m.write("material/c/i/open", nil).want(t, http.StatusBadRequest).says(t, "not configured")
	m.InvalidateKey(context.Background(), "something/else")
}

func TestRollbackOfAnUnknownEntryKeepsIt(t *testing.T) {
	m := newMount(t)
	if _, err := framework.PutWAL(context.Background(), m.storage, "of a newer version", nil); err != nil {
		t.Fatal(err)
	}
	if response := m.rollBack(t); response == nil || !response.IsError() {
		t.Errorf("rollback = %v, want an error", response)
	}
	if entries, _ := framework.ListWAL(context.Background(), m.storage); len(entries) != 1 {
		t.Errorf("%d entries are left, want the one that nobody understands", len(entries))
	}
}

func TestCleaningUpTwiceIsHarmless(t *testing.T) {
	m := newMount(t)
	m.addKey("prod")
	m.Cleanup(context.Background())
	m.Cleanup(context.Background())
	if _, err := m.HandleRequest(context.Background(), m.carry(&logical.Request{Operation: logical.ReadOperation, Path: "keys/prod"})); err != nil {
		m.t.Logf("a request after the end: %v", err) // any error will do; it must not hang or panic
	}
}
