package device_test

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/internal/device"
)

func TestModuleThatTheProviderRefusesIsAnErrorOfTheConfiguration(t *testing.T) {
	manager := pkcs11.New(pkcs11.Options{Modules: []string{"/usr/lib/allowed.so"}})
	open := device.PKCS11(manager)
	for name, module := range map[string]string{"not allowed": filepath.Join(t.TempDir(), "x.so"), "not there": "/usr/lib/allowed.so"} {
		_, err := open(t.Context(), "mount", device.Config{Type: device.TypePKCS11, Module: module, Serial: "S"}, device.Secrets{PIN: []byte("648219")})
		if !errors.Is(err, device.ErrConfig) || !strings.Contains(err.Error(), module) {
			t.Errorf("%s: %v, want a device.ErrConfig that names the module", name, err)
		}
	}
	if err := manager.Close(); err != nil {
		t.Fatal(err)
	}
}
