//go:build cgo

package modhost

import (
	"crypto/rand"
	"encoding/hex"
	"os"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// environment is what a host needs to see the token.
func environment(k *pkcs11test.Token) []string {
	env := make([]string, len(k.Env))
	for i, name := range k.Env {
		env[i] = name + "=" + os.Getenv(name)
	}
	return env
}

// slotOf returns the slot of a token as the host sees it.
func slotOf(h *host, k *pkcs11test.Token) uint {
	h.t.Helper()
	var slots wire.Slots
	h.must(wire.OpSlots, nil, nil, &slots)
	for _, slot := range slots.Slots {
		if slot.Token.Serial == k.Serial {
			return slot.ID
		}
	}
	h.t.Fatalf("no token %q in %+v", k.Serial, slots)
	return 0
}

// openToken starts a host with a token of SoftHSM, logged in.
func openToken(t testing.TB) (*host, *pkcs11test.Token, uint) {
	t.Helper()
	k := pkcs11test.SoftHSM(t)
	h := startHost(t, environment(k)...)
	if _, err := h.hello(k.Module); err != nil {
		t.Fatal(err)
	}
	slot := slotOf(h, k)
	h.must(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte(k.PIN), nil)
	return h, k, slot
}

func randomID() string {
	id := make([]byte, 8)
	rand.Read(id)
	return hex.EncodeToString(id)
}

// must is call where an error ends the test.
func (h *host) must(op wire.Op, meta any, data []byte, answer any) []byte {
	h.t.Helper()
	got, err := h.call(op, meta, data, answer)
	if err != nil {
		h.t.Fatalf("operation %d: %v", op, err)
	}
	return got
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); <-tick.C {
		if holds() {
			return
		}
	}
	t.Fatalf("after %v: %s", patience, what)
}
