package nethsm_test

import (
	"context"
	"crypto"
	"errors"
	"net/http"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// Who locks a NetHSM on purpose and then once more, when it is out of reach, still wants it locked.
func TestLockThatReachesNobodyLeavesAnEarlierOneInForce(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	config := deviceOn(h)
	config.UnlockPassphrase = []byte(nethsmtest.UnlockPassphrase)
	device := openDevice(t, config)
	key := generate(t, device, "seal")
	if err := device.Lock(shortly(t)); err != nil {
		t.Fatal(err)
	}
	h.Node(0).Stop()
	if err := device.Lock(shortly(t)); err == nil {
		t.Error("Lock reaches a node that is away")
	}
	if err := h.Node(0).Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the return of the locked node", func() bool {
		_, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
		return errors.Is(err, hsm.ErrLocked) || err == nil
	})
	if n := asked(h, http.MethodPost, "/unlock"); n != 0 || h.Node(0).State() != nethsmtest.Locked {
		t.Errorf("what was locked on purpose is %s after %d unlockings", h.Node(0).State(), n)
	}
}

// Lock that fails is no reason to try a wrong passphrase again.
func TestLockThatIsRefusedDoesNotRetryAWrongPassphrase(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	key := generate(t, openDevice(t, deviceOn(h)), "seal")
	config := deviceOn(h)
	config.UnlockPassphrase = []byte("not the passphrase")
	weak := config.Operator
	config.Administrator, config.Objects = &weak, false
	device := openDevice(t, config)
	h.Node(0).SetState(nethsmtest.Locked)
	for range 3 {
		for range 2 { // both nodes are asked in turn
			if _, err := hsm.FindKey(shortly(t), device, hsm.KeyQuery{ID: key.Ref().ID}); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "the try to unlock it", func() bool { return asked(h, http.MethodPost, "/unlock") > 0 })
		h.Node(0).SetState(nethsmtest.Failed) // so that no node is found locked
		if err := device.Lock(shortly(t)); !errors.Is(err, hsm.ErrForbidden) {
			t.Errorf("Lock = %v, want ErrForbidden", err)
		}
		h.Node(0).SetState(nethsmtest.Locked)
		select {
		case <-time.After(1500 * time.Millisecond):
		case <-t.Context().Done():
		}
	}
	if n := asked(h, http.MethodPost, "/unlock"); n != 1 {
		t.Errorf("a wrong passphrase was tried %d times", n)
	}
}

// A node that is just being unlocked by itself is locked when Lock returns, and stays so.
func TestLockOutlivesAnUnlockingOnItsWay(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	config := deviceOn(h)
	config.UnlockPassphrase = []byte(nethsmtest.UnlockPassphrase)
	device := openDevice(t, config)
	key := generate(t, device, "seal")
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/unlock", Latency: 700 * time.Millisecond})
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	impatient, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := key.DecryptOAEP(impatient, crypto.SHA256, encrypted(t, key)); err == nil {
		t.Fatal("it is not locked")
	}
	if err := device.Lock(shortly(t)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-time.After(1500 * time.Millisecond): // more than the unlocking takes
	case <-t.Context().Done():
	}
	if state := h.Node(0).State(); state != nethsmtest.Locked {
		t.Errorf("after Lock the node is %s", state)
	}
}

// Somebody else unlocks a node while we do.
func TestNodeThatSomebodyElseUnlockedIsOpen(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device := openDevice(t, deviceOn(h))
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodGet, Path: "/health/state", Status: http.StatusOK, Body: []byte(`{"state":"Locked"}`), Times: 1})
	if err := device.Unlock(shortly(t), []byte(nethsmtest.UnlockPassphrase)); err != nil {
		t.Errorf("Unlock of a node that has just been opened = %v", err)
	}
}

// One node is Failed when a person unlocks the others: those are unlocked by themselves again after their next restart.
func TestUnlockOfSomeNodesResumesUnlockingByItself(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	config := deviceOn(h)
	config.UnlockPassphrase = []byte(nethsmtest.UnlockPassphrase)
	device := openDevice(t, config)
	key := generate(t, device, "seal")
	if err := device.Lock(shortly(t)); err != nil {
		t.Fatal(err)
	}
	h.Node(1).SetState(nethsmtest.Failed)
	if err := device.Unlock(shortly(t), nil); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Unlock with a failed node = %v, want ErrUnavailable", err)
	}
	decrypts(t, key)
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "unlocking it by itself", func() bool {
		_, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
		return err == nil
	})
}
