package device_test

import (
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

func TestNetHSMIsOpenedWithoutAskingIt(t *testing.T) {
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	opened, err := device.NetHSM(manager)(t.Context(), "mount", device.Config{
		Type: device.TypeNetHSM, URLs: []string{"https://127.0.0.1:1"}, Username: "operator",
	}, device.Secrets{Password: []byte("OperatorPassphrase")})
	if err != nil {
		t.Fatal(err)
	}
	for name, capable := range map[string]bool{
		"Clustered": is[hsm.Clustered](opened), "Randomer": is[hsm.Randomer](opened), "Unlocker": is[hsm.Unlocker](opened),
		"ObjectStore": is[hsm.ObjectStore](opened), "no PIN": !is[hsm.PINChanger](opened),
	} {
		if !capable {
			t.Errorf("the device is not %s", name)
		}
	}
}

func is[T any](device hsm.Device) bool {
	_, ok := device.(T)
	return ok
}

func TestWhatTheProviderOfNetHSMsRefusesIsAnErrorOfTheConfiguration(t *testing.T) {
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	_, err := device.NetHSM(manager)(t.Context(), "mount", device.Config{
		Type: device.TypeNetHSM, URLs: []string{"https://127.0.0.1:1"}, Username: "operator",
	}, device.Secrets{Password: []byte("OperatorPassphrase"), UnlockPassphrase: []byte("short")})
	if !errors.Is(err, device.ErrConfig) || strings.Contains(err.Error(), "short") {
		t.Errorf("a passphrase that no NetHSM takes: %v", err)
	}
}

func TestADeviceThatIsANetHSMTellsItsStatus(t *testing.T) {
	double := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	if _, _, err := double.AddKey(nethsmtest.Key{ID: "seal"}); err != nil {
		t.Fatal(err)
	}
	manager := nethsm.NewManager(nil)
	config := device.Config{
		Type: device.TypeNetHSM, URLs: double.URLs(), CACert: string(double.CA()),
		Username: nethsmtest.OperatorUser, Password: nethsmtest.OperatorPassphrase,
		AdminUsername: nethsmtest.AdminUser, AdminPassword: nethsmtest.AdminPassphrase,
	}
	registry := device.New(device.Options{Openers: map[string]device.Opener{device.TypeNetHSM: device.NetHSM(manager)}})
	handle, err := registry.Open("mount", "net", config)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(handle.Close(), manager.Close()); err != nil {
			t.Error(err)
		}
	}()
	status := handle.Status(t.Context())
	if !status.CanOpen() || len(status.Keys) != 1 || status.RoundTrip == 0 || status.Info.State != hsm.StateOperational || len(status.Nodes) != 2 {
		t.Errorf("status = %+v", status)
	}
	for i, node := range status.Nodes {
		if node.URL != double.URLs()[i] || node.State != hsm.StateOperational || node.Err != nil || node.CertificateEnds.IsZero() ||
			node.RoundTrip == 0 || node.Firmware == "" {
			t.Errorf("node %d = %+v", i, node)
		}
	}
	config.CACert, config.Insecure = "", true
	insecure, err := registry.Open("mount", "insecure", config)
	if err != nil {
		t.Fatal(err)
	}
	if notes := insecure.Status(t.Context()).Info.Notes; len(notes) != 1 || !strings.Contains(notes[0], "tls_insecure") {
		t.Errorf("the notes about one that takes any certificate are %q", notes)
	}
	if err := insecure.Close(); err != nil {
		t.Error(err)
	}
	for _, node := range double.Nodes() {
		node.SetState(nethsmtest.Locked)
	}
	handle.ForgetStatus()
	status = handle.Status(t.Context())
	if status.CanOpen() || status.Info.State != hsm.StateLocked || status.Err == nil || !strings.Contains(status.Err.Error(), "all 2 nodes are locked") {
		t.Errorf("locked: %+v", status)
	}
}
