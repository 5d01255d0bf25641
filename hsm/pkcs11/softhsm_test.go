package pkcs11_test

import (
	"context"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// patience bounds whatever a test waits for.
const patience = 30 * time.Second

// setting is a token with a manager that may use it.
type setting struct {
	token   *pkcs11test.Token
	manager *pkcs11.Manager
	state   string
}

// newSetting makes a manager that may use a token.
func newSetting(t *testing.T, token *pkcs11test.Token, change ...func(*pkcs11.Options)) *setting {
	t.Helper()
	s := &setting{token: token, state: t.TempDir()}
	options := pkcs11.Options{Modules: []string{token.Module}, StateDir: s.state, Env: token.Env}
	for _, c := range change {
		c(&options)
	}
	s.manager = pkcs11.New(options)
	t.Cleanup(func() {
		if err := s.manager.Close(); err != nil {
			t.Errorf("closing the manager: %v", err)
		}
	})
	return s
}

// open opens the token by its serial.
func (s *setting) open(t *testing.T, change ...func(*pkcs11.Config)) *pkcs11.Device {
	t.Helper()
	config := pkcs11.Config{Module: s.token.Module, Serial: s.token.Serial, PIN: []byte(s.token.PIN), Owner: "mount"}
	for _, c := range change {
		c(&config)
	}
	device, err := s.manager.Open(t.Context(), config)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { _ = device.Close() })
	return device
}

func patient(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func TestSoftHSMKeepsTheContract(t *testing.T) {
	s := newSetting(t, pkcs11test.SoftHSM(t))
	hsmtest.TestDevice(t, func(t *testing.T) hsm.Device {
		t.Helper()
		device, err := s.manager.Open(t.Context(), pkcs11.Config{
			Module: s.token.Module, TokenLabel: s.token.Label, PIN: []byte(s.token.PIN), Owner: t.Name(), Parallel: 8,
		})
		if err != nil {
			t.Fatalf("Open: %v", err)
		}
		return device
	}, hsmtest.Capabilities{
		Algorithms: []hsm.Algorithm{hsm.RSA2048, hsm.ECDHP256, hsm.ECDHP384}, DuplicateLabels: true,
		Objects: true, MaxObject: 64 << 10, Random: true, Legacy: true,
		Foreign: func(t *testing.T, label string, value []byte) {
			t.Helper()
			s.token.WriteForeignObject(t, label, value)
		},
	})
}
