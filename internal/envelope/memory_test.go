package envelope

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"errors"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
)

// The same with a device that keeps the whole contract of package hsm, as providers do.
func TestADeviceOpensWithOneOperation(t *testing.T) {
	device := hsmtest.NewMemory()
	keys := []hsm.Key{
		device.AddRSA(t, "rsa", "01", 2048),
		device.AddEC(t, "p256", "02", ecdh.P256()),
		device.AddEC(t, "p384", "03", ecdh.P384()),
	}
	var to []Recipient
	for _, key := range keys {
		to = append(to, named(t, key.Public()))
	}
	raw, err := Seal(wrapContext(), to, testAuth, []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	if n := device.Operations(); n != 0 {
		t.Errorf("sealing took %d HSM operations", n)
	}
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	for i, key := range keys {
		payload, err := e.Open(t.Context(), wrapContext(), to[i], key, testAuth)
		if err != nil || string(payload) != "payload" {
			t.Errorf("opening with %s gave %q, %v", key.Ref().Label, payload, err)
		}
		if n := device.Operations(); n != i+1 {
			t.Errorf("%d HSM operations after %d openings", n, i+1)
		}
	}

	device.SetError(hsm.ErrUnavailable)
	if _, err := e.Open(t.Context(), wrapContext(), to[0], keys[0], testAuth); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("an HSM that is away gave %v", err)
	}
	device.SetError(nil)

	device.Delay(time.Hour)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := e.Open(ctx, wrapContext(), to[1], keys[1], testAuth); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an HSM that hangs gave %v", err)
	}
}

func TestATokenThatDoesSHA1OnlyOpensWhatIsRecordedSo(t *testing.T) {
	device := hsmtest.NewMemory()
	device.SetHashes(crypto.SHA1)
	key := device.AddRSA(t, "rsa", "01", 2048)
	recipient := named(t, key.Public())
	recipient.Algorithm = RSAOAEP
	raw, err := Seal(wrapContext(), []Recipient{recipient}, testAuth, []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if payload, err := e.Open(t.Context(), wrapContext(), recipient, key, testAuth); err != nil || string(payload) != "payload" {
		t.Errorf("opening gave %q, %v", payload, err)
	}
}
