package pkcs11_test

import (
	"bytes"
	"os"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
)

// TestATokenOfYourOwn runs the conformance suite on a real token. The suite makes and deletes keys and objects of its own:
// use a token that may lose everything. The PIN comes from a file; a wrong one is sent once.
//
//	NITROSEAL_MODULE=/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so NITROSEAL_SERIAL=DENK… NITROSEAL_PIN_FILE=… \
//	  go test -count=1 -run TestATokenOfYourOwn -v -timeout 60m ./hsm/pkcs11
func TestATokenOfYourOwn(t *testing.T) {
	module, serial, file := os.Getenv("NITROSEAL_MODULE"), os.Getenv("NITROSEAL_SERIAL"), os.Getenv("NITROSEAL_PIN_FILE")
	if module == "" || serial == "" || file == "" {
		t.Skip("it runs where NITROSEAL_MODULE, NITROSEAL_SERIAL and NITROSEAL_PIN_FILE name a token that may lose everything")
	}
	pin, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	manager := pkcs11.New(pkcs11.Options{Modules: []string{module}, StateDir: t.TempDir(), Env: []string{"SOFTHSM2_CONF"}})
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	hsmtest.TestDevice(t, func(t *testing.T) hsm.Device {
		t.Helper()
		device, err := manager.Open(t.Context(), pkcs11.Config{
			Module: module, Serial: serial, PIN: bytes.TrimRight(pin, "\r\n"), Owner: t.Name(),
		})
		if err != nil {
			t.Fatal(err)
		}
		return device
	}, hsmtest.Capabilities{
		Algorithms: []hsm.Algorithm{hsm.RSA2048, hsm.ECDHP256}, DuplicateLabels: true, Objects: true, Random: true,
	})
}
