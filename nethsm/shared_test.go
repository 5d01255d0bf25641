package nethsm

import (
	"testing"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

func TestUnlockPassphraseIsWipedWithTheLastDevice(t *testing.T) {
	manager := NewManager(nil)
	open := func(owner string) *Device {
		t.Helper()
		device, err := manager.Open(DeviceConfig{
			Options:          Options{URLs: []string{"https://127.0.0.1:1"}},
			Operator:         Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)},
			UnlockPassphrase: []byte(nethsmtest.UnlockPassphrase),
			Owner:            owner,
		})
		if err != nil {
			t.Fatal(err)
		}
		return device
	}
	first, second := open("one mount"), open("another mount")
	kept := second.shared.passphrase
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if string(kept) != nethsmtest.UnlockPassphrase {
		t.Error("closing one device wiped what another one needs")
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	for _, b := range kept {
		if b != 0 {
			t.Fatal("the passphrase is in memory after the last device was closed")
		}
	}
	if len(manager.shared) != 0 || len(manager.devices) != 0 {
		t.Errorf("the manager still has %d clients and %d devices", len(manager.shared), len(manager.devices))
	}
}
